"""Two real processes on gloo: the same run as one process on the same global batch, and one voice for errors."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moka.training import config_from_dict, run_training

# Dropout draws other masks for other shapes of the batch.
SAME = {
    "adapter__dropout": 0.0,
    "model__modalities__visual__encoder__dropout": 0.0,
    "model__modalities__audio__encoder__dropout": 0.0,
    "alignment__global_batch_size": 8,
    "training__global_batch_size": 4,
    # Adam divides a gradient near zero by its own size, and so makes much of its rounding.
    "alignment__optim": "sgd",
    "training__optim": "sgd",
    "alignment__max_steps": 3,
    "training__max_steps": 3,
    "alignment__save_strategy": "no",
    "training__save_strategy": "no",
}


@pytest.mark.parametrize("objective", ["embedding", "language_modeling"])
def test_two_processes_train_as_one(tiny_config, tmp_path, launch, write_yaml, losses, objective):
    changes = {**SAME, "alignment__objective": objective}
    # Whole batches here; there two processes with two rows each, in stage 1 accumulated too.
    one = run_training(config_from_dict(tiny_config(tmp_path / "one", **changes)))
    halves = {"alignment__per_device_train_batch_size": 2, "training__per_device_train_batch_size": 2}
    config = write_yaml(tmp_path / "two.yaml", tiny_config(tmp_path / "two", **changes, **halves))
    if objective == "embedding":
        done = launch("torchrun", "train", config)
    else:
        done = launch("accelerate", "train", config)
    assert done.returncode == 0, done.stderr[-2000:]
    two = tmp_path / "two"
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    assert "8 samples a step (2 x 2 processes x 2 accumulated)" in done.stdout
    assert done.stdout.count("done: ") == 1
    ours, theirs = losses(two), losses(one)
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len((two / "metrics.jsonl").read_text().splitlines()) == len(
        (one / "metrics.jsonl").read_text().splitlines()
    )
    for key, tensor in load_file(two / "adapter/adapter_model.safetensors").items():
        reference = load_file(one / "adapter/adapter_model.safetensors")[key]
        torch.testing.assert_close(tensor, reference, rtol=1e-4, atol=1e-6)


def test_two_processes_leave_the_same_samples_out(tiny_config, tmp_path, launch, write_yaml, losses):
    """Under ``skip`` the main process tries the files; the others must not have one sample more."""
    lines = []
    for number in range(9):
        Image.new("L", (20, 20), 25 * number).save(tmp_path / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "Which digit is written?"}]
        answer = {"role": "assistant", "content": "seven"}
        lines.append(json.dumps({"id": f"s{number}", "messages": [{"role": "user", "content": content}, answer]}))
    (tmp_path / "4.png").write_bytes(b"no picture")
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    data = {f"data__{name}": str(tmp_path / "data.jsonl") for name in ("alignment", "train", "validation", "test")}
    changes = {**SAME, **data, "data__on_bad_media": "skip", "data__bad_media_budget": 0.2, "stages": [2]}
    one = run_training(config_from_dict(tiny_config(tmp_path / "one", **changes)))
    halves = {"training__per_device_train_batch_size": 2}
    config = write_yaml(tmp_path / "two.yaml", tiny_config(tmp_path / "two", **changes, **halves))
    done = launch("torchrun", "train", config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("data.train: 1 of 9 samples left out") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


def test_bad_input_is_told_once_and_ends_both(tiny_config, tmp_path, launch, write_yaml, losses):
    config = write_yaml(
        tmp_path / "run.yaml", tiny_config(tmp_path / "run", data__train=str(tmp_path / "absent.jsonl"))
    )
    done = launch("torchrun", "train", config)
    assert done.returncode != 0
    assert "moka/training" not in done.stderr  # no traceback of ours
    told = [line for line in done.stderr.splitlines() if "moka: error" in line]
    assert len(told) == 1, done.stderr[-3000:]
    assert "absent.jsonl" in told[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()
