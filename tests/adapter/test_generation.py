"""Prefill, cache, beams, chunks, turns, padding, drafts: every way to the same token gives the same logits."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import moka
from moka.adapter import ops
from moka.adapter.layer import MokaLinear

NEW = 5
WAYS = ("kwargs", "routing", "derived")
# One question before or after the media and no text besides, so that the derived ids are the given ones.
ONE_QUESTION = ["i i i a a q q q", "i i q q", "q q a a a i i", "q q q"]


def way_of(model, batch, way):
    """The arguments that say how to route ``batch``, and a context for those that come otherwise."""
    block = moka.routing(model, **batch.routed) if way == "routing" else contextlib.nullcontext()
    return {**batch.text, **(batch.routed if way == "kwargs" else {})}, block


def chunked(tiny, model, inputs):
    """As ``tiny.generate``, in chunks of 4 tokens; transformers 5.0 needs a cache for that."""
    return tiny.generate(model, inputs, prefill_chunk_size=4, past_key_values=DynamicCache())


def count_forwards(model):
    forwards = []
    model.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
    return forwards


def test_adapter_and_interaction_reach_the_generated_logits(pair, batch, tiny):
    """Neither of the two is negligible: all equalities below rest on it."""
    _, logits = tiny.generate(pair, batch)
    with pair.disable_adapter():
        _, bare = tiny.generate(pair, batch)
    batch.interaction_ids = torch.zeros_like(batch.interaction_ids)
    _, apart = tiny.generate(pair, batch)
    assert (logits[0] - bare[0]).abs().amax(-1).min() > 0.05
    assert (logits[0] - apart[0]).abs().amax(-1)[:3].min() > 0.01
    tiny.same(logits[0][3], apart[0][3])  # the text-only row has nothing to interact


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}


@pytest.mark.parametrize(
    ("options", "other"),
    [({}, {"use_cache": False}), ({}, {"cache_implementation": "static"}), (BEAMS, {**BEAMS, "use_cache": False})],
    ids=["no cache", "static cache", "beams without a cache"],
)
def test_every_cache_gives_the_same(pair, tiny, batch, options, other):
    tokens, logits = tiny.generate(pair, batch, **options)
    again, others = tiny.generate(pair, batch, **other)
    assert tokens.shape[0] == 4 * options.get("num_return_sequences", 1)
    assert torch.equal(tokens, again)
    tiny.same(logits, others)
    if options:  # the first step is the prompt's own, thrice
        tiny.same(logits[0][::3], tiny.generate(pair, batch)[1][0])


@pytest.mark.parametrize("way", WAYS)
def test_left_padded_batch_equals_singles_in_each_way_to_give_ids(pair, tiny, way):
    batch = tiny.rows(ONE_QUESTION)

    def run(rows):
        inputs, block = way_of(pair, rows, way)
        with block:
            return tiny.generate(pair, inputs)

    tokens, logits = run(batch)
    tiny.same(logits, tiny.generate(pair, batch)[1])
    for i in range(4):
        single_tokens, single = run(batch.row(i))
        assert torch.equal(tokens[i], single_tokens[0])
        tiny.same(logits[:, i], single[:, 0])


def test_right_padded_forward_equals_singles(pair, tiny):
    batch = tiny.rows(side="right")
    logits = tiny.logits(pair, batch)
    for i in range(4):
        single = batch.row(i)
        tiny.same(logits[i, : single.input_ids.shape[1]], tiny.logits(pair, single)[0])


def test_question_mask_and_inputs_embeds_are_other_forms_of_the_same(pair, tiny, batch):
    expected = tiny.generate(pair, batch)[1]
    question = (batch.interaction_ids > 0) & (batch.mm_token_type_ids == 0)
    types = batch.kwargs("mm_token_type_ids")
    tiny.same(tiny.generate(pair, {**batch.text, **types, "question_mask": question})[1], expected)
    embeds = pair.get_input_embeddings()(batch.input_ids)
    tiny.same(tiny.generate(pair, {"inputs_embeds": embeds, **batch.ids})[1], expected)


def test_text_modality_may_have_another_id_than_zero(tiny, batch):
    model = tiny.adapted(modalities={"visual": [1], "audio": [3], "text": [7]})
    batch.mm_token_type_ids[batch.mm_token_type_ids == 0] = 7
    tiny.same(tiny.generate(model, batch)[1], tiny.generate(model, batch, use_cache=False)[1])


def test_chunked_prefill_equals_one_prefill_if_no_group_is_split(pair, tiny):
    turns = tiny.rows(["i1 q1 i1 q1 a2 q2 q2 a2 t t", "q1 i1 t t t i2 a2 q2 t t"])
    tokens, logits = tiny.generate(pair, turns)
    again, in_chunks = chunked(tiny, pair, turns)
    assert torch.equal(tokens, again)
    tiny.same(logits, in_chunks)
    model, split = tiny.adapted(interaction="none"), tiny.rows(["i i i i q q t t"])
    tiny.same(tiny.generate(model, split)[1], chunked(tiny, model, split)[1])


@pytest.mark.parametrize("layout", ["i i i i q q t t", "q q t t i i i i"])
def test_chunked_prefill_with_the_question_in_another_chunk_is_an_error(pair, tiny, layout):
    split = tiny.rows([layout])
    for inputs in (split, split.text):
        with pytest.raises(moka.MokaError, match=r"another chunk.*prefill_chunk_size.* 8"):
            chunked(tiny, pair, inputs)


TWO_TURNS = ["i1 i1 q1 q1 t", "a1 a1 a1 q1 t"], ["a2 i2 q2 q2 t t", "i2 t q2 q2 q2 t"]


def two_turns(tiny):
    first, second = tiny.rows(TWO_TURNS[0]), tiny.rows(TWO_TURNS[1], seed=4)
    both = tiny.Rows(
        *(torch.cat(parts, 1) for parts in zip(first.kwargs().values(), second.kwargs().values(), strict=True))
    )
    return first, second, both


def test_second_turn_on_the_cache_equals_one_full_forward(pair, tiny):
    first, second, both = two_turns(tiny)
    with torch.no_grad():
        expected = pair(**both.kwargs()).logits[:, 5:]
        for given in (second, both):  # the new tokens' ids, or everyone's
            cache = pair(**first.kwargs(), use_cache=True).past_key_values
            ids = {**given.routed, "attention_mask": both.attention_mask}
            tiny.same(pair(input_ids=second.input_ids, past_key_values=cache, **ids).logits, expected)


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
    expected = tiny.generate(pair, both)[1]
    cache = DynamicCache()
    with torch.no_grad():
        pair(**first.kwargs(), past_key_values=cache)
    inputs = {"input_ids": {"both": both, "new": second}[tokens].input_ids, "attention_mask": both.attention_mask}
    inputs |= {"both": both, "new": second}[ids].routed
    tiny.same(tiny.generate(pair, inputs, past_key_values=cache)[1], expected)


def test_derived_keys_of_a_second_turn_are_its_own_text(pair, tiny):
    """Without turn markers: media in the cache had the first turn's text, the new ones get the new text."""
    first, second, both = two_turns(tiny)
    both.interaction_ids = torch.cat([torch.ones_like(first.input_ids), torch.full_like(second.input_ids, 2)], 1)
    expected = tiny.generate(pair, both)[1]
    cache = DynamicCache()
    with torch.no_grad():
        pair(**first.text, past_key_values=cache)
    tiny.same(tiny.generate(pair, both.text, past_key_values=cache)[1], expected)


