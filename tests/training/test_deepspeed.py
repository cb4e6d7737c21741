"""Two real processes on gloo under DeepSpeed: every ZeRO stage trains, saves and resumes as one process does."""

import json

import pytest
import torch

from moka.errors import MokaError
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


@pytest.mark.parametrize(
    ("environment", "more", "words"),
    [
        ({}, {"train_micro_batch_size_per_gpu": 16}, r"train_micro_batch_size_per_gpu=16 vs .*=4"),
        ({"ACCELERATE_USE_CPU": "true"}, {}, "ACCELERATE_USE_CPU"),
    ],
)
def test_what_contradicts_deepspeed_is_refused(tmp_path, monkeypatch, write_zero, environment, more, words):
    for name, value in {"RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    path = write_zero(tmp_path, "zero2", **more)
    with pytest.raises(MokaError, match=words):
        training_arguments({"deepspeed": str(path), "per_device_train_batch_size": 4}, tmp_path)


def test_one_process_is_recorded_as_such(trained_run):
    expected = {"processes": 1, "distributed_type": "NO", "zero_stage": None, "offload": None}
    engines = json.loads((trained_run / "summary.json").read_text())["engines"]
    wrappers = {"1": "EmbeddingAlignment", "2": "PeftModelForCausalLM"}
    assert engines == {stage: {**expected, "wrapper": wrapper} for stage, wrapper in wrappers.items()}


@pytest.fixture(scope="module")
def one(train, tmp_path_factory, as_one):
    """The run of one process on full batches."""
    return train(tmp_path_factory.mktemp("one") / "run", **{**as_one, **OFTEN})


@pytest.fixture(scope="module", params=MODES)
def zero(request, train_two, tmp_path_factory, write_zero, as_one, halves):
    """The same run in two processes: (mode, its folder, what it printed, its configuration file)."""
    mode, folder = request.param, tmp_path_factory.mktemp(request.param)
    launcher, changes = "accelerate zero1", {**as_one, **halves, **OFTEN}
    if mode != "zero1":  # asked for on the command line, without a file
        launcher, changes["training__deepspeed"] = "torchrun", str(write_zero(folder, mode))
    done = train_two(folder / "run", launcher, **changes)
    return mode, folder / "run", done.stdout, folder / "run.yaml"


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


def resume(launch, launcher, config, folder, step):
    done = launch(launcher, "train", config, f"output.dir={folder}", "--resume", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {folder / f'checkpoints/stage2/checkpoint-{step}'}" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted(zero, killed, tmp_path, launch, losses, same_weights):
    mode, folder, _, config = zero
    if mode not in ("zero2", "zero3"):
        pytest.skip("its checkpoints are like those of another mode")
    resumed = killed(folder, tmp_path / "run", 10)
    resume(launch, "torchrun", config, resumed, 10)
    assert_ran_under(resumed, mode, stages=("2",))
    assert losses(resumed) == pytest.approx(losses(folder), abs=1e-5)
    same_weights(resumed, folder)


@pytest.mark.slow
def test_resumes_with_other_numbers_of_processes(zero, killed, tmp_path, launch, losses, same_weights):
    """Two processes, then one, then two again, through DeepSpeed's universal checkpoints."""
    mode, folder, _, config = zero
    if mode not in ("zero2", "zero3"):
        pytest.skip("its checkpoints are like those of another mode")
    single = killed(folder, tmp_path / "one", 5)
    said = resume(launch, "torchrun one", config, single, 5)
    assert "was written with world size 2; it is converted for 1" in said
    assert_ran_under(single, mode, stages=("2",), processes=1)
    assert losses(single) == pytest.approx(losses(folder), abs=1e-4)
    same_weights(single, folder)
    together = killed(single, tmp_path / "two", 10)
    said = resume(launch, "torchrun", config, together, 10)
    assert "was written with world size 1; it is converted for 2" in said
    assert_ran_under(together, mode, stages=("2",))
    assert losses(together) == pytest.approx(losses(folder), abs=1e-4)
    same_weights(together, folder)
    assert not list(together.glob("checkpoints/*/.universal*"))


@pytest.mark.slow
def test_mixed_batches_never_hang(mixed_run, ones, train, train_two, tmp_path, write_zero, losses):
    """ZeRO-3 waits for every process at every parameter; also in evaluation, and with recomputation in backward."""
    changes = {
        **mixed_run,
        "stages": [2],
        "training__gradient_checkpointing": True,
        "training__gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    single = train(tmp_path / "one", **changes)
    changes |= {**ones, "training__deepspeed": str(write_zero(tmp_path, "zero3"))}
    train_two(tmp_path / "two", **changes)
    assert_ran_under(tmp_path / "two", "zero3", stages=("2",))
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=1e-4)
    assert len(losses(single)) == 8
