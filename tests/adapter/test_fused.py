"""The fused functions: equal to plain operators, dropout drawn anew in backward, one input kept, nothing watched changed."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import moka
from moka.adapter import layer as layers
from moka.adapter import ops
from moka.adapter.ops import draw_seed, dropped_positions, project

ROUTED = ("mm_token_type_ids", "interaction_ids", "attention_mask")


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
def test_fused_equals_plain_operators(tiny, kind, interaction, share_b, position):
    for adapt in (None, ["visual"]):
        settings = {"interaction": interaction, "share_b": share_b, "scale_position": position, "adapt": adapt}
        model = tiny.adapted(kind, interaction_weight={"visual": 0.5, "audio": 2.0}, **settings)
        for layouts in (
            ["t i i i a a q q q t", "t i i q q t", "i1 q1 q1 i2 q2 t a2"],
            ["t t q", "q t"],
            ["t q i a i q t"],
        ):
            batch = tiny.rows(layouts)
            ours = step(model, batch, tiny)
            adapts = adapt is None or bool((batch.mm_token_type_ids == 1).any())
            assert any(grad.abs().max() > 0 for grad in ours[1].values()) == adapts
            with tiny.plain_layers():
                theirs = step(model, batch, tiny)
            assert_equal(ours, theirs)


@pytest.mark.parametrize("settings", [{"rank_pattern": {"k_proj": 2}}, {"alpha_pattern": {"up_proj": 40}}], ids=str)
def test_projections_of_different_rank_or_scale(tiny, settings, batch):
    for position in ("output", "input"):
        model = tiny.adapted(scale_position=position, **settings)
        ours = step(model, batch, tiny)
        with tiny.plain_layers():
            assert_equal(ours, step(model, batch, tiny))


def half_precision(tiny, batch, cast):
    """Logits and gradients, fused and plain, of a model that ``cast`` runs in bfloat16; and those in float32."""
    exact = step(tiny.adapted(), batch, tiny)
    ours = cast(lambda model: step(model, batch, tiny))
    with tiny.plain_layers():
        theirs = cast(lambda model: step(model, batch, tiny))
    return ours, theirs, exact


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
    def cast(run):
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return run(tiny.adapted())
        return run(tiny.adapted(backbone=tiny.backbone().bfloat16()))

    ours, theirs, exact = half_precision(tiny, batch, cast)
    for own, plain in zip(off(ours, exact), off(theirs, exact), strict=True):
        assert 0 < own <= 1.3 * plain


def test_gradients_of_the_functions(monkeypatch):
    monkeypatch.setattr(ops, "draw_seed", lambda: 7)  # the same dropout in each of the checker's calls
    torch.manual_seed(0)
    x, A, B = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((2, 3, 5), (3, 4, 5), (6, 4)))
    W = torch.randn(6, 5, dtype=torch.double)
    index = torch.tensor([0, 4, 8, 9, 12, 17])
    keep = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.double)[:, None]

    def run(x, A, B, owns_gradient, in_place):
        again, z = down(x, A, index, keep, 0.5, 0.3, owns_gradient)
        return up(again @ W.T, z, B, 2.0, in_place)

    for owns_gradient, in_place in itertools.product((True, False), repeat=2):
        assert torch.autograd.gradcheck(run, (x, A, B, owns_gradient, in_place))


def test_a_graph_may_be_gone_through_twice(tiny, batch):
    model = tiny.adapted().train()
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
    for places in (dropped[:, :20], dropped[:, -20:]):
        assert abs(places.mean() - rate) < 5 * (rate * (1 - rate) / places.numel()) ** 0.5
    both = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(both - rate**2) < 6 * (rate**2 / dropped.numel()) ** 0.5 + 1e-6


def test_dropout_is_that_of_its_seed_forward_and_backward():
    torch.manual_seed(0)
    x, A = torch.randn(50, 8, requires_grad=True), torch.randn(1, 3, 8, requires_grad=True)
    state = torch.get_rng_state()
    _, z = down(x, A, None, None, 1.0, 0.25)
    torch.set_rng_state(state)
    mask = torch.ones(400)
    mask[dropped_positions(400, 0.25, draw_seed())] = 0
    given = x * mask.view(50, 8) / 0.75
    torch.testing.assert_close(z, given @ A[0].T)
    direction = torch.randn_like(z)
    expected = torch.autograd.grad(given @ A[0].T, (x, A), direction)
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


# --- projections that share an input


class Attention(nn.Module):
    """q, k and v of one input, or of inputs that ``change`` made different."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.change = change
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(self.change(x)) + 2 * self.v_proj(x)


