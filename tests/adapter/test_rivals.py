"""The methods that MokA is compared with: equal to their definitions, and citizens of peft as MokA is."""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

import moka
from moka.adapter import MokaLinear
from moka.adapter.rivals import RIVALS
from moka.adapter.rivals.imod import OTHER, SHARED, TEXT
from moka.errors import MokaError

N = 3  # modalities
SETTINGS = {**{name: {"method": name} for name in RIVALS}, "uni_modal_lora": {"share_b": False, "interaction": "none"}}
GATED = {"loramoe", "hydralora", "uni_mm_lora_gate"}
BY_MODALITY = {"uni_modal_lora", "uni_mm_lora", "uni_mm_lora_gate"}
# Numbers of A, of B and of rows of the gate: the paper's table 1.
COUNTS = {
    "multiple_lora": (N, N, 0),
    "uni_modal_lora": (N, N, 0),
    "loramoe": (N, N, N),
    "hydralora": (1, N, N),
    "uni_mm_lora": (N + 1, 2, 0),
    "uni_mm_lora_gate": (N + 1, 2, 1),
    "imod": (1, 1, 0),
}
every = pytest.mark.parametrize("name", SETTINGS)
merged = pytest.mark.parametrize("name", [name for name in SETTINGS if name not in GATED])


def update(name, A, B, gate, x, rows):
    """Compute B~ z~ [batch, seq, out] from the definition, with a loop over matrices. x: [batch, seq, in]; rows: [batch, seq]."""
    paths = [[x @ a.T @ b.T for a in A] for b in B]  # [#B][#A]
    own = {m: (rows == m)[..., None].to(x.dtype) for m in range(N)}
    if name in ("multiple_lora", "imod"):
        return sum(paths[k][k] for k in range(len(A)))
    if name == "uni_modal_lora":
        return sum(own[m] * paths[m][m] for m in range(N))
    if name == "loramoe":
        w = (x @ gate.T).softmax(-1)
        return sum(w[..., k, None] * paths[k][k] for k in range(N))
    if name == "hydralora":
        w = (x @ gate.T).softmax(-1)
        return sum(w[..., k, None] * paths[k][0] for k in range(N))
    g = (x @ gate.T).sigmoid() if name == "uni_mm_lora_gate" else None
    first, second = sum(own[m] * paths[0][m] for m in range(N)), paths[1][N]
    return first + second if g is None else g * first + (1 - g) * second


def weights(layer, name="default"):
    gate = layer.moka_gate[name].weight if name in layer.moka_gate else None
    return layer.moka_A[name].weight, layer.moka_B[name].weight, gate


@contextmanager
def plain_layers(name, batch, adapted=(0, 1, 2)):
    """Compute the layers by `update`; only tokens of the rows ``adapted`` go through the adapter."""
    kinds = batch.mm_token_type_ids
    rows = torch.where(kinds == 3, 2, kinds.clamp(max=1)) * batch.attention_mask

    def forward(layer, x):
        takes = torch.isin(rows, torch.tensor(adapted))[..., None]
        return layer.base_layer(x) + layer.moka_scaling["default"] * takes * update(name, *weights(layer), x, rows)

    own = MokaLinear.forward
    MokaLinear.forward = forward
    try:
        yield
    finally:
        MokaLinear.forward = own


def step(model, batch, tiny):
    """Gradients of one training step."""
    model.train()
    model(**batch.kwargs(), labels=batch.input_ids, use_cache=False).loss.backward()
    return tiny.gradients(model)


