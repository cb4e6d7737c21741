"""Whole runs on a GPU: in float32 the curve of the CPU; bfloat16, nf4 and balance strategies; killed and resumed."""

import json
import math

import pytest
import torch

from moka.cli.main import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """Convolutions in float32; training.tf32 is about matrix products alone."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


# Neither TF32 nor dropout, whose numbers differ between devices.
EXACT = {
    **{f"{stage}__{key}": False for stage in ("alignment", "training") for key in ("tf32", "use_cpu")},
    "adapter__dropout": 0.0,
    **{f"model__modalities__{name}__encoder__dropout": 0.0 for name in ("visual", "audio")},
}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_curve_is_that_of_the_cpu(train, tmp_path, curve):
    cpu = train(tmp_path / "cpu", **EXACT | {"training__use_cpu": True, "alignment__use_cpu": True})
    gpu = train(tmp_path / "gpu", **EXACT)
    assert summary(gpu)["device"] != "cpu"
    ours, theirs = curve(gpu), curve(cpu)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [x or 0.0 for x in one] == pytest.approx([x or 0.0 for x in other], rel=2e-3, abs=1e-4)


def test_resumes_exactly(train, tmp_path, killed, same_adapter, curve):
    full = train(tmp_path / "full", **EXACT)
    folder = killed(full, tmp_path / "again", 4)
    train(folder, resume=True, **EXACT)
    same_adapter(folder, full)
    assert curve(folder) == curve(full)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__bf16": True},
        {"training__bf16": True, "training__gradient_checkpointing": True, "training__optim": "adamw_bnb_8bit"},
        {"training__bf16": True, "training__optim": "paged_adamw_8bit"},
        {"training__bf16": True, "training__torch_compile": True},
        {"balance": [{"name": "ogm", "alpha": 0.8}, {"name": "pareto_b"}]},
        {"training__observe_modalities": 1},
    ],
    ids=["bf16", "bf16 checkpointed, 8-bit Adam", "bf16, paged Adam", "bf16 compiled", "balance", "observed"],
)
def test_trains_and_evaluates(train, tmp_path, changes, losses):
    if "bnb" in str(changes) or "8bit" in str(changes):
        pytest.importorskip("bitsandbytes")
    folder = train(tmp_path / "run", training__use_cpu=False, **changes)
    assert all(math.isfinite(loss) for loss in losses(folder).values())
    main(["eval", str(folder), "--size", "8"])
    assert len((folder / "predictions.jsonl").read_text().splitlines()) >= 8
