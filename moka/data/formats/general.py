"""The layouts that people keep their own data in: chat messages, LLaVA's conversations, ShareGPT as LLaMA-Factory has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.conversations import conversation, listed_media, medium, other_fields
from moka.data.formats.files import JsonRecords, TableRecords
from moka.data.schema import MEDIA
from moka.errors import MokaError

OPTIONS: Mapping[str, Option] = {
    "file": Option(None, "the annotation file, relative to the root; by default the first of those in the layout"),
    "hub": Option(None, "a data set of the Hugging Face Hub, `owner/name`, or a local folder with Parquet files"),
    "config": Option(None, "the configuration of the Hub data set, where it has several"),
    "streaming": Option(False, "stream the Hub data set, and keep the first `take` records in memory"),
    "take": Option(None, "how many records to stream"),
}
_ENDINGS = (".jsonl", ".json", ".parquet")
_LAYOUT = """
    {split}.jsonl, {split}.json (an array), {split}.parquet, {split}-*.parquet or data/{split}-*.parquet
    (the root may also be the annotation file itself)
    media files, named relative to the root
"""


def open_records(
    name: str,
    root: Path,
    split: str,
    *,
    file: str | None,
    hub: str | None,
    config: str | None,
    streaming: bool,
    take: int | None,
) -> tuple[JsonRecords | TableRecords, Path]:
    """Return the records of one split, and the folder that their media start from.

    Raises:
        MokaError: options that do not go together; no annotation file.
    """
    problems = {
        "options config, streaming and take go with option hub. Set hub, or remove them.": hub is None
        and (config is not None or streaming or take is not None),
        "options streaming: true and take: N go together. Set both or neither.": streaming is not (take is not None),
        f"option take is {take!r}; a positive number of records is expected.": take is not None
        and (not isinstance(take, int) or take < 1),
        "options hub and file name two sources. Keep one of them.": hub is not None and file is not None,
        f"the root {str(root)!r} is a file and option file is {file!r}. Keep one.": root.is_file() and file is not None,
    }
    if problem := next((text for text, holds in problems.items() if holds), None):
        raise MokaError(f"format {name}: {problem}")
    if hub is not None:
        return TableRecords(hub, split, config, take=take), root
    if root.is_file():
        root, file = root.parent, root.name
    if file is None:
        shards = sorted(root.glob(f"{split}-*.parquet")) or sorted(root.glob(f"data/{split}-*.parquet"))
        if shards and not any((root / f"{split}{ending}").is_file() for ending in _ENDINGS):
            return TableRecords(str(shards[0].parent), split, files=shards), root
    candidates = [file] if file is not None else [f"{split}{ending}" for ending in _ENDINGS]
    path = find_file(root, *candidates, format=name, layout=_LAYOUT)
    return (TableRecords(str(path), split, files=[path]) if path.suffix == ".parquet" else JsonRecords(path)), root


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    """Return a sample of our own layout, with the two things that tables do to it: wrapped media, and media listed next to the messages."""
    listed = listed_media(record)
    messages = []
    for message in record["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [_part(part, listed) for part in content]
        messages.append({**message, "content": content})
    for kind, unused in listed.items():
        if unused:
            raise MokaError(
                f"{len(unused)} of the {kind} files listed have no part of type {kind!r} in the messages. "
                'Write {"type": "' + kind + '"} where each is to be seen.'
            )
    return {**other_fields(record), "messages": messages}


def _part(part: Any, listed: dict[str, list[Any]]) -> Any:
    if not isinstance(part, dict) or part.get("type") not in MEDIA:
        return part
    kind = part["type"]
    given = medium(part.get(kind))
    if given is None and listed[kind]:
        given = listed[kind].pop(0)
    return {**part, kind: given}


def llava(record: dict[str, Any], question: str | None = None) -> dict[str, Any]:
    """Return one record of LLaVA's layout as a sample; ``question`` replaces the record's own first question."""
    messages = conversation(record["conversations"], listed_media(record), media_first=True, question=question)
    return {**other_fields(record, "conversations"), "messages": messages}


def _sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    if record.get("tools"):
        raise MokaError("field 'tools' describes functions to call, which samples cannot hold. Remove it.")
    turns = record.get("messages")
    messages = conversation(
        record["conversations"] if turns is None else turns, listed_media(record), media_first=False
    )
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return {**other_fields(record, "conversations", "messages", "system", "tools"), "messages": messages}


def _read(name: str, make: Callable[[dict[str, Any]], dict[str, Any]], root: Path, split: str, **options: Any) -> Rows:
    items, media_root = open_records(name, root, split, **options)
    return Rows(items, make, items.where, media_root)


# Format -> how a row of a table becomes a sample.
ROW_MAKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "messages": _messages,
    "llava-conversations": llava,
    "sharegpt": _sharegpt,
}

FORMATS = (
    Format(
        name="messages",
        about="Chat messages with typed parts, moka's own layout (`moka.data.schema`), as JSONL, a JSON array or a table.",
        media=MEDIA,
        splits=("train", "validation", "test"),
        any_split=True,
        layout=_LAYOUT,
        fields={
            "id": "a string, optional",
            "messages": "role and content; content is text or a list of parts",
            "images, audios, videos": "in tables: media of the parts that have a type alone, in order, optional",
        },
        read=partial(_read, "messages", ROW_MAKERS["messages"]),
        options=OPTIONS,
    ),
    Format(
        name="llava-conversations",
        about="LLaVA's layout of visual instruction data (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md), "
        "here with sound and video too.",
        media=MEDIA,
        splits=("train", "validation", "test"),
        any_split=True,
        layout=_LAYOUT,
        fields={
            "id": "a string, optional",
            "image, video, audio": "a path or a list of paths, optional",
            "conversations": "`from` (human, gpt, system) and `value`; `<image>`, `<video>`, `<audio>` in human turns "
            "mark the media, one each. The only medium of a turn goes before its text, several stay where they are; "
            "in other turns, and beyond the media listed, the characters are text",
        },
        read=partial(_read, "llava-conversations", ROW_MAKERS["llava-conversations"]),
        options=OPTIONS,
    ),
    Format(
        name="sharegpt",
        about="ShareGPT conversations as LLaMA-Factory has them (github.com/hiyouga/LLaMA-Factory, data/README.md).",
        media=MEDIA,
        splits=("train", "validation", "test"),
        any_split=True,
        layout=_LAYOUT,
        fields={
            "messages or conversations": "`role` and `content`, or `from` and `value`; `<image>`, `<video>`, `<audio>` "
            "in user turns mark the media where they stand",
            "images, videos, audios": "lists of paths, optional",
            "system": "the system message, optional",
        },
        read=partial(_read, "sharegpt", ROW_MAKERS["sharegpt"]),
        options=OPTIONS,
    ),
)
