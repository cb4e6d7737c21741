"""The products, dropout and interaction: equal to plain operators, and what they keep in memory and build."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import moka
from moka.adapter.config import DEFAULT_TARGETS
from moka.adapter.ops import draw_seed, dropped_positions, project


def step(model, batch, tiny):
    """Logits and gradients of a training forward."""
    model.train()
    model.zero_grad()
    out = model(**batch.kwargs(), labels=batch.input_ids)
    out.loss.backward()
    return out.logits.detach(), tiny.gradients(model)


def assert_equal(ours, theirs, tolerance=1e-5):
    (logits, grads), (expected, expected_grads) = ours, theirs
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert grads.keys() == expected_grads.keys()
    largest = max((grad.abs().max() for grad in expected_grads.values()), default=0)
    for name, grad in grads.items():
        scale = max(expected_grads[name].abs().max(), 1e-2 * largest)  # some gradients are zero but for rounding
        assert (grad - expected_grads[name]).abs().max() <= 10 * tolerance * scale, name


# --- the same numbers as plain operators


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("interaction", ["question", "none", "reversed", "mean"])
@pytest.mark.parametrize("share_b", [True, False], ids=["one B", "own B"])
@pytest.mark.parametrize("position", ["output", "input"])
def test_training_step_equals_plain_operators(tiny, kind, interaction, share_b, position):
    for adapt in (None, ["visual"]):
        settings = {"interaction": interaction, "share_b": share_b, "scale_position": position, "adapt": adapt}
        # float64: a softmax over logits as sharp as these makes rounding large
        model = tiny.adapted(kind, interaction_weight={"visual": 0.5, "audio": 2.0}, **settings).double()
        for layouts in (
            ["t i i i a a q q q t", "t i i q q t", "i1 q1 q1 i2 q2 t a2"],
            ["t t q", "q t"],
            ["t q i a i q t"],
        ):
            batch = tiny.rows(layouts)
            ours = step(model, batch, tiny)
            adapts = adapt is None or bool((batch.mm_token_type_ids == 1).any())
            assert any(grad.abs().max() > 0 for grad in ours[1].values()) == adapts
            with tiny.plain_layers(batch):
                theirs = step(model, batch, tiny)
            assert_equal(ours, theirs)


def off(result, exact):
    """How far logits and gradients are off, relative to their norms."""
    (logits, grads), (expected, expected_grads) = result, exact
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    flat, expected_flat = (torch.cat([g[n].flatten() for n in sorted(grads)]) for g in (grads, expected_grads))
    return ((logits.float() - expected).norm() / expected.norm()).item(), (
        (flat - expected_flat).norm() / expected_flat.norm()
    ).item()


@pytest.mark.parametrize("how", ["autocast", "bfloat16 backbone"])
def test_half_precision_is_as_exact_as_with_plain_operators(tiny, batch, how):
    def low():
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return step(tiny.adapted(), batch, tiny)
        return step(tiny.adapted(backbone=tiny.backbone().bfloat16()), batch, tiny)

    exact, ours = step(tiny.adapted(), batch, tiny), low()
    with tiny.plain_layers(batch):
        theirs = low()
    for own, plain in zip(off(ours, exact), off(theirs, exact), strict=True):
        assert 0 < own <= 1.3 * plain


def test_a_graph_may_be_gone_through_twice(tiny, batch):
    model = tiny.adapted(dropout=0.3).train()
    loss = model(**batch.kwargs(), labels=batch.input_ids).loss
    loss.backward(retain_graph=True)
    once = tiny.gradients(model)
    loss.backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name], msg=name)


# --- dropout


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.3, 0.5, 0.9])
def test_positions_are_dropped_at_the_rate_and_each_on_its_own(rate):
    count, size = 400, 2000
    dropped = torch.zeros(count, size)
    for seed in range(count):
        positions = dropped_positions(size, rate, seed)
        assert (positions[1:] > positions[:-1]).all()
        dropped[seed, positions] = 1
    spread = (rate * (1 - rate) / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - rate) < 5 * spread
    # The first and the last positions, and pairs of neighbours, as often as any.
    for edge in (dropped[:, :20], dropped[:, -20:]):
        assert abs(edge.mean() - rate) < 5 * (rate * (1 - rate) / edge.numel()) ** 0.5
    both = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(both - rate**2) < 6 * (rate**2 / dropped.numel()) ** 0.5 + 1e-6


def test_dropout_is_that_of_its_seed_forward_and_backward():
    torch.manual_seed(0)
    x, A = torch.randn(50, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    state = torch.get_rng_state()
    z = project(x, A, 0.25)
    torch.set_rng_state(state)
    mask = torch.ones(400)
    mask[dropped_positions(400, 0.25, draw_seed())] = 0
    given = x * mask.view(50, 8) / 0.75
    torch.testing.assert_close(z, given @ A.T)
    direction = torch.randn_like(z)
    expected = torch.autograd.grad(given @ A.T, (x, A), direction)
    torch.testing.assert_close(torch.autograd.grad(z, (x, A), direction), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_a_recomputed_block_drops_the_same(tiny, batch, reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny.adapted(dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(5)
        results.append(step(model, batch, tiny))
    assert_equal(results[1], results[0])
    torch.manual_seed(6)
    assert not torch.equal(step(model, batch, tiny)[0], results[0][0])  # there is dropout


def test_the_seed_comes_from_the_host_on_any_default_device():
    with torch.device("meta"):
        assert isinstance(draw_seed(), int)


# --- what is kept for backward, and built


def kept_bytes(model, run):
    """Bytes of distinct storages that autograd keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(storages.values())
    del result
    return total


