"""From a forward's arguments to its routing: ids given, in a block, or derived from tokens, turn markers, labels, packing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessor

import moka

USER, ASSISTANT, END = 100, 101, 102
MARKERS = {"user": [USER], "assistant": [ASSISTANT], "end": [END]}
FIXED = {"u": USER, "s": ASSISTANT, "e": END, "i": 126}
UNROUTED = r"without routing.*mm_token_type_ids.*moka\.routing"
ALL_REMEDIES = r"Row 0.*turn_markers.*labels.*interaction_ids"


def chat(*layouts, seed=0):
    """u, s, e: the markers; i image; q question; a answer; t other text. Returns ids, interaction ids, labels."""
    generator = torch.Generator().manual_seed(seed)
    letters = [row.split() for row in layouts]

    def token(letter):
        return FIXED.get(letter, int(torch.randint(1, 90, (), generator=generator)))

    ids = torch.tensor([[token(letter) for letter in row] for row in letters])
    turn = torch.tensor([[max(1, row[: i + 1].count("u")) for i in range(len(row))] for row in letters])
    takes_part = torch.tensor([[letter in "iq" for letter in row] for row in letters])
    answer = torch.tensor([[letter == "a" for letter in row] for row in letters])
    return ids, turn * takes_part, torch.where(answer, ids, -100)


def adapted(tiny, marked=True, **settings):
    return tiny.adapted(**({"turn_markers": MARKERS} if marked else {}), **settings)


def logits(model, ids, train=False, **more):
    model.train(train)
    with torch.set_grad_enabled(train):
        return model(input_ids=ids, use_cache=False, **more).logits.detach()


# Given ids


@pytest.mark.parametrize("source", ["the adapter's configuration", "the model's"])
def test_types_are_derived_from_the_placeholder_tokens(tiny, batch, source):
    backbone, settings = tiny.backbone(), {}
    if source == "the model's":
        backbone.config.image_token_id, backbone.config.audio_token_id = tiny.IMAGE, tiny.AUDIO
        settings = {"modality_token_ids": None}
    model = tiny.adapted(backbone=backbone, **settings)
    assert model.peft_config["default"].modality_token_ids == {"visual": [tiny.IMAGE], "audio": [tiny.AUDIO]}
    derived = tiny.logits(model, batch, "input_ids", "interaction_ids", "attention_mask")
    assert torch.equal(derived, tiny.logits(model, batch))


def test_a_fourth_modality_runs_in_a_model(tiny):
    model = tiny.adapted(modalities={"text": [0], "visual": [1, 2], "audio": [3], "point": [4]})
    batch = tiny.rows(["i i q q t"])
    image = tiny.logits(model, batch)
    batch.mm_token_type_ids[batch.mm_token_type_ids == 1] = 4
    assert (tiny.logits(model, batch) - image).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_at_padding_count_for_nothing(model, tiny, side):
    batch = tiny.rows(side=side)
    real, expected = batch.attention_mask.bool(), tiny.logits(model, batch)
    batch.interaction_ids[~real] = 1
    for types in (0, 1):
        batch.mm_token_type_ids[~real] = types
        assert torch.equal(tiny.logits(model, batch)[real], expected[real])
    batch.attention_mask = batch.attention_mask.bfloat16()  # numpy has no such type
    assert torch.equal(tiny.logits(model, batch)[real], expected[real])


def test_own_arguments_win_over_the_block(model, tiny, batch):
    given = tiny.logits(model, batch)
    with moka.routing(model, mm_token_type_ids=torch.zeros_like(batch.input_ids)):
        assert torch.equal(tiny.logits(model, batch), given)


@pytest.mark.parametrize("edited", ["labels", "mm_token_type_ids", "interaction_ids"])
def test_ids_edited_in_place_count(model, tiny, edited):
    batch = tiny.rows(["i i q q q t t t", "q i i q t t t t"])
    kwargs = batch.kwargs("input_ids", "mm_token_type_ids", "attention_mask")
    if edited == "labels":
        kwargs["labels"] = torch.where(batch.interaction_ids == 0, batch.input_ids, -100)
    else:
        kwargs["interaction_ids"] = batch.interaction_ids
    before = model(**kwargs).logits
    kwargs[edited][0, 1 if edited == "mm_token_type_ids" else 4] = 0
    found = model(**kwargs).logits
    assert torch.equal(found, model(**{name: value.clone() for name, value in kwargs.items()}).logits)
    assert (found - before)[0].abs().max() > 1e-3


EMBEDS = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("known", [True, False], ids=["media known", "media unknown"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called", ["the model", "the decoder"])
def test_a_forward_without_routing(tiny, known, training, called):
    """An error in training if the model's media are known; else one warning, and all is text."""
    model = tiny.adapted(**({} if known else {"modality_token_ids": {}})).train(training)
    module = model if called == "the model" else model.base_model.model.model
    if known and training:
        with pytest.raises(moka.MokaError, match=UNROUTED):
            module(inputs_embeds=EMBEDS)
        return
    with pytest.warns(UserWarning, match=UNROUTED) as caught:
        first, second = [module(inputs_embeds=EMBEDS)[0] for _ in range(2)]
    assert sum("without routing" in str(warning.message) for warning in caught) == 1
    text = module(inputs_embeds=EMBEDS, mm_token_type_ids=torch.zeros(1, 4).long())[0]
    assert torch.equal(first, text)
    assert torch.equal(second, text)


