"""Closed sets of benchmarks: answers, one entry a line in the files next to this one, and subtasks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

MME_TASKS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


@cache
def ave_events() -> tuple[str, ...]:
    """Return AVE's 28 event names as its annotations spell them; "Background" is not among them."""
    return _lines("ave_events.txt")


@cache
def music_avqa_answers() -> tuple[str, ...]:
    """Return MUSIC-AVQA's 42 answer words."""
    return _lines("music_avqa_answers.txt")


def _lines(name: str) -> tuple[str, ...]:
    text = (Path(__file__).parent / name).read_text("utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())