@pytest.mark.parametrize("adapt", [None, ["visual"], ["text", "audio"]], ids=["all", "visual", "text and audio"])
@every
def test_logits_and_gradients_equal_the_definition(tiny, batch, name, adapt):
    options = {"method_options": {"decoupling_weight": 0, "alignment_weight": 0}} if name == "imod" else {}
    model = tiny.adapted(**SETTINGS[name], **options, adapt=adapt)
    rows = {None: (0, 1, 2), "visual": (1,), "text": (0, 2)}[adapt and adapt[0]]
    with plain_layers(name, batch, rows):
        expected = tiny.logits(model, batch)
        gradients = step(model, batch, tiny)
    model.zero_grad()
    torch.testing.assert_close(tiny.logits(model.eval(), batch), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (tiny.logits(model, batch) - expected).abs().max() > 0.05
    assert len(gradients) == (42 if name in GATED else 28)
    tiny.same_gradients(step(model, batch, tiny), gradients, atol=1e-5, rtol=1e-4)


@every
def test_partial_modality_inference_equals_adapting_these_only(tiny, batch, name):
    model = tiny.adapted(**SETTINGS[name])
    with plain_layers(name, batch, (0,)):
        expected = tiny.logits(model, batch)
    with moka.adapter.active_modalities(model, ["text"]):
        torch.testing.assert_close(tiny.logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@every
def test_parameter_count_is_the_formula_and_the_update_begins_at_zero(tiny, batch, name):
    backbone = tiny.backbone()
    plain = tiny.logits(backbone, batch, "input_ids", "attention_mask")
    model = get_peft_model(backbone, tiny.config(**SETTINGS[name], init_weights=True))
    a, b, gates = COUNTS[name]
    expected = sum(
        a * 4 * layer.in_features + b * 4 * layer.out_features + gates * layer.in_features
        for layer in tiny.layers(model).values()
    )
    assert model.get_nb_trainable_parameters()[0] == expected
    assert torch.equal(tiny.logits(model.eval(), batch), plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@every
def test_gradients_through_checkpointing_equal_those_without(tiny, batch, name, reentrant):
    options = {"method_options": {"balance_weight": 0.1}} if name == "loramoe" else {}
    expected = step(tiny.adapted(**SETTINGS[name], **options), batch, tiny)
    model = tiny.adapted(**SETTINGS[name], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tiny.same_gradients(step(model, batch, tiny), expected)


@every
def test_saved_and_loaded_adapter_is_the_same(tiny, batch, name, tmp_path):
    model = tiny.adapted(**SETTINGS[name])
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["method"]) == ("MOKA", SETTINGS[name].get("method", "moka"))
    loaded = PeftModel.from_pretrained(tiny.backbone(), tmp_path)
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))
    other = tiny.adapted()
    other.load_adapter(tmp_path, "other")
    other.set_adapter("other")
    assert torch.equal(tiny.logits(other, batch), tiny.logits(model, batch))


def test_method_and_its_options_survive_json(tmp_path):
    config = moka.MokaConfig(method="imod", method_options={"shared_share": 0.5, "seed": 2})
    config.save_pretrained(tmp_path)
    loaded = moka.MokaConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert (loaded.method_option("shared_share"), loaded.method_option("alignment_weight")) == (0.5, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["autocast", "float32"])
@every
def test_step_with_dropout_under_autocast_is_finite(tiny, batch, name, dtype):
    model = tiny.adapted(**SETTINGS[name], dropout=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        gradients = step(model, batch, tiny)
    assert len(gradients) == (42 if name in GATED else 28)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


@merged
def test_merged_equals_live_for_every_token(tiny, batch, name):
    model = tiny.adapted(**SETTINGS[name])
    live, layer = tiny.logits(model, batch), next(iter(tiny.layers(model).values()))
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.weight, before)
    tiny.same(tiny.logits(model, batch), live)
    tokens, _ = tiny.generate(model, batch)
    model.unmerge_adapter()
    tiny.same(layer.base_layer.weight, before)
    assert torch.equal(tokens, tiny.generate(model, batch)[0])
    if name in BY_MODALITY:
        with pytest.warns(UserWarning, match="Lost: the visual, audio projections"):
            model.merge_and_unload()
    else:  # nothing is lost, and nothing is warned of
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bare = model.merge_and_unload()
        tiny.same(tiny.logits(bare, batch, "input_ids", "attention_mask"), live)


@pytest.mark.parametrize("name", sorted(GATED))
def test_gate_cannot_be_merged(tiny, batch, name):
    model = tiny.adapted(**SETTINGS[name])
    live = tiny.logits(model, batch)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MokaError, match=f"'default' cannot be merged: method {name}"):
            merge()
    assert torch.equal(tiny.logits(model, batch), live)


@pytest.mark.parametrize(
    "layouts", [["t q q t"] * 2, ["i i q q t", "t t q"], ["a a", "a a"]], ids=["text", "images", "sound"]
)
@every
def test_batch_without_a_modality_gives_every_parameter_a_finite_gradient(tiny, name, layouts):
    model = tiny.adapted(**SETTINGS[name])
    gradients = step(model, tiny.rows(layouts), tiny)
    assert gradients.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every
