"""Two real processes on gloo under FSDP2, which accelerate runs on a CPU by way of ``fsdp_on_cpu.py`` only."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moka.errors import MokaError

PROGRAM = (Path(__file__).with_name("fsdp_on_cpu.py"),)
# As `accelerate launch` passes configs/accelerate/fsdp2.yaml on.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
pytestmark = pytest.mark.slow


def wrappers(folder):
    engines = json.loads((folder / "summary.json").read_text())["engines"]
    assert {(engine["processes"], engine["distributed_type"]) for engine in engines.values()} == {(2, "FSDP")}
    return {stage: engine["wrapper"] for stage, engine in engines.items()}


@pytest.fixture(scope="module")
def sharded(launch):
    """``sharded(config, ...)``: `moka train config ...` in two processes under FSDP2; returns what it printed."""

    def run(*arguments, **environment):
        done = launch("torchrun", "train", *arguments, program=PROGRAM, timeout=300, **{**FSDP, **environment})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def pair(train, tiny_config, tmp_path_factory, sharded, write_yaml, as_one, halves):
    """A run of one process on full batches; the same of two under FSDP2, on halves; its configuration."""
    folder = tmp_path_factory.mktemp("fsdp")
    one = train(folder / "one", **as_one)
    config = write_yaml(folder / "two.yaml", tiny_config(folder / "two", **as_one, **halves))
    sharded(config)
    return one, folder / "two", config


def test_trains_and_evaluates_as_one_process(pair, losses):
    one, two, _ = pair
    assert wrappers(two) == {"1": "FSDPEmbeddingAlignment", "2": "FSDPPeftModelForCausalLM"}
    ours, theirs = losses(two), losses(one)
    assert len(ours) == 23
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert losses(two, "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=1e-4)
    assert len(losses(two, "eval_loss")) == 2


def test_saves_and_answers_as_one_process(pair, same_weights):
    """Full tensors, not the part of one process; the answers at the end are made by both together."""
    one, two, _ = pair
    same_weights(two, one)
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (two, one))
    assert ours["all parameters"] == theirs["all parameters"]


def test_checkpoint_has_what_is_trained_only(pair):
    _, two, _ = pair
    checkpoint = two / "checkpoints/stage2/checkpoint-20"
    saved, result = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, two / "adapter"))
    assert all(saved[key].equal(result[key]) for key in result)
    assert not list(checkpoint.glob("pytorch_model_fsdp*"))
    # Adam's two moments and no more
    assert (checkpoint / "optimizer.bin").stat().st_size < 4 * (checkpoint / "adapter_model.safetensors").stat().st_size


def test_resumed_run_equals_uninterrupted(pair, killed, tmp_path, sharded, losses, same_weights):
    _, two, config = pair
    folder = killed(two, tmp_path / "run", 10)
    said = sharded(config, f"output.dir={folder}", "--resume")
    assert f"resuming from {folder / 'checkpoints/stage2/checkpoint-10'}" in said
    assert wrappers(folder) == {"2": "FSDPPeftModelForCausalLM"}
    assert losses(folder) == pytest.approx(losses(two), abs=1e-5)
    same_weights(folder, two)


def test_checkpoint_is_not_resumed_without_fsdp(pair, killed, tmp_path, train, as_one, halves):
    _, two, _ = pair
    folder = killed(two, tmp_path / "run", 20)
    with pytest.raises(MokaError, match="written under FSDP, and this run is under neither DeepSpeed nor FSDP"):
        train(folder, **as_one, **halves, resume=True)


def test_mixed_batches_with_fsdps_own_checkpointing(
    mixed_run, ones, train, tiny_config, tmp_path, sharded, write_yaml, losses
):
    """Also where the state is saved in parts: the adapter comes full."""
    one = train(tmp_path / "one", **mixed_run)
    changes = {**mixed_run, **ones, "training__save_strategy": "steps", "training__save_steps": 4}
    config = write_yaml(tmp_path / "two.yaml", tiny_config(tmp_path / "two", **changes))
    sharded(config, FSDP_ACTIVATION_CHECKPOINTING="true", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    assert wrappers(tmp_path / "two") == {"1": "FSDPMokaForConditionalGeneration", "2": "FSDPPeftModelForCausalLM"}
    ours, theirs = losses(tmp_path / "two"), losses(one)
    assert len(ours) == 16
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=1e-4)
    saved, result = (
        load_file(tmp_path / f"two/{name}/adapter_model.safetensors")
        for name in ("checkpoints/stage2/checkpoint-8", "adapter")
    )
    assert all(saved[key].equal(result[key]) for key in result)
