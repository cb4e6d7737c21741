"""The format of one sample: chat messages whose content is a list of typed parts.

    {"id": "clip7", "category": "counting", "messages": [
        {"role": "user", "content": [{"type": "audio", "audio": "clips/7.wav"},
                                     {"type": "text", "text": "How many bells ring?"}]},
        {"role": "assistant", "content": "Three."}]}

The layout is the one that chat templates of `transformers` use. Media are counted by their parts only: the characters
``<image>`` inside a text are text. A medium is a path, the bytes of an encoded file (what Parquet tables hold), or a decoded
object. Everything here is a pure function; paths are neither opened nor resolved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, NoReturn

from PIL import Image

from moka.errors import MokaError, nearest
from moka.modeling.media import AudioFeatures, Waveform

ROLES = ("system", "user", "assistant")
MEDIA = ("image", "audio", "video")
PARTS = ("text", *MEDIA)

_DUE = {
    "text": "a string",
    "image": "a path, the bytes of a file or a PIL image",
    "audio": "a path, the bytes of a file, a Waveform (or a list of them: its windows) or AudioFeatures",
    "video": "a path, the bytes of a file or a list of PIL images",
}
_DECODED = {"image": (Image.Image,), "audio": (Waveform, AudioFeatures), "video": ()}
# Where other formats list media next to the text. Kept as unknown keys they would train a model that sees nothing.
_MEDIA_LISTS = ("image", "images", "audio", "audios", "video", "videos")


def check_sample(sample: Any, where: str, require_answer: bool = True) -> dict[str, Any]:
    """Check one sample and return its normal form; the sample given is left unchanged.

    Args:
        sample: a dict with ``messages``, and optionally ``id`` and ``category`` (strings). Other keys are kept as
            they are, for metadata.
        where: file and line, such as ``"data/train.jsonl:12"``; it opens every error message.
        require_answer: whether at least one assistant message must hold text (what training needs).

    Returns:
        A new dict in which every ``content`` is a non-empty list of parts, each part has exactly the keys ``type`` and
        the one named by its type, paths are strings, and ``id`` is a string: a missing one becomes the last path
        component of ``where`` (``"train.jsonl:12"``), so that it is the same on every machine.

    Raises:
        MokaError: names ``where``, the field, what was given, what is allowed and the remedy.
    """
    if not isinstance(sample, dict):
        _fail(where, "sample", f"is {_show(sample)}; an object with a 'messages' list is expected")
    for key in _MEDIA_LISTS:
        if sample.get(key):
            _fail(where, key, f"is next to the messages and would be ignored. {_REMEDY_MEDIA_LIST}")
    messages = sample.get("messages")
    if messages is None:
        _fail(where, "messages", f"is missing; the sample has {_keys(sample)}. {_REMEDY_MESSAGES}")
    if not isinstance(messages, list):
        _fail(where, "messages", f"is {_show(messages)}; a list is expected. {_REMEDY_MESSAGES}")
    if not messages:
        _fail(where, "messages", f"is empty. {_REMEDY_MESSAGES}")

    checked = {key: value for key, value in sample.items() if value is not None}
    checked["id"] = _id(sample.get("id"), where)
    if not isinstance(checked.get("category", ""), str):
        _fail(where, "category", f"is {_show(checked['category'])}; a string is expected. Quote it, or leave it out")
    checked["messages"] = [_message(message, where, f"messages[{i}]") for i, message in enumerate(messages)]
    if require_answer and not any(_has_answer(message) for message in checked["messages"]):
        roles = [message["role"] for message in checked["messages"]]
        given = "every assistant message is blank" if "assistant" in roles else f"its roles are {', '.join(roles)}"
        _fail(
            where,
            "messages",
            f"has no assistant message with text ({given}), so there is nothing to learn. Add the answer as a message "
            "with role 'assistant', or leave the sample out (in Python require_answer=False reads questions only)",
        )
    return checked


def media_parts(sample: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the media of a checked sample in order of appearance, as ``(type, medium)`` pairs."""
    for message in sample["messages"]:
        for part in message["content"]:
            if part["type"] in MEDIA:
                yield part["type"], part[part["type"]]