def test_generation_with_a_cache_equals_a_recomputation_without(tiny, batch, name):
    model = tiny.adapted(**SETTINGS[name])
    tokens, cached = tiny.generate(model, batch)
    again, recomputed = tiny.generate(model, batch, use_cache=False)
    assert torch.equal(tokens, again)
    tiny.same(cached, recomputed)


@every
def test_next_to_a_moka_adapter_each_routes_as_it_is(tiny, batch, name):
    alone = tiny.logits(tiny.adapted(), batch)
    model = tiny.adapted(**SETTINGS[name])
    own = tiny.logits(model, batch)
    model.add_adapter("moka", tiny.config())
    for key, parameter in tiny.adapted().named_parameters():
        if ".moka_" in key:
            model.get_parameter(key.replace(".default.", ".moka.")).data = parameter.data.clone()
    assert torch.equal(tiny.logits(model, batch), own)
    model.set_adapter("moka")
    tiny.same(tiny.logits(model, batch), alone)
    model.base_model.set_adapter(["default", "moka"])
    model.delete_adapter("default")
    tiny.same(tiny.logits(model, batch), alone)


def test_multiple_lora_equals_one_lora_of_rank_n_r(tiny, batch):
    model = tiny.adapted(method="multiple_lora")
    targets = sorted(next(iter(model.peft_config.values())).target_modules)
    lora = get_peft_model(tiny.backbone(), LoraConfig(r=4 * N, lora_alpha=8 * N, target_modules=targets)).eval()
    for name, layer in tiny.layers(model).items():
        other = lora.get_base_model().get_submodule(name)
        A, B, _ = weights(layer)
        other.lora_A["default"].weight.data = A.detach().flatten(0, 1)
        other.lora_B["default"].weight.data = torch.cat(list(B.detach()), 1)
    expected = tiny.logits(lora, batch, "input_ids", "attention_mask")
    torch.testing.assert_close(tiny.logits(model, batch), expected, atol=1e-5, rtol=1e-5)


def one_layer(tiny, **settings):
    """A model with one adapted layer; its input [batch, seq, in] is read as the model runs."""
    model = tiny.adapted(**settings, target_modules=["o_proj"], layers_to_transform=[1]).train()
    (layer,) = tiny.layers(model).values()
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    return model, layer, seen


def test_imod_adds_the_gradients_of_its_two_constraints_to_a(tiny, batch):
    weight = {"decoupling_weight": 0.7, "alignment_weight": 0.3}
    plain = step(one_layer(tiny, method="imod", method_options=dict.fromkeys(weight, 0))[0], batch, tiny)
    model, layer, seen = one_layer(tiny, method="imod", method_options=weight)
    found = step(model, batch, tiny)
    A, masks = layer.moka_A["default"].weight.detach()[0].requires_grad_(), layer.moka_masks["default"]
    kind = {part: (masks == part).float() for part in (TEXT, OTHER, SHARED)}
    loss = 0.0
    for x, types, real in zip(seen[0], batch.mm_token_type_ids, batch.attention_mask.bool(), strict=True):
        text, other = x * (real & (types == 0))[:, None], x * (real & (types > 0))[:, None]
        for inputs, part in ((text, TEXT), (other, OTHER)):
            loss = loss + 0.7 * ((inputs @ (A * (kind[part] + kind[SHARED])).T - inputs @ A.T) ** 2).sum()
        if (real & (types > 0)).any():
            s = [x[real & (types == 0)] @ (A * kind[SHARED]).T, x[real & (types > 0)] @ (A * kind[SHARED]).T]
            c = sum(F.cosine_similarity(one, one.mean(0)[None]).mean() for one in s)
            loss = loss + 0.3 * (1 - c * F.cosine_similarity(s[0].mean(0), s[1].mean(0), dim=0))
    (expected,) = torch.autograd.grad(loss / len(seen[0]), A)
    assert expected.abs().max() > 1e-3
    for key, gradient in plain.items():
        added = expected[None] if ".moka_A." in key else 0
        torch.testing.assert_close(found[key], gradient + added, atol=1e-5, rtol=1e-4)


