"""Fused decoding equals a plain loop over tokens of its equations, with and without a cache, alone and in a batch."""

import copy
import math
import threading
from functools import partial

import pytest
import torch

from moka.analysis import Contribution
from moka.analysis.contribution import hidden_from_attention, modality_index
from moka.analysis.modality_fusion import fused_generate, mixed
from moka.errors import MokaError
from moka.modeling.hf_model import model_inputs
from moka.testing.mllms import SPECIAL

EXACT = {"abs": 1e-6, "rel": 0}
NAMES = ("composed, moka", "composed, lora", "composed, none", "qwen2_5_omni, none", "qwen2_5_omni, moka")
GREEDY = {
    "do_sample": False,
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "pad_token_id": 0,
    "suppress_tokens": [*SPECIAL],
}
BOTH = ("visual", "audio")


def generate_of(model, batch):
    return partial(model.generate, **model_inputs(model, batch))


@pytest.fixture(params=NAMES)
def case(request, composed, hugging_face):
    name, adapter = request.param.split(", ")
    example = composed(adapter) if name == "composed" else hugging_face(name, adapter)
    left_out = ("labels", "mm_token_type_ids", "interaction_ids", "question_mask")[
        : 4 if name != "composed" and adapter == "none" else 1
    ]
    example.batch = {key: value for key, value in example.batch.items() if key not in left_out}
    if (name, adapter) == ("qwen2_5_omni", "moka"):  # so that a plain loop knows that decoded text is no question
        types, mask = example.batch["mm_token_type_ids"], example.batch["attention_mask"]
        example.batch["question_mask"] = (types == 0) & (mask == 1)
    return example


def other_member(example):
    """The same model with other values of its adapter and projectors."""
    other = copy.deepcopy(example)
    generator = torch.Generator().manual_seed(5)
    for name, weight in other.model.named_parameters():
        if "moka_" in name or "projectors" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return other


@torch.no_grad()
def answers(example, weights="entropy", models=None, batch=None, **generation):
    batch = example.batch if batch is None else batch
    models = dict.fromkeys(BOTH, example.model) if models is None else models
    tokens = fused_generate(models, batch, generate_of, weights, **{**GREEDY, **generation})
    return tokens[:, batch["input_ids"].shape[1] :]


def next_logits(model, batch, new, name):
    """Logits [batch, vocabulary] after the prompt and ``new`` [batch, n], with one modality visible, without a cache."""
    rows = modality_index(model, batch)
    hidden = torch.stack([own for other, own in rows.items() if other != name]).any(0)
    inputs = dict(batch)
    pad = torch.nn.functional.pad
    n = new.shape[1]
    inputs["input_ids"] = torch.cat([batch["input_ids"], new], 1)
    inputs["attention_mask"] = pad(batch["attention_mask"], (0, n), value=1)
    for key in ("mm_token_type_ids", "interaction_ids", "question_mask"):
        if key in inputs:
            inputs[key] = pad(batch[key], (0, n))
    with hidden_from_attention(model, pad(hidden, (0, n))):
        return model(**inputs, use_cache=False).logits[:, -1].float()


@torch.no_grad()
def by_hand(models, batch, weights):
    """A loop over tokens: for each row the mixture, in plain Python, of the modalities that it has."""
    any_model = next(iter(models.values()))
    present = {name: modality_index(any_model, batch)[name].any(1).tolist() for name in models}
    new = batch["input_ids"][:, :0]
    for _ in range(GREEDY["max_new_tokens"]):
        logits = {name: next_logits(model, batch, new, name) for name, model in models.items()}
        chosen = []
        for i in range(len(new)):
            mine = {}
            for name in [n for n in models if present[n][i]] or list(models):
                one = logits[name][i].double()
                one[[token for token in SPECIAL if token < len(one)]] = -math.inf
                p = one.softmax(-1)
                mine[name] = one, -sum(x * math.log(x) for x in p.tolist() if x > 0)
            top = max(h for _, h in mine.values())
            w = {n: math.exp(top - h) if weights == "entropy" else 1.0 for n, (_, h) in mine.items()}
            chosen.append(sum(w[n] / sum(w.values()) * one for n, (one, _) in mine.items()).argmax())
        new = torch.cat([new, torch.stack(chosen)[:, None]], 1)
    return new