@pytest.mark.parametrize("training", [True, False])
def test_of_text_as_the_only_modality_no_routing_is_missing(tiny, training):
    model = tiny.adapted(modalities={"text": [0]}, modality_token_ids={}).train(training)
    assert torch.isfinite(model(inputs_embeds=EMBEDS).logits).all()  # a warning is an error in these tests


# Turn markers


class Forced(LogitsProcessor):
    """Lets generate choose the given tokens only."""

    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens[:, ids.shape[1] - self.start, None], 0.0)


def notebook(tiny):
    """A notebook's recipe: labels = input_ids, with -100 only at the placeholders."""
    ids, _, _ = chat("t u i i i q q q e s a a a e", "t u i q q q q q e s a a a e")
    return ids, torch.where(ids == tiny.IMAGE, -100, ids)


def test_everything_supervised_without_markers_is_an_error_in_training_and_a_warning_else(tiny):
    model, (ids, labels) = adapted(tiny, marked=False), notebook(tiny)
    with pytest.raises(moka.MokaError, match=ALL_REMEDIES):
        logits(model, ids, train=True, labels=labels)
    with pytest.warns(UserWarning, match=r"Row 0.*turn_markers.*labels"):
        logits(model, ids, labels=labels)


def test_with_markers_the_answers_loss_as_trained_is_that_as_generated(tiny):
    model, (ids, labels) = adapted(tiny), notebook(tiny)
    start = (ids[0] == ASSISTANT).nonzero().item() + 1
    answer = ids[:, start:]
    trained = logits(model, ids, train=True, labels=labels)[:, start - 1 : -1]
    prompt = {"input_ids": ids[:, :start], "attention_mask": torch.ones_like(ids[:, :start])}
    forced = {"max_new_tokens": answer.shape[1], "logits_processor": [Forced(start, answer)]}
    tokens, steps = tiny.generate(model.eval(), prompt, **forced)
    assert torch.equal(tokens, answer)
    generated = steps.transpose(0, 1)
    losses = [F.cross_entropy(found.flatten(0, 1), answer.flatten()).item() for found in (trained, generated)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # This makes it able to fail: the interaction does change the loss.
    other = logits(adapted(tiny, interaction="none"), ids)[:, start - 1 : -1]
    assert F.cross_entropy(other.flatten(0, 1), answer.flatten()).item() != pytest.approx(losses[0], abs=1e-3)


ROWS = {
    "one turn": ["t u i i i q q q e s a a a e", "t t u q q i i i e s a a a e"],
    "two turns": ["t u i i q e s a a e u q i q e s a e", "t u i q q e s a a e u q q q e s a e"],
    "image after the question": ["t u q q q q i i e s a a a e"],
    "image in the system turn": ["t i i t u q q e s a a a e u q e s a"],
    "image and question in two messages": ["u i i i e u q q q e s a a e u i i q q e s a a e"],
}


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ROWS)
def test_markers_without_labels_equal_given_ids(tiny, kind, train):
    model, (ids, groups, _) = adapted(tiny), chat(*ROWS[kind])
    if "two messages" in kind:
        groups = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0]])
    expected = logits(model, ids, interaction_ids=groups)
    torch.testing.assert_close(logits(model, ids, train=train), expected)
    assert (logits(model, ids, question_mask=torch.zeros_like(ids)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["answers", "everything", "first answer", "smoothed"])
def test_labels_change_nothing_if_markers_are_known(tiny, form):
    model, (ids, groups, labels) = adapted(tiny), chat(*ROWS["two turns"])
    labels = {
        "answers": labels,
        "everything": ids,
        "first answer": torch.where(torch.arange(ids.shape[1]) < 10, labels, -100),
        "smoothed": labels.clone().fill_(-100),
    }[form]
    expected = logits(model, ids, interaction_ids=groups)
    torch.testing.assert_close(logits(model, ids, train=True, labels=labels), expected)


@pytest.mark.parametrize(
    "layout",
    [
        "i i i q e s a a a e u q q q e s a a a e",  # an image in the system turn, and the assistant greets
        "i i i q q q e s a a a e u q q q e s a a a e",  # a row whose beginning was cut off
    ],
)
def test_media_in_no_users_turn_have_no_question_and_leak_nothing(tiny, layout):
    """Without labels, in evaluation, where a prompt without markers would make all of its text the question."""
    model = adapted(tiny)
    ids, _, _ = chat(layout)
    later = ids.clone()
    later[0, -2] = 91 if ids[0, -2] != 91 else 92
    with pytest.warns(UserWarning, match="turn_markers"):
        before = logits(model, ids)
    assert torch.equal(before[:, :-2], logits(model, later)[:, :-2])
    assert torch.equal(before, logits(model, ids, interaction_ids=torch.zeros_like(ids)))


@pytest.mark.parametrize("training", [False, True])
def test_markers_that_match_nothing_are_reported_once_and_labels_decide(tiny, training):
    ids, _, labels = chat(*ROWS["one turn"])
    model, plain = tiny.adapted(turn_markers={"user": [99, 98]}), adapted(tiny, marked=False)
    expected = logits(plain, ids, train=training, labels=labels)
    begin = ", ".join(map(str, ids[0, :6].tolist()))
    with pytest.warns(UserWarning, match=rf"turn_markers.*\[99, 98\].*{begin}") as caught:
        found = [logits(model, ids, train=training, labels=labels) for _ in range(3)]
    assert sum("turn_markers" in str(warning.message) for warning in caught) == 1
    assert all(torch.equal(one, expected) for one in found)


# Labels


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_labels_of_the_answers_only_give_the_question_also_in_evaluation(tiny, train):
    """The text before the answer, that of the template included, of each row for itself."""
    model, (ids, _, labels) = adapted(tiny, marked=False), chat(*ROWS["one turn"])
    labels[1, 10] = -100  # this row's answer begins one token later
    groups = (torch.arange(ids.shape[1]) < torch.tensor([[10], [11]])).long()
    expected = logits(model, ids, interaction_ids=groups)
    torch.testing.assert_close(logits(model, ids, train=train, labels=labels), expected)


@pytest.mark.parametrize("marked", [True, False], ids=["markers", "labels"])
def test_labels_cut_to_logits_to_keep(tiny, marked):
    model, (ids, _, labels) = adapted(tiny, marked), chat(*ROWS["one turn"])
    full = logits(model, ids, train=True, labels=labels)
    kept = logits(model, ids, train=True, labels=labels[:, -6:], logits_to_keep=6)
    torch.testing.assert_close(kept, full[:, -6:])
    assert (logits(model, ids, question_mask=ids != tiny.IMAGE) - full).abs().max() > 1e-3


def test_evaluation_without_labels_or_markers_asks_all_text_and_warns_once(tiny, recwarn):
    model, (ids, _, _) = adapted(tiny, marked=False), chat(*ROWS["one turn"])
    expected = logits(model, ids, question_mask=ids != tiny.IMAGE)
    assert not [w for w in recwarn if "turn_markers" in str(w.message)]
    for _ in range(2):
        torch.testing.assert_close(logits(model, ids), expected)
    assert len([w for w in recwarn if "turn_markers" in str(w.message)]) == 1


@pytest.mark.parametrize("embeds", [False, True])
def test_training_on_media_without_a_question_is_an_error(model, tiny, embeds):
    row = tiny.rows(["i i q q t t"])
    inputs = {"inputs_embeds": model.get_input_embeddings()(row.input_ids)} if embeds else {"input_ids": row.input_ids}
    model.train()
    with pytest.raises(moka.MokaError, match=ALL_REMEDIES):
        model(**inputs, mm_token_type_ids=row.mm_token_type_ids)
    text = tiny.rows(["t t q q"])  # without media no question is needed
    assert model(**text.kwargs("input_ids", "mm_token_type_ids")).logits.requires_grad


@pytest.mark.parametrize("settings", [{"interaction": "none"}, {"adapt": ["visual"]}, {"adapt": ["text"]}])
def test_training_without_a_question_is_no_error_if_nothing_interacts(tiny, settings):
    row = tiny.rows(["i i q q t t"])
    model = tiny.adapted(**settings).train()
    asked = model(input_ids=row.input_ids, labels=row.input_ids).logits
    assert torch.equal(model(input_ids=row.input_ids).logits, asked)


# Packed rows


@pytest.mark.parametrize("marked", [True, False], ids=["markers", "labels"])
@pytest.mark.parametrize("given_by", ["position_ids", "cu_seq_lens_q"])
def test_packed_samples_equal_single_ones(tiny, given_by, marked):
    model = adapted(tiny, marked)
    layouts = ["t u i i q q e s a a e", "u q e s a e", "i i t u q i q q q e s a e"]
    samples = [chat(layout, seed=i) for i, layout in enumerate(layouts)]
    ids, labels = (torch.cat([sample[k] for sample in samples], dim=1) for k in (0, 2))
    lengths = [sample[0].shape[1] for sample in samples]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    if given_by == "position_ids":
        packing = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    else:
        # Positions count on; only this mask keeps the samples apart, and only the lengths give the question.
        mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths))[None, None].bool()
        packing = {"cu_seq_lens_q": ends.int(), "attention_mask": mask}
    packed = logits(model, ids, train=True, labels=labels, **packing)
    for i, (own, _, own_labels) in enumerate(samples):
        single = logits(model, own, train=True, labels=own_labels)
        tiny.same(packed[:, ends[i] : ends[i + 1]], single)


