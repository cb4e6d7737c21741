"""Find whose turn a token belongs to, and from it the interaction groups: which question each medium attends to.

    tokens   <s> SYSTEM   USER: img img what is it  ASSISTANT: a cat </s>   USER: img and this  ASSISTANT: a dog </s>
    groups    0       0      0   1   1    1  1  1           0  0   0    0      0   2    2    2           0  0   0    0

Media of a group are queries, its text are their keys; an answer or a later question never is a key of an earlier medium.
Arrays are numpy's, [batch, seq] unless noted; ``segments`` numbers the samples of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product, takewhile
from typing import Any

import numpy as np
from jinja2 import TemplateError

from moka.errors import MokaError

_BASE = ["Kiwi tree", "Plum soup", "Mango hill", "Grape wine"]
_PLAIN = ["742 of 9", "stone quay", "Où été"]
# Contents whose borders merge with the template's own text: "\n" + "\n\n" and "?" + "\n\n" are single tokens of many models.
_MERGING = ["\n\nlime\n\n", "\nfig\n", "  pine  ", '"oak?', " elm: "]
_CHECKED = [  # user, assistant, user, assistant, user
    ["Who is here", "No one now", "Where then", "Far away", "Since when"],
    ["Is it so? ", " Yes ", " Then why? ", " A guess. ", "Good. "],
    ["Time: 5:30 [or 6], yes?", "\n\nNone (x): 7.", "\nlist:\n- b\n\n- c\n", '"So," it said\n', "  d / e. "],
]
_REMEDY = "Set processor.chat_template, pass turn_markers by hand, or give labels or interaction_ids with the inputs."
Ids = list[int]


def turn_markers(processor: Any) -> dict[str, Ids]:
    """Derive from the chat template the token ids that open and close turns, for ``MokaConfig(turn_markers=...)``.

    Returns ``"user"`` and ``"assistant"`` (what opens their turns; the latter begins with what closes the user's turn)
    and, if the template has one, ``"end"`` (the token that closes a turn). A key with a suffix is another form of the
    same marker: ``"user_first"`` if the first turn's is tokenised differently, ``"..._merged"`` for contents whose first
    or last characters merge with the template's.

    Args:
        processor: a transformers processor or tokenizer, or a ``MokaProcessor``.

    Raises:
        MokaError: without a chat template, or if the markers do not find the turns of other conversations.
    """
    tokenizer, name = getattr(processor, "tokenizer", processor), type(processor).__name__
    render = _renderer(processor, tokenizer)
    markers = _derive(render, tokenizer, _PLAIN)
    # A medium next to the template's text divides it otherwise: "\n\n" before a word may be two tokens, else one.
    medium = getattr(processor, "image_token", None) or tokenizer.pad_token or tokenizer.unk_token or ""
    for key, marker in _derive(render, tokenizer, [*_PLAIN, *_MERGING, f"{medium}ash{medium}"]).items():
        # If a token of its own ends the user's turn, no other form of what follows it is needed.
        needed = marker not in markers.values() and key not in (["end", "assistant"] if "end" in markers else [])
        if needed and not (len(marker) == 1 and tokenizer.decode(marker).strip().isalnum()):  # a word of contents
            markers[f"{key}_merged"] = marker
    if "end" not in markers:
        # A space at the end of a question may merge with what follows it.
        spaced = [[f"{text} " for text in texts] for texts in (_PLAIN, _BASE)]
        markers["assistant_spaced"] = _derive(render, tokenizer, *spaced).get("assistant", [])
        markers = {key: marker for key, marker in markers.items() if marker}
    for texts, system in product(_CHECKED, (None, "Be kind 2")):
        try:
            ids = np.array([render(texts, True, system)])
        except MokaError:
            if system is None:
                raise
            continue  # this template has no system turn
        everywhere = np.ones_like(ids, bool)
        groups, _ = question_groups(ids, ~everywhere, everywhere, np.zeros_like(ids), markers)
        found = [_squashed(tokenizer, ids[groups == k]) for k in range(1, groups.max() + 1)]
        wanted = ["".join(text.split()).casefold() for text in texts]
        right = len(found) == len(wanted[::2]) and all(map(str.__contains__, found, wanted[::2]))
        if not right or any(answer in turn for answer in wanted[1::2] for turn in found):
            raise MokaError(
                f"turn_markers: {markers}, derived from the chat template of {name}, find the users' turns {found} where "
                f"the users wrote {texts[::2]}. {_REMEDY}"
            )
    return markers


def _renderer(processor: Any, tokenizer: Any) -> Callable[..., Ids]:
    """Return a function from the texts of user, assistant, user, ... to the token ids of the rendered conversation."""
    name = type(processor).__name__
    owner = next((one for one in (processor, tokenizer) if getattr(one, "chat_template", None)), None)
    if owner is None:
        raise MokaError(f"turn_markers: {name} has no chat_template to derive them from. {_REMEDY}")

    def render(texts: list[str], prompt: bool = False, system: str | None = None) -> Ids:
        chat = list(zip(["user", "assistant"] * len(texts), texts, strict=False))
        chat = chat if system is None else [("system", system), *chat]
        reason = "it leaves out contents"
        for as_parts in (False, True):
            messages = [{"role": r, "content": [{"type": "text", "text": t}] if as_parts else t} for r, t in chat]
            try:
                if hasattr(processor, "modalities"):  # MokaProcessor tokenises the template and the contents separately
                    return processor.encode(messages, add_generation_prompt=prompt)["input_ids"]
                text = owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                reason = str(error)
                continue
            if all(t.strip() in text for _, t in chat):
                return tokenizer(text, add_special_tokens=False)["input_ids"]
        raise MokaError(f"turn_markers: the chat template of {name} refuses {chat}: {reason}. {_REMEDY}")

    return render


def _derive(
    render: Callable[..., Ids], tokenizer: Any, variants: list[str], contents: list[str] = _BASE
) -> dict[str, Ids]:
    """Find the markers: the runs of ids that stay the same whichever of ``variants`` is the content of a turn."""

    def around(texts: list[str], prompt: bool) -> list[Ids]:
        """Return the ids before the first content, between each two, and after the last."""
        base, edges = render(texts, prompt), [0]
        for i in range(len(texts)):
            others = [render([*texts[:i], v, *texts[i + 1 :]], prompt) for v in variants]
            edges.append(len(_common(base, *others)))
            edges.append(len(base) - len(_common(*(ids[::-1] for ids in [base, *others]))))
        return [base[start:stop] for start, stop in zip(edges[::2], [*edges[1::2], len(base)], strict=True)]

    before, to_answer, to_user, to_last, _ = around(contents, False)
    _, prompt = around(contents[:1], True)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end = to_answer[:1] if to_answer[:1] == to_user[:1] and special.issuperset(to_answer[:1]) else []
    # A bos token that is also in front of answers opens every turn, as <|im_start|> does.
    closing = {*end, tokenizer.eos_token_id, tokenizer.bos_token_id} - ({tokenizer.bos_token_id} & {*to_answer})

    def opening(run: Ids) -> Ids:
        """Drop the end of the turn before, and white space after it: a first turn has neither."""
        words = [i for i, token in enumerate(run) if token not in closing and tokenizer.decode([token]).strip()]
        return run[words[0] :] if words else []

    # Qwen3 adds <think> to the last answer. A template may ignore the request for a prompt: nothing but an end is there.
    assistant = _common(to_answer, to_last, *([prompt] if opening(prompt) else []))
    stable = opening(_common(before[::-1], to_user[::-1])[::-1])
    markers = {"user": opening(to_user), "assistant": assistant, "end": end}
    if markers["user"] != stable:  # the first turn's opening is tokenised differently: find its text before the first
        word = _squashed(tokenizer, markers["user"])
        tails = (before[-n:] for n in range(1, len(before) + 1))
        first = next((tail for tail in tails if _squashed(tokenizer, tail).endswith(word)), None)
        markers |= {"user_first": first} if first else {"user": stable}
    return {key: marker for key, marker in markers.items() if marker}


def _common(*runs: Ids) -> Ids:
    """Return the ids that all runs begin with."""
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*runs, strict=False))]


def _squashed(tokenizer: Any, ids: Any) -> str:
    """Decode ids to text without white space and case, which tokenizers may change."""
    return "".join(tokenizer.decode(list(ids)).split()).casefold()


def segments(
    shape: tuple[int, int], valid: np.ndarray, position_ids: Any = None, cu_seq_lens: Any = None
) -> np.ndarray:
    """Number the samples of each packed row from 0, with -1 at padding: int64 [batch, seq].

    Args:
        shape: batch, seq.
        valid: bool, False at padding.
        position_ids: [batch or 1, seq], or M-RoPE's [3 or 4, batch or 1, seq], of which the first plane counts. A
            sample begins where they restart at 0 after another valid token.
        cu_seq_lens: [samples + 1] cumulative lengths, from 0, of a batch of one row; goes before ``position_ids``.
    """
    if cu_seq_lens is not None:
        ends = np.asarray(cu_seq_lens).ravel()
        if shape[0] != 1 or not ends.size or ends[-1] > shape[1]:
            raise MokaError(
                f"cu_seq_lens: {ends.tolist()} does not fit ids of shape {tuple(shape)}; give one row of ids."
            )
        return np.where(valid, np.searchsorted(ends[1:], np.arange(shape[1]), side="right"), -1)
    if position_ids is None:
        return np.where(valid, 0, -1)
    position = np.asarray(position_ids)
    grid = position.ndim == 3
    position = np.broadcast_to(position[0] if grid else position, shape)
    restart = (position == 0) & valid & (np.cumsum(valid, axis=1) > 1)  # padding in front is no sample
    if grid:  # all tokens of a picture at the beginning of a sample have the temporal position 0
        restart[:, 1:] &= position[:, :-1] != 0
    return np.where(valid, np.cumsum(restart, axis=1), -1)


def question_groups(
    ids: np.ndarray, media: np.ndarray, keys_allowed: np.ndarray, segments: np.ndarray, markers: dict[str, Ids]
) -> tuple[np.ndarray, np.ndarray]:
    """Group tokens by user turn, found by its markers. Returns int64 groups, and bool [batch]: rows with any marker.

    A user turn reaches from a user marker to the next marker of any kind, or the end of its segment; user turns with no
    answer between them are one. Media outside of user turns belong to the turn before them; those of a system turn,
    before any answer, to the first user turn.

    Args:
        ids: int token ids.
        media: bool, tokens that are not text.
        keys_allowed: bool, valid text that is no structure token of a medium.
        segments: int, ascending in a row, -1 at padding.
        markers: of `turn_markers`; the part of a key before "_" is its kind.
    """
    seq = ids.shape[1]
    starts = {kind: np.zeros(ids.shape, bool) for kind in ("user", "assistant", "end")}
    taken = segments < 0  # [batch, seq] padding, and tokens of a marker
    # Longest first: "[INST]" may also be found in "[/INST]", and the short form of a marker in its long form.
    for key, marker in sorted(markers.items(), key=lambda item: -len(item[1])):
        count = max(0, seq - len(marker) + 1) if marker else 0  # of positions at which it could begin
        match = (segments[:, :count] == segments[:, seq - count :]) & ~taken[:, :count]
        for offset, token in enumerate(marker):
            match &= ids[:, offset : offset + count] == token
        starts[key.split("_")[0]][:, :count] |= match
        for offset in range(len(marker)):
            taken[:, offset : offset + count] |= match
    begins, *bounds = _bounds(segments)
    opened, next_opened = _nearest(starts["user"], *bounds)
    answered, next_answered = _nearest(starts["assistant"], *bounds)
    ended, _ = _nearest(starts["end"], *bounds)
    opened_before = np.where(begins, -1, np.roll(opened, 1, axis=1))
    # Only if one end, that of the turn before, is between two user turns, no answer was: the opening of an answer may be
    # hidden, if it merged with its text.
    ends = np.cumsum(starts["end"], axis=1)
    answers = (answered > opened_before) | (ends - np.take_along_axis(ends, opened_before.clip(0), 1) != 1)
    turn = np.cumsum(starts["user"] & ((opened_before < 0) | answers), axis=1)
    # An answer before the first question must not depend on it.
    of_system = (next_opened >= 0) & (answered < 0) & ((next_answered < 0) | (next_answered > next_opened))
    of_medium = np.where(opened >= 0, turn, np.where(of_system, turn + 1, 0))
    is_key = keys_allowed & (opened > np.maximum(answered, ended)) & ~taken
    groups = np.where(media & (segments >= 0), of_medium, np.where(is_key, turn, 0))
    return groups, np.logical_or.reduce(list(starts.values())).any(axis=1)


def groups_from_labels(
    labels: np.ndarray, media: np.ndarray, keys_allowed: np.ndarray, segments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Group tokens in training without markers: a turn ends with a supervised span; its keys are what is before it.

    Only unsupervised text separates spans: media and their structure tokens within an answer belong to its turn. Text
    after the last span takes no part. Returns int64 groups, and bool [batch]: rows with media in which some segment's
    supervised text has no allowed text before it, because everything is supervised.
    """
    answer = (labels != -100) & ~media & (segments >= 0)
    question = (labels == -100) & ~media & keys_allowed & (segments >= 0)
    begins, *bounds = _bounds(segments)
    last_answer, next_answer = _nearest(answer, *bounds)
    last_question, next_question = _nearest(question, *bounds)
    question_next = (next_question >= 0) & ((next_answer < 0) | (next_question < next_answer))
    begins[:, 1:] |= answer[:, :-1] & question_next[:, 1:]
    turn = np.cumsum(begins, axis=1)
    after = (last_answer >= 0) & (next_answer < 0)
    groups = np.where((media & (segments >= 0)) | (question & ~after), turn, 0)
    last_medium, next_medium = _nearest(media & (segments >= 0), *bounds)
    unasked = answer & (last_question < 0) & ((last_medium >= 0) | (next_medium >= 0))
    return groups, unasked.any(axis=1)


def groups_from_prompt(media: np.ndarray, keys_allowed: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Group tokens at inference without markers and labels: all allowed text and media of a segment are one group."""
    return np.where((media | keys_allowed) & (segments >= 0), segments + 1, 0)


def _bounds(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each token whether it begins a segment, and the first and last position of its segment."""
    position = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.diff(np.maximum.accumulate(segments, axis=1), axis=1, prepend=-1) > 0
    last = np.where(np.roll(begins, -1, axis=1), position, position[-1:])[:, ::-1]
    first = np.maximum.accumulate(np.where(begins, position, 0), axis=1)
    return begins, first, np.minimum.accumulate(last, axis=1)[:, ::-1]


def _nearest(mask: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the nearest True at or before, and at or after each token; -1 if its segment has none."""
    position = np.arange(mask.shape[1], dtype=np.int32)
    before = np.maximum.accumulate(np.where(mask, position, -1), axis=1)
    after = np.minimum.accumulate(np.where(mask, position, position.size)[:, ::-1], axis=1)[:, ::-1]
    return np.where(before >= first, before, -1), np.where(after <= last, after, -1)


def no_marker_matched(ids: np.ndarray, markers: dict[str, Ids]) -> str:
    """Write the warning that no user turn was found in ``ids``."""
    row = np.asarray(ids)[0]
    begin = max(0, int((row != row[0]).argmax()) - 1)  # after padding on the left
    return (
        f"turn_markers: {markers} match nothing in the input ids, of which one row begins with "
        f"{row[begin : begin + 24].tolist()}: its media have no question to interact with. Derive the markers "
        "with moka.turn_markers(processor) from the processor that wrote these ids, or give interaction_ids."
    )
