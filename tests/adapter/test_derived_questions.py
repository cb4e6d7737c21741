"""The question without ``interaction_ids``: from turn markers, labels or the prompt, the same in training and generation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

import moka

USER, ASSISTANT, END = 100, 101, 102
MARKERS = {"user": [USER], "assistant": [ASSISTANT], "end": [END]}
FIXED = {"u": USER, "s": ASSISTANT, "e": END, "i": 126}


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


ONE = "t u i i i q q q e s a a a e"


def adapted(tiny, marked=True, **settings):
    return tiny.adapted(**({"turn_markers": MARKERS} if marked else {}), **settings)


def logits(model, ids, train=False, **more):
    model.train(train)
    with torch.set_grad_enabled(train):
        return model(input_ids=ids, use_cache=False, **more).logits.detach()


class Forced(LogitsProcessor):
    """Lets generate choose the given tokens only."""

    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens[:, ids.shape[1] - self.start, None], 0.0)


# A notebook's recipe: labels = input_ids, with -100 only at the placeholders.


def notebook(tiny):
    ids, _, _ = chat(ONE, "t u i q q q q q e s a a a e")
    return ids, torch.where(ids == tiny.IMAGE, -100, ids)


def test_everything_supervised_without_markers_is_an_error(tiny):
    model, (ids, labels) = adapted(tiny, marked=False), notebook(tiny)
    with pytest.raises(moka.MokaError) as error:
        logits(model, ids, train=True, labels=labels)
    assert all(name in str(error.value) for name in ("Row 0", "turn_markers", "labels", "interaction_ids"))


def test_with_markers_the_answers_loss_as_trained_is_that_as_generated(tiny):
    model, (ids, labels) = adapted(tiny), notebook(tiny)
    start = (ids[0] == ASSISTANT).nonzero().item() + 1
    answer = ids[:, start:]
    trained = logits(model, ids, train=True, labels=labels)[:, start - 1 : -1]
    model.eval()
    out = model.generate(
        input_ids=ids[:, :start],
        attention_mask=torch.ones_like(ids[:, :start]),
        max_new_tokens=answer.shape[1],
        do_sample=False,
        logits_processor=[Forced(start, answer)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, start:], answer)
    generated = torch.stack(out.logits, dim=1)
    losses = [F.cross_entropy(found.flatten(0, 1), answer.flatten()).item() for found in (trained, generated)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # What makes this able to fail: the interaction does change the loss.
    other = logits(adapted(tiny, interaction="none"), ids)[:, start - 1 : -1]
    assert F.cross_entropy(other.flatten(0, 1), answer.flatten()).item() != pytest.approx(losses[0], abs=1e-3)


# With markers, nothing else is needed; with labels of the answers only, no markers are.

ROWS = {
    "one turn": ["t u i i i q q q e s a a a e", "t t u q q i i i e s a a a e"],
    "two turns": ["t u i i q e s a a e u q i q e s a e", "t u i q q e s a a e u q q q e s a e"],
    "image after the question": ["t u q q q q i i e s a a a e"],
    "image in the system turn": ["t i i t u q q e s a a a e u q e s a"],
}


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ROWS)
def test_markers_without_labels_equal_given_ids(tiny, kind, train):
    model, (ids, groups, _) = adapted(tiny), chat(*ROWS[kind])
    expected = logits(model, ids, interaction_ids=groups)
    torch.testing.assert_close(logits(model, ids, train=train), expected)
    assert (logits(model, ids, question_mask=torch.zeros_like(ids)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["answers", "everything", "first answer", "smoothed"])
def test_labels_change_nothing_where_markers_are_known(tiny, form):
    model, (ids, groups, labels) = adapted(tiny), chat(*ROWS["two turns"])
    labels = {
        "answers": labels,
        "everything": ids,
        "first answer": torch.where(torch.arange(ids.shape[1]) < 10, labels, -100),
        "smoothed": labels.clone().fill_(-100),
    }[form]
    expected = logits(model, ids, interaction_ids=groups)
    torch.testing.assert_close(logits(model, ids, train=True, labels=labels), expected)


@pytest.mark.parametrize("marked", [True, False], ids=["markers", "labels"])
def test_labels_cut_to_logits_to_keep(tiny, marked):
    model, (ids, _, labels) = adapted(tiny, marked), chat(*ROWS["one turn"])
    full = logits(model, ids, train=True, labels=labels)
    kept = logits(model, ids, train=True, labels=labels[:, -6:], logits_to_keep=6)
    torch.testing.assert_close(kept, full[:, -6:])
    whole_text = logits(model, ids, question_mask=ids != tiny.IMAGE)
    assert (whole_text - full).abs().max() > 1e-3


def test_labels_of_another_length_without_markers_are_refused(tiny):
    model, (ids, _, labels) = adapted(tiny, marked=False), chat(*ROWS["one turn"])
    with pytest.raises(moka.MokaError, match=r"labels is \[2, 6\]"):
        model.train()(input_ids=ids, labels=labels[:, -6:])


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_labels_of_the_answers_only_give_the_question_also_in_evaluation(tiny, train):
    """The text before the answer, that of the template included."""
    model, (ids, _, labels) = adapted(tiny, marked=False), chat(*ROWS["one turn"])
    groups = (torch.arange(ids.shape[1]) < 10).long().expand_as(ids)
    expected = logits(model, ids, interaction_ids=groups)
    torch.testing.assert_close(logits(model, ids, train=train, labels=labels), expected)


def test_evaluation_without_labels_or_markers_asks_all_text_and_warns_once(tiny, recwarn):
    model, (ids, _, _) = adapted(tiny, marked=False), chat(*ROWS["one turn"])
    expected = logits(model, ids, question_mask=ids != tiny.IMAGE)
    assert not [w for w in recwarn if "turn_markers" in str(w.message)]
    for _ in range(2):
        torch.testing.assert_close(logits(model, ids), expected)
    assert len([w for w in recwarn if "turn_markers" in str(w.message)]) == 1


def test_markers_that_match_nothing_are_reported_and_labels_decide(tiny, recwarn):
    model, (ids, _, labels) = tiny.adapted(turn_markers={"user": [99, 99]}), chat(*ROWS["one turn"])
    expected = logits(adapted(tiny, marked=False), ids, train=True, labels=labels)
    torch.testing.assert_close(logits(model, ids, train=True, labels=labels), expected)
    assert len([w for w in recwarn if "turn_markers" in str(w.message)]) == 1


def test_an_image_in_the_system_turn_sees_the_first_question_only(tiny):
    model, (ids, _, _) = adapted(tiny), chat(*ROWS["image in the system turn"])
    first, later = (ids[0] == USER).nonzero().flatten().tolist()
    plain = logits(model, ids)
    for position, reaches in ((first + 1, True), (later + 1, False)):
        changed = ids.clone()
        changed[0, position] = 95
        difference = (logits(model, changed) - plain)[0, 1:3].abs().max()
        assert (difference > 1e-3) == reaches


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
        torch.testing.assert_close(packed[:, ends[i] : ends[i + 1]], single, atol=1e-4, rtol=1e-4)


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


def test_an_image_and_its_question_in_two_messages_of_the_user(tiny):
    model = adapted(tiny)
    ids, _, _ = chat("u i i i e u q q q e s a a e u i i q q e s a a e")
    groups = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0]])
    expected = logits(model, ids, interaction_ids=groups)
    assert torch.equal(logits(model, ids), expected)
    assert not torch.allclose(expected, logits(model, ids, interaction_ids=torch.zeros_like(ids)), atol=1e-3)


def test_evaluation_of_labels_that_supervise_everything_warns(tiny):
    ids, labels = notebook(tiny)
    with pytest.warns(UserWarning, match=r"Row 0.*turn_markers.*labels"):
        logits(adapted(tiny, marked=False), ids, labels=labels)
