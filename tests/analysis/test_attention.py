"""Attention by modality against the weights that transformers itself returns."""

import pytest
import torch

from moka import MokaError
from moka.analysis import Contribution
from moka.analysis.attention import attention_by_modality, conditional_utilization, interaction_off


def test_mass_equals_the_sum_of_the_models_own_weights(example):
    model, batch = example.model, example.batch
    found = attention_by_modality(model, batch)
    total = sum(found.mass[name] for name in found.mass)
    rows_differ = len({tuple(x) for x in Contribution(model, batch).rows["audio"].any(1, keepdim=True).tolist()}) > 1
    if not rows_differ:
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=1e-5)
    assert all((mass >= 0).all() and (mass <= 1 + 1e-6).all() for mass in found.mass.values())


def test_mass_of_a_composed_model_by_hand(composed):
    example = composed("none")
    model, batch = example.model, example.batch
    found = attention_by_modality(model, batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    types, answers = batch["mm_token_type_ids"], batch["labels"] != -100
    for layer, weight in enumerate(weights):
        rows = []
        for row in range(2):
            asks = answers[row].nonzero().flatten() - 1
            rows.append(weight[row][:, asks][..., types[row] == 1].sum(-1).mean(-1))
        torch.testing.assert_close(found.mass["visual"][layer], torch.stack(rows).mean(0), atol=1e-5, rtol=1e-5)
        asks = answers[0].nonzero().flatten() - 1  # only the first row has sound
        expected = weight[0][:, asks][..., types[0] == 3].sum(-1).mean(-1)
        torch.testing.assert_close(found.mass["audio"][layer], expected, atol=1e-5, rtol=1e-5)
    assert found.tokens == {"text": 6.0, "visual": 2.0, "audio": 3.0}
    torch.testing.assert_close(found.per_token()["visual"] * 2, found.mass["visual"])


def test_reading_attention_leaves_the_model_as_it_was(composed):
    example = composed()
    before = Contribution(example.model, example.batch).log_likelihood()
    implementation = example.model.get_base_model().language_model.config._attn_implementation
    attention_by_modality(example.model, example.batch)
    assert example.model.get_base_model().language_model.config._attn_implementation == implementation
    assert torch.equal(Contribution(example.model, example.batch).log_likelihood(), before)


def test_the_imbalance_rate_is_antisymmetric_and_bounded(composed):
    example = composed()
    found = attention_by_modality(example.model, example.batch)
    rate = found.imbalance_rate("visual", "audio")
    torch.testing.assert_close(rate, -found.imbalance_rate("audio", "visual"))
    assert (rate.abs() <= 2).all()
    assert rate.abs().max() > 0


def test_without_the_interaction_the_model_is_the_one_without_it(composed):
    example = composed()
    gain = conditional_utilization(example.model, example.batch)
    assert gain.abs().min() > 0
    before = Contribution(example.model, example.batch).log_likelihood()
    example.model.peft_config["default"].interaction = "none"
    without = Contribution(example.model, example.batch).log_likelihood()
    torch.testing.assert_close(before - without, gain, atol=1e-5, rtol=1e-5)


def test_a_model_without_an_adapter_has_no_interaction_to_switch_off(composed):
    with pytest.raises(MokaError, match="no MokA adapter"), interaction_off(composed("lora").model):
        pass
