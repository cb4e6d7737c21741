"""The contribution engine: what is hidden has no influence, what is not hidden stays as it is, whatever the model."""

import pytest
import torch

from moka import MokaError
from moka.adapter.diagnostics import active_modalities
from moka.analysis import Contribution


def row_losses(model, batch):
    """Mean negative log-likelihood of each row's answer, from the model's own logits."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels" or "interaction_ids" not in batch}).logits
    targets = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1)


def test_all_modalities_are_the_model_itself(example):
    found = Contribution(example.model, example.batch)
    expected = -row_losses(example.model, example.batch)
    torch.testing.assert_close(found.log_likelihood(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.log_likelihood(found.modalities), expected, atol=1e-5, rtol=1e-5)


def test_hidden_media_have_no_influence_and_others_do(example):
    before = Contribution(example.model, example.batch)
    for changed, inputs in example.media.items():
        other = dict(example.batch) | {name: torch.randn_like(example.batch[name]) for name in inputs}
        after = Contribution(example.model, other)
        rest = [name for name in before.modalities if name != changed]
        torch.testing.assert_close(after.log_likelihood(rest), before.log_likelihood(rest), atol=1e-5, rtol=1e-5)
        assert (after.log_likelihood() - before.log_likelihood()).abs().max() > 1e-3


def test_hidden_tokens_keep_the_positions_of_the_others(composed):
    """Equal to the backbone with a mask of its own, at the original positions."""
    example = composed("none")
    model, batch = example.model, example.batch
    keep = batch["attention_mask"] * (batch["mm_token_type_ids"] != 3)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    masked = {**batch, "attention_mask": keep, "position_ids": positions}
    found = Contribution(model, batch).log_likelihood(["visual"])
    torch.testing.assert_close(found, -row_losses(model, masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["composed", "qwen2_5_omni"])
def test_adapter_ablation_is_partial_modality_inference(composed, hugging_face, name):
    example = composed("moka") if name == "composed" else hugging_face(name, "moka")
    found = Contribution(example.model, example.batch)
    for coalition in ((), ("text",), ("visual",), ("text", "audio")):
        with active_modalities(example.model, coalition):
            expected = -row_losses(example.model, example.batch)
        torch.testing.assert_close(found.log_likelihood(coalition, "adapter"), expected, atol=1e-5, rtol=1e-5)
    with example.model.disable_adapter():
        torch.testing.assert_close(
            found.log_likelihood((), "adapter"), -row_losses(example.model, example.batch), atol=1e-5, rtol=1e-5
        )


def test_blank_uses_the_batch_that_the_caller_gives(composed):
    example = composed()
    black = {**example.batch, "pixel_values": torch.zeros_like(example.batch["pixel_values"])}
    found = Contribution(example.model, example.batch, blank=lambda coalition: black)
    torch.testing.assert_close(found.log_likelihood(["audio"], "blank"), -row_losses(example.model, black))


def test_a_batch_equals_its_rows(composed):
    example = composed()
    together = Contribution(example.model, example.batch)
    for row, (pictures, sounds) in enumerate([((0, 1), (0, 1)), ((1, 2), (1, 1))]):
        real = example.batch["attention_mask"][row].bool()
        ids = {k: v[row, real][None] for k, v in example.batch.items() if v.shape == real[None].expand(2, -1).shape}
        media = {"pixel_values": example.batch["pixel_values"][slice(*pictures)]}
        if sounds[0] < sounds[1]:
            media["input_features"] = example.batch["input_features"][slice(*sounds)]
        single = Contribution(example.model, {**ids, **media})
        for coalition in ((), ("visual",), None):
            torch.testing.assert_close(
                single.log_likelihood(coalition)[0], together.log_likelihood(coalition)[row], atol=1e-5, rtol=1e-5
            )


def test_a_modality_that_a_row_lacks_adds_nothing_to_it(composed):
    example = composed()
    values = Contribution(example.model, example.batch).shapley()
    assert values["audio"][1].abs() < 1e-6
    assert values["visual"].abs().min() > 1e-4


@pytest.mark.parametrize("ablate", ["tokens", "adapter"])
def test_shapley_values_sum_to_the_gain_of_all(composed, ablate):
    example = composed()
    found = Contribution(example.model, example.batch)
    values = found.shapley(ablate=ablate)
    assert set(values.values) == set(found.players(ablate))
    torch.testing.assert_close(sum(values.values.values()), found.lift(ablate=ablate), atol=1e-5, rtol=1e-5)


def test_correct_is_greedy_decoding(composed):
    example = composed()
    model, batch = example.model, example.batch
    prompt = {k: v[:, :-2] for k, v in batch.items() if v.dim() == 2 and k != "labels"}
    media = {name: batch[name] for name in ("pixel_values", "input_features")}
    decoded = model.generate(**prompt, **media, max_new_tokens=2, do_sample=False)[:, -2:]
    answers = batch["labels"].clone()
    batch["input_ids"][0, -2:] = answers[0, -2:] = decoded[0]
    expected = torch.tensor([1.0, float((decoded[1] == answers[1, -2:]).all())])
    torch.testing.assert_close(Contribution(model, {**batch, "labels": answers}).correct(), expected)


def test_gradients_on_request_and_the_model_as_it_was(composed):
    example = composed()
    example.model.train()
    modes = [module.training for module in example.model.modules()]
    found = Contribution(example.model, example.batch)
    assert not found.log_likelihood(["visual"]).requires_grad
    assert [module.training for module in example.model.modules()] == modes
    found.log_likelihood(["visual"], grad=True).sum().backward()
    grads = {n: p.grad for n, p in example.model.named_parameters() if "layers.0." in n and "moka_A" in n}
    assert grads
    rows = list(example.model.peft_config["default"].modalities)
    assert all(grad[rows.index("visual")].abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize(
    ("change", "call", "words"),
    [
        ({"labels": None}, None, ["labels"]),
        ({"labels": torch.full((2, 11), -100)}, None, ["labels", "-100"]),
        ({"mm_token_type_ids": torch.zeros(2, 11, dtype=torch.long)}, None, ["mm_token_type_ids"]),
        ({}, {"coalition": ["visul"]}, ["'visul'", "visual"]),
        ({}, {"coalition": [], "ablate": "token"}, ["'token'", "tokens"]),
        ({}, {"coalition": [], "ablate": "blank"}, ["'blank'", "blank="]),
    ],
)
def test_bad_input_names_the_field(composed, change, call, words):
    example = composed()
    with pytest.raises(MokaError) as error:
        Contribution(example.model, {**example.batch, **change}).log_likelihood(**(call or {}))
    assert all(word in str(error.value) for word in words)


def test_an_unknown_value_function_is_refused_with_the_known_ones(composed):
    example = composed()
    with pytest.raises(MokaError, match=r"accurcy.*correct"):
        Contribution(example.model, example.batch).shapley("accurcy")
