"""Checkpoints: complete or left out, and the last good one is never removed; one run in a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moka.errors import MokaError
from moka.training import config_from_dict, run_training
from moka.training.checkpointing import (
    METADATA,
    CheckpointMetadata,
    complete,
    file_sizes,
    last_checkpoint,
    problem,
    rotate,
)
from moka.training.run_dir import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage(trained_run, tmp_path):
    """A copy of a run's second stage: checkpoints at steps 2, 4 and 6."""
    shutil.copytree(trained_run / "checkpoints/stage2", tmp_path / "stage2")
    return tmp_path / "stage2"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, step):
    """A small complete checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "tag").mkdir(parents=True)
    (checkpoint / "tag/weights.bin").write_bytes(bytes([step]) * 100)
    complete(checkpoint, CheckpointMetadata(step), [file_sizes(checkpoint)])
    return checkpoint


def test_a_checkpoint_has_the_metadata_that_a_resume_needs(trained_run):
    checkpoint = trained_run / "checkpoints/stage2/checkpoint-4"
    metadata = CheckpointMetadata.read(checkpoint)
    assert (metadata.step, metadata.world_size, metadata.zero_stage) == (4, 1, None)
    assert metadata.torch_version == torch.__version__
    assert metadata.files == {name: size for name, size in file_sizes(checkpoint).items() if name != METADATA}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"} <= {
        *metadata.files
    }
    assert problem(checkpoint) is None
    assert names(checkpoint.parent) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_metadata_of_a_newer_format_are_refused(stage):
    path = stage / "checkpoint-6" / METADATA
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "format_version": 99}))
    assert "newer" in problem(stage / "checkpoint-6")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("file", "damage"),
    [("adapter_model.safetensors", truncate), ("rng_state.pth", Path.unlink), (METADATA, truncate)],
)
def test_a_damaged_newest_checkpoint_is_left_out_by_name(stage, capsys, file, damage):
    damage(stage / "checkpoint-6" / file)
    assert last_checkpoint(stage) == (stage / "checkpoint-4", 4)
    assert str(stage / "checkpoint-6" / file) in capsys.readouterr().out
    assert names(stage) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_checkpoints_that_are_all_damaged_are_an_error_and_not_a_new_beginning(stage):
    for step in (2, 4, 6):
        truncate(stage / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(MokaError, match=r"--resume.*3 checkpoints.*checkpoint-6/optimizer.pt"):
        last_checkpoint(stage)
    shutil.rmtree(stage)
    assert last_checkpoint(stage) == (None, 0)


def test_a_checkpoint_that_a_killed_run_had_not_finished_is_removed_by_name(stage, capsys):
    (stage / "checkpoint-8").mkdir()
    (stage / "checkpoint-8/optimizer.pt").write_bytes(b"half")
    assert last_checkpoint(stage) == (stage / "checkpoint-6", 6)
    assert "checkpoint-8" in capsys.readouterr().out
    assert names(stage) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_file_of_another_process_that_cannot_be_seen_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moka.training.checkpointing._VISIBLE_WITHIN_S", 0.0)
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "rng_state_0.pth").write_bytes(b"here")
    with pytest.raises(MokaError, match=r"rng_state_1.pth"):
        complete(checkpoint, CheckpointMetadata(1, 2), [file_sizes(checkpoint), {"rng_state_1.pth": 4}])
    assert problem(checkpoint) is not None


@pytest.mark.parametrize(
    ("limit", "newest", "best", "left"),
    [
        (None, 5, None, [1, 2, 3, 4, 5]),
        (2, 5, None, [4, 5]),
        (1, 5, 2, [2, 5]),
        (3, 5, 1, [1, 4, 5]),
        # A run that continued from an older one: what it wrote last stays, whatever its number.
        (1, 3, None, [3]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best_and_counts_complete_ones_only(tmp_path, limit, newest, best, left):
    """Counted as complete, checkpoint-9 would replace the last good one."""
    paths = {step: write(tmp_path, step) for step in (1, 2, 3, 4, 5, 9)}
    (paths[9] / METADATA).unlink()
    rotate(tmp_path, limit, paths[newest], str(paths[best]) if best else None)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (*left, 9)]


def test_a_run_keeps_the_newest_and_the_best_of_its_checkpoints(tiny_config, tmp_path):
    """The largest loss counts as the best, so the first checkpoint is it, and is named as it is on the disk."""
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    raw = tiny_config(tmp_path / "run", stages=[2])
    raw["training"] |= {
        **best,
        "save_total_limit": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    run_training(config_from_dict(raw))
    stage = tmp_path / "run/checkpoints/stage2"
    state = json.loads((stage / "checkpoint-4/trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    assert state["best_model_checkpoint"] == str(stage / f"checkpoint-{state['best_global_step']}")
    assert names(stage) == sorted([f"checkpoint-{state['best_global_step']}", "checkpoint-4"])
    assert all(problem(path) is None for path in stage.iterdir())


HOLD = """
import sys
from moka.training.lock import FolderLock
from pathlib import Path
FolderLock(Path(sys.argv[1])).take()
print("kept", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(trained_run, tiny_config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    (folder / "summary.json").unlink()
    config = config_from_dict(tiny_config(folder))
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as other:
        assert other.stdout.readline() == "kept\n"
        for how in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(MokaError, match=f"is being trained by process {other.pid} on "):
                run_training(config, **how)
        assert (folder / "metrics.jsonl").read_bytes() == (trained_run / "metrics.jsonl").read_bytes()
        other.kill()
    # Its lock died with it; the file that it left is of no account.
    RunFolder(folder).check(resume=True, overwrite=False)


def test_a_run_leaves_no_lock(trained_run, train, tiny_config, tmp_path):
    assert not (trained_run / ".lock").exists()
    with pytest.raises(MokaError, match="already has a run"):
        train(trained_run)
    assert not (trained_run / ".lock").exists()
    bad = tiny_config(tmp_path / "run", data__train=str(tmp_path / "absent.jsonl"))
    with pytest.raises(MokaError, match="absent"):
        run_training(config_from_dict(bad))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["locks", "no fcntl", "no locks"])
def test_a_lock_is_taken_once_and_given_back(tmp_path, monkeypatch, capsys, kind):
    """`--overwrite` asks twice: to see whether the folder is free, and to write it; also where there are no locks."""

    def unsupported(descriptor, how):
        raise OSError(38, "Function not implemented")

    if kind == "no fcntl":
        monkeypatch.setattr("moka.training.lock.fcntl", None)
    elif kind == "no locks":
        monkeypatch.setattr("fcntl.flock", unsupported)
    first, second = RunFolder(tmp_path).lock, RunFolder(tmp_path).lock
    assert first.take()
    assert not first.take()
    assert ("no lock" in capsys.readouterr().out) == (kind == "no locks")
    if kind == "locks":
        with pytest.raises(MokaError, match=f"process {os.getpid()} on"):
            second.take()
    first.release()
    assert names(tmp_path) == []
    assert second.take()
    second.release()
