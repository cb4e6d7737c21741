"""Prefill, cache, beams, chunks, turns and padding: every way to the same token gives the same logits."""

import contextlib

import pytest
import torch
from transformers import DynamicCache

import moka

NEW = 5
ROUTED = ("mm_token_type_ids", "interaction_ids")
WAYS = ("kwargs", "routing", "derived")
# One question before or after the media and no text besides, so that the derived ids are the given ones.
ONE_QUESTION = ["i i i a a q q q", "i i q q", "q q a a a i i", "q q q"]


def generate(model, r, ids=ROUTED, **options):
    """(sequences of new tokens, logits [steps, batch, vocab])."""
    out = model.generate(
        **r.kwargs("input_ids", "attention_mask", *ids),
        **{"max_new_tokens": NEW, "do_sample": False, **options},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, r.input_ids.shape[1] :], torch.stack(out.logits)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_adapter_and_interaction_reach_the_generated_logits(pair, batch, tiny):
    """What all equalities below rest on: neither of the two is negligible."""
    _, logits = generate(pair, batch)
    with pair.disable_adapter():
        _, bare = generate(pair, batch)
    batch.interaction_ids = torch.zeros_like(batch.interaction_ids)
    _, alone = generate(pair, batch)
    assert (logits[0] - bare[0]).abs().amax(-1).min() > 0.05
    assert (logits[0] - alone[0]).abs().amax(-1)[:3].min() > 0.01
    same(logits[0][3], alone[0][3])  # the text-only row has nothing to interact


def test_cache_equals_recompute(pair, batch):
    tokens, logits = generate(pair, batch)
    again, recomputed = generate(pair, batch, use_cache=False)
    assert torch.equal(tokens, again)
    same(logits, recomputed)


@pytest.mark.parametrize("way", WAYS)
def test_left_padded_batch_equals_singles(pair, tiny, way):
    batch = tiny.rows(ONE_QUESTION)
    ids = ROUTED if way == "kwargs" else ()

    def run(r):
        routed = way == "routing"
        with moka.routing(pair, **r.kwargs(*ROUTED)) if routed else contextlib.nullcontext():
            return generate(pair, r, ids)

    tokens, logits = run(batch)
    for i in range(4):
        single_tokens, single = run(batch.row(i))
        assert torch.equal(tokens[i], single_tokens[0])
        same(logits[:, i], single[:, 0])


@pytest.mark.parametrize("way", WAYS)
def test_the_three_ways_to_give_ids_agree(pair, tiny, way):
    batch = tiny.rows(ONE_QUESTION)
    expected = generate(pair, batch)[1]
    context = moka.routing(pair, **batch.kwargs(*ROUTED)) if way == "routing" else contextlib.nullcontext()
    with context:
        same(generate(pair, batch, ROUTED if way == "kwargs" else ())[1], expected)


def test_question_mask_is_shorthand_for_one_group(pair, batch):
    expected = generate(pair, batch)[1]
    batch.question_mask = (batch.interaction_ids > 0) & (batch.mm_token_type_ids == 0)
    same(generate(pair, batch, ("mm_token_type_ids", "question_mask"))[1], expected)


def test_right_padded_forward_equals_singles(pair, tiny):
    batch = tiny.rows(side="right")
    with torch.no_grad():
        logits = pair(**batch.kwargs()).logits
        for i in range(4):
            single = batch.row(i)
            same(logits[i, : single.input_ids.shape[1]], pair(**single.kwargs()).logits[0])


def test_beam_search_with_cache_equals_without(pair, batch):
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    tokens, logits = generate(pair, batch, **beams)
    again, recomputed = generate(pair, batch, use_cache=False, **beams)
    assert tokens.shape[0] == 8
    assert torch.equal(tokens, again)
    same(logits, recomputed)
    # The first step is the prompt's own, thrice.
    same(logits[0][::3], generate(pair, batch)[1][0])


def test_static_cache_equals_dynamic(pair, batch):
    tokens, logits = generate(pair, batch)
    again, static = generate(pair, batch, cache_implementation="static")
    assert torch.equal(tokens, again)
    same(logits, static)


