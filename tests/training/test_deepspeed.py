"""Two real processes on gloo under DeepSpeed: every ZeRO stage trains, saves and resumes as one process does."""

import json
import shutil

import pytest
import torch

from moka.errors import MokaError
from moka.training import config_from_dict, run_training
from moka.training.arguments import training_arguments

STEPS = 20
MODES = ("zero1", "zero2", "zero3", "zero3-offload")
# More often than `as_one` says: runs are resumed from one checkpoint, and then from the next.
OFTEN = {"training__save_steps": 5, "training__eval_strategy": "no"}


def zero_stage(mode):
    return int(mode[len("zero")])


def assert_ran_under(folder, mode, stages=("1", "2"), processes=2):
    offload = ["optimizer", "parameters"] if "offload" in mode else []
    zero = {"zero_stage": zero_stage(mode), "offload": offload}
    engine = {"processes": processes, "distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", **zero}
    assert json.loads((folder / "summary.json").read_text())["engines"] == dict.fromkeys(stages, engine)


def test_file_that_contradicts_the_section_is_refused(tmp_path, monkeypatch, write_zero):
    monkeypatch.setenv("RANK", "0")
    path = write_zero(tmp_path, "zero2", train_micro_batch_size_per_gpu=16)
    with pytest.raises(MokaError, match=r'train_micro_batch_size_per_gpu=16 vs .*=4.* Write "auto" in the file'):
        training_arguments({"deepspeed": str(path), "per_device_train_batch_size": 4}, tmp_path)


def test_environment_that_would_turn_deepspeed_off_is_refused(tmp_path, monkeypatch, write_zero):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(MokaError, match="ACCELERATE_USE_CPU in the environment would turn it off"):
        training_arguments({"deepspeed": str(write_zero(tmp_path, "zero2"))}, tmp_path)


def test_one_process_without_deepspeed_says_so(trained_run):
    engine = {"processes": 1, "distributed_type": "NO", "zero_stage": None, "offload": None}
    engines = json.loads((trained_run / "summary.json").read_text())["engines"]
    assert {stage: {key: said[key] for key in engine} for stage, said in engines.items()} == {"1": engine, "2": engine}
    assert engines["1"]["wrapper"] == "EmbeddingAlignment"
    assert engines["2"]["wrapper"].startswith("PeftModel")


@pytest.fixture(scope="module")
def one(tiny_config, tmp_path_factory, as_one):
    """The run of one process on full batches."""
    return run_training(config_from_dict(tiny_config(tmp_path_factory.mktemp("one") / "run", **{**as_one, **OFTEN})))


