"""Several adapters, and layers that differ in state: each is asked for itself, never one for all."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import moka

DERIVED = ("input_ids", "interaction_ids", "attention_mask")


def logits(model, batch, *names):
    with torch.no_grad():
        return model(**batch.kwargs(*names)).logits


def test_a_disabled_layer_has_no_effect_on_the_others(tiny, batch):
    model, silent = tiny.adapted(), tiny.adapted()
    first = model.get_base_model().model.layers[0].self_attn.q_proj
    twin = silent.get_base_model().model.layers[0].self_attn.q_proj
    next(p for name, p in twin.named_parameters() if "moka_B" in name).data.zero_()
    full, expected = logits(model, batch), logits(silent, batch)
    first.enable_adapters(False)
    found = logits(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - full).abs().max() > 1e-3
    batch.mm_token_type_ids.zero_()
    assert (logits(model, batch) - expected).abs().max() > 0.01  # media are not treated as text
    first.enable_adapters(True)


# The maps of two adapters that see the same tokens differently; one layer, so that their updates add up.
MAPS = {
    "placeholders": {"modalities": {"text": [0], "media": [1]}, "modality_token_ids": {"media": [126]}},
    "ids": {"modalities": {"text": [0, 3], "visual": [1, 2]}, "modality_token_ids": {"visual": [126]}},
    "order": {
        "modalities": {"audio": [0], "text": [1], "visual": [3]},
        "modality_token_ids": {"audio": [126], "visual": [127]},
    },
}


@pytest.mark.parametrize("other", MAPS)
def test_two_active_adapters_with_different_maps_add_up_in_any_order(tiny, batch, other):
    one_layer = {"target_modules": ["down_proj"], "layers_to_transform": [1]}
    model = get_peft_model(tiny.backbone(), tiny.config(**one_layer))
    model.add_adapter("other", tiny.config(**one_layer, **MAPS[other]))
    tiny.strong_(model).eval()
    names = ("input_ids", "attention_mask", "interaction_ids", *(["mm_token_type_ids"] if other == "ids" else []))
    outputs = []
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    for active in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(active)
        logits(model, batch, *names)
    with model.disable_adapter():
        logits(model, batch, *names)
    first, second, both, swapped, bare = outputs
    torch.testing.assert_close(both - bare, (first - bare) + (second - bare), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both, swapped, atol=1e-6, rtol=1e-6)
    assert min((first - both).abs().max(), (second - both).abs().max()) > 0.01


def test_an_adapter_added_to_a_model_in_evaluation_mode_is_in_evaluation_mode(tiny, batch):
    model = tiny.adapted(dropout=0.5)
    model.add_adapter("b", tiny.config(dropout=0.5))
    model.set_adapter("b")
    tiny.strong_(model)
    assert not any(module.training for module in model.modules())
    live = logits(model, batch)
    assert torch.equal(logits(model, batch), live)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), live, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_a_backbone_in_evaluation_mode_is_in_evaluation_mode(tiny, batch):
    model = get_peft_model(tiny.backbone().eval(), tiny.config(dropout=0.5))
    assert not any(module.training for module in model.get_base_model().modules())
    assert torch.equal(logits(model, batch), logits(model, batch))


def test_a_copy_of_a_trained_adapter_by_name_is_its_reference(tiny, batch):
    """As TRL makes the reference model of DPO: every parameter with `.default.` in its name, under another name."""
    config = tiny.config()
    model = tiny.strong_(get_peft_model(tiny.backbone(), config)).eval()
    model.add_adapter("ref", config)
    copied = 0
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            copied += 1
    assert copied == 28
    trained = logits(model, batch)
    model.set_adapter("ref")
    assert torch.equal(logits(model, batch), trained)
    with model.disable_adapter():
        assert (logits(model, batch) - trained).abs().max() > 0.01


def test_loading_into_a_merged_adapter_is_refused_and_costs_nothing(tiny, batch, tmp_path):
    model = tiny.adapted()
    tiny.strong_(copy.deepcopy(model), seed=7).save_pretrained(tmp_path)
    before, live = copy.deepcopy(model.state_dict()), logits(model, batch)
    model.merge_adapter()
    with pytest.raises(moka.MokaError, match="'default'"):
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model, batch), live, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-6, msg=name)
    model.load_adapter(tmp_path, "default")
    assert (logits(model, batch) - live).abs().max() > 0.01


def test_verbs_that_mean_nothing_here_are_refused_by_name(tiny, tmp_path):
    model = tiny.adapted()
    model.add_adapter("b", tiny.config())
    with pytest.raises(moka.MokaError, match="add_weighted_adapter"):
        model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "mean")
    model.delete_adapter("b")
    model.save_pretrained(tmp_path)
    with pytest.raises(moka.MokaError, match="load_adapter"):
        PeftModel.from_pretrained(model, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "import moka" in readme
    assert "KeyError: 'MOKA'" in readme


# Projections that read one input are computed together; what is changed in one of them counts for it.


def scaled(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def shifted(layer):
    layer.register_forward_hook(lambda module, args, out: out + 1)


def half(layer):
    layer.moka_A.to(torch.bfloat16)
    layer.moka_B.to(torch.bfloat16)


def rescaled(layer):
    layer.moka_scaling["default"] *= 3


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("change", [scaled, shifted, half, rescaled, nn.Module.eval], ids=lambda f: f.__name__)
def test_what_changes_one_projection_after_a_forward_counts(tiny, batch, name, change):
    rate = 0.5 if change is nn.Module.eval else 0.0
    used, fresh = tiny.adapted(dropout=rate), tiny.adapted(dropout=0.0)
    outputs = []
    for model in (used, fresh):
        layer = getattr(model.get_base_model().model.layers[0].self_attn, name)
        if model is used:
            model.train()
            logits(model, batch)
        change(layer)
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
        logits(model, batch)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("edited", ["labels", "mm_token_type_ids", "interaction_ids"])
def test_ids_edited_in_place_count(model, tiny, edited):
    batch = tiny.rows(["i i q q q t t t", "q i i q t t t t"])
    kwargs = batch.kwargs("input_ids", "mm_token_type_ids", "attention_mask")
    labels = torch.where(batch.interaction_ids == 0, batch.input_ids, -100)
    kwargs["labels" if edited == "labels" else "interaction_ids"] = (
        labels if edited == "labels" else batch.interaction_ids
    )
    before = model(**kwargs).logits
    kwargs[edited][0, 1 if edited == "mm_token_type_ids" else 4] = 0
    found = model(**kwargs).logits
    fresh = model(**{name: value.clone() for name, value in kwargs.items()}).logits
    assert torch.equal(found, fresh)
    assert (found - before)[0].abs().max() > 1e-3
