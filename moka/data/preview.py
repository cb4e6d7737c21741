"""A sample as the model sees it, token by token: ``moka data show``.

    encoded sample --> spans (token | medium's placeholders): text, modality, interaction group, supervised --> terminal

In a terminal the modality is the background, the interaction group a raised number, and what is learnt is underlined;
elsewhere the same is a plain table.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from moka.data.schema import media_parts
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.hf_processing import ChatProcessor
from moka.modeling.processing import IGNORE, MokaProcessor

TEXT = "text"
_KINDS = {0: TEXT, **{type_id: kind for kind, type_id in MEDIA_TYPE_IDS.items()}}
_BACKGROUND = {"image": "black on cyan", "video": "black on magenta", "audio": "black on yellow", TEXT: ""}
_QUESTION = "black on green"
_LEARNT = "bold underline"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_COLUMNS = ("position", "id", "modality", "interaction", "supervised", "token")


@dataclass(frozen=True)
class Span:
    """A token of text, or all placeholders of one medium.

    Attributes:
        start: position of its first token.
        count: tokens it means; 1 for text.
        text: the decoded token, or such as ``"<image x64>"``.
        token_id: of each of its tokens.
        modality: "text", "image", "video" or "audio".
        interaction: group of its interaction (0: none); a medium interacts with the text of its own group.
        supervised: whether it carries loss.
    """

    start: int
    count: int
    text: str
    token_id: int
    modality: str
    interaction: int
    supervised: bool


def spans(
    encoded: dict[str, Any], processor: MokaProcessor | ChatProcessor, sample: dict[str, Any] | None = None
) -> list[Span]:
    """Return the tokens of one encoded sample in order; the counts add up to its length.

    Args:
        encoded: from ``MokaProcessor.encode``.
        processor: the same one.
        sample: the decoded sample; says where one medium ends and the next of its kind begins.
    """
    rows = zip(*(encoded[key] for key in ("input_ids", "mm_token_type_ids", "interaction_ids", "labels")), strict=True)
    sizes = _sizes(processor, sample) if sample is not None and isinstance(processor, MokaProcessor) else {}
    made: list[Span] = []
    position = 0
    for (type_id, group), run in groupby(rows, key=lambda row: (row[1], row[2])):
        tokens = list(run)
        modality = _KINDS.get(type_id, f"type {type_id}")
        if modality == TEXT:
            for token, _, _, label in tokens:
                text = processor.tokenizer.decode([token])
                made.append(Span(position, 1, text, token, TEXT, group, label != IGNORE))
                position += 1
            continue
        for count in _split(len(tokens), sizes.get(modality, [])):
            token, _, _, label = tokens[0]
            text = f"<{modality} x{count}>"
            made.append(Span(position, count, text, token, modality, group, label != IGNORE))
            position += count
    return made


def _sizes(processor: MokaProcessor, sample: dict[str, Any]) -> dict[str, list[int]]:
    """Return placeholders of each medium, by kind, in order of appearance."""
    owner = {type_id: spec for spec in processor.modalities.values() for type_id in spec["type_ids"]}
    sizes: dict[str, list[int]] = {}
    for kind, medium in media_parts(sample):
        items = len(medium) if isinstance(medium, (list, tuple)) else 1
        sizes.setdefault(kind, []).append(items * owner[MEDIA_TYPE_IDS[kind]]["tokens"])
    return sizes


def _split(length: int, sizes: list[int]) -> list[int]:
    """Return ``length`` as the next of ``sizes``, which it uses up, or as it is if they do not add up to it."""
    taken: list[int] = []
    while sum(taken) < length and len(taken) < len(sizes):
        taken.append(sizes[len(taken)])
    if sum(taken) != length:
        return [length]
    del sizes[: len(taken)]
    return taken


def show(rows: Sequence[Span], title: str, console: Console | None = None) -> None:
    """Print spans in colour, or as a plain table if the console has none (a pipe, ``NO_COLOR``)."""
    console = console or Console()
    if console.is_terminal and not console.no_color:
        console.print(Text(printable(title), style="bold"), soft_wrap=True)
        console.print(_legend())
        console.print(_coloured(rows))
        lines = [counts(rows), ""]
    else:
        lines = [printable(title), *table(rows), counts(rows), ""]
    print("\n".join(lines), file=console.file)


def table(rows: Sequence[Span]) -> list[str]:
    """Return one line a span, in columns, after a line of their names; the token comes last, as a JSON string."""
    cells = [_COLUMNS]
    for row in rows:
        at = str(row.start) if row.count == 1 else f"{row.start}-{row.start + row.count - 1}"
        token = printable(json.dumps(row.text, ensure_ascii=False))
        learnt = "yes" if row.supervised else "no"
        cells.append((at, str(row.token_id), row.modality, str(row.interaction), learnt, token))
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS) - 1)]
    return ["  ".join([*map(str.ljust, line, widths), line[-1]]) for line in cells]


def counts(rows: Sequence[Span]) -> str:
    """Return how many tokens of what, on one line."""
    by_modality: Counter[str] = Counter()
    for row in rows:
        by_modality[row.modality] += row.count
    parts = ", ".join(f"{count} {modality}" for modality, count in by_modality.items())
    question = sum(row.count for row in rows if row.modality == TEXT and row.interaction)
    learnt = sum(row.count for row in rows if row.supervised)
    return f"{sum(by_modality.values())} tokens: {parts}; {question} of questions; {learnt} supervised"


def printable(text: str) -> str:
    """Return text that can do nothing to a terminal: control characters as escapes, line breaks and spaces as they are."""
    return "".join(c if c.isprintable() or c in " \n" else json.dumps(c)[1:-1] for c in text)


def _coloured(rows: Sequence[Span]) -> Text:
    text, group = Text(), 0
    for row in rows:
        if row.interaction not in (group, 0):
            text.append(str(row.interaction).translate(_RAISED), style="dim")
        group = row.interaction
        is_question = row.modality == TEXT and row.interaction
        background = _QUESTION if is_question else _BACKGROUND.get(row.modality, "reverse")
        style = f"{background} {_LEARNT}".strip() if row.supervised else background
        text.append(printable(row.text).replace("\n", "⏎\n"), style=style)
    return text


def _legend() -> Text:
    text = Text("legend: ")
    for kind in ("image", "video", "audio"):
        text.append(f" {kind} ", style=_BACKGROUND[kind]).append(" ")
    text.append(" question (text that media interact with) ", style=_QUESTION).append(" ")
    text.append("supervised", style=_LEARNT).append("  ¹ group of the interaction\n")
    return text