@pytest.mark.parametrize("way", WAYS)
def test_manual_decoding_equals_generate(pair, tiny, way):
    batch = tiny.rows(ONE_QUESTION)
    # Outside of generate a decoded placeholder cannot be distinguished from a given one.
    tokens, logits = tiny.generate(pair, batch, suppress_tokens=[tiny.IMAGE, tiny.AUDIO])
    ids, block = way_of(pair, batch, way)
    ids = {name: value for name, value in ids.items() if name in batch.routed}
    mask, cache, step = batch.attention_mask, DynamicCache(), batch.input_ids
    with block, torch.no_grad():
        for n in range(NEW):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = pair(input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache, **ids)
            tiny.same(out.logits[:, -1], logits[n])
            step, ids = tokens[:, n : n + 1], {}  # decoded tokens are text and need no ids
            mask = torch.cat([mask, torch.ones_like(step)], 1)


def test_decoded_tokens_that_look_like_placeholders_are_text(model, tiny):
    """Position decides: a decoded token is text even if its id is that of a placeholder."""
    prompt = tiny.rows(["i i q q t"])
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(128))
    head.bias.data[tiny.IMAGE] = 1e4
    tokens, logits = tiny.generate(model, prompt.text)
    assert (tokens == tiny.IMAGE).all()
    tiny.same(logits, tiny.generate(model, prompt.text, use_cache=False)[1])


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
    inputs, block = way_of(model, repeating(tiny), way)
    # Lookup of transformers 5.0 needs a token that ends; this one is never chosen.
    settings = {"max_new_tokens": 12, "eos_token_id": 0, "suppress_tokens": [0]}
    with block:
        tokens, logits = tiny.generate(model, inputs, **settings)
        drafts = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": assistant(tiny, draft)}
        forwards = count_forwards(model)
        again, speculative = tiny.generate(model, inputs, **settings, **drafts)
    assert torch.equal(tokens, again)
    tiny.same(logits, speculative)
    assert len(forwards) <= 12


