"""Prefill, cache, beams, chunks, turns, padding, drafts: every way to the same token gives the same logits."""

import contextlib

import pytest
import torch
import transformers
from packaging.version import Version
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


def chunked(model, r, ids=ROUTED):
    """As above, in chunks of 4 tokens; transformers 5.0 needs a cache for that."""
    return generate(model, r, ids, prefill_chunk_size=4, past_key_values=DynamicCache())


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_adapter_and_interaction_reach_the_generated_logits(pair, batch, tiny):
    """Neither of the two is negligible: all equalities below rest on it."""
    _, logits = generate(pair, batch)
    with pair.disable_adapter():
        _, bare = generate(pair, batch)
    batch.interaction_ids = torch.zeros_like(batch.interaction_ids)
    _, apart = generate(pair, batch)
    assert (logits[0] - bare[0]).abs().amax(-1).min() > 0.05
    assert (logits[0] - apart[0]).abs().amax(-1)[:3].min() > 0.01
    same(logits[0][3], apart[0][3])  # the text-only row has nothing to interact


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


def test_chunked_prefill_equals_one_prefill_if_no_group_is_split(pair, tiny):
    turns = tiny.rows(["i1 q1 i1 q1 a2 q2 q2 a2 t t", "q1 i1 t t t i2 a2 q2 t t"])
    tokens, logits = generate(pair, turns)
    again, in_chunks = chunked(pair, turns)
    assert torch.equal(tokens, again)
    same(logits, in_chunks)


def test_chunked_prefill_with_the_question_in_another_chunk_is_an_error(pair, tiny):
    later, earlier = tiny.rows(["i i i i q q t t"]), tiny.rows(["q q t t i i i i"])
    for split in (later, earlier):
        for ids in (ROUTED, ()):
            with pytest.raises(moka.MokaError, match=r"another chunk.*prefill_chunk_size.* 8"):
                chunked(pair, split, ids)


def test_chunked_prefill_without_interaction_needs_no_question(tiny):
    model, split = tiny.adapted(interaction="none"), tiny.rows(["i i i i q q t t"])
    same(generate(model, split)[1], chunked(model, split)[1])


TWO_TURNS = ["i1 i1 q1 q1 t", "a1 a1 a1 q1 t"], ["a2 i2 q2 q2 t t", "i2 t q2 q2 q2 t"]


def two_turns(tiny):
    first, second = tiny.rows(TWO_TURNS[0]), tiny.rows(TWO_TURNS[1], seed=4)
    names = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
    both = tiny.Rows(*(torch.cat([getattr(first, name), getattr(second, name)], 1) for name in names))
    return first, second, both


def test_second_turn_on_the_cache_equals_one_full_forward(pair, tiny):
    first, second, both = two_turns(tiny)
    with torch.no_grad():
        expected = pair(**both.kwargs()).logits[:, 5:]
        for given in (second, both):  # the new tokens' ids, or everyone's
            cache = pair(**first.kwargs(), use_cache=True).past_key_values
            ids = {**given.kwargs(*ROUTED), "attention_mask": both.attention_mask}
            same(pair(input_ids=second.input_ids, past_key_values=cache, **ids).logits, expected)


only_new = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.3"),
    reason="generate of transformers before 5.3 takes input_ids for the full sequence, cached tokens included",
)


