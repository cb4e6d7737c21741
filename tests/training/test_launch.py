"""Launch configurations as their readers parse them, the commands built from them, and processes really started."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from moka.cli.main import main
from moka.config import MokaTrainingArguments
from moka.errors import MokaError
from moka.training import load_config
from moka.training.arguments import divide, training_arguments
from moka.training.launch import alone_by_mistake, launch_of, launcher_names

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
SETTINGS = sorted((ROOT / "configs/deepspeed").glob("*.json"))
QUICKSTART = "configs/quickstart/audio_visual_text.yaml"
GPUS = 8


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """The repository's root, in no launcher."""
    monkeypatch.chdir(ROOT)
    for name in [
        name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("RANK", "WORLD_SIZE")
    ]:
        monkeypatch.delenv(name)


@pytest.fixture
def with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)


def launcher_reads(path, *options):
    """Return what `accelerate launch --config_file PATH OPTIONS` starts, after accelerate has read both; nothing is started."""
    from accelerate.commands.launch import _validate_launch_command

    parsed = launch_command_parser().parse_args(["--config_file", str(path), *options, "-m", "moka", "train", "x.yaml"])
    parsed, defaults, _ = _validate_launch_command(parsed)
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return parsed


EXPECTED = {  # name: (how accelerate starts it, processes, machines)
    "single_gpu": (None, 1, 1),
    "ddp": ("multi_gpu", 8, 1),
    "zero2": ("use_deepspeed", 8, 1),
    "zero2_offload": ("use_deepspeed", 8, 1),
    "zero3": ("use_deepspeed", 8, 1),
    "zero3_offload": ("use_deepspeed", 8, 1),
    "fsdp2": ("use_fsdp", 8, 1),
    "multi_node": ("use_deepspeed", 16, 2),
    "cpu": ("multi_gpu", 2, 1),
}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration_as_meant(path):
    way, processes, machines = EXPECTED[path.stem]
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    parsed = launcher_reads(path)
    ways = [name for name in ("multi_gpu", "use_deepspeed", "use_fsdp", "tpu", "cpu") if getattr(parsed, name)]
    assert ways == ([way] if way else [])
    assert (int(parsed.num_processes), int(parsed.num_machines)) == (processes, machines)
    assert parsed.use_cpu is (path.stem == "cpu")
    assert parsed.mixed_precision == "no"  # the recipe's bf16 decides


