"""Logs and progress: right counts, gradients by part that add up, and a training that is the same without."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from moka.data import Collator
from moka.errors import MokaError
from moka.training import callbacks
from moka.training import run as run_module
from moka.training.callbacks import Meter, MetricsWriter

SHORT = {"stages": [2], "training__max_steps": 4, "training__save_strategy": "no", "data__validation": None}
NO_DROPOUT = {
    "adapter__dropout": 0.0,
    "model__modalities__visual__encoder__dropout": 0.0,
    "model__modalities__audio__encoder__dropout": 0.0,
}
TWICE = {
    **SHORT,
    **NO_DROPOUT,
    "training__global_batch_size": 4,
    # Adam divides a gradient near zero by its own size, and so makes much of its rounding.
    "training__optim": "sgd",
    "training__learning_rate": 0.1,
    "training__max_grad_norm": 0.05,
    "training__logging_steps": 2,
    "training__observe_modalities": 2,
}
OBSERVED = ("update_share/", "fisher_share/", "gradient_cosine/", "z_norm/", "non_text_dominance")
ROOT = Path(__file__).parents[2]
TYPES = {"text": (0,), "visual": (1, 2), "audio": (3,)}


def logged(folder, stage=2):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in records if r["stage"] == stage and "loss" in r}


def counted(batches):
    """The numbers that are expected, one token at a time."""
    counts = dict.fromkeys(["text", "visual", "audio", "supervised", "padding", "all"], 0)
    for batch in batches:
        rows = zip(*(batch[k].tolist() for k in ("mm_token_type_ids", "labels", "attention_mask")), strict=True)
        for types, labels, mask in rows:
            for type_id, label, present in zip(types, labels, mask, strict=True):
                counts["all"] += 1
                counts["padding"] += not present
                counts["supervised"] += label != -100
                for name, ids in TYPES.items():
                    counts[name] += bool(present) and type_id in ids
    return counts


@pytest.mark.parametrize("packing", [False, True])
def test_counts_are_those_of_the_batches_since_the_last_log(train, tmp_path, monkeypatch, packing):
    batches = []

    class Kept(Collator):
        def __call__(self, encoded):
            batches.append(super().__call__(encoded))
            return dict(batches[-1])

    monkeypatch.setattr(run_module, "Collator", Kept)
    changes = {"training__logging_steps": 2, "training__gradient_accumulation_steps": 2, "training__packing": packing}
    if packing:
        changes |= {"model__max_length": 120, "training__per_device_train_batch_size": 2}
    records = logged(train(tmp_path / "run", **SHORT, **changes))
    assert sorted(records) == [1, 2, 4]
    for step, since in ((1, batches[:2]), (2, batches[2:4]), (4, batches[4:8])):
        due, found = counted(since), records[step]
        for name in ("text", "visual", "audio", "supervised"):
            assert due[name] > 0
            assert found[f"tokens/{name}"] == due[name]
        assert found["padding"] == pytest.approx(due["padding"] / due["all"])
        tokens = due["all"] - due["padding"]
        rows = sum(len(ids.split(", ")) for batch in since for ids in batch["sample_ids"])
        assert found["tokens_per_second"] / found["samples_per_second"] == pytest.approx(tokens / rows)
        assert 0 <= found["data_wait"] <= 1
        assert 0.05 < found["memory_gib"] < 100


@pytest.mark.parametrize("limit", [0.01, 1e6, 0.0])
def test_gradient_norms_by_part_make_up_the_full(train, tmp_path, limit):
    records = logged(train(tmp_path / "run", **SHORT, training__max_grad_norm=limit))
    for step, record in records.items():
        parts = {key.removeprefix("grad_norm/"): value for key, value in record.items() if key.startswith("grad_norm/")}
        assert set(parts) >= {"A/text", "A/visual", "A/audio", "B", "projector/visual", "projector/audio"}
        assert math.sqrt(sum(value**2 for value in parts.values())) == pytest.approx(record["grad_norm"], rel=1e-3)
        assert (parts["A/audio"] == 0) == (step == 1)  # no A has a gradient while B is zero
        assert parts["B"] > 0


def test_training_is_the_same_unobserved(trained_run, train, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_callbacks", lambda run, stage: [MetricsWriter(run.folder, stage)])
    single = train(tmp_path / "single")
    for stage in (1, 2):
        observed, unobserved = logged(trained_run, stage), logged(single, stage)
        assert len(observed) == 6
        assert "tokens_per_second" not in unobserved[1]
        for step in observed:
            for key in ("loss", "grad_norm", "learning_rate"):
                assert observed[step][key] == unobserved[step][key]
    for file in ("adapter/adapter_model.safetensors", "connector/connector.safetensors"):
        ours, theirs = load_file(trained_run / file), load_file(single / file)
        assert all(ours[key].equal(theirs[key]) for key in ours)
    assert (trained_run / "balance.png").stat().st_size > 0
    assert not (single / "balance.png").exists()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_observed_modalities_are_logged_and_training_is_the_same(train, tmp_path, checkpointing):
    """Once over the micro-batches of a step, and with the same result for one batch of the full size."""
    changes = {**SHORT, **NO_DROPOUT, "training__max_steps": 5, "training__logging_steps": 2}
    changes |= {"training__global_batch_size": 4, "training__gradient_checkpointing": checkpointing}
    runs = {
        name: train(tmp_path / name, **changes, training__observe_modalities=every, **more)
        for name, every, more in (
            ("plain", 0, {}),
            ("observed", 2, {}),
            ("accumulated", 2, {"training__per_device_train_batch_size": 1}),
        )
    }
    plain, observed, accumulated = (logged(folder) for folder in runs.values())
    for step, record in observed.items():
        new = set(record) - set(plain[step])
        assert bool(new) == (step in (2, 4)), step
        assert all(key.startswith(OBSERVED) for key in new)
        assert (record["loss"], record["grad_norm"]) == (plain[step]["loss"], plain[step]["grad_norm"])
        for key in new:
            assert record[key] == pytest.approx(accumulated[step][key], rel=1e-2, abs=1e-3), key
        if new:
            for group in ("update_share", "fisher_share"):
                assert sum(record[f"{group}/{name}"] for name in TYPES) == pytest.approx(1)
            assert {key for key in new if key.startswith("gradient_cosine")} == {
                f"gradient_cosine/{pair}" for pair in ("text-visual", "text-audio", "visual-audio")
            }
            assert 0 <= record["non_text_dominance"] <= 1
            assert record["z_norm/audio"] > 0
    ours, theirs = (load_file(runs[name] / "adapter/adapter_model.safetensors") for name in ("observed", "plain"))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert (runs["observed"] / "balance.png").stat().st_size > (runs["plain"] / "balance.png").stat().st_size


def test_waiting_and_pauses_are_separate(monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now.time)
    meter = Meter({})

    def step(fetching, computing):
        meter.on_fetch_begin(None)
        now.time += fetching
        meter.on_fetch_end(None)
        now.time += computing
        meter.on_step_end(None, None, None)

    step(3.0, 5.0)
    now.time += 100.0  # an evaluation
    step(3.0, 1.0)
    now.time += 0.5  # the device ends its work
    assert meter.read_times() == (12.5, 6.0)
    now.time += 50.0  # a checkpoint
    step(2.0, 0.0)
    assert meter.read_times() == (2.0, 2.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_bar_and_other_outputs_a_line_at_each_log(train, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    train(tmp_path / "run", **SHORT)
    out, err = capsys.readouterr()
    assert ("4/4 [" in err) is terminal
    lines = [line.split(":")[0] for line in out.splitlines() if line.startswith("stage 2, step ")]
    assert lines == ([] if terminal else [f"stage 2, step {step}/4" for step in (1, 2, 3, 4)])
    for word in ("loss", "tokens/s"):
        assert word in (err if terminal else out)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("named", [{}, {"training__report_to": "tensorboard"}, {"training__report_to": "none"}])
def test_tensorboard_has_what_is_logged_unless_it_is_none(train, tmp_path, named):
    folder = train(tmp_path / "run", **SHORT, **named)
    assert not list(folder.glob("checkpoints/**/events*"))
    if "none" in named.values():
        assert not (folder / "tensorboard").exists()
        return
    found = scalars(folder / "tensorboard/stage2")
    for key in ("loss", "tokens_per_second", "data_wait", "tokens/audio", "grad_norm/A/visual", "grad_norm/B"):
        assert found[f"train/{key}"] == [1, 2, 3, 4]


def test_missing_and_unknown_services_are_reported_before_training(train, tmp_path):
    for name in ("wandb", "mlflow"):
        if importlib.util.find_spec(name):
            continue
        with pytest.raises(MokaError, match=rf"training.report_to: {name} is not installed.*pip install {name}"):
            train(tmp_path / "run", **SHORT, training__report_to=["tensorboard", name])
    with pytest.raises(MokaError, match=r"training.report_to: 'tensorbord' is not one of .*tensorboard"):
        train(tmp_path / "run", **SHORT, training__report_to="tensorbord")
    assert not (tmp_path / "run").exists()


ENGINES = {
    "ddp": ({}, "DistributedDataParallel"),
    "zero2": ({"training__deepspeed": str(ROOT / "configs/deepspeed/zero2.json")}, "DeepSpeedEngine"),
    "zero3": ({"training__deepspeed": str(ROOT / "configs/deepspeed/zero3.json")}, "DeepSpeedEngine"),
    "fsdp2": ({}, "FSDPPeftModelForCausalLM"),
}
# What `accelerate launch` sets from configs/accelerate/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory):
    return logged(train(tmp_path_factory.mktemp("one") / "run", **TWICE))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_log_as_one(one_process, tiny_config, tmp_path, launch, write_yaml, engine):
    """Counts are sums over the processes, gradients means over them, read before the engine lets go of them."""
    changes, wrapper = ENGINES[engine]
    changes = {**TWICE, **changes, "training__per_device_train_batch_size": 2}
    config = write_yaml(tmp_path / "two.yaml", tiny_config(tmp_path / "two", **changes))
    program = (ROOT / "tests/training/fsdp_on_cpu.py",) if engine == "fsdp2" else ("-m", "moka")
    done = launch("torchrun", "train", config, program=program, **(FSDP2 if engine == "fsdp2" else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f", 2 processes, {wrapper}" in done.stdout
    two = logged(tmp_path / "two")
    assert sorted(two) == [1, 2, 4]
    for step, record in two.items():
        one = one_process[step]
        assert set(record) == set(one)
        for key in record:
            if key.startswith("tokens/"):
                assert record[key] == one[key]
            if key.startswith("grad_norm"):
                assert record[key] == pytest.approx(one[key], rel=2e-3, abs=1e-6), key
            if key.startswith(OBSERVED):
                assert record[key] == pytest.approx(one[key], rel=2e-3, abs=1e-3), key
        assert ("update_share/visual" in record) == (step in (2, 4))
        tokens, due = (r["tokens_per_second"] / r["samples_per_second"] for r in (record, one))
        assert tokens == pytest.approx(due)
    assert done.stdout.count("step 4/4: ") == 1
    assert "adapter changes logits by" in (tmp_path / "two/summary.json").read_text()
