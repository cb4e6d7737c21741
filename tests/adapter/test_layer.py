"""The layer against a slow reference: one token at a time, as section 3 of the paper reads."""

import itertools
import math

import pytest
import torch
from peft import get_peft_model
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


def reference(x, weight, bias, A, B, config, modality, groups, real):
    """y_t = W0 x_t + b + s B z~_t, token by token. modality: names; x: [seq, in] -> [seq, out]."""
    scale = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    adapts = config.adapt or NAMES
    goes = [modality[t] in adapts for t in range(len(x))]  # padding is text
    z = {t: A[NAMES.index(modality[t])] @ x[t] for t in range(len(x)) if goes[t]}
    if config.scale_position == "input":
        z = {t: scale * value for t, value in z.items()}
    lam = config.interaction_weight
    out = []
    for t in range(len(x)):
        y = weight @ x[t] + bias
        if goes[t]:
            added = torch.zeros_like(z[t])
            asks_text = config.interaction in ("question", "mean")
            is_query = (modality[t] != "text") == asks_text
            keys = [
                j
                for j in z
                if real[j]
                and real[t]
                and groups[j] == groups[t]
                and groups[j] > 0
                and (modality[j] == "text") == asks_text
                and is_query
            ]
            if keys and config.interaction == "mean":
                added = sum(z[j] for j in keys) / len(keys)
            elif keys and config.interaction in ("question", "reversed"):
                share = torch.softmax(torch.stack([z[t] @ z[j] for j in keys]) / math.sqrt(config.r), 0)
                added = sum(share[i] * z[j] for i, j in enumerate(keys))
            full = z[t] + (lam.get(modality[t], 1.0) if isinstance(lam, dict) else lam) * added
            update = (B if config.share_b else B[NAMES.index(modality[t])]) @ full
            y = y + (scale * update if config.scale_position == "output" else update)
        out.append(y)
    return torch.stack(out)


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(IN, OUT)

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


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("share_b", [True, False], ids=["one B", "own B"])
@pytest.mark.parametrize("position", ["output", "input"])
def test_layer_equals_reference(interaction, share_b, position):
    types, groups, real = ids()
    names = [[{0: "text", 3: "audio"}.get(int(i), "visual") for i in row] for row in types]
    for adapt, weight, rslora in itertools.product(ADAPTED, WEIGHTS, (False, True)):
        model, proj, config = layer(
            interaction=interaction,
            share_b=share_b,
            scale_position=position,
            adapt=adapt,
            interaction_weight=weight,
            use_rslora=rslora,
        )
        x = torch.randn(2, len(LAYOUT[0]), IN)
        direction = torch.randn(2, len(LAYOUT[0]), OUT)

        def run(f, x=x, direction=direction, proj=proj):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            return y, torch.autograd.grad(
                y, (leaf, proj.moka_A["default"].weight, proj.moka_B["default"].weight), direction
            )

        def ours(leaf, model=model):
            with moka.routing(model, mm_token_type_ids=types, interaction_ids=groups, attention_mask=real):
                return model(leaf)

        def theirs(leaf, proj=proj, config=config):
            shared = (proj.weight, proj.bias, proj.moka_A["default"].weight, proj.moka_B["default"].weight, config)
            return torch.stack([reference(leaf[b], *shared, names[b], groups[b], real[b]) for b in range(2)])

        y, grads = run(ours)
        expected, expected_grads = run(theirs)
        case = f"adapt={adapt} weight={weight} rslora={rslora}"
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4, msg=lambda m, case=case: f"{case}: {m}")
        for name, a, b in zip(("x", "A", "B"), grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-4, msg=lambda m, n=name, c=case: f"{c} {n}: {m}")


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
