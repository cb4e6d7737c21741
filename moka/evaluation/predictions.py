"""Prediction files: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moka.data.decoders import file_problem
from moka.errors import MokaError


def read_predictions(path: str | Path) -> tuple[list[Any], list[str]]:
    """The records of a JSONL file, and where each stands ("predictions.jsonl:3"). Blank lines are skipped.

    Raises:
        MokaError: the file is absent or empty, or a line is not UTF-8 JSON.
    """
    path = Path(path)
    if problem := file_problem(path):
        raise MokaError(f"{path}: {problem}. A JSONL file of predictions is due, one object a line.")
    records: list[Any] = []
    places: list[str] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(_parse(line, f"{path}:{number}"))
                places.append(f"{path}:{number}")
    if not records:
        raise MokaError(f"{path}: holds blank lines only. A JSONL file of predictions is due, one object a line.")
    return records, places


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MokaError(f"{where}: is not UTF-8 text ({error.reason}). Save the file as plain UTF-8 JSONL.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        hint = "Each line must hold one whole object." if line.lstrip()[:1] in (b"[", b"{") else "Mend or remove it."
        raise MokaError(f"{where}: is not valid JSON: {why}. {hint}") from error
