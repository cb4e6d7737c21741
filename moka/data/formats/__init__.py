"""Readers of published data set layouts, and the one function that opens any of them.

open_format("ave", "data/ave", "train")  ->  FormatDataset: checked samples, media as absolute paths
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from moka.data.formats import (
    audio_visual,
    captions,
    general,
    instructions,
    mmbench,
    picture_benchmarks,
    sound_benchmarks,
    speech,
)
from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.dataset import FormatDataset
from moka.errors import MokaError, nearest

__all__ = ["FORMATS", "Format", "FormatDataset", "Option", "Rows", "describe_formats", "find_file", "open_format"]


_MODULES = (
    general,
    captions,
    instructions,
    audio_visual,
    speech,
    picture_benchmarks,
    mmbench,
    sound_benchmarks,
)
FORMATS: dict[str, Format] = {format.name: format for module in _MODULES for format in module.FORMATS}


def open_format(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    *,
    require_answer: bool = True,
    media_root: str | os.PathLike[str] | None = None,
    **options: Any,
) -> FormatDataset:
    """Open one split of a published data set.

    Args:
        name: the format, a key of `FORMATS`.
        root: the folder that has the data set; not needed where the records come from the Hub and hold their media.
        split: which split; the format's first by default.
        require_answer: whether every sample must hold an assistant message with text.
        media_root: the folder that media paths start from and may not leave; the format's own place by default.
        options: the format's options; those left out have their defaults.

    Raises:
        MokaError: the format, split or option is not known; the root is absent or does not have the layout.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise MokaError(f"Format {name!r} is not known; allowed are {', '.join(FORMATS)}.{nearest(str(name), FORMATS)}")
    format = FORMATS[name]
    split = format.splits[0] if split is None else split
    if split not in format.splits and not format.any_split:
        hint = nearest(str(split), format.splits)
        raise MokaError(f"format {name}: split {split!r} is not known; allowed are {', '.join(format.splits)}.{hint}")
    for option in options:
        if option not in format.options:
            allowed = f"allowed are {', '.join(format.options)}" if format.options else "it has none"
            hint = nearest(option, [*format.options, "format", "root", "split", "media_root"])
            raise MokaError(f"format {name}: option {option!r} is not known; {allowed}.{hint}")
    given = {name: option.default for name, option in format.options.items()} | options
    for option, value in given.items():
        format.options[option].check(f"format {name}: option {option}", value)
    if root is None:
        if not given.get("hub"):
            raise MokaError(f"format {name}: root is missing. Name the folder that has the data set.")
        root = "."
    if not Path(root).exists():
        raise MokaError(
            f"format {name}: root {str(root)!r} does not exist. Put the data set there, or name another root."
        )
    rows = format.read(Path(root), split, **given)
    if not len(rows.items):
        raise MokaError(f"format {name}: split {split!r} under {str(root)!r} has no records.")
    return FormatDataset(format, split, rows, require_answer=require_answer, media_root=media_root)


def describe_formats() -> str:
    """Return the reference of all formats as Markdown, from what the formats say of themselves; ``docs/formats.md`` has it."""
    return "\n".join(_describe(format) for format in FORMATS.values())


def _describe(format: Format) -> str:
    splits = ", ".join(f"`{split}`" for split in format.splits) + (", or any other" if format.any_split else "")
    facts = [f"Media: {', '.join(format.media)}. Splits: {splits} (default `{format.splits[0]}`)."]
    if format.benchmark:
        facts.append(f"Scored by `moka score {format.benchmark}`.")
    if format.experimental:
        facts.append(f"Experimental: {format.experimental} were not checked against the published files.")
    text = [f"## {format.name}", "", _cell(format.about.removesuffix(".")) + ".", "", " ".join(facts), ""]
    text += ["```text", inspect.cleandoc(format.layout), "```", "", "| field | |", "|---|---|"]
    text += [f"| {_cell(name)} | {_cell(meaning)} |" for name, meaning in format.fields.items()]
    if format.options:
        text += ["", "| option | default | |", "|---|---|---|"]
        text += [
            f"| `{name}` | {_cell(f'`{json.dumps(option.default)}`')} | {_cell(option.help)} |"
            for name, option in format.options.items()
        ]
    return "\n".join([*text, ""])


def _cell(text: str) -> str:
    """Return text for a table: on one line, and with angle brackets that stay visible outside code."""
    spans = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(span if i % 2 else span.replace("<", "&lt;") for i, span in enumerate(spans))