def test_inputs_embeds_equal_input_ids(pair, batch):
    expected = generate(pair, batch)[1]
    out = pair.generate(
        inputs_embeds=pair.get_input_embeddings()(batch.input_ids),
        **batch.kwargs("attention_mask", *ROUTED),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    same(torch.stack(out.logits), expected)


def test_chunked_prefill_equals_one_go_when_groups_lie_in_one_chunk(pair, tiny):
    turns = tiny.rows(["i1 q1 i1 q1 a2 q2 q2 a2 t t", "q1 i1 t t t i2 a2 q2 t t"])
    tokens, logits = generate(pair, turns)
    again, chunked = generate(pair, turns, prefill_chunk_size=4)
    assert torch.equal(tokens, again)
    same(logits, chunked)


def test_chunked_prefill_with_the_question_in_another_chunk_is_an_error(pair, tiny):
    later, earlier = tiny.rows(["i i i i q q t t"]), tiny.rows(["q q t t i i i i"])
    for split in (later, earlier):
        for ids in (ROUTED, ()):
            with pytest.raises(moka.MokaError, match=r"another chunk.*prefill_chunk_size to at least 8"):
                generate(pair, split, ids, prefill_chunk_size=4)


def test_chunked_prefill_without_interaction_needs_no_question(tiny):
    model, split = tiny.adapted(interaction="none"), tiny.rows(["i i i i q q t t"])
    same(generate(model, split)[1], generate(model, split, prefill_chunk_size=4)[1])


TWO_TURNS = ["i1 i1 q1 q1 t", "a1 a1 a1 q1 t"], ["a2 i2 q2 q2 t t", "i2 t q2 q2 q2 t"]


def two_turns(tiny):
    first, second = tiny.rows(TWO_TURNS[0]), tiny.rows(TWO_TURNS[1], seed=4)
    names = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
    whole = tiny.Rows(*(torch.cat([getattr(first, name), getattr(second, name)], 1) for name in names))
    return first, second, whole


def test_second_turn_on_the_cache_equals_one_full_forward(pair, tiny):
    first, second, whole = two_turns(tiny)
    with torch.no_grad():
        expected = pair(**whole.kwargs()).logits[:, 5:]
        for given in (second, whole):  # the new tokens' ids, or everyone's
            cache = pair(**first.kwargs(), use_cache=True).past_key_values
            ids = {**given.kwargs(*ROUTED), "attention_mask": whole.attention_mask}
            same(pair(input_ids=second.input_ids, past_key_values=cache, **ids).logits, expected)


@pytest.mark.parametrize(("tokens", "ids"), [("whole", "whole"), ("new", "whole"), ("new", "new")])
def test_second_turn_of_generate_on_the_cache(pair, tiny, tokens, ids):
    first, second, whole = two_turns(tiny)
    expected = generate(pair, whole)[1]
    cache = DynamicCache()
    with torch.no_grad():
        pair(**first.kwargs(), past_key_values=cache)
    out = pair.generate(
        input_ids={"whole": whole, "new": second}[tokens].input_ids,
        attention_mask=whole.attention_mask,
        past_key_values=cache,
        **{"whole": whole, "new": second}[ids].kwargs(*ROUTED),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    same(torch.stack(out.logits), expected)


def test_derived_keys_of_a_second_turn_are_its_own_text(pair, tiny):
    """Derived ids know no turns: media in the cache had the first turn's text, the new ones get the new text."""
    first, second, whole = two_turns(tiny)
    whole.interaction_ids = torch.cat([torch.ones_like(first.input_ids), torch.full_like(second.input_ids, 2)], 1)
    expected = generate(pair, whole)[1]
    cache = DynamicCache()
    with torch.no_grad():
        pair(**first.kwargs("input_ids", "attention_mask"), past_key_values=cache)
    same(generate(pair, whole, (), past_key_values=cache)[1], expected)


@pytest.mark.parametrize("way", WAYS)
def test_manual_decoding_equals_generate(pair, tiny, way):
    batch = tiny.rows(ONE_QUESTION)
    # A loop of one's own cannot tell a decoded placeholder from a given one.
    tokens, logits = generate(pair, batch, suppress_tokens=[tiny.IMAGE, tiny.AUDIO])
    routed = moka.routing(pair, **batch.kwargs(*ROUTED)) if way == "routing" else contextlib.nullcontext()
    ids = batch.kwargs(*ROUTED) if way == "kwargs" else {}
    mask, cache, step = batch.attention_mask, DynamicCache(), batch.input_ids
    with routed, torch.no_grad():
        for n in range(NEW):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = pair(input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache, **ids)
            same(out.logits[:, -1], logits[n])
            step, ids = tokens[:, n : n + 1], {}  # decoded tokens are text; nothing has to be said about them
            mask = torch.cat([mask, torch.ones_like(step)], 1)


def test_decoded_tokens_that_look_like_placeholders_are_text(model, tiny):
    """Position decides: a decoded token is text even where its id is that of a placeholder."""
    prompt = tiny.rows(["i i q q t"])
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(128))
    head.bias.data[tiny.IMAGE] = 1e4
    tokens, logits = generate(model, prompt, ())
    assert (tokens == tiny.IMAGE).all()
    same(logits, generate(model, prompt, (), use_cache=False)[1])


def test_text_modality_may_have_another_id_than_zero(tiny, batch):
    model = tiny.adapted(modalities={"visual": [1], "audio": [3], "text": [7]})
    batch.mm_token_type_ids[batch.mm_token_type_ids == 0] = 7
    same(generate(model, batch)[1], generate(model, batch, use_cache=False)[1])