def attention(change=lambda x: x, **settings):
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj"]
    return get_peft_model(
        Attention(change),
        moka.MokaConfig(**{"r": 3, "dropout": 0.0, "init_weights": False, "target_modules": names, **settings}),
    )


def count_products(monkeypatch, run):
    calls = []
    monkeypatch.setattr(shared, "down", lambda *args: calls.append(1) or down(*args))
    run()
    return len(calls)


def test_projections_of_one_input_are_computed_together(tiny, batch, monkeypatch):
    model = tiny.adapted()
    # Of each of the two blocks: q, k, v; o; gate, up; down.
    assert count_products(monkeypatch, lambda: step(model, batch, tiny)) == 2 * 4


def scaled_in_place(x):
    with torch.no_grad():
        return x.mul_(2.0)


@pytest.mark.parametrize("change", [lambda x: x * 2, scaled_in_place], ids=["another", "written to"])
def test_another_input_is_noticed(change, monkeypatch):
    model = attention(change)
    types = torch.tensor([[0, 1, 3, 0]])
    x = torch.randn(1, 4, 6)

    def run():
        return model(x.clone(), mm_token_type_ids=types, question_mask=types == 0)

    ours = []
    count_products(monkeypatch, lambda: ours.append(run()))
    with tiny.plain_layers():
        torch.testing.assert_close(ours[0], run())


def test_nothing_is_held_after_the_forward(tiny, batch):
    model = tiny.adapted()
    model.base_model.model.model.layers[0].self_attn.v_proj.forward = lambda x: x.new_zeros(*x.shape[:2], 32)
    router = model.base_model.model.moka_router
    model(**batch.kwargs())
    assert router.shared._input is None
    assert not router.shared._waiting


def test_two_adapters_at_once(tiny, batch):
    model = tiny.adapted()
    model.add_adapter("second", tiny.config(interaction_weight=0.3))
    tiny.strong_(model, seed=9)
    model.base_model.set_adapter(["default", "second"])
    ours = step(model, batch, tiny)
    with tiny.plain_layers():
        assert_equal(ours, step(model, batch, tiny))


# --- what is kept and built


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
        held = run()
    total = sum(storages.values())
    del held
    return total


def test_one_copy_of_each_input_is_kept(tiny):
    batch = tiny.rows(["t i i i a a q q q t " * 12] * 4)
    tokens = batch.input_ids.numel()
    embeds = torch.randn(*batch.input_ids.shape, 64, requires_grad=True)

    def kept(model):
        routed = batch.kwargs(*ROUTED) if isinstance(model.peft_config["default"], moka.MokaConfig) else {}
        return kept_bytes(model, lambda: model.train()(inputs_embeds=embeds, **routed).logits)

    frozen = tiny.adapted()
    with frozen.disable_adapter():
        bare = kept(frozen)
    names = list(moka.adapter.config.DEFAULT_TARGETS)
    lora = get_peft_model(tiny.backbone(), LoraConfig(r=4, target_modules=names, lora_dropout=0.05))
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
    model = tiny.adapted(interaction="question")
    with Shapes() as shapes:
        step(model, batch, tiny)
    maps = {shape: n for shape, n in shapes.seen.items() if shape[-2:] in ((37, 23), (23, 37))}
    # The mask of who may read whom, made once for all 14 layers.
    assert sum(maps.values()) <= 10, maps
    with Shapes() as shapes, tiny.plain_layers():
        step(model, batch, tiny)
    assert sum(n for shape, n in shapes.seen.items() if shape[-2:] in ((37, 23), (23, 37))) > 100