def test_imod_masks_divide_a_by_depth_and_are_drawn_again_alike(tiny, batch):
    options = {"shared_share": 0.2, "shared_growth": 0.4}
    first, again, other = (
        tiny.adapted(method="imod", r=16, method_options={**options, "seed": seed}) for seed in (0, 0, 1)
    )
    for model in (first, again, other):
        step(model, batch, tiny)
    for (name, layer), same, differs in zip(
        tiny.layers(first).items(), tiny.layers(again).values(), tiny.layers(other).values(), strict=True
    ):
        masks, depth = layer.moka_masks["default"], 0.5 * (".1." in name)
        shares = [(masks == part).float().mean().item() for part in (TEXT, OTHER, SHARED)]
        shared = 0.2 + 0.4 * depth
        assert shares == pytest.approx([(1 - shared) / 2, (1 - shared) / 2, shared], abs=0.06)
        assert torch.equal(masks, same.moka_masks["default"])
        assert not torch.equal(masks, differs.moka_masks["default"])
    assert not any("mask" in key for key in first.state_dict())


def test_balance_loss_of_loramoe_is_added_to_the_gate(tiny, batch):
    plain = step(one_layer(tiny, method="loramoe")[0], batch, tiny)
    model, layer, seen = one_layer(tiny, method="loramoe", method_options={"balance_weight": 0.5})
    layer.moka_model.auxiliary_scale = 0.25  # as of four accumulated batches
    found = step(model, batch, tiny)
    gate = layer.moka_gate["default"].weight.detach().requires_grad_()
    importance = (seen[0][batch.attention_mask.bool()] @ gate.T).softmax(-1).sum(0)
    (expected,) = torch.autograd.grad(0.5 * importance.var(correction=0) / importance.mean(), gate)
    for key, gradient in plain.items():
        added = 0.25 * expected if ".moka_gate." in key else 0
        torch.testing.assert_close(found[key], gradient + added, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["multiple_lora", "loramoe", "hydralora"])
def test_methods_that_see_no_modality_need_no_routing(tiny, batch, name):
    """The fixture of all tests turns the warning of an unrouted layer into an error."""
    model = tiny.adapted(**SETTINGS[name]).train()
    embeds = model.get_input_embeddings().weight[batch.input_ids].detach()
    model(inputs_embeds=embeds, attention_mask=batch.attention_mask, labels=batch.input_ids).loss.backward()
    assert tiny.gradients(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "lorahub"}, ["method", "'lorahub'", "loramoe"]),
        ({"method": "loramoe", "share_b": False}, ["share_b", "loramoe"]),
        ({"method": "imod", "interaction": "mean"}, ["interaction", "'mean'", "imod"]),
        ({"method": "imod", "method_options": {"seeds": 1}}, ["method_options", "'seeds'", "Did you mean 'seed'"]),
        ({"method_options": {"seed": 1}}, ["method_options", "moka", "none"]),
        ({"method": "loramoe", "method_options": {"balance_weight": -1}}, ["balance_weight", "-1"]),
        ({"method": "imod", "text_merged": True}, ["text_merged", "imod"]),
    ],
)
def test_settings_without_meaning_are_refused(fields, words):
    with pytest.raises(MokaError) as caught:
        moka.MokaConfig(**fields)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("look", ["interaction_weights", "modality_norms", "gradient_norms"])
def test_what_reads_mokas_own_matrices_refuses_another_method(tiny, batch, look):
    model = tiny.adapted(method="hydralora")
    step(model, batch, tiny)
    arguments = () if look == "gradient_norms" else (batch.kwargs(),)
    with pytest.raises(MokaError, match="hydralora"):
        getattr(moka.adapter, look)(model, *arguments)


def test_baselines_that_are_settings_are_presets():
    found = {name: moka.MokaConfig.preset(name, r=2) for name in ("uni_modal_lora", "moka_reversed", "moka_mean")}
    assert (found["uni_modal_lora"].share_b, found["uni_modal_lora"].interaction) == (False, "none")
    assert [found[name].interaction for name in ("moka_reversed", "moka_mean")] == ["reversed", "mean"]
    assert moka.MokaConfig.preset("moka_no_interaction").interacts is False
