"""MokA on transformers' own multimodal models, tiny and random: the towers stay bare, the ids come from the model.

Each model's inputs are built as its processor would: the placeholder token repeated once per feature, and the media
next to it. Capital letters of a layout are media (I image, V video, A sound), ``q`` question text, ``a`` an answer.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn

import moka
from moka.adapter.config import DEFAULT_TARGETS
from moka.testing import mllms


def adapted(case, tiny, base=None, **overrides):
    base = mllms.backbone(case) if base is None else base
    return tiny.strong_(get_peft_model(base, tiny.config(**{"modality_token_ids": None, **overrides}))).eval()


def takes_types(model):
    """Return whether Qwen-VL makes its positions of mm_token_type_ids: of transformers 5.3 and newer."""
    return "mm_token_type_ids" in inspect.signature(model.get_base_model().model.get_rope_index).parameters


def positions(model, batch):
    """Return the positions that Qwen-VL makes of mm_token_type_ids; if they are given, it needs no ids."""
    grids = {name: value for name, value in batch.media.items() if name.endswith("grid_thw")}
    if takes_types(model):
        grids["mm_token_type_ids"] = batch.mm_token_type_ids
    index, _ = model.get_base_model().model.get_rope_index(
        batch.input_ids, **grids, attention_mask=batch.attention_mask
    )
    return {"position_ids": index}


def generate(tiny, model, tokens, **options):
    """(new tokens, logits [steps, batch, vocabulary])."""
    return tiny.generate(model, tokens, max_new_tokens=4, suppress_tokens=list(mllms.SPECIAL), **options)


@pytest.fixture(scope="module", params=list(mllms.CASES))
def case(request):
    return mllms.CASES[request.param]


@pytest.fixture(scope="module")
def model(case, tiny):
    """Read-only."""
    return adapted(case, tiny)


@pytest.fixture
def batch(case):
    return mllms.prompt(case)


def logits_of(model, batch, **more):
    with torch.no_grad():
        return model(**{**batch.everything, **more}).logits


def test_only_the_language_models_projections_are_adapted(tiny, case, model):
    layers = set(tiny.layers(model))
    inside = f"{case.language_model}.layers"
    parents = dict.fromkeys(DEFAULT_TARGETS[:4], "self_attn") | dict.fromkeys(DEFAULT_TARGETS[4:], "mlp")
    assert layers == {f"{inside}.{i}.{parent}.{leaf}" for i in range(2) for leaf, parent in parents.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 28
    assert all(".moka_" in name and f"{inside}." in name for name in trained)
    assert len([m for m in model.modules() if isinstance(m, nn.Linear)]) > len(layers) + 1  # there are towers to leave


def test_placeholder_ids_come_from_the_models_config(case, model):
    tokens = sorted(mllms.PLACEHOLDER[letter][0] for letter in case.media if letter in "IV")
    expected = {"visual": tokens} if tokens else {}
    assert model.peft_config["default"].modality_token_ids == expected | (
        {"audio": [mllms.AUDIO]} if "A" in case.media else {}
    )


def test_given_and_derived_types_give_equal_logits(case, model, batch):
    given = logits_of(model, batch)
    # Qwen-VL needs mm_token_type_ids for its own positions, so without them the positions are given.
    own = positions(model, batch) if case.mrope else {}
    derived = logits_of(model, batch, mm_token_type_ids=None, **own)
    assert torch.equal(given, derived)
    with model.disable_adapter():
        bare = logits_of(model, batch)
    real = batch.attention_mask.bool()
    assert (given - bare)[real].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("to", ["text", "another modality"])
def test_moving_a_media_tokens_type_changes_the_logits(case, model, batch, to):
    own = positions(model, batch) if case.mrope else {}
    given = logits_of(model, batch, **own)
    media = batch.mm_token_type_ids[0].nonzero()[0]
    moved = batch.mm_token_type_ids.clone()
    moved[0, media] = 0 if to == "text" else 4 - moved[0, media]  # 1 <-> 3
    changed = logits_of(model, batch, **{**own, "mm_token_type_ids": moved})
    difference = (given - changed)[0].abs().amax(-1)
    assert difference[media:].min() > 1e-4
    assert difference[:media].max() == 0
    assert torch.equal(given[1], changed[1])


def test_every_modality_that_occurs_gets_gradients(case, tiny, batch):
    model = adapted(case, tiny).train()
    loss = model(**batch.everything, labels=batch.labels).loss
    loss.backward()
    occurs = [True, *(any(letter in case.media for letter in mllms.ROW[row]) for row in (1, 2))]
    first = rf"{re.escape(case.language_model)}\.layers\.0\."
    seen = 0
    for name, gradient in tiny.gradients(model).items():
        assert torch.isfinite(gradient).all(), name
        if "moka_B" in name:
            assert gradient.abs().max() > 0, name
        # Of the last layer, only media's keys and values reach the answer.
        elif re.search(first, name) or re.search("[kv]_proj", name):
            assert [bool(row.abs().max() > 0) for row in gradient] == occurs, name
            seen += 1
    assert seen == 9


def test_no_answer_token_changes_an_earlier_logit(case, tiny, batch):
    model = adapted(case, tiny).train()
    plain = logits_with_labels(model, batch)
    answer = batch.answer[0].nonzero()[0].item()
    for position in range(answer, batch.answer.shape[1]):
        changed = logits_with_labels(model, batch.with_token(0, position, 117))
        assert torch.equal(plain[0, :position], changed[0, :position])
        assert (plain[0, position:] - changed[0, position:]).abs().amax(-1).min() > 1e-4
    # What makes this able to fail: the question does reach the media before it.
    media = batch.mm_token_type_ids[0].nonzero()[0].item()
    asked = logits_with_labels(model, batch.with_token(0, answer - 1, 117))
    assert (plain[0, media] - asked[0, media]).abs().max() > 1e-4


def logits_with_labels(model, batch):
    """Return logits in training, with the keys derived from the labels of the answer."""
    return model(**batch.everything, labels=batch.labels).logits.detach()


def test_training_without_a_question_is_an_error(case, tiny, batch):
    model = adapted(case, tiny).train()
    with pytest.raises(moka.MokaError, match=r"turn_markers.*labels.*interaction_ids") as caught:
        model(**batch.everything)
    assert "Row 0 " in str(caught.value)


def test_cached_generation_equals_recompute(tiny, case, model, batch):
    if case.language_model == "model.text_model" and Version(tf.__version__) < Version("5.5"):
        pytest.skip(
            f"{case.model_class.__name__} before transformers 5.5 without a cache: the bare model differs as well"
        )
    tokens, logits = generate(tiny, model, batch.everything)
    again, recomputed = generate(tiny, model, batch.everything, use_cache=False)
    assert torch.equal(tokens, again)
    tiny.same(logits, recomputed)
    tiny.same(logits[0], logits_of(model, batch)[:, -1])
    with model.disable_adapter():
        _, bare = generate(tiny, model, batch.everything)
    assert (logits[0] - bare[0]).abs().max() > 0.01


def test_generation_with_given_ids_equals_derived(tiny, case, model, batch):
    own = {}
    if case.mrope and takes_types(model):  # so here they are given, after those of the text
        text = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)[None]
        own["position_ids"] = torch.cat([text, positions(model, batch)["position_ids"]])
    tiny.same(generate(tiny, model, batch.everything)[1], generate(tiny, model, {**batch.tokens, **own})[1])


def test_left_padded_batch_equals_singles(tiny, case, model):
    """Forward and generation of two prompts of different length, each with media of its own."""
    both = mllms.prompt(case)
    assert both.attention_mask[1, 0] == 0
    tokens, logits = generate(tiny, model, both.everything)
    full = logits_of(model, both)
    for i, single in enumerate(singles(case, both)):
        single_tokens, steps = generate(tiny, model, single.everything)
        assert torch.equal(tokens[i], single_tokens[0])
        tiny.same(logits[:, i], steps[:, 0])
        real = both.attention_mask[i].bool()
        tiny.same(full[i, real], logits_of(model, single)[0])


def singles(case, both):
    """The rows of ``both`` without padding, with their own media: each row has one piece of each letter it names."""
    for i, layout in enumerate(case.layouts):
        real, media = both.attention_mask[i].bool(), {}
        for letter, (_, make) in case.media.items():
            if letter not in layout:
                continue
            total = sum(row.count(letter) for row in case.layouts)
            before = sum(row.count(letter) for row in case.layouts[:i])
            for name in make(1):
                size = both.media[name].shape[0] // total
                media[name] = both.media[name][before * size : (before + 1) * size]
        columns = [t[i, real][None] for t in (both.input_ids, both.mm_token_type_ids, both.attention_mask, both.answer)]
        yield mllms.Prompt(*columns, media)


def test_save_and_load_round_trip_is_exact(case, model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mllms.backbone(case), tmp_path).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    assert loaded.peft_config["default"].modality_token_ids == model.peft_config["default"].modality_token_ids


def test_merging_keeps_the_logits(case, tiny, batch):
    model = adapted(case, tiny)
    weight = model.get_base_model().get_submodule(f"{case.language_model}.layers.0.self_attn.q_proj").base_layer.weight
    plain, bare, steps = logits_of(model, batch), weight.clone(), generate(tiny, model, batch.everything)[1]
    model.merge_adapter()
    assert (weight - bare).abs().max() > 1e-3
    tiny.same(logits_of(model, batch), plain)
    tiny.same(generate(tiny, model, batch.everything)[1], steps)
    model.unmerge_adapter()
    tiny.same(logits_of(model, batch), plain)


def train(model, batches):
    """All forwards, then one backward."""
    model.train()
    losses = [model(**batch.everything, labels=batch.labels, use_cache=False).loss for batch in batches]
    sum((i + 1) * loss for i, loss in enumerate(losses)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the frozen towers
def test_checkpointing_changes_no_gradient(case, tiny, reentrant):
    # The second batch has the rows of the first the other way round, and so another routing of the same shape.
    batches = [mllms.prompt(case), mllms.prompt(case, case.layouts[::-1], seed=5)]
    expected = train(adapted(case, tiny), batches)
    model = adapted(case, tiny)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    network = model.get_base_model().get_submodule(case.language_model)
    assert network.layers[0].gradient_checkpointing
    calls = []
    network.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    ours = train(model, batches)
    assert len(calls) == 2 * 2  # each forward ran again in the backward pass
    assert len(ours) == 28
    tiny.same_gradients(ours, expected)


# What follows is about choosing layers and token ids in models that nest otherwise.


def test_generating_with_the_speaking_model_equals_its_thinker(tiny):
    torch.manual_seed(0)
    base = tf.Qwen2_5OmniForConditionalGeneration(
        tf.Qwen2_5OmniConfig(thinker_config=mllms.qwen2_5_omni().to_dict(), enable_audio_output=False)
    )
    # For text, its generate asks for no more of the talker and the speaker than this.
    base.talker, base.speaker_map = SimpleNamespace(codec_pad_token=0), {"Chelsie": {}}
    model, batch = adapted(None, tiny, base.eval()), mllms.prompt(mllms.CASES["qwen2_5_omni"])
    with moka.routing(model, mm_token_type_ids=batch.mm_token_type_ids):
        expected = generate(tiny, model.get_base_model().thinker, batch.tokens)[1]
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(mllms.SPECIAL)}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    settings = {f"thinker_{name}": value for name, value in settings.items()}

    def logits(tokens):
        return torch.stack(model.generate(**tokens, **settings, generation_mode="text").logits)

    tiny.same(logits(batch.everything), expected)
    tiny.same(logits(batch.tokens), expected)
    moved = {**batch.everything, "mm_token_type_ids": torch.zeros_like(batch.input_ids)}
    assert (logits(moved) - expected)[0].abs().amax(-1).min() > 1e-3


def test_an_adapted_assistant_model_drafts_what_is_generated(case, tiny, model):
    """Its first call has the prompt's ids and one token more than they cover."""
    row = mllms.prompt(case, case.layouts[1:])
    plain, _ = generate(tiny, model, row.everything)
    twin = adapted(case, tiny)
    for draft in (twin, twin.get_base_model()):
        tokens, _ = generate(tiny, model, row.everything, assistant_model=draft)
        assert torch.equal(tokens, plain)