# --- who else looks at the base layer


def test_a_hook_on_the_base_layer_sees_its_result(tiny, batch):
    model = tiny.adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    watched = step(model, batch, tiny)
    handle.remove()
    x, result = seen[0]
    assert torch.equal(result, nn.functional.linear(x, layer.base_layer.weight))
    assert_equal(watched, step(model, batch, tiny))


def test_a_hook_on_an_input_sees_its_whole_gradient():
    model = attention()
    types = torch.tensor([[0, 1, 3, 0]])
    x = torch.randn(1, 4, 6, requires_grad=True)
    found = []
    for path in (False, True):
        leaf = x.detach().requires_grad_()
        inner = leaf * 1.0
        inner.retain_grad()
        if path:
            with tiny.plain_layers():
                y = model(inner, mm_token_type_ids=types, question_mask=types == 0)
        else:
            y = model(inner, mm_token_type_ids=types, question_mask=types == 0)
        y.square().sum().backward()
        found.append((inner.grad, leaf.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("everywhere", [False, True], ids=["of the layer", "of all modules"])
def test_a_backward_hook_keeps_what_it_saw(tiny, batch, everywhere):
    model = tiny.adapted()
    expected = step(model, batch, tiny)
    seen = []

    def hook(module, grad_input, grad_output):
        seen.extend((grad, grad.clone()) for grad in grad_input if grad is not None)

    if everywhere:
        handle = nn.modules.module.register_module_full_backward_hook(hook)
    else:
        layer = model.base_model.model.model.layers[1].self_attn.q_proj
        handle = layer.base_layer.register_full_backward_hook(hook)
    try:
        assert_equal(step(model, batch, tiny), expected)
    finally:
        handle.remove()
    assert seen
    assert all(torch.equal(now, then) for now, then in seen)


def test_a_base_layer_that_keeps_its_result_is_left_alone():
    class Sigmoid(nn.Linear):
        def forward(self, x):
            return super().forward(x).sigmoid()

    torch.manual_seed(0)
    model = attention()
    model.base_model.model.q_proj.base_layer = Sigmoid(6, 5)
    x, types = torch.randn(1, 4, 6), torch.tensor([[0, 1, 3, 0]])
    results = []
    for plain in (False, True):
        leaf = x.clone().requires_grad_()
        if plain:
            with tiny.plain_layers():
                y = model(leaf, mm_token_type_ids=types, question_mask=types == 0)
        else:
            y = model(leaf, mm_token_type_ids=types, question_mask=types == 0)
        results.append((y, torch.autograd.grad(y.square().sum(), leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


# --- other modes of PyTorch


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
    model = attention()
    x, types = torch.randn(1, 4, 6), torch.tensor([[0, 1, 3, 0]])
    with moka.routing(model, mm_token_type_ids=types, question_mask=types == 0):
        with torch.inference_mode():
            before = model(x)
        after = model(x)
        after.sum().backward()
    assert torch.equal(before, after.detach())


def test_functional_gradients(tiny):
    model = attention()
    x, types = torch.randn(1, 4, 6), torch.tensor([[0, 1, 3, 0]])
    own = {name: p.detach() for name, p in model.named_parameters() if "moka_" in name}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    with moka.routing(model, mm_token_type_ids=types, question_mask=types == 0):
        functional = torch.func.grad(loss)(own)
        model(x).square().sum().backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(functional[name], grad, msg=name)


def test_the_seed_comes_from_the_host_whatever_the_default_device():
    with torch.device("meta"):
        assert isinstance(draw_seed(), int)


def test_a_mask_of_bfloat16(tiny, batch):
    model = tiny.adapted()
    expected = model(**batch.kwargs()).logits
    batch.attention_mask = batch.attention_mask.bfloat16()
    torch.testing.assert_close(model(**batch.kwargs()).logits, expected)


def test_every_parameter_has_a_gradient_where_no_token_is_adapted(tiny):
    for share_b in (True, False):
        model = tiny.adapted(adapt=["visual"], share_b=share_b)
        _, grads = step(model, tiny.rows(["t t q q", "q t"]), tiny)
        assert len(grads) == 28
        assert all(grad.shape == model.get_parameter(name).shape for name, grad in grads.items())
        assert all((grad == 0).all() for grad in grads.values())


# --- decoding


def test_a_forward_that_somebody_replaced_stays(tiny, batch):
    """accelerate moves weights between devices that way."""
    model = tiny.adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    calls = []
    own = layer.forward
    layer.forward = lambda x: calls.append(x.shape[1]) or own(x)
    model.generate(**batch.kwargs(), max_new_tokens=4, do_sample=False)
    model(**batch.kwargs())
    assert calls == [10, 1, 1, 1, 10]


def test_dropout_is_in_force_while_a_model_in_training_decodes(tiny, batch, monkeypatch):
    model = tiny.adapted(dropout=0.5).train()
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    drawn = []
    monkeypatch.setattr(ops, "draw_seed", lambda: drawn.append(1) or 7)
    model.generate(**batch.kwargs(), **settings)
    assert len(drawn) == 4 * 8  # in the prefill and in three steps: q, k, v; o; gate, up; down of two blocks


def test_gradients_at_a_decode_position(tiny):
    model = tiny.adapted()
    prompt = tiny.rows(["t i i q q t"])
    found = []

    def scores_with_gradients(ids, scores):
        if ids.shape[1] > 6:
            with torch.enable_grad():
                loss = model(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(held[0])).logits.sum()
                found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
        return scores

    held = [model(**prompt.kwargs(), use_cache=True).past_key_values]
    for layer in held[0].layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    model.generate(**prompt.kwargs(), max_new_tokens=3, do_sample=False, logits_processor=[scores_with_gradients])
    assert found
    assert all(grad.abs().max() > 0 for grad in found[0][:2])


def test_a_decode_step_is_the_base_layers_and_two_products_each(tiny):
    model = tiny.adapted()
    prompt = tiny.rows(["t i i q q t"])
    products = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            products[name] = products.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    def of(model, tokens, **kwargs):
        products.clear()
        with Count():
            model.generate(prompt.input_ids, max_new_tokens=tokens, do_sample=False, **kwargs)
        return {
            name: products.get(name, 0) for name in ("mm", "addmm", "addmm_", "bmm", "index_select", "gather", "add")
        }

    routed = prompt.kwargs(*ROUTED)
    adapted = {name: of(model, 3, **routed)[name] - n for name, n in of(model, 2, **routed).items()}
    backbone = tiny.backbone()
    bare = {name: of(backbone, 3)[name] - n for name, n in of(backbone, 2).items()}
    assert adapted == {**bare, "mm": bare["mm"] + 14, "addmm_": bare["addmm_"] + 14}


def test_decoding_equals_the_plain_operators_and_leaves_no_trace(tiny, batch):
    model = tiny.adapted()
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def logits():
        return torch.stack(model.generate(**batch.kwargs(), **settings).logits)

    ours = logits()
    assert not any("forward" in vars(module) for module in model.modules() if hasattr(module, "moka_A"))
    with tiny.plain_layers():
        torch.testing.assert_close(logits(), ours, atol=1e-4, rtol=1e-4)
    tiny.strong_(model, seed=4)
    changed = logits()
    assert not torch.allclose(changed, ours, atol=1e-2)
    with model.disable_adapter():
        assert not torch.allclose(logits(), changed, atol=1e-2)
