"""AVE: which event is seen and heard, and in which of the clip's ten one-second segments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moka.data.vocabulary import ave_events
from moka.errors import MokaError

from .base import Benchmark, Figures, Item, Protocol, known_name
from .intervals import bootstrap, percent
from .parsing import clean, tagged

SEGMENTS = 10
BACKGROUND = "background"
Labels = tuple[str, ...]  # one label a segment


def labels(event: str, ranges: Sequence[tuple[int, int]]) -> Labels:
    """The label of each segment: the event inside one of the ranges, both ends included, else background."""
    inside = (any(start <= second <= end for start, end in ranges) for second in range(SEGMENTS))
    return tuple(event if hit else BACKGROUND for hit in inside)


def _event(text: str) -> str | None:
    return {name.casefold(): name for name in ave_events()}.get(text.strip().casefold())


def _reference(record: Mapping[str, Any]) -> Labels:
    given = record["reference"]
    if not isinstance(given, Mapping) or not {"event", "start", "end"} <= set(given):
        raise MokaError(f'reference {given!r} is not of the form {{"event": name, "start": second, "end": second}}.')
    event = known_name("reference event", given["event"], ave_events(), "AVE's 28 names")
    start, end = given["start"], given["end"]
    if any(type(second) is not int for second in (start, end)) or not 0 <= start <= end <= SEGMENTS:
        raise MokaError(
            f"reference seconds {start!r} to {end!r} are no range of integers; 0 <= start <= end <= {SEGMENTS} is expected."
        )
    return labels(event, [(start, end)])


_RANGE = re.compile(r"<range>\s*(\d{1,4})\s*,\s*(\d{1,4})\s*</range>")
_PAIR = re.compile(r"\(\s*(\d{1,4})[\s,]+(\d{1,4})\s*\)")
_NAME_THEN_RANGES = re.compile(r"\s*(.*?)\s*,\s*((?:\([\s\d,]+\)[\s,]*)+)", re.DOTALL)


def _seconds(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end in pattern.findall(text)]


def _event_and_ranges(inner: str, text: str) -> tuple[str, list[tuple[int, int]]] | None:
    """Return what an event tag has: a name, with the ranges of the text, or "name, (a b) (c d)" by itself."""
    if event := _event(inner):
        return event, _seconds(_RANGE, text)
    match = _NAME_THEN_RANGES.fullmatch(inner)
    event = _event(match[1]) if match else None
    return (event, _seconds(_PAIR, match[2])) if match and event else None


def parse_paper(text: str, record: Mapping[str, Any] | None = None) -> Labels | None:
    """The authors' rule: exactly one event tag with a known name, and the ranges of the full text."""
    tags = tagged(text, "event")
    found = _event_and_ranges(tags[0], text) if len(tags) == 1 else None
    return labels(*found) if found and found[1] else None


def parse_strict(text: str, record: Mapping[str, Any] | None = None) -> Labels | None:
    """The last event tag decides, with the ranges of the text, or those after it where there are several events.

    A range is valid with 0 <= start <= end <= 10; others do not count.
    """
    text = clean(text)
    tags = tagged(text, "event")
    if not tags:
        return None
    after = text if len(tags) == 1 else text[text.rindex("<event>") :]
    found = _event_and_ranges(tags[-1], after)
    if found is None:
        return None
    valid = [(start, end) for start, end in found[1] if start <= end <= SEGMENTS]
    return labels(found[0], valid) if valid else None


def measure(items: Sequence[Item], overall: bool) -> Figures:
    """The share of right segments; an unparsable clip has none. Clips are resampled: their segments go together."""
    units = np.zeros((len(items), 2))  # [clips, (right segments, segments)]
    for row, item in zip(units, items, strict=True):
        answer = item.answer or (None,) * SEGMENTS
        row[:] = sum(a == b for a, b in zip(answer, item.reference, strict=True)), SEGMENTS
    return {"accuracy": bootstrap(units, percent, SEGMENTS * len(items))}


AVE = Benchmark(
    name="ave",
    about="AVE: event and when it happens; accuracy over the 10 one-second segments of every clip",
    expects='{"event": one of the 28 names, "start": int, "end": int}, seconds, both ends included',
    figures={"accuracy": "%"},
    reference=_reference,
    measure=measure,
    protocols={
        "strict": Protocol(
            "the last <event>E</event>, E one of the 28 names (case ignored), with the <range>a,b</range> of the text, "
            'or E reads "name, (a b) (c d)"; 0 <= a <= b <= 10',
            parse_strict,
        ),
        "paper": Protocol(
            "exactly one <event>E</event>, E one of the 28 names (case ignored), with every <range>a,b</range>, or E "
            'reads "name, (a b) (c d)". Unparsable clips are wrong in all segments; the published script counts them '
            "as right",
            parse_paper,
        ),
    },
    optional={"category": "a row each"},
    select=lambda items, protocol: (items, {"segments": SEGMENTS * len(items)}),
)
