"""The authors' code, variant by variant: outputs and gradients of one adapted linear (see tests/golden/README.md)."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

import moka

GOLDEN = Path(__file__).parents[1] / "golden"


class OneLinear(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0])
        self.proj.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, x):
        return self.proj(x)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    ("variant", "names"), [("avt", ["text", "visual", "audio"]), ("vt", ["text", "visual"])], ids=["avt", "vt"]
)
def test_preset_reproduces_authors_code(variant, names):
    g = load_file(GOLDEN / f"moka_layer_official_{variant}.safetensors")
    config = moka.MokaConfig.preset(f"official-{variant}", dropout=0.0, target_modules=["proj"])
    model = get_peft_model(OneLinear(g["weight"], g["bias"]), config)
    layer = model.base_model.model.proj
    A = torch.stack([g[f"A_{name}"] for name in names])
    layer.moka_A["default"].weight.data.copy_(A)
    layer.moka_B["default"].weight.data.copy_(g["B"])

    real = g["modality"] >= 0  # padding is text here, and was not adapted there: not compared
    type_ids = torch.tensor([0, 1, 3])[g["modality"].clamp(min=0)]
    x = g["x"].clone().requires_grad_()
    with moka.routing(model, mm_token_type_ids=type_ids, question_mask=g["question"], attention_mask=real):
        y = model(x)
    y.backward(g["grad_y"] * real[..., None])

    assert relative(y[real], g["y"][real]) < 1e-5
    assert relative(x.grad[real], g["grad_x"][real]) < 1e-5
    assert relative(layer.moka_B["default"].weight.grad, g["grad_B"]) < 1e-5
    for row, name in enumerate(names):
        assert relative(layer.moka_A["default"].weight.grad[row], g[f"grad_A_{name}"]) < 1e-5, name
