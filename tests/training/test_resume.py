"""A resumed run is the uninterrupted one, bit for bit, wherever it was killed."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from moka.errors import MokaError
from moka.training import config_from_dict, run_training

AFTER_TRAINING = ("adapter", "summary.json", "README.md", "loss.png", "samples.jsonl")


def killed(run, folder, stage, step, half_written=None):
    """A copy of a finished run as it lies when it is killed in ``stage``, ``step`` being its newest checkpoint there.

    The last two lines logged after that checkpoint are kept: a killed run has logged more than it saved.
    """
    shutil.copytree(run, folder)
    for name in AFTER_TRAINING + (("connector",) if stage == 1 else ()):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for later in range(stage, 3):
        for checkpoint in (folder / f"checkpoints/stage{later}").glob("checkpoint-*"):
            if later > stage or int(checkpoint.name.split("-")[1]) > step:
                shutil.rmtree(checkpoint)
    if half_written is not None:
        source = folder / f"checkpoints/stage{stage}/checkpoint-{step}"
        broken = source.with_name(f"checkpoint-{half_written}")
        shutil.copytree(source, broken)
        (broken / "trainer_state.json").unlink()
        next(broken.glob("*.safetensors")).write_bytes(b"\x00" * 40)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [i for i, line in enumerate(lines) if _at(line) <= (stage, step)]
    kept = lines[: (logged[-1] + 1 if logged else 0) + 2]
    # The kill came in the middle of a line.
    (folder / "metrics.jsonl").write_text("\n".join(kept) + '\n{"stage": 2, "st')
    return folder


def _at(line):
    record = json.loads(line)
    return record["stage"], record["step"]


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (r["stage"], r["step"], r.get("loss"), r.get("eval_loss"), r.get("grad_norm"), r.get("learning_rate"))
        for r in records
        if "train_runtime" not in r
    ]


def assert_same(folder, reference):
    assert losses(folder) == losses(reference)
    for name in ("connector/connector.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(reference / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def resume(tiny_config, folder, **changes):
    return run_training(config_from_dict(tiny_config(folder, **changes)), resume=True)


@pytest.mark.parametrize(
    ("stage", "step", "half_written"),
    [(1, 0, None), (1, 4, None), (2, 0, None), (2, 2, None), (2, 4, 6)],
    ids=["stage 1, no checkpoint", "stage 1", "between the stages", "stage 2", "while a checkpoint was written"],
)
def test_resumed_run_equals_uninterrupted(trained_run, tiny_config, tmp_path, stage, step, half_written):
    folder = killed(trained_run, tmp_path / "run", stage, step, half_written)
    assert losses_before(folder, stage) > 0 or (stage, step) == (1, 0)
    resume(tiny_config, folder)
    assert_same(folder, trained_run)
    twice = [key for key, n in Counter(map(_at_loss, losses(folder))).items() if n > 1]
    assert twice == []


def losses_before(folder, stage):
    return sum('"loss"' in line for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1])


def _at_loss(record):
    return record[0], record[1], record[2] is None


def test_lora_run_resumes_too(tiny_config, tmp_path):
    changes = {"stages": [2], "adapter__method": "lora", "training__eval_strategy": "no"}
    whole = run_training(config_from_dict(tiny_config(tmp_path / "whole", **changes)))
    folder = killed(whole, tmp_path / "run", 2, 4)
    resume(tiny_config, folder, **changes)
    ours, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(folder) == losses(whole)


def test_resume_with_other_settings_is_refused(trained_run, tiny_config, tmp_path):
    folder = killed(trained_run, tmp_path / "run", 2, 2)
    with pytest.raises(MokaError, match=r"training.learning_rate is 0.003 .* and 0.1 is given"):
        resume(tiny_config, folder, training__learning_rate=0.1)
    resume(tiny_config, folder, evaluation__size=3)  # does not reach the training
    assert_same(folder, trained_run)


def test_resume_with_another_global_batch_is_refused(trained_run, tiny_config, tmp_path):
    """As when it goes on with more processes: here the record of the beginning says another number."""
    folder = killed(trained_run, tmp_path / "run", 2, 2)
    text = (folder / "metrics.jsonl").read_text()
    assert text.count('{"stage": 2, "step": 0, "samples_per_step": 4}') == 1
    (folder / "metrics.jsonl").write_text(text.replace('"samples_per_step": 4}', '"samples_per_step": 8}'))
    with pytest.raises(MokaError, match="began with 8 samples a step, and would go on with 4"):
        resume(tiny_config, folder)


def test_resume_of_a_complete_run_changes_nothing(trained_run, tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    resume(tiny_config, folder)
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resume_without_a_run_is_refused(tiny_config, tmp_path):
    with pytest.raises(MokaError, match="holds no run"):
        resume(tiny_config, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