@pytest.mark.parametrize("path", [p for p in LAUNCHERS if "DEEPSPEED" in p.read_text()], ids=lambda path: path.stem)
def test_accelerates_deepspeed_plugin_takes_the_launchers_settings(path, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    _, environment = prepare_deepspeed_cmd_env(launcher_reads(path, "--main_process_ip", "10.0.0.1"))
    for name in [name for name in environment if name.startswith("ACCELERATE_")]:
        monkeypatch.setenv(name, environment[name])
    plugin = DeepSpeedPlugin()  # refuses settings that are given twice
    stage = 3 if "zero3" in path.stem else 2
    assert (plugin.zero_stage, plugin.zero3_init_flag) == (stage, stage == 3)
    assert plugin.offload_optimizer_device == ("cpu" if "offload" in path.stem else "none")
    assert plugin.offload_param_device == ("cpu" if path.stem == "zero3_offload" else "none")
    unset_hf_deepspeed_config()


def test_fsdp_configuration_makes_the_plugin_that_can_save_an_adapter(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    environment = prepare_multi_gpu_env(launcher_reads(ROOT / "configs/accelerate/fsdp2.yaml"))
    for name in [name for name in environment if name.startswith("FSDP_")]:
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert (plugin.activation_checkpointing, plugin.cpu_offload) == (False, None) or not plugin.activation_checkpointing


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_deepspeed_settings_are_filled_from_the_section(path, tmp_path):
    """As ``training.deepspeed: FILE``: read by us, filled by transformers, accepted by DeepSpeed's own classes."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    key = f"training.deepspeed={path.relative_to(ROOT)}"
    section = load_config(QUICKSTART, [key, "training.per_device_train_batch_size=4"]).training
    arguments = MokaTrainingArguments(str(tmp_path), **section, gradient_accumulation_steps=4, use_cpu=True)
    filled = arguments.hf_deepspeed_config
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"hidden_size": 64})
    filled.trainer_config_finalize(arguments, model, num_training_steps=10)
    assert "auto" not in json.dumps(filled.config)
    ours = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    assert {name: filled.config[name] for name in ours} == ours
    assert filled.config["gradient_clipping"] == arguments.max_grad_norm
    config = {key: value for key, value in filled.config.items() if key != "steps_per_print"}
    zero = DeepSpeedConfig(config).zero_config
    assert int(zero.stage) == int(path.stem[4])
    assert (zero.offload_optimizer is not None) is ("offload" in path.stem)
    assert (zero.offload_param is not None) is (path.stem == "zero3_offload")
    unset_hf_deepspeed_config()


def test_every_launch_file_is_in_the_documentation():
    page = (ROOT / "docs/launching.md").read_text("utf-8")
    files = [*LAUNCHERS, *SETTINGS, *(ROOT / "configs/launch").iterdir()]
    assert len(files) >= 16
    for path in files:
        assert path.name in page or f"`{path.stem}`" in page, path


RUNNABLE = [
    p
    for p in sorted((ROOT / "configs").glob("**/*.yaml"))
    if p.relative_to(ROOT / "configs").parts[0] not in ("shared", "accelerate")
]


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_fixes_its_global_batch(path):
    config = load_config(path)
    for stage in config.stages:
        section = config.alignment if stage == 1 else config.training
        total, largest = section["global_batch_size"], section["per_device_train_batch_size"]
        for processes in (1, 2, 4, 8):
            size, steps = divide(total, largest, processes)
            assert size * steps * processes == total


def printed(capsys, *words):
    assert main(["train", *words, "--dry-run"]) == 0
    return shlex.split(capsys.readouterr().out)


def test_command_is_printed_and_is_what_accelerate_reads(capsys, with_gpus):
    words = printed(
        capsys, QUICKSTART, "training.max_steps=3", "output.dir=a b", "--tiny", "--launcher", "zero3",
        "--num-processes", "4", "--launcher-args=--gpu_ids 0,1,2,3", "--overwrite",
    )  # fmt: skip
    assert Path(words[0]).name == "accelerate"
    parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.config_file == "configs/accelerate/zero3.yaml"
    assert (parsed.num_processes, parsed.gpu_ids) == (4, "0,1,2,3")
    assert (parsed.module, parsed.training_script) == (True, "moka")
    assert parsed.training_script_args == [
        *("train", QUICKSTART, "training.max_steps=3", "output.dir=a b", "--overwrite", "--tiny"),
    ]


def test_named_launcher_works_from_any_folder(capsys, tmp_path, monkeypatch, with_gpus):
    monkeypatch.chdir(tmp_path)
    words = printed(capsys, str(ROOT / QUICKSTART), "--launcher", "zero2")
    parsed = launch_command_parser().parse_args(words[2:])
    assert Path(parsed.config_file).samefile(ROOT / "configs/accelerate/zero2.yaml")
    assert Path(parsed.deepspeed_config_file).samefile(ROOT / "configs/deepspeed/zero2.json")


def test_names_are_the_files(with_gpus):
    assert launcher_names() == sorted(EXPECTED) == [path.stem for path in LAUNCHERS]
    for name in launcher_names():
        processes = EXPECTED[name][1]
        address = ["--main_process_ip", "10.0.0.1"] if name == "multi_node" else []
        assert launch_of(name, ["train"], extra=address).processes == processes


def test_cpu_launcher_hides_the_gpus(monkeypatch, with_gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(launch_of("cpu", ["train"])).startswith("CUDA_VISIBLE_DEVICES='' ")
    assert "CUDA" not in str(launch_of("ddp", ["train"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["zerro2"], ["zerro2", "Did you mean 'zero2'?"]),
        (["configs/none.yaml"], ["configs/none.yaml", "a file"]),
        (["ddp", "--num-processes", "0"], ["--num-processes: 0 is too small", "at least 1"]),
        (["single_gpu", "--num-processes", "2"], ["one process", "ddp"]),
        (["multi_node"], ["--main_process_ip"]),
        (["ddp", "--launcher-args=--gpus 3"], ["--launcher-args", "accelerate refuses them", "--gpus"]),
        (["multi_node", "--num-processes", "3"], ["3 processes", "2 machines"]),
        (["cpu", "--num-processes", "3"], ["global_batch_size: 64", "3 processes", "1, 2, 4 or 8 processes"]),
        (["RANK=0", "cpu"], ["RANK"]),
        (["", "--num-processes", "2"], ["--num-processes", "--launcher"]),
        (["", "--launcher-args=--debug"], ["--launcher-args", "--launcher"]),
        ([""], ["--dry-run", "--launcher"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_launched_is_one_line(capsys, monkeypatch, with_gpus, options, words):
    if options[0] == "RANK=0":  # inside a launcher
        monkeypatch.setenv("RANK", "0")
        options = options[1:]
    options = ["--launcher", *options] if options[0] else options[1:]
    assert main(["train", QUICKSTART, "--dry-run", *options]) == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("gpus", "lack"),
    [
        (0, "needs a GPU for each process, and this machine has none. Take --launcher cpu."),
        (3, "8 processes on this machine need as many GPUs, and it has 3. Give --num-processes 3."),
    ],
)
def test_gpus_that_are_not_here_are_noted_in_a_dry_run_and_refused_in_a_run(capsys, monkeypatch, gpus, lack):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in set(launcher_names()) - {"single_gpu", "cpu", "multi_node"}:
        command = ["train", QUICKSTART, "--launcher", name, "--num-processes", "8"]
        assert main([*command, "--dry-run"]) == 0
        said = capsys.readouterr()
        assert said.err == f"note: this machine could not run it: --launcher {name}{':' if gpus else ''} {lack}\n"
        parsed = launch_command_parser().parse_args(shlex.split(said.out)[2:])
        assert (Path(parsed.config_file).stem, parsed.num_processes) == (name, 8)
        assert main(command) == 2
        said = capsys.readouterr()
        assert lack in said.err
        assert said.out == ""


def test_configuration_that_accelerate_cannot_use_or_would_start_only_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    for text in ("distributed_type: [", "- a list", "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: NO\n"):
        path.write_text(text)
        with pytest.raises(MokaError, match="accelerate cannot use"):
            launch_of(str(path), ["train"])
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    with pytest.raises(MokaError, match="accelerate starts one process"):
        launch_of(str(path), ["train"])
    path.write_text("distributed_type: MULTI_GPU\nnum_procs: 2\n")
    with pytest.raises(MokaError, match="num_procs"):
        launch_of(str(path), ["train"])


def test_missing_deepspeed_is_reported_wherever_it_is_asked_for(capsys, monkeypatch, tmp_path, with_gpus):
    with pytest.raises(MokaError, match=r"training.deepspeed needs a launcher, for one process too: torchrun"):
        training_arguments({"deepspeed": "configs/deepspeed/zero2.json"}, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    remedy = "pip install 'moka-peft[deepspeed]'"
    command, lack = (
        ["train", QUICKSTART, "--launcher", "zero2"],
        f"--launcher zero2 needs DeepSpeed, which is not installed: {remedy}",
    )
    assert main(command) == 2
    assert lack in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == f"note: this machine could not run it: {lack}.\n"
    assert "zero2.yaml" in said.out
    with pytest.raises(
        MokaError, match=re.escape(f"training.deepspeed needs DeepSpeed, which is not installed: {remedy}")
    ):
        training_arguments({"deepspeed": "configs/deepspeed/zero2.json"}, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(MokaError, match=r"The launcher's configuration needs DeepSpeed"):
        training_arguments({}, tmp_path / "run")
    assert main(["train", QUICKSTART, "--launcher", "cpu", "--dry-run"]) == 0


@pytest.mark.parametrize(("processes", "noted"), [(1, False), (2, True)])
def test_single_process_instead_of_several_is_noted(monkeypatch, processes, noted):
    """The environment that accelerate's launcher of one process makes, where ``--cpu`` hides the number asked for."""
    options = ["--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    parsed = launch_command_parser().parse_args([*options, "--dynamo_backend", "no", "-m", "moka"])
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    _, environment = prepare_simple_launcher_cmd_env(parsed)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (alone_by_mistake() is not None) is noted


def test_reason_of_an_error_ends_what_the_launcher_prints(capsys, monkeypatch, tmp_path):
    """torch's launcher, which accelerate uses, reads the file that it names to its processes."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert main(["train", "none.yaml"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    *_, line, border = str(ChildFailedError("moka", {0: failure})).strip().splitlines()
    assert "error: No configuration file none.yaml" in line
    assert set(border) == {"="}


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun_two_nodes.sh"])
def test_shell_scripts_parse(name):
    subprocess.run(["bash", "-n", ROOT / "configs/launch" / name], check=True)


def command_of(*words):
    return [str(BIN / "moka"), "train", *map(str, words)]


def environment(**changes):
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **own, **{key: str(value) for key, value in changes.items()}}


@pytest.mark.slow
def test_quickstart_trains_in_two_processes_on_the_cpu(tmp_path):
    done = subprocess.run(
        command_of(QUICKSTART, "--tiny", "--launcher", "cpu", f"output.dir={tmp_path / 'run'}", "training.max_steps=2"),
        capture_output=True, text=True, check=False, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accelerate launch --config_file configs/accelerate/cpu.yaml -m moka train" in done.stdout
    summary = json.loads((tmp_path / "run-tiny/summary.json").read_text())
    assert summary["processes"] == 2
    for engine in summary["engines"].values():
        assert (engine["processes"], engine["distributed_type"]) == (2, "MULTI_CPU")
        assert engine["wrapper"] == "DistributedDataParallel"
    assert "stage 1: 64 samples a step (32 x 2 processes x 1 accumulated)" in done.stdout
    assert "stage 2: 16 samples a step (8 x 2 processes x 1 accumulated)" in done.stdout


@pytest.mark.slow
def test_three_processes_and_a_batch_of_four_end_with_one_line(tiny_config, tmp_path, write_yaml):
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", stages=[2], training__global_batch_size=4))
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "3", "-m", "moka", "train", str(config)]
    done = subprocess.run(
        launcher, capture_output=True, text=True, check=False, timeout=300, env=environment(PYTHONPATH=ROOT)
    )
    assert done.returncode != 0
    message = "training.global_batch_size: 4 cannot be divided over 3 processes"
    assert sum(f"moka: error: {message}" in line for line in done.stderr.splitlines()) == 1
    # And once more where the launcher says what it has seen: at the end.
    assert any(f"error: {message}" in line for line in done.stderr.strip().splitlines()[-3:])
    assert not (tmp_path / "run").exists()


SRUN = """#!/usr/bin/env bash
# Is in for Slurm's: the same command for two nodes, here on one machine, and USR1 passed on to both.
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while :; do wait "$task"; ended=$?; kill -0 "$task" 2>/dev/null || break; done
    (( ended )) && code=$ended
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$*" >> "$REQUEUED"; fi
"""


@pytest.mark.slow
def test_slurm_script_saves_at_the_signal_is_requeued_and_resumes(tiny_config, tmp_path, write_yaml):
    """Two launchers, as on two nodes, of one process each; Slurm's own programs are replaced."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    nodes = {
        "distributed_type": "MULTI_GPU",
        "use_cpu": True,
        "num_machines": 2,
        "num_processes": 2,
        "same_network": True,
    }
    run = tmp_path / "run"
    rare = {"training__max_steps": 150, "training__save_strategy": "no", "training__eval_strategy": "no"}
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "elsewhere", stages=[2], **rare))
    slurm = {"SLURM_NNODES": 2, "SLURM_GPUS_ON_NODE": 1, "SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NODELIST": "node[1-2]"}
    own = environment(**slurm, LAUNCHER=write_yaml(tmp_path / "nodes.yaml", nodes), REQUEUED=tmp_path / "requeued")
    own["PATH"] = f"{programs}{os.pathsep}{own['PATH']}"
    command = ["bash", str(ROOT / "configs/launch/slurm.sbatch"), str(run), str(config)]
    with (tmp_path / "log").open("w+") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=own)
        try:
            deadline = time.monotonic() + 240
            while not ((run / "metrics.jsonl").exists() and '"loss"' in (run / "metrics.jsonl").read_text()):
                assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            job.send_signal(signal.SIGUSR1)
            code = job.wait(timeout=180)
        finally:
            job.kill()
    said = (tmp_path / "log").read_text()
    assert code == 75, said[-3000:]
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert "stage 2: MULTI_CPU, 2 processes, DistributedDataParallel" in said
    (saved,) = (run / "checkpoints/stage2").glob("checkpoint-*")
    assert not (run / "summary.json").exists()

    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=own)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from {saved}" in again.stdout
    assert json.loads((run / "summary.json").read_text())["processes"] == 2
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1