# Bad input: refused before any layer runs


@pytest.fixture
def no_compute(model):
    """The model, and an error of another type as soon as its first layer runs."""

    def ran(*_):
        raise AssertionError("a layer ran before the check")

    model.get_input_embeddings().register_forward_hook(ran)
    return model


TYPES, GROUPS, QUESTION = "mm_token_type_ids", "interaction_ids", "question_mask"
WRONG_IDS = [
    (TYPES, lambda t: t.masked_fill(t == 1, 7), r"\[7\].*\{'text': \[0\], 'visual': \[1, 2\]"),
    (TYPES, lambda t: t - 1, r"\[-1\]"),
    (TYPES, lambda t: t[:, 1:], r"\[4, 9\].*\[4, 10\]"),
    (TYPES, lambda t: t[:2], r"\[2, 10\].*\[4, 10\]"),
    (TYPES, lambda t: t[0], r"\[10\].*\[4, 10\]"),
    (TYPES, lambda t: t.float(), r"integer.*float32"),
    (TYPES, lambda t: t > 0, r"integer.*torch.bool"),
    (TYPES, lambda t: t.tolist(), r"integer.*list"),
    (GROUPS, lambda t: t[:, :-1], r"\[4, 9\].*\[4, 10\]"),
    (GROUPS, lambda t: t.bool(), r"integer.*torch.bool"),
    (QUESTION, lambda t: torch.ones(4, 9).bool(), r"\[4, 9\].*\[4, 10\]"),
    (QUESTION, lambda t: torch.ones(4, 10), r"bool.*float32"),
]


