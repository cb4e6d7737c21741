"""One adapted linear map: the authors' code (tests/golden/README.md), and the definition computed by plain operators."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

import moka
from moka.adapter.ops import draw_seed, dropped_positions

IN, OUT, RANK, ALPHA = 6, 5, 3, 7.0
NAMES = ("text", "visual", "audio")
TYPE_OF = {"t": 0, "v": 1, "w": 2, "a": 3}  # w: video, visual too
# Two rows; -: padding; the number is the interaction id (0: takes no part).
LAYOUT = [
    ["t0", "v1", "v1", "t1", "t1", "a1", "t0", "w2", "t2", "a2", "v3", "-"],
    ["-", "-", "t1", "a1", "t1", "v0", "t2", "t2", "v2", "a4", "t5", "-"],
]
INTERACTIONS = ("question", "none", "reversed", "mean")
ADAPTED = (None, ["visual"], ["text"], ["text", "audio"], ["visual", "audio"])
WEIGHTS = (1.0, 0.05, {"visual": 0.5, "audio": 2.0, "text": -1.5})


def ids():
    types = torch.tensor([[TYPE_OF.get(token[0], 0) for token in row] for row in LAYOUT])
    groups = torch.tensor([[int(token[1:] or 0) for token in row] for row in LAYOUT])
    return types, groups, torch.tensor([[token[0] != "-" for token in row] for row in LAYOUT])


class OneLinear(nn.Module):
    def __init__(self, out_features=OUT, in_features=IN):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.proj(x)


def layer(**settings):
    torch.manual_seed(0)
    config = moka.MokaConfig(**{"r": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": ["proj"], **settings})
    model = get_peft_model(OneLinear(), config)
    proj = model.base_model.model.proj
    for parameters in (proj.moka_A, proj.moka_B):
        parameters["default"].weight.data.normal_()
    return model, proj, config


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("variant", ["avt", "vt"])
def test_preset_reproduces_authors_code(variant):
    names = ["text", "visual", "audio"][: len(variant)]
    g = load_file(Path(__file__).parents[1] / "golden" / f"moka_layer_official_{variant}.safetensors")
    config = moka.MokaConfig.preset(f"official-{variant}", dropout=0.0, target_modules=["proj"])
    network = OneLinear(*g["weight"].shape)
    network.proj.load_state_dict({"weight": g["weight"], "bias": g["bias"]})
    model = get_peft_model(network, config)
    proj = model.base_model.model.proj
    proj.moka_A["default"].weight.data.copy_(torch.stack([g[f"A_{name}"] for name in names]))
    proj.moka_B["default"].weight.data.copy_(g["B"])

    real = g["modality"] >= 0  # padding is text here, and was not adapted there: not compared
    type_ids = torch.tensor([0, 1, 3])[g["modality"].clamp(min=0)]
    x = g["x"].clone().requires_grad_()
    with moka.routing(model, mm_token_type_ids=type_ids, question_mask=g["question"], attention_mask=real):
        y = model(x)
    y.backward(g["grad_y"] * real[..., None])

    assert relative(y[real], g["y"][real]) < 1e-5
    assert relative(x.grad[real], g["grad_x"][real]) < 1e-5
    assert relative(proj.moka_B["default"].weight.grad, g["grad_B"]) < 1e-5
    for row, name in enumerate(names):
        assert relative(proj.moka_A["default"].weight.grad[row], g[f"grad_A_{name}"]) < 1e-5, name


MAPS = ({}, {"modalities": {"text": [1], "visual": [0, 2], "point": [4], "audio": [3]}, "adapt": None})


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("share_b", [True, False], ids=["one B", "own B"])
@pytest.mark.parametrize("position", ["output", "input"])
def test_layer_equals_reference(tiny, interaction, share_b, position):
    """Outputs and gradients; padding is text that takes no part; other maps and orders of modalities too."""
    ids_ = ids()
    x = torch.randn(2, len(LAYOUT[0]), IN, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(2, len(LAYOUT[0]), OUT, generator=torch.Generator().manual_seed(1))
    settings = {"interaction": interaction, "share_b": share_b, "scale_position": position}
    for adapt, weight, more in itertools.product(ADAPTED, WEIGHTS, ({"use_rslora": True}, *MAPS)):
        model, proj, config = layer(**{**settings, "adapt": adapt, "interaction_weight": weight, **more})
        parameters = proj.moka_A["default"].weight, proj.moka_B["default"].weight

        def run(function, parameters=parameters):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            return y, *torch.autograd.grad(y, (leaf, *parameters), direction)

        names = ("mm_token_type_ids", "interaction_ids", "attention_mask")
        with moka.routing(model, **dict(zip(names, ids_, strict=True))):
            ours = run(model)
        theirs = run(lambda leaf, proj=proj: tiny.reference(proj, leaf, *ids_))
        for name, found, expected in zip(("y", "x", "A", "B"), ours, theirs, strict=True):
            tolerance = 1e-4 if name == "y" else 2e-3
            torch.testing.assert_close(
                found, expected, atol=tolerance, rtol=1e-4, msg=lambda m, n=name, c=config: f"{n} of {c}: {m}"
            )


def test_question_mask_equals_group_one():
    types, _, real = ids()
    model, _, _ = layer()
    x = torch.randn(2, len(LAYOUT[0]), IN)
    question = torch.zeros_like(real)
    question[:, 3:5] = True
    groups = (((types == 0) & question) | (types != 0)).long()
    common = {"mm_token_type_ids": types, "attention_mask": real}
    with moka.routing(model, question_mask=question, **common):
        masked = model(x)
    with moka.routing(model, question_mask=question.long(), **common):
        as_numbers = model(x)
    with moka.routing(model, interaction_ids=groups, **common):
        grouped = model(x)
    assert torch.equal(masked, grouped)
    assert torch.equal(masked, as_numbers)
    assert not torch.equal(masked, model_without_question(model, x, common))


def model_without_question(model, x, common):
    with moka.routing(model, interaction_ids=torch.zeros_like(common["mm_token_type_ids"]), **common):
        return model(x)


def test_text_without_media_is_lora_with_the_text_matrix():
    model, proj, _ = layer()
    x = torch.randn(2, 4, IN)
    with moka.routing(model, mm_token_type_ids=torch.zeros(2, 4, dtype=torch.long)):
        y = model(x)
    A, B = proj.moka_A["default"].weight[0], proj.moka_B["default"].weight
    torch.testing.assert_close(y, proj.base_layer(x) + ALPHA / RANK * (x @ A.T @ B.T))


def test_media_without_keys_have_no_interaction_and_no_nan():
    types = torch.tensor([[1, 1, 3, 1]])
    model, proj, _ = layer()
    x = torch.randn(1, 4, IN, requires_grad=True)
    with moka.routing(model, mm_token_type_ids=types, interaction_ids=torch.ones_like(types)):
        y = model(x)
    A, B = proj.moka_A["default"].weight[[1, 1, 2, 1]], proj.moka_B["default"].weight
    z = torch.einsum("tri,ti->tr", A, x[0])
    torch.testing.assert_close(y[0], proj.base_layer(x[0]) + ALPHA / RANK * z @ B.T)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(proj.moka_A["default"].weight.grad).all()


def test_every_modality_has_a_gradient_also_where_its_tokens_are_absent():
    """DDP and ZeRO wait for parameters without a gradient; stacked, there are none."""
    model, proj, _ = layer(share_b=False)
    for types in (torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 0]])):
        with moka.routing(model, mm_token_type_ids=types, question_mask=types == 0):
            model(torch.randn(1, 4, IN)).sum().backward()
        for stacked in (proj.moka_A["default"].weight, proj.moka_B["default"].weight):
            assert stacked.grad.shape == stacked.shape
            assert stacked.grad[2].abs().sum() == 0
        model.zero_grad()


def test_flattened_tokens_equal_batched_ones():
    """Some blocks flatten [batch, seq, in] to [batch * seq, in] before their linear layers."""
    types, groups, real = ids()
    model, _, _ = layer()
    x = torch.randn(2, len(LAYOUT[0]), IN)
    with moka.routing(model, mm_token_type_ids=types, interaction_ids=groups, attention_mask=real):
        assert torch.equal(model(x).flatten(0, 1), model(x.flatten(0, 1)))


def test_new_adapter_starts_at_zero_and_kaiming():
    model, proj, config = layer(init_weights=True)
    proj.update_layer("default", RANK, ALPHA, config)  # draws the weights that the helper replaced
    x = torch.randn(1, 4, IN)
    with moka.routing(model, mm_token_type_ids=torch.tensor([[0, 1, 3, 0]]), question_mask=torch.ones(1, 4).bool()):
        assert torch.equal(model(x), proj.base_layer(x))
    bound = 1 / math.sqrt(IN)  # Kaiming-uniform with a = sqrt(5)
    largest = proj.moka_A["default"].weight.abs().amax((1, 2))
    assert (largest <= bound).all()
    assert (largest > bound / 2).all()


def test_dropout_applies_to_the_input_and_only_in_training():
    model, proj, _ = layer(dropout=0.5)
    x = torch.randn(1, 200, IN)
    with moka.routing(model, mm_token_type_ids=torch.zeros(1, 200, dtype=torch.long)):
        torch.manual_seed(0)
        first, second = model.train()(x), model(x)
        steady = model.eval()(x)
        assert torch.equal(steady, model(x))
    assert not torch.allclose(first, second)
    # Each input is dropped or doubled, so the update is that of x times a 0-2 mask: the same dropout, drawn again.
    torch.manual_seed(0)
    mask = torch.full((x.numel(),), 2.0)
    mask[dropped_positions(x.numel(), 0.5, draw_seed())] = 0
    dropped = x * mask.view_as(x)
    A, B = proj.moka_A["default"].weight[0], proj.moka_B["default"].weight
    torch.testing.assert_close(first, proj.base_layer(x) + ALPHA / RANK * (dropped @ A.T @ B.T))


def test_softmax_is_in_float32_and_the_rest_in_the_activations_dtype():
    types, groups, real = ids()
    model, proj, _ = layer()
    proj.base_layer.to(torch.bfloat16)
    x = torch.randn(2, len(LAYOUT[0]), IN)
    with moka.routing(model, mm_token_type_ids=types, interaction_ids=groups, attention_mask=real):
        low = model(x.bfloat16())
        proj.base_layer.float()
        high = model(x)
    assert low.dtype == torch.bfloat16
    assert proj.moka_A["default"].weight.dtype == torch.float32
    torch.testing.assert_close(low.float(), high, atol=0.05 * high.abs().max().item(), rtol=0)