def test_speculative_decoding_accepts_drafts(tiny):
    """With the model itself as its assistant, so that every draft is right: fewer forwards than tokens."""
    model, twin, row = tiny.adapted(), tiny.adapted(), repeating(tiny)
    forwards = count_forwards(model)
    with moka.routing(twin, **row.routed):
        tokens, _ = tiny.generate(model, row, max_new_tokens=12, assistant_model=twin.get_base_model())
    assert len(forwards) < 8
    assert torch.equal(tokens, tiny.generate(model, row, max_new_tokens=12)[0])


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
            ids = {name: torch.nn.functional.pad(getattr(row, name), (0, n)) for name in row.routed}
            given = pair(input_ids=torch.cat([row.input_ids, new[:, :n]], 1), **ids).logits[:, -1]
            text = torch.cat([other, new[:, :n]], 1)
            free = pair(input_ids=text, mm_token_type_ids=torch.zeros_like(text)).logits[:, -1]
            given, free = given.log_softmax(-1), free.log_softmax(-1)
            finite = torch.isfinite(scores)
            tiny.same(scores[finite], (free + scale * (given - free))[finite])


@pytest.mark.parametrize("modality", ["text", "media"])
def test_an_adapted_head_equals_a_full_forward_at_the_last_position(tiny, batch, modality):
    """The head sees only the last position in a prefill, of a token of its modality."""
    model = tiny.adapted(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    if modality == "media":
        batch = tiny.rows(["t q q i i", "q t a"])
        batch.interaction_ids = torch.zeros_like(batch.interaction_ids)
    tokens, logits = tiny.generate(model, batch)
    again, recomputed = tiny.generate(model, batch, use_cache=False)
    assert torch.equal(tokens, again)
    tiny.same(logits, recomputed)
    with torch.no_grad():
        full = model(**batch.kwargs()).logits
        ends = torch.tensor([0, batch.input_ids.shape[1] - 1])
        tiny.same(logits[0], full[:, -1])
        tiny.same(model(**batch.kwargs(), logits_to_keep=ends).logits, full[:, ends])
        model.get_base_model().lm_head.enable_adapters(False)
        assert (model(**batch.kwargs()).logits - full)[:, -1].abs().amax(-1).min() > 0.01


# --- the layers while generate decodes


def steps(tiny, model, batch, **options):
    """Logits of six greedy steps."""
    return tiny.generate(model, batch, max_new_tokens=6, **options)[1]


TWO = {"r": 2, "target_modules": ["q_proj", "down_proj"], "share_b": False}


@pytest.mark.parametrize(
    "settings",
    [{}, {"share_b": False}, {"scale_position": "input"}, {"adapt": ["visual"]}, {"text_merged": True}, "two adapters"],
    ids=str,
)
def test_decoding_equals_the_reference(tiny, batch, settings):
    model = tiny.adapted(**({} if isinstance(settings, str) else settings))
    if isinstance(settings, str):
        model.add_adapter("second", tiny.config(**TWO))
        tiny.strong_(model, seed=9)
        first = steps(tiny, model, batch)
        model.base_model.set_adapter(["default", "second"])
        assert not torch.allclose(steps(tiny, model, batch), first, atol=1e-2)
    ours = steps(tiny, model, batch)
    with tiny.plain_layers(batch):
        tiny.same(steps(tiny, model, batch), ours)


def test_nothing_is_kept_from_one_generate_to_the_next(tiny, batch):
    model = tiny.adapted()
    before = steps(tiny, model, batch)
    tiny.strong_(model, seed=4)
    changed = steps(tiny, model, batch)
    assert not torch.allclose(changed, before, atol=1e-2)
    with model.disable_adapter():
        assert not torch.allclose(steps(tiny, model, batch), changed, atol=1e-2)
    tiny.strong_(model)
    assert torch.equal(steps(tiny, model, batch), before)


CHANGES = {
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "switch": lambda model: model.set_adapter("second"),
    "merge": lambda model: model.merge_adapter(),
    "unmerge": lambda model: model.unmerge_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_takes_effect(tiny, batch, change):
    """A streamer or a stopping rule may change the adapters in the middle of ``generate``."""

    def fresh():
        model = tiny.adapted()
        model.add_adapter("second", tiny.config())
        tiny.strong_(model, seed=9)
        if change == "unmerge":
            model.merge_adapter()
        return model

    def run(model):
        def changed(ids, scores):
            if ids.shape[1] == batch.input_ids.shape[1] + 3:  # after the fourth step's logits
                CHANGES[change](model)
            return scores

        return steps(tiny, model, batch, logits_processor=[changed])

    ours, plain = run(fresh()), steps(tiny, fresh(), batch)
    with tiny.plain_layers(batch):
        tiny.same(run(fresh()), ours)
    tiny.same(ours[:4], plain[:4])
    assert torch.allclose(ours[4:], plain[4:], atol=1e-3) == (change in ("merge", "unmerge"))


def test_a_decode_step_is_the_base_layers_and_two_products_each(tiny):
    prompt = tiny.rows(["t i i q q t"])

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    def of(model, tokens, **kwargs):
        with Count() as count:
            model.generate(prompt.input_ids, max_new_tokens=tokens, do_sample=False, **kwargs)
        return count.calls

    def one_step(model, **kwargs):
        calls = of(model, 3, **kwargs)
        calls.subtract(of(model, 2, **kwargs))
        return {name: calls[name] for name in ("mm", "addmm", "addmm_", "bmm", "index_select", "gather", "add")}

    model, bare = tiny.adapted(), one_step(tiny.backbone())
    assert bare["mm"] >= 14
    with_adapter = {**bare, "mm": bare["mm"] + 14, "addmm": bare["addmm"] + 14}
    assert one_step(model, **prompt.routed) == with_adapter
    model.merge_adapter()
    assert one_step(model, **prompt.routed) == bare


def test_a_replaced_forward_stays(tiny, batch):
    """accelerate moves weights between devices that way."""
    model = tiny.adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    calls = []
    own = layer.forward
    layer.forward = lambda x: calls.append(x.shape[1]) or own(x)
    model.generate(**batch.kwargs(), max_new_tokens=4, do_sample=False)
    model(**batch.kwargs())
    assert calls == [10, 1, 1, 1, 10]


def test_a_model_in_training_drops_out_while_it_decodes(tiny, batch, monkeypatch):
    model = tiny.adapted(dropout=0.5).train()
    drawn = []
    monkeypatch.setattr(ops, "draw_seed", lambda: drawn.append(1) or 7)
    model.generate(**batch.kwargs(), max_new_tokens=4, do_sample=False)
    assert len(drawn) == 4 * 8  # in the prefill and in three steps: q, k, v; o; gate, up; down of two blocks


def test_gradients_at_a_decode_position(tiny):
    model = tiny.adapted()
    prompt = tiny.rows(["t i i q q t"])
    found = []

    def scores_with_gradients(ids, scores):
        if ids.shape[1] > 6:
            with torch.enable_grad():
                loss = model(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits.sum()
                found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
        return scores

    with torch.no_grad():
        cache = model(**prompt.kwargs(), use_cache=True).past_key_values
    model.generate(**prompt.kwargs(), max_new_tokens=3, do_sample=False, logits_processor=[scores_with_gradients])
    assert found
    assert all(grad.abs().max() > 0 for grad in found[0][:2])


def test_hooks_of_a_base_layer_run_at_every_step_of_merged_decoding(pair, tiny, batch):
    """Frameworks hook into modules: a layer whose adapters are merged calls its base layer as a module then."""
    pair.merge_adapter()
    layer = next(module for module in pair.modules() if isinstance(module, MokaLinear))
    seen = []
    handles = [
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1])),
        layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])),
    ]
    with_hooks = tiny.generate(pair, batch, min_new_tokens=NEW)
    for handle in handles:
        handle.remove()
    assert seen.count(1) == 2 * (NEW - 1)
    assert torch.equal(with_hooks[1], tiny.generate(pair, batch, min_new_tokens=NEW)[1])