@pytest.mark.parametrize("verb", ["forward", "generate", "routing", "routing generate"])
@pytest.mark.parametrize(("name", "edit", "message"), WRONG_IDS)
def test_ids_of_another_kind(no_compute, batch, name, edit, message, verb):
    ids = batch.kwargs(TYPES) if name == QUESTION else batch.kwargs(TYPES, GROUPS)
    ids[name] = edit(ids.get(name))

    def run():
        if verb == "forward":
            return no_compute(**batch.text, **ids)
        if verb == "generate":
            return no_compute.generate(**batch.text, **ids, max_new_tokens=1)
        with moka.routing(no_compute, **ids):
            return (no_compute.generate if verb == "routing generate" else no_compute)(**batch.text)

    with pytest.raises(moka.MokaError, match=f"{name}.*{message}"):
        run()


@pytest.mark.parametrize("markers", [None, {"user": [99], "assistant": [98]}], ids=["no markers", "markers"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda b: {"attention_mask": b.attention_mask[:, 2:]}, r"attention_mask.*\[4, 8\].*\[4, 10\]"),
        (lambda b: {"labels": b.input_ids[:, 1:]}, r"labels.*\[4, 9\].*\[4, 10\].*interaction_ids"),
        (lambda b: {"labels": b.input_ids[:2]}, r"labels.*\[2, 10\].*\[4, 10\].*interaction_ids"),
        (
            lambda b: {**b.ids, "question_mask": b.mm_token_type_ids == 0},
            r"interaction_ids.*question_mask",
        ),
    ],
    ids=["mask", "labels", "labels of fewer rows", "the question twice"],
)
def test_arguments_that_do_not_fit_each_other(tiny, batch, given, message, markers):
    model = tiny.adapted(turn_markers=markers)
    with pytest.raises(moka.MokaError, match=message):
        model(input_ids=batch.input_ids, **given(batch))


def test_a_question_without_types(no_compute, batch):
    with pytest.raises(moka.MokaError, match=r"interaction_ids.*mm_token_type_ids \[batch, seq\]"):
        no_compute(inputs_embeds=torch.randn(4, 10, 64), interaction_ids=batch.interaction_ids)


def test_ids_that_end_before_the_cached_tokens_ids(model, tiny):
    cache = model(**tiny.rows(["i i q q t t"]).kwargs(), use_cache=True).past_key_values
    with pytest.raises(moka.MokaError, match=r"mm_token_type_ids.*\[1, 4\].*\[1, 2\].*6 cached.*\[1, 8\]"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, mm_token_type_ids=torch.zeros(1, 4).long())


def test_routing_of_a_model_without_an_adapter():
    with pytest.raises(moka.MokaError, match=r"moka.routing.*Linear"), moka.routing(nn.Linear(1, 1)):
        pass
