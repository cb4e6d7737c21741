"""Projections of one input: computed together if they may be, on their own if one of them differs."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

import moka
from moka.adapter import layer as layers
from moka.adapter import ops

TYPES = torch.tensor([[0, 1, 3, 0]])
ROWS = SimpleNamespace(mm_token_type_ids=TYPES, interaction_ids=TYPES * 0 + 1, attention_mask=TYPES * 0 + 1)
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """q, k and v of one input, or of one that ``change`` makes different before k reads it: [1, 4, 6] -> [3, 1, 4, 5]."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.change = change
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return torch.stack([self.q_proj(x), self.k_proj(self.change(x)), self.v_proj(x)])


def attention(change=lambda x: x, **settings):
    torch.manual_seed(0)
    values = {"r": 3, "dropout": 0.0, "init_weights": False, "target_modules": PROJECTIONS, **settings}
    return get_peft_model(Attention(change), moka.MokaConfig(**values)).double()


def run(model, x):
    """Outputs, and the gradients of the input and of the adapter."""
    leaf = x.clone().requires_grad_()
    y = model(leaf * 1, mm_token_type_ids=TYPES, question_mask=TYPES == 0)
    wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    return y, torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # the reference's softmax is in float32


@pytest.fixture
def x():
    return torch.randn(1, 4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def products(monkeypatch):
    """The widths of the products with A, one entry each."""
    widths = []
    own = ops.project
    monkeypatch.setattr(layers, "project", lambda x, A, rate: widths.append(len(A)) or own(x, A, rate))
    return widths


def test_projections_of_a_decoder_are_computed_together(tiny, batch, products):
    tiny.adapted()(**batch.kwargs())
    # Three modalities of rank 4, of q, k, v; o; gate, up; down in each of the two blocks.
    assert products == [12 * n for n in (3, 1, 2, 1)] * 2


def scaled_in_place(x):
    with torch.no_grad():
        return x.mul_(2.0)


@pytest.mark.parametrize(
    ("change", "together"),
    [(lambda x: x, True), (lambda x: x * 2, False), (scaled_in_place, False)],
    ids=["same", "another", "written to"],
)
def test_another_input_is_noticed(tiny, x, products, change, together):
    model = attention(change)
    with torch.no_grad():
        ours = model(x.clone(), mm_token_type_ids=TYPES, question_mask=TYPES == 0)
        assert (products == [27]) == together
        with tiny.plain_layers(ROWS):
            close(ours, model(x.clone(), mm_token_type_ids=TYPES, question_mask=TYPES == 0))


CHANGES = {
    "disabled": lambda k: k.enable_adapters(False),
    "inactive": lambda k: k.set_adapter([]),
    "merged": lambda k: k.merge(),
    "hooked": lambda k: k.register_forward_hook(lambda module, args, result: None),
    "hooked before": lambda k: k.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "another scale": lambda k: k.moka_scaling.update(default=5.0),
    "another dtype": lambda k: k.moka_A.float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_differs_is_computed_on_its_own(tiny, x, products, change):
    model = attention()
    run(model, x)  # together, before
    CHANGES[change](model.base_model.model.k_proj)
    products.clear()
    ours = run(model, x)
    assert products[0] == 18  # q and v
    assert len(products) == (1 if change in ("disabled", "inactive") else 2)
    with tiny.plain_layers(ROWS):
        close(ours, run(model, x))


@pytest.mark.parametrize("settings", [{"rank_pattern": {"k_proj": 2}}, {"alpha_pattern": {"k_proj": 40}}], ids=str)
@pytest.mark.parametrize("position", ["output", "input"])
@pytest.mark.parametrize("share_b", [True, False], ids=["one B", "own B"])
def test_projections_of_different_rank_or_scale(tiny, x, settings, position, share_b):
    model = attention(scale_position=position, share_b=share_b, **settings)
    ours = run(model, x)
    with tiny.plain_layers(ROWS):
        close(ours, run(model, x))


def test_one_in_evaluation_mode_drops_nothing(tiny, x):
    model = attention(dropout=0.5).train()
    with tiny.plain_layers(ROWS):
        expected = run(model, x)[0]
    model.base_model.model.k_proj.eval()
    q, k, v = run(model, x)[0]
    close(k, expected[1])
    for dropped, steady in ((q, expected[0]), (v, expected[2])):
        assert (dropped - steady).abs().max() > 0.01


def test_two_adapters_at_once(tiny, x):
    model = attention()
    model.add_adapter("second", moka.MokaConfig(r=2, dropout=0.0, init_weights=False, target_modules=PROJECTIONS))
    model.double().base_model.set_adapter(["default", "second"])
    ours = run(model, x)
    assert len(ours[1]) == 1 + 2 * 6
    with tiny.plain_layers(ROWS):
        close(ours, run(model, x))


def test_nothing_is_kept_after_the_forward(x):
    """Also not what was computed for a projection that was never called."""
    model = attention()
    model.base_model.model.v_proj.forward = lambda x: x.new_zeros(1, 4, 5)
    inputs = x.clone()
    with torch.no_grad():
        model(inputs, mm_token_type_ids=TYPES, question_mask=TYPES == 0)
    gone = weakref.ref(inputs)
    del inputs
    gc.collect()
    assert gone() is None
