"""Prediction files: one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moka.data.jsonl import parse_line
from moka.data.media_io import file_problem
from moka.errors import MokaError


def read_predictions(path: str | Path) -> tuple[list[Any], list[str]]:
    """The records of a JSONL file, and where each is ("predictions.jsonl:3"). Blank lines are skipped.

    Raises:
        MokaError: the file is absent or empty, or a line is not UTF-8 JSON.
    """
    path = Path(path)
    if problem := file_problem(path):
        raise MokaError(f"{path}: {problem}. A JSONL file of predictions is expected, one object a line.")
    records: list[Any] = []
    places: list[str] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(parse_line(line, f"{path}:{number}"))
                places.append(f"{path}:{number}")
    if not records:
        raise MokaError(f"{path}: has blank lines only. A JSONL file of predictions is expected, one object a line.")
    return records, places