def test_the_mixture_by_hand():
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = math.exp(4) / (math.exp(4) + 1)
    h = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    every = torch.ones(2, 1, dtype=torch.bool)
    w = math.exp(math.log(2) - h) / (math.exp(math.log(2) - h) + 1)
    found = mixed(torch.stack([sure, unsure]), every, "entropy")
    assert found[0].tolist() == pytest.approx([4 * w, 0.0], **EXACT)
    three = mixed(torch.stack([sure, unsure, unsure]), torch.ones(3, 1, dtype=torch.bool), "entropy")
    w = math.exp(math.log(2) - h) / (math.exp(math.log(2) - h) + 2)
    assert three[0].tolist() == pytest.approx([4 * w, 0.0], **EXACT)
    assert mixed(torch.stack([sure, unsure]), every, "equal")[0].tolist() == pytest.approx([2.0, 0.0], **EXACT)
    one = torch.tensor([[True], [False]])
    assert mixed(torch.stack([sure, unsure]), one, "entropy")[0].tolist() == [4.0, 0.0]
    # Suppressed tokens stay so, also of a forward that does not count; beams follow their prompt.
    low = torch.tensor([[-math.inf, 1.0, 0.0]])
    assert mixed(torch.stack([low, low]), every, "entropy")[0].tolist() == pytest.approx([-math.inf, 1.0, 0.0])
    assert mixed(torch.stack([low, low]), one, "equal")[0].tolist() == pytest.approx([-math.inf, 1.0, 0.0])
    beams = torch.arange(8.0).view(2, 4, 1)
    sides = torch.tensor([[True, False], [False, True]])
    assert mixed(beams, sides, "equal")[:, 0].tolist() == [0.0, 1.0, 6.0, 7.0]


@pytest.mark.parametrize("weights", ["entropy", "equal"])
def test_tokens_are_those_of_the_equations(case, weights):
    expected = by_hand(dict.fromkeys(BOTH, case.model), case.batch, weights)
    assert torch.equal(answers(case, weights), expected)
    assert torch.equal(answers(case, weights, use_cache=False), expected)


def test_the_first_logits_are_those_that_the_analysis_measures(composed):
    """One token: the likelihood of the answer with one modality is what is mixed."""
    example = composed()
    found = Contribution(example.model, example.batch)
    prompt = {k: v[:, :-2] if v.dim() == 2 and v.shape[1] == 11 else v for k, v in example.batch.items()}
    seen = next_logits(
        example.model, {k: v for k, v in prompt.items() if k != "labels"}, prompt["input_ids"][:, :0], "visual"
    )
    log_p, _ = found.answer_distribution(["visual"])
    torch.testing.assert_close(seen.log_softmax(-1), log_p[:, 0], atol=1e-5, rtol=1e-4)


def test_an_ensemble_asks_each_model_with_its_modality(composed):
    example = composed()
    example.batch.pop("labels")
    other = other_member(example)
    models = {"visual": example.model, "audio": other.model}
    found = answers(example, "equal", models)
    assert torch.equal(found, by_hand(models, example.batch, "equal"))
    turned = answers(example, "equal", {"visual": other.model, "audio": example.model})
    assert not torch.equal(found, turned)


def test_an_adapter_whose_text_reads_media_reads_only_those_that_are_visible(composed):
    """With the reversed interaction text takes keys of media in the adapter, past the attention mask."""
    example = composed()
    example.batch.pop("labels")
    for module in example.model.modules():
        for config in getattr(module, "moka_config", {}).values():
            config.interaction = "reversed"
    changed = {**example.batch, "input_features": torch.randn_like(example.batch["input_features"])}
    picture = {"visual": example.model}
    assert torch.equal(answers(example, models=picture), answers(example, models=picture, batch=changed))


def test_rows_with_one_medium_are_decoded_as_usual(composed):
    example = composed()
    example.batch.pop("labels")
    plain = example.model.generate(**example.batch, **GREEDY)[:, example.batch["input_ids"].shape[1] :]
    assert torch.equal(answers(example)[1], plain[1])


def test_a_batch_is_answered_as_its_rows(composed):
    example = composed()
    names = ("pixel_values", "input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
    example.batch.pop("labels")
    together = answers(example)
    for index in (0, 1):
        one = {name: example.batch[name][index : index + 1] for name in names}
        one |= {"input_features": example.batch["input_features"]} if index == 0 else {}
        assert torch.equal(together[index : index + 1], answers(example, batch=one))


def test_beams_with_a_cache_equal_those_without(case):
    assert torch.equal(answers(case, num_beams=3), answers(case, num_beams=3, use_cache=False))


def test_an_error_in_one_forward_ends_all(composed):
    example, before = composed(), threading.active_count()
    example.batch.pop("labels")

    def breaking(model, batch):
        calls.append(1)
        broken = len(calls) == 2

        def generate(**kwargs):
            if broken:
                raise ValueError("broken")
            return model.generate(**batch, **kwargs)

        return generate

    calls = []
    with pytest.raises(ValueError, match="broken"):
        fused_generate(dict.fromkeys(BOTH, example.model), example.batch, breaking, "entropy", **GREEDY)
    assert threading.active_count() == before


def test_sampling_is_refused(composed):
    example = composed()
    with pytest.raises(MokaError, match="do_sample"):
        answers(example, do_sample=True)


def test_the_model_is_as_before_afterwards(case):
    logits = case.model(**case.batch, use_cache=False).logits
    answers(case)
    assert torch.equal(case.model(**case.batch, use_cache=False).logits, logits)
