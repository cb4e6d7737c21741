"""Two real processes on gloo: the runs that are compared, and reading what they left."""

import json
import shutil
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moka.training import config_from_dict, run_training


@pytest.fixture(scope="session")
def train(tiny_config):
    """``train(folder, resume=False, overwrite=False, **changes)``: the run of ``tiny_config``, or of a raw configuration."""

    def run(folder, resume=False, overwrite=False, **changes):
        raw = folder if isinstance(folder, dict) else tiny_config(folder, **changes)
        return run_training(config_from_dict(raw), resume=resume, overwrite=overwrite)

    return run


@pytest.fixture(scope="session")
def train_two(tiny_config, launch, write_yaml):
    """``train_two(folder, **changes)``: the run of ``tiny_config`` in two processes; what it printed is returned."""

    def run(folder, launcher="torchrun", **changes):
        config = write_yaml(folder.with_name(f"{folder.name}.yaml"), tiny_config(folder, **changes))
        done = launch(launcher, "train", config, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def engine():
    """``engine(folder, stage=2)``: how a run says that it ran: processes, distributed_type, wrapper, zero_stage, offload."""

    def read(folder, stage=2):
        return json.loads((folder / "summary.json").read_text())["engines"][str(stage)]

    return read


@pytest.fixture(scope="session")
def killed():
    """``killed(run, folder, step)``: a copy of a finished run as it is when it is killed in stage 2 after ``step`` was saved."""

    def copy(run, folder, step):
        shutil.copytree(run, folder)
        shutil.rmtree(folder / "adapter")
        (folder / "summary.json").unlink()
        for checkpoint in (folder / "checkpoints/stage2").glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > step:
                shutil.rmtree(checkpoint)
        return folder

    return copy


@pytest.fixture(scope="session")
def losses():
    """(stage, step) -> loss of a run folder, or another of its figures."""

    def read(folder, key="loss"):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {(r["stage"], r["step"]): r[key] for r in records if key in r}

    return read


@pytest.fixture(scope="session")
def curve():
    """(stage, step, loss, eval_loss, grad_norm, learning_rate) of every line that a run logged; None for what it has not."""
    keys = ("stage", "step", "loss", "eval_loss", "grad_norm", "learning_rate")

    def read(folder):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [tuple(r.get(key) for key in keys) for r in records if "loss" in r or "eval_loss" in r]

    return read


@pytest.fixture(scope="session")
def close_curve(curve):
    """``close_curve(folder, reference)``: the lines of another run, their numbers up to rounding.

    ``resumes``: see ``same_run``.
    """

    def check(folder, reference, rel=1e-5, resumes=0):
        ours, theirs = curve(folder), curve(reference)
        assert [record[:2] for record in ours] == [record[:2] for record in theirs]
        other_means = 0
        for one, other in zip(ours, theirs, strict=True):
            one, other = ([x or 0.0 for x in record] for record in (one, other))
            if one[2] != pytest.approx(other[2], rel=rel):
                other_means += 1
                one[2] = other[2]
            assert one == pytest.approx(other, rel=rel)
        assert other_means <= resumes

    return check


@pytest.fixture(scope="session")
def same_run(curve):
    """``same_run(folder, reference)``: curve, connector and adapter of another run, bit for bit.

    ``resumes``: as many logged losses may differ: the first after a resume is the mean of fewer steps.
    """

    def check(folder, reference, resumes=0):
        ours, theirs = curve(folder), curve(reference)
        assert [(*r[:2], *r[3:]) for r in ours] == [(*r[:2], *r[3:]) for r in theirs]
        assert sum(one[2] != other[2] for one, other in zip(ours, theirs, strict=True)) <= resumes
        for name in ("connector/connector.safetensors", "adapter/adapter_model.safetensors"):
            ours, theirs = load_file(folder / name), load_file(reference / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name

    return check


@pytest.fixture(scope="session")
def same_adapter():
    """``same_adapter(folder, reference)``: the adapter of another run, bit for bit."""

    def check(folder, reference):
        ours, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, reference))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    return check


@pytest.fixture(scope="session")
def as_one():
    """Changes to ``tiny_config`` under which runs on one process and on two take the same steps; for two also ``halves``."""
    dropouts = ("adapter__dropout", *(f"model__modalities__{name}__encoder__dropout" for name in ("visual", "audio")))
    return {
        **dict.fromkeys(dropouts, 0.0),  # it would draw other masks for other shapes of the batch
        "alignment__global_batch_size": 8,
        "alignment__max_steps": 3,
        "alignment__save_strategy": "no",
        "training__global_batch_size": 4,
        "training__max_steps": 20,
        "training__save_steps": 10,
        "training__eval_steps": 10,
    }


@pytest.fixture(scope="session")
def halves():
    return {"alignment__per_device_train_batch_size": 2, "training__per_device_train_batch_size": 2}


@pytest.fixture(scope="session")
def same_weights():
    """``same_weights(folder, reference)``: connector and adapter, re-read, are those of another run."""
    # A norm follows: the gradient of these biases is zero but for rounding, which Adam blows up to full steps.
    without_effect = ("stages.0.0.bias", "stages.1.0.bias")

    def check(folder, reference, names=("connector/connector.safetensors", "adapter/adapter_model.safetensors")):
        for name in names:
            ours, theirs = load_file(folder / name), load_file(reference / name)
            assert ours.keys() == theirs.keys()
            for key in theirs:
                if not key.endswith(without_effect):
                    torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")
            if name.startswith("adapter"):
                assert {"projectors", "encoders"} <= {part for key in ours for part in key.split(".")}
                assert all(tensor.any() for key, tensor in ours.items() if key.endswith("moka_B"))

    return check


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """A JSONL file in which the samples of every step have other media on one process than on the other."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20), dtype=np.uint8)).save(folder / "a.png")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(16000) / 9)).astype(np.int16).tobytes())
    image, sound = {"type": "image", "image": "a.png"}, {"type": "audio", "audio": "a.wav"}
    kinds = {"text": [], "image": [image], "sound": [sound], "full": [image, sound]}
    steps = (
        "text full",
        "image sound",
        "sound text",
        "full image",
        "text image",
        "sound full",
        "image text",
        "full sound",
    )
    lines = []
    for kind in " ".join(steps).split():
        content = [*kinds[kind], {"type": "text", "text": "which digit is it " + "one two three " * (len(lines) % 3)}]
        answer = {"role": "assistant", "content": "seven" if len(lines) % 2 else "one two"}
        messages = [{"role": "user", "content": content}, answer]
        lines.append(json.dumps({"id": f"{kind}-{len(lines)}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


@pytest.fixture(scope="session")
def mixed_run(mixed, as_one):
    """Changes to ``tiny_config``: 8 steps of two samples of ``mixed``; of two processes, by ``ones``, each takes one."""
    sections = {
        "max_steps": 8,
        "global_batch_size": 2,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 2,
        "save_strategy": "no",
    }
    return {
        **as_one,
        **{f"data__{name}": str(mixed) for name in ("alignment", "train", "validation", "test")},
        "data__train_size": None,
        **{f"{section}__{key}": value for section in ("alignment", "training") for key, value in sections.items()},
        "alignment__objective": "language_modeling",
        "training__eval_steps": 4,
    }


@pytest.fixture(scope="session")
def ones():
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    return {f"{section}__{size}": 1 for section in ("alignment", "training") for size in sizes}