@pytest.fixture(scope="module", params=MODES)
def zero(request, tiny_config, tmp_path_factory, launch, write_yaml, write_zero, as_one, halves):
    """The same run in two processes: (mode, its folder, what it printed, its configuration file)."""
    mode, folder = request.param, tmp_path_factory.mktemp(request.param)
    changes = {**as_one, **halves, **OFTEN, "training__deepspeed": str(write_zero(folder, mode))}
    if mode == "zero1":
        # Asked for on the command line, without a file.
        launcher = "accelerate zero1"
        del changes["training__deepspeed"]
    else:
        launcher = "torchrun"
    config = write_yaml(folder / "run.yaml", tiny_config(folder / "run", **changes))
    done = launch(launcher, "train", config, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return mode, folder / "run", done.stdout, config


@pytest.mark.slow
def test_trains_as_one_process(zero, one, losses):
    mode, folder, said, _ = zero
    assert_ran_under(folder, mode)
    assert f"stage 2: DEEPSPEED ZeRO-{zero_stage(mode)}" in said
    assert "8 samples a step (2 x 2 processes x 2 accumulated)" in said
    ours, theirs = losses(folder), losses(one)
    assert len(ours) == STEPS + 3
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_saves_what_one_process_saves(zero, one, same_weights):
    """Connector and adapter with projectors and encoders: nothing empty, every B moved, all as in one process."""
    _, folder, _, _ = zero
    same_weights(folder, one)
    summary, reference = (json.loads((run / "summary.json").read_text()) for run in (folder, one))
    counts = [key for key in reference if key.endswith("parameters") or key.startswith("trainable")]
    assert len(counts) == 4
    assert {key: summary[key] for key in counts} == {key: reference[key] for key in counts}
    assert (folder / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


@pytest.mark.slow
def test_checkpoint_has_no_backbone(zero):
    mode, folder, _, _ = zero
    parts = sorted((folder / f"checkpoints/stage2/checkpoint-{STEPS}").glob("global_step*/*model_states.pt"))
    assert len(parts) == (2 if "zero3" in mode else 1)  # each process its part of a partitioned model
    for part in parts:
        module = torch.load(part, weights_only=False)["module"]
        assert not any("embed_tokens" in key or "base_layer" in key for key in module)
        assert any("moka_A" in key for key in module)


def killed_at(step, folder, copy):
    """A copy of a finished run as it is when it is killed in stage 2 with its newest checkpoint at ``step``."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "adapter")
    (copy / "summary.json").unlink()
    for checkpoint in (copy / "checkpoints/stage2").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return copy


def resume(launch, launcher, config, folder, step):
    done = launch(launcher, "train", config, f"output.dir={folder}", "--resume", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {folder / f'checkpoints/stage2/checkpoint-{step}'}" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted(zero, tmp_path, launch, losses, same_weights):
    mode, folder, _, config = zero
    if mode not in ("zero2", "zero3"):
        pytest.skip("its checkpoints are like those of another mode")
    resumed = killed_at(10, folder, tmp_path / "run")
    resume(launch, "torchrun", config, resumed, 10)
    assert_ran_under(resumed, mode, stages=("2",))
    assert losses(resumed) == pytest.approx(losses(folder), abs=1e-5)
    same_weights(resumed, folder)


@pytest.mark.slow
def test_resumes_with_other_numbers_of_processes(zero, tmp_path, launch, losses, same_weights):
    """Two processes, then one, then two again, through DeepSpeed's universal checkpoints."""
    mode, folder, _, config = zero
    if mode not in ("zero2", "zero3"):
        pytest.skip("its checkpoints are like those of another mode")
    single = killed_at(5, folder, tmp_path / "one")
    said = resume(launch, "torchrun one", config, single, 5)
    assert "was written with world size 2; it is converted for 1" in said
    assert_ran_under(single, mode, stages=("2",), processes=1)
    assert losses(single) == pytest.approx(losses(folder), abs=1e-4)
    same_weights(single, folder)
    together = killed_at(10, single, tmp_path / "two")
    said = resume(launch, "torchrun", config, together, 10)
    assert "was written with world size 1; it is converted for 2" in said
    assert_ran_under(together, mode, stages=("2",))
    assert losses(together) == pytest.approx(losses(folder), abs=1e-4)
    same_weights(together, folder)
    assert not list(together.glob("checkpoints/*/.universal*"))


@pytest.mark.slow
def test_mixed_batches_never_hang(mixed_run, ones, tiny_config, tmp_path, launch, write_yaml, write_zero, losses):
    """ZeRO-3 waits for every process at every parameter; also in evaluation, and with recomputation in backward."""
    changes = {
        **mixed_run,
        "stages": [2],
        "training__gradient_checkpointing": True,
        "training__gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    single = run_training(config_from_dict(tiny_config(tmp_path / "one", **changes)))
    changes |= {**ones, "training__deepspeed": str(write_zero(tmp_path, "zero3"))}
    config = write_yaml(tmp_path / "two.yaml", tiny_config(tmp_path / "two", **changes))
    done = launch("torchrun", "train", config, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ran_under(tmp_path / "two", "zero3", stages=("2",))
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=1e-4)
    assert len(losses(single)) == 8
