"""Conversations that list their media next to the text, and mark their places in it with ``<image>``, ``<audio>``, ``<video>``.

"image": "a.jpg", human: "<image>\\nWhat is this?"   ->   [{"type": "image", "image": "a.jpg"}, {"type": "text", ...}]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moka.data.schema import MEDIA
from moka.errors import MokaError, nearest

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TOKEN = re.compile(r"<(image|audio|video)>")


def conversation(
    turns: Any, media: Mapping[str, Sequence[Any]], *, media_first: bool, question: str | None = None
) -> list[dict[str, Any]]:
    """Return messages with the media at their places.

    A placeholder counts in user turns only, and only while listed media of its kind are left; any other is text.

    Args:
        turns: dicts with ``from`` and ``value``, or ``role`` and ``content``.
        media: kind -> the media listed, in the order of their placeholders.
        media_first: whether the only medium of a turn is before its text wherever its placeholder is, as LLaVA's own
            preprocessing has it; several media stay where they are.
        question: replaces the text of the first user turn.

    Raises:
        MokaError: fewer placeholders than media, an unknown role, a turn without text.
    """
    if not isinstance(turns, list) or not turns:
        raise MokaError(f"the conversation is {turns!r:.60}; a list with at least one turn is expected.")
    left = {kind: list(listed) for kind, listed in media.items()}
    messages: list[dict[str, Any]] = []
    for position, turn in enumerate(turns):
        role, text = _turn(turn, position)
        if role != "user":
            messages.append({"role": role, "content": text})
            continue
        parts = _place(text, left, media_first)
        if question is not None:
            parts = [*(part for part in parts if part["type"] != "text"), {"type": "text", "text": question}]
            question = None
        messages.append({"role": role, "content": parts})
    for kind, unused in left.items():
        if unused:
            listed = len(media[kind])
            raise MokaError(
                f"{listed} {kind} file{'s' * (listed != 1)} listed, but {listed - len(unused)} <{kind}> "
                f"placeholder{'s' * (listed - len(unused) != 1)} in the user's turns. Write one <{kind}> for each file."
            )
    return messages


def listed_media(record: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the media under ``image`` or ``images`` (so for audio and video) of a record, be it one or a list.

    Raises:
        MokaError: both keys hold media.
    """
    found: dict[str, list[Any]] = {}
    for kind in MEDIA:
        one, many = record.get(kind), record.get(f"{kind}s")
        if one and many:
            raise MokaError(f"media are under both {kind!r} and '{kind}s'. Keep one of them.")
        given = one or many or []
        found[kind] = [medium(item) for item in (given if isinstance(given, list) else [given])]
    return found


def medium(given: Any) -> Any:
    """Return a medium as tables hold it, ``{"bytes", "path"}``, as its bytes or else its path; others pass unchanged."""
    if isinstance(given, dict) and given.keys() <= {"bytes", "path"}:
        return given.get("bytes") or given.get("path")
    return given


def other_fields(record: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """Return the fields of a record that are neither ``used`` nor media: they stay with the sample as metadata."""
    media = {name for kind in MEDIA for name in (kind, f"{kind}s")}
    return {key: value for key, value in record.items() if key not in media and key not in used}


def _turn(turn: Any, position: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise MokaError(f"turn {position} is {turn!r:.60}; an object with 'from' and 'value' is expected.")
    name = turn.get("from") or turn.get("role")
    text = turn["value"] if turn.get("value") is not None else turn.get("content")
    if name not in ROLES:
        hint = nearest(name, ROLES) if isinstance(name, str) else ""
        raise MokaError(f"turn {position} is from {name!r}; allowed are {', '.join(ROLES)}.{hint}")
    if not isinstance(text, str):
        raise MokaError(f"turn {position} has the text {text!r:.60}; a string under 'value' or 'content' is expected.")
    return ROLES[name], text


def _place(text: str, left: dict[str, list[Any]], media_first: bool) -> list[dict[str, Any]]:
    """Return the parts of a user turn; takes the media that it uses out of ``left``."""
    placed = []  # placeholder and its part
    for token in _TOKEN.finditer(text):
        kind = token[1]
        if left.get(kind):
            placed.append((token, {"type": kind, kind: left[kind].pop(0)}))
    if not placed:
        return [{"type": "text", "text": text}]
    if media_first and len(placed) == 1:
        token, part = placed[0]
        return _filled([part, _text(text[: token.start()] + text[token.end() :])])
    parts, end = [], 0
    for token, part in placed:
        parts += [_text(text[end : token.start()]), part]
        end = token.end()
    return _filled([*parts, _text(text[end:])])


def _text(text: str) -> dict[str, Any]:
    # The line break between a placeholder and the text belongs to the notation.
    return {"type": "text", "text": text.strip()}


def _filled(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for part in parts if part["type"] != "text" or part["text"]]
