"""No leak, ever: nothing that comes later than a logit, an answer or a later question, may change it."""

import pytest
import torch

# q1: turn 1's question, t: its answer; q2: turn 2's question.
CHAT = "i1 i1 a1 q1 q1 q1 t t a2 i2 q2 q2 q2 t t"
ANSWER_1, QUESTION_2, ANSWER_2 = (6, 7), (10, 11, 12), (13, 14)


def with_token(row, position, tiny, value=77):
    changed = row.input_ids.clone()
    changed[0, position] = value if changed[0, position] != value else value + 1
    return tiny.Rows(changed, row.mm_token_type_ids, row.interaction_ids, row.attention_mask)


@pytest.mark.parametrize("position", [*ANSWER_1, *QUESTION_2, *ANSWER_2])
def test_later_token_changes_no_logit_before_its_turn(pair, tiny, position):
    row = tiny.rows([CHAT])
    # Turn 2's media look forward to turn 2's question, so the boundary of that one is where its media begin.
    before = 8 if position in QUESTION_2 else position
    with torch.no_grad():
        plain = pair(**row.kwargs()).logits[0]
        changed = pair(**with_token(row, position, tiny).kwargs()).logits[0]
    assert torch.equal(plain[:before], changed[:before])
    assert not torch.allclose(plain[position:], changed[position:], atol=1e-3)


def test_the_question_does_reach_the_media_before_it(pair, tiny):
    """The interaction looks forward: without that the tests of this file could not fail."""
    row = tiny.rows([CHAT])
    with torch.no_grad():
        plain = pair(**row.kwargs()).logits[0]
        changed = pair(**with_token(row, 5, tiny).kwargs()).logits[0]
    assert (plain[:3] - changed[:3]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", [*ANSWER_1, *QUESTION_2, *ANSWER_2])
def test_questions_derived_from_labels_are_those_of_their_own_turn(pair, tiny, position, training):
    row = tiny.rows([CHAT])
    labels = torch.full_like(row.input_ids, -100)
    for i in (*ANSWER_1, *ANSWER_2):
        labels[0, i] = row.input_ids[0, i]

    def logits(r):
        return pair(input_ids=r.input_ids, labels=labels).logits[0]

    pair.train(training)
    try:
        plain, changed = logits(row), logits(with_token(row, position, tiny))
        question = logits(with_token(row, 5, tiny))
    finally:
        pair.eval()
    before = 8 if position in QUESTION_2 else position  # where turn 2's media begin
    assert torch.equal(plain[:before], changed[:before])
    assert (plain[:3] - question[:3]).abs().amax(-1).min() > 1e-3


def test_changing_labels_changes_no_logit_where_ids_are_given(pair, tiny):
    row = tiny.rows([CHAT])
    with torch.no_grad():
        plain = pair(**row.kwargs()).logits
        assert torch.equal(plain, pair(**row.kwargs(), labels=row.input_ids).logits)


def packed_mask(lengths):
    """[1, 1, seq, seq] bool: causal, each sample to itself."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((sample[:, None] == sample[None]) & torch.ones(len(sample), len(sample)).tril().bool())[None, None]


def test_packed_samples_interact_within_their_own(pair, tiny):
    """Two samples in one row equal the two on their own."""
    one, two = tiny.rows(["i i a q q t"]), tiny.rows(["q i i t t"], seed=9)
    names = ("input_ids", "mm_token_type_ids")
    ids = torch.cat([one.interaction_ids, 2 * two.interaction_ids], 1)
    positions = torch.tensor([[*range(6), *range(5)]])
    with torch.no_grad():
        packed = pair(
            **{name: torch.cat([getattr(one, name), getattr(two, name)], 1) for name in names},
            interaction_ids=ids,
            position_ids=positions,
            attention_mask=packed_mask([6, 5]),
        ).logits
        single = [pair(**sample.kwargs()).logits for sample in (one, two)]
    tiny.same(packed, torch.cat(single, 1))


def test_packed_samples_under_one_id_do_interact(pair, tiny):
    """The ids, not the positions, keep packed samples apart."""
    row = tiny.rows(["i1 q1 i2 q2"])
    with torch.no_grad():
        apart = pair(**row.kwargs()).logits
        row.interaction_ids = torch.ones_like(row.interaction_ids)
        together = pair(**row.kwargs()).logits
    assert (apart[0, 0] - together[0, 0]).abs().max() > 1e-3
