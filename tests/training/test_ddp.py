"""Two real processes on gloo under DDP: the same run as one process on the same global batch, and one voice for errors."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from moka.modeling.encoders import tiny_encoder

DDP = {"processes": 2, "distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel"}
LINES = ("torchrun", "embedding"), pytest.param(("accelerate", "language_modeling"), marks=pytest.mark.slow)


def engines(folder):
    return {stage: {key: engine[key] for key in DDP} for stage, engine in summary(folder)["engines"].items()}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=LINES, ids=lambda pair: pair[0])
def pair(request, train, train_two, tmp_path_factory, as_one, halves):
    """A run of one process on full batches; the same of two, launched, on halves; what that printed."""
    launcher, objective = request.param
    folder = tmp_path_factory.mktemp(launcher)
    changes = {**as_one, "alignment__objective": objective}
    one = train(folder / "one", **changes)
    return one, folder / "two", train_two(folder / "two", launcher, **changes, **halves).stdout


def test_two_processes_train_as_one(pair, losses):
    one, two, said = pair
    assert engines(two) == {"1": DDP, "2": DDP}
    assert "8 samples a step (2 x 2 processes x 2 accumulated)" in said
    assert said.count("done: ") == 1
    ours, theirs = losses(two), losses(one)
    assert len(ours) == 23
    assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = losses(two, "eval_loss"), losses(one, "eval_loss")
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (two, one))
    assert len(ours) == len(theirs)


def test_two_processes_save_what_one_saves(pair, same_weights):
    one, two, _ = pair
    same_weights(two, one)
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_mixed_batches_never_hang(mixed_run, ones, train, train_two, tmp_path, losses, reentrant):
    """In both stages, with recomputation, and with a published tower whose last norm no feature depends on."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    changes = {
        **mixed_run,
        **{f"{section}__{key}": value for section in ("alignment", "training") for key, value in checkpointing.items()},
        "model__modalities__visual__encoder": tiny_encoder({"type": "dinov2", "trainable": True}),
    }
    del changes["model__modalities__visual__encoder__dropout"]
    one = train(tmp_path / "one", **changes)
    train_two(tmp_path / "two", **{**changes, **ones})
    assert engines(tmp_path / "two") == {"1": DDP, "2": DDP}
    ours, theirs = losses(tmp_path / "two"), losses(one)
    assert len(ours) == 16
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=1e-4)


def pictures(folder, count):
    """A JSONL file of questions about a picture each."""
    lines = []
    for number in range(count):
        Image.new("L", (20, 20), 25 * number).save(folder / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "Which digit is written?"}]
        answer = {"role": "assistant", "content": "seven"}
        lines.append(json.dumps({"id": f"s{number}", "messages": [{"role": "user", "content": content}, answer]}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return {f"data__{name}": str(folder / "data.jsonl") for name in ("alignment", "train", "validation", "test")}


@pytest.mark.slow
def test_two_processes_leave_the_same_samples_out(train, train_two, tmp_path, losses, as_one, halves):
    """Under ``skip`` each tries a part of the files; none must have one sample more."""
    data = pictures(tmp_path, 9)
    (tmp_path / "4.png").write_bytes(b"no picture")
    skip = {"data__on_bad_media": "skip", "data__bad_media_budget": 0.2}
    changes = {**as_one, **data, **skip, "stages": [2], "training__max_steps": 3}
    one = train(tmp_path / "one", **changes)
    done = train_two(tmp_path / "two", **changes, **halves)
    assert done.stdout.count("data.train: 1 of 9 samples left out") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
def test_bad_input_is_reported_once_and_ends_both(tiny_config, tmp_path, launch, write_yaml):
    """A file that is not there, in the share of the second process."""
    data = pictures(tmp_path, 4)
    (tmp_path / "1.png").unlink()
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **data))
    done = launch("torchrun", "train", config)
    assert done.returncode != 0
    assert "moka/training" not in done.stderr  # no traceback of ours
    printed = [line for line in done.stderr.splitlines() if "moka: error" in line]
    assert len(printed) == 1, done.stderr[-3000:]
    assert "data.jsonl:2: image" in printed[0]
    assert "1.png" in printed[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


PATIENCE = """
import time
from datetime import timedelta

import torch.distributed as dist

from moka.distributed import run_on_all, disconnect, is_main

dist.init_process_group("gloo", timeout=timedelta(seconds=10))
print(run_on_all(lambda: time.sleep(14 * is_main()) or "prepared", main_first=True))
disconnect(True)
"""


@pytest.mark.slow
def test_what_one_process_prepares_may_take_longer_than_the_time_out(tmp_path, launch):
    (tmp_path / "patience.py").write_text(PATIENCE)
    done = launch("torchrun", program=[tmp_path / "patience.py"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("prepared") == 2


def of_rank(launcher, rank):
    """The process of a rank that a launcher has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher.pid and b"RANK=%d" % rank in environment:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("accelerate", 0)])
def test_a_rank_that_dies_ends_the_others(tiny_config, tmp_path, launch, write_yaml, launcher, rank):
    config = tiny_config(tmp_path / "run", stages=[2], training__max_steps=100_000, training__eval_strategy="no")
    started = launch(launcher, "train", write_yaml(tmp_path / "run.yaml", config), start=True)
    try:
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or '"loss"' not in metrics.read_text():
            assert started.poll() is None, started.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(of_rank(started, rank), signal.SIGKILL)
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode not in (0, None)
    assert "Signal 9 (SIGKILL) received" in said  # the launcher's report
    assert not (tmp_path / "run/summary.json").exists()