def test_one_copy_of_each_input_is_kept(tiny):
    batch = tiny.rows(["t i i i a a q q q t " * 12] * 4)
    tokens = batch.input_ids.numel()
    embeds = torch.randn(*batch.input_ids.shape, 64, requires_grad=True)

    def kept(model):
        routed = batch.ids if isinstance(model.peft_config["default"], moka.MokaConfig) else {}
        return kept_bytes(model, lambda: model.train()(inputs_embeds=embeds, **routed).logits)

    frozen = tiny.adapted()
    with frozen.disable_adapter():
        bare = kept(frozen)
    lora = get_peft_model(tiny.backbone(), LoraConfig(r=4, target_modules=list(DEFAULT_TARGETS), lora_dropout=0.05))
    extra, of_lora = kept(tiny.adapted(dropout=0.05)) - bare, kept(lora) - bare
    inputs = 2 * tokens * 4 * (64 + 64 + 64 + 96)  # of q, k, v; o; gate, up; down, in each of two blocks
    rank_space = 2 * tokens * 4 * 4 * 7
    assert extra <= inputs + 6 * rank_space
    assert extra < 0.7 * of_lora


class Shapes(TorchDispatchMode):
    """Counts the results of each shape."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen[tuple(tensor.shape)] = self.seen.get(tuple(tensor.shape), 0) + 1
        return result


def test_no_map_of_queries_and_keys_in_any_layer(tiny):
    batch = tiny.rows(["i " * 37 + "q " * 23 + "t " * 9, "i " * 11 + "q " * 23 + "t " * 3])
    with Shapes() as shapes:
        step(tiny.adapted(interaction="question"), batch, tiny)
    maps = {shape: n for shape, n in shapes.seen.items() if shape[-2:] in ((37, 23), (23, 37))}
    # The mask of who may attend to whom, made once for all 14 layers.
    assert 0 < sum(maps.values()) <= 10, maps


# --- other modes of PyTorch


def linear(**settings):
    torch.manual_seed(0)
    values = {"r": 3, "dropout": 0.0, "init_weights": False, "target_modules": ["0"], **settings}
    return get_peft_model(nn.Sequential(nn.Linear(6, 5)), moka.MokaConfig(**values))


TYPES = torch.tensor([[0, 1, 3, 0]])


def test_deterministic_algorithms(tiny, batch):
    model = tiny.adapted(dropout=0.2)
    torch.manual_seed(0)
    expected = step(model, batch, tiny)
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        assert_equal(step(model, batch, tiny), expected, tolerance=0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_after_inference_mode_in_one_block():
    model, x = linear(), torch.randn(1, 4, 6)
    with moka.routing(model, mm_token_type_ids=TYPES, question_mask=TYPES == 0):
        with torch.inference_mode():
            before = model(x)
        after = model(x)
        after.sum().backward()
    assert torch.equal(before, after.detach())


def test_functional_gradients(tiny):
    model, x = linear(), torch.randn(1, 4, 6)
    own = {name: p.detach() for name, p in model.named_parameters() if "moka_" in name}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    with moka.routing(model, mm_token_type_ids=TYPES, question_mask=TYPES == 0):
        functional = torch.func.grad(loss)(own)
        model(x).square().sum().backward()
    tiny.same_gradients(functional, tiny.gradients(model))


def test_a_mask_of_bfloat16(tiny, batch):
    model = tiny.adapted()
    expected = model(**batch.kwargs()).logits
    batch.attention_mask = batch.attention_mask.bfloat16()
    torch.testing.assert_close(model(**batch.kwargs()).logits, expected)


@pytest.mark.parametrize("share_b", [True, False], ids=["one B", "own B"])
def test_every_parameter_has_a_gradient_if_no_token_is_adapted(tiny, share_b):
    model = tiny.adapted(adapt=["visual"], share_b=share_b)
    _, grads = step(model, tiny.rows(["t t q q", "q t"]), tiny)
    assert len(grads) == 28
    assert all(grad.shape == model.get_parameter(name).shape for name, grad in grads.items())
    assert all((grad == 0).all() for grad in grads.values())
