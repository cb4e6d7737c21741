"""Several adapters, and layers that differ in state: each is asked for itself, never one for all."""

import pytest
import torch
from peft import get_peft_model


def test_a_disabled_layer_has_no_effect_on_the_others(tiny, batch):
    model, silent = tiny.adapted(), tiny.adapted()
    first = model.get_base_model().model.layers[0].self_attn.q_proj
    twin = silent.get_base_model().model.layers[0].self_attn.q_proj
    next(p for name, p in twin.named_parameters() if "moka_B" in name).data.zero_()
    full, expected = tiny.logits(model, batch), tiny.logits(silent, batch)
    first.enable_adapters(False)
    found = tiny.logits(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - full).abs().max() > 1e-3
    batch.mm_token_type_ids.zero_()
    assert (tiny.logits(model, batch) - expected).abs().max() > 0.01  # media are not treated as text
    first.enable_adapters(True)


# The maps of two adapters that see the same tokens differently; one layer, so that their updates add up.
MAPS = {
    "placeholders": {"modalities": {"text": [0], "media": [1]}, "modality_token_ids": {"media": [126]}},
    "ids": {"modalities": {"text": [0, 3], "visual": [1, 2]}, "modality_token_ids": {"visual": [126]}},
    "order": {
        "modalities": {"audio": [0], "text": [1], "visual": [3]},
        "modality_token_ids": {"audio": [126], "visual": [127]},
    },
    "weights": {"interaction_weight": 3.0, "adapt": ["audio", "text"], "interaction": "mean"},
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
        tiny.logits(model, batch, *names)
    with model.disable_adapter():
        tiny.logits(model, batch, *names)
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
    live = tiny.logits(model, batch)
    assert torch.equal(tiny.logits(model, batch), live)
    model.merge_adapter()
    tiny.same(tiny.logits(model, batch), live)


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
    trained = tiny.logits(model, batch)
    model.set_adapter("ref")
    assert torch.equal(tiny.logits(model, batch), trained)
    with model.disable_adapter():
        assert (tiny.logits(model, batch) - trained).abs().max() > 0.01