def map_media(sample: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return a copy of a checked sample in which every medium is replaced by ``change(type, medium)``."""

    def mapped(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return {"type": kind, kind: change(kind, part[kind])} if kind in MEDIA else dict(part)

    messages = [{**message, "content": [mapped(part) for part in message["content"]]} for message in sample["messages"]]
    return {**sample, "messages": messages}


def _id(given: Any, where: str) -> str:
    if given is None:
        return PurePath(where).name
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str) or not given:
        _fail(where, "id", f"is {_show(given)}; a string is expected. Leave it out to have it made from file and line")
    return given


def _message(message: Any, where: str, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        _fail(where, field, f"is {_show(message)}; an object with 'role' and 'content' is expected")
    message = {key: value for key, value in message.items() if value is not None}
    for key in message:
        if key in _MEDIA_LISTS:
            _fail(where, f"{field}.{key}", f"is next to the content and would be ignored. {_REMEDY_MEDIA_LIST}")
        if key not in ("role", "content"):
            hint = nearest(str(key), ("role", "content"))
            _fail(where, f"{field}.{key}", f"is not known; a message has 'role' and 'content'.{hint} Remove it")
    role = message.get("role")
    if role not in ROLES:
        given = "is missing" if role is None else f"is {_show(role)}"
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        _fail(where, f"{field}.role", f"{given}; allowed are {', '.join(ROLES)}.{hint} Write one of these")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        given = "is missing" if content is None else f"is {_show(content)}"
        _fail(where, f"{field}.content", f"{given}; a string or a list of parts is expected")
    if not content:
        _fail(where, f"{field}.content", "is an empty list. Add a part, or remove the message")
    return {
        "role": role,
        "content": [_part(part, where, f"{field}.content[{i}]") for i, part in enumerate(content)],
    }


def _part(part: Any, where: str, field: str) -> dict[str, Any]:
    if isinstance(part, str):
        _fail(where, field, f'is {_show(part)}; a part is an object. Write {{"type": "text", "text": ...}}')
    if not isinstance(part, dict):
        _fail(where, field, f"is {_show(part)}; an object with 'type' is expected")
    # Tables (Parquet, `datasets`) give every part every column, the unused ones as null.
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind not in PARTS:
        given = "is missing" if kind is None else f"is {_show(kind)}"
        hint = nearest(kind, PARTS) if isinstance(kind, str) else ""
        _fail(where, f"{field}.type", f"{given}; allowed are {', '.join(PARTS)}.{hint} Write one of these")
    if kind not in part:
        what = "a text part without its text" if kind == "text" else "a placeholder without a medium"
        example = f'{{"type": "{kind}", "{kind}": ...}}'
        _fail(where, field, f"is {what}: it has {_keys(part)}. Write {example} with {_DUE[kind]}, or remove it")
    for key in part:
        if key not in ("type", kind):
            _fail(where, f"{field}.{key}", f"does not belong to a part of type {kind!r}. Write one part per medium")
    return {"type": kind, kind: _content(kind, part[kind], where, f"{field}.{kind}")}


def _content(kind: str, value: Any, where: str, field: str) -> Any:
    """Return the text or medium of a part, paths as strings."""
    if kind == "text":
        if not isinstance(value, str):
            _fail(where, field, f"is {_show(value)}; a string is expected. Quote it")
        return value
    if isinstance(value, _DECODED[kind]) or (isinstance(value, bytes) and value):
        return value
    if kind == "video" and isinstance(value, list):
        if value and all(isinstance(frame, Image.Image) for frame in value):
            return list(value)
        _fail(where, field, f"is {_show(value)}; a list must hold PIL images, at least one. For a file give its path")
    if kind == "audio" and isinstance(value, list) and value and all(isinstance(one, Waveform) for one in value):
        return list(value)  # one clip cut into windows, as video is into frames
    if isinstance(value, (list, tuple)):
        remedy = f"Write one part of type {kind!r} for each {kind}, in the order in which they are to be seen"
        _fail(where, field, f"is a list of {len(value)}; {_DUE[kind]} is expected. {remedy}")
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        _fail(where, field, f"is {_show(value)}; {_DUE[kind]} is expected")
    path = os.fspath(value)
    if "://" in path or path.startswith("data:"):
        _fail(where, field, f"is the address {_show(path)}; a local path is expected. Save the file and give its path")
    return path


def _has_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and any(part.get("text", "").strip() for part in message["content"])


def _keys(mapping: dict[Any, Any]) -> str:
    return f"only {', '.join(repr(key) for key in mapping)}" if mapping else "no fields"


def _show(value: Any) -> str:
    """Return what was given, short enough for one line."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


_REMEDY_MESSAGES = 'Write "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
_REMEDY_MEDIA_LIST = (
    'Write each medium as a part of the content, at its place among the text: {"type": "image", "image": "a.png"}'
)


def _fail(where: str, field: str, problem: str) -> NoReturn:
    raise MokaError(f"{where}: {field} {problem}.")