@pytest.mark.parametrize(
    ("tokens", "ids"),
    [("both", "both"), pytest.param("new", "both", marks=only_new), pytest.param("new", "new", marks=only_new)],
)
def test_second_turn_of_generate_on_the_cache(pair, tiny, tokens, ids):
    first, second, both = two_turns(tiny)
    expected = generate(pair, both)[1]
    cache = DynamicCache()
    with torch.no_grad():
        pair(**first.kwargs(), past_key_values=cache)
    out = pair.generate(
        input_ids={"both": both, "new": second}[tokens].input_ids,
        attention_mask=both.attention_mask,
        past_key_values=cache,
        **{"both": both, "new": second}[ids].kwargs(*ROUTED),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    same(torch.stack(out.logits), expected)


def test_derived_keys_of_a_second_turn_are_its_own_text(pair, tiny):
    """Without turn markers: media in the cache had the first turn's text, the new ones get the new text."""
    first, second, both = two_turns(tiny)
    both.interaction_ids = torch.cat([torch.ones_like(first.input_ids), torch.full_like(second.input_ids, 2)], 1)
    expected = generate(pair, both)[1]
    cache = DynamicCache()
    with torch.no_grad():
        pair(**first.kwargs("input_ids", "attention_mask"), past_key_values=cache)
    same(generate(pair, both, (), past_key_values=cache)[1], expected)


@pytest.mark.parametrize("way", WAYS)
def test_manual_decoding_equals_generate(pair, tiny, way):
    batch = tiny.rows(ONE_QUESTION)
    # Outside of generate a decoded placeholder cannot be distinguished from a given one.
    tokens, logits = generate(pair, batch, suppress_tokens=[tiny.IMAGE, tiny.AUDIO])
    routed = moka.routing(pair, **batch.kwargs(*ROUTED)) if way == "routing" else contextlib.nullcontext()
    ids = batch.kwargs(*ROUTED) if way == "kwargs" else {}
    mask, cache, step = batch.attention_mask, DynamicCache(), batch.input_ids
    with routed, torch.no_grad():
        for n in range(NEW):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = pair(input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache, **ids)
            same(out.logits[:, -1], logits[n])
            step, ids = tokens[:, n : n + 1], {}  # decoded tokens are text and need no ids
            mask = torch.cat([mask, torch.ones_like(step)], 1)


def test_decoded_tokens_that_look_like_placeholders_are_text(model, tiny):
    """Position decides: a decoded token is text even if its id is that of a placeholder."""
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


# --- decoding with drafts, guidance, an adapted head


def repeating(tiny):
    """A prompt whose end occurs earlier, so that prompt lookup finds candidates in the first step."""
    row = tiny.rows(["i i a q q q t t q q t t"])
    row.input_ids[0, 8:12] = row.input_ids[0, 4:8]
    return row


def assistant(tiny, how):
    """Another backbone, one with an adapter of its own, or the bare backbone of the same seed."""
    if how == "adapted":
        return tiny.strong_(tiny.adapted(), seed=7).get_base_model()
    return tiny.backbone(seed=0 if how == "same" else 5)


@pytest.mark.parametrize("way", ["kwargs", "routing"])
@pytest.mark.parametrize("draft", ["lookup", "other", "same", "adapted"])
def test_speculative_decoding_equals_plain(model, tiny, draft, way):
    row = repeating(tiny)
    ids = ROUTED if way == "kwargs" else ()
    # Lookup of transformers 5.0 needs a token that ends; this one is never chosen.
    settings = {"max_new_tokens": 12, "eos_token_id": 0, "suppress_tokens": [0]}
    with moka.routing(model, **row.kwargs(*ROUTED)) if way == "routing" else contextlib.nullcontext():
        tokens, logits = generate(model, row, ids, **settings)
        drafts = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": assistant(tiny, draft)}
        forwards = []
        handle = model.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
        again, speculative = generate(model, row, ids, **settings, **drafts)
        handle.remove()
    assert torch.equal(tokens, again)
    same(logits, speculative)
    assert len(forwards) <= 12


def test_speculative_decoding_accepts_drafts(tiny):
    """With the model itself as its assistant, so that every draft is right: fewer forwards than tokens."""
    model, row = tiny.adapted(), repeating(tiny)
    twin = tiny.adapted()
    forwards = []
    model.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
    with moka.routing(twin, **row.kwargs(*ROUTED)):
        tokens, _ = generate(model, row, max_new_tokens=12, assistant_model=twin.get_base_model())
    assert len(forwards) < 8
    assert torch.equal(tokens, generate(model, row, max_new_tokens=12)[0])


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("negative", [False, True], ids=["last token", "negative prompt"])
@pytest.mark.parametrize("layout", ["t i i a q q q t", "i i q q"])
def test_guidance_equals_its_two_branches_by_hand(pair, tiny, cache, negative, layout):
    """The unconditional branch is text of another length; its tokens must not be taken for the prompt's."""
    row, scale = tiny.rows([layout]), 1.5
    other = tiny.rows(["q t q t t"], seed=8).input_ids if negative else row.input_ids[:, -1:]
    extra = {"negative_prompt_ids": other} if negative else {}
    out = pair.generate(
        **row.kwargs(),
        **{"max_new_tokens": NEW, "do_sample": False, "use_cache": cache, "guidance_scale": scale, **extra},
        suppress_tokens=[tiny.IMAGE, tiny.AUDIO],
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, row.input_ids.shape[1] :]
    with torch.no_grad():
        for n, scores in enumerate(out.scores):
            ids = {name: torch.nn.functional.pad(getattr(row, name), (0, n)) for name in ROUTED}
            given = pair(input_ids=torch.cat([row.input_ids, new[:, :n]], 1), **ids).logits[:, -1]
            text = torch.cat([other, new[:, :n]], 1)
            free = pair(input_ids=text, mm_token_type_ids=torch.zeros_like(text)).logits[:, -1]
            given, free = given.log_softmax(-1), free.log_softmax(-1)
            finite = torch.isfinite(scores)
            same(scores[finite], (free + scale * (given - free))[finite])


@pytest.mark.parametrize("modality", ["text", "media"])
def test_an_adapted_head_equals_a_full_forward_at_the_last_position(tiny, batch, modality):
    """The head sees only the last position in a prefill, of a token of its modality."""
    model = tiny.adapted(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    if modality == "media":
        batch = tiny.rows(["t q q i i", "q t a"])
        batch.interaction_ids = torch.zeros_like(batch.interaction_ids)
    tokens, logits = generate(model, batch)
    again, recomputed = generate(model, batch, use_cache=False)
    assert torch.equal(tokens, again)
    same(logits, recomputed)
    with torch.no_grad():
        full = model(**batch.kwargs()).logits
        ends = torch.tensor([0, batch.input_ids.shape[1] - 1])
        same(logits[0], full[:, -1])
        same(model(**batch.kwargs(), logits_to_keep=ends).logits, full[:, ends])
        model.get_base_model().lm_head.enable_adapters(False)
        assert (model(**batch.kwargs()).logits - full)[:, -1].abs().amax(-1).min() > 0.01


def test_hooks_of_a_base_layer_run_at_every_step_of_merged_decoding(pair, batch):
    """Frameworks hook into modules: a layer whose adapters are merged calls its base layer as a module then."""
    pair.merge_adapter()
    layer = next(module for module in pair.modules() if isinstance(module, moka.adapter.layer.MokaLinear))
    seen = []
    handles = [
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1])),
        layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])),
    ]
    with_hooks = generate(pair, batch, min_new_tokens=NEW)
    for handle in handles:
        handle.remove()
    assert seen.count(1) == 2 * (NEW - 1)
    assert torch.equal(with_hooks[1], generate(pair, batch, min_new_tokens=NEW)[1])
