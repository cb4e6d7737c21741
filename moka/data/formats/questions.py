"""Shared by readers of questions about media: entries with a place and an id, and the sample that asks and answers.

annotation file  ->  Entries(...)  ->  Entry(id, place, data)  ->  question_sample(...)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moka.data.formats.base import Rows
from moka.errors import MokaError, counted, nearest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."


class Entry(NamedTuple):
    """One record: the id of its sample, what opens an error message about it, and its content."""

    id: str
    place: str
    data: Any


class Entries(list[Entry]):
    """Entries with unique ids from ``(place, record)`` pairs.

    An id that ``name`` gives again gets ``-2``, ``-3`` and so on. A record that ``name`` stumbles over is called by its
    file and position, so that the error comes when the record is read, with the field that is wrong.
    """

    def __init__(self, placed: Iterable[tuple[str, Any]], name: Callable[[Any], str]) -> None:
        seen: dict[str, int] = {}
        for place, data in placed:
            try:
                given = name(data)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError):
                given = Path(place).name
            unique = given
            while unique in seen:  # "a-2" may be an id of its own
                seen[given] += 1
                unique = f"{given}-{seen[given]}"
            seen[unique] = 1
            self.append(Entry(unique, place, data))

    def where(self, index: int) -> str:
        return self[index].place

    def rows(self, make: Callable[[Entry], dict[str, Any]], root: Path, notes: Iterable[str] = ()) -> Rows:
        """Return them as `Rows`, whose media paths start from ``root``."""
        return Rows(self, make, self.where, root, tuple(notes))


def question_rows(
    path: Path,
    name: Callable[[Any], str],
    make: Callable[[Entry], dict[str, Any]],
    root: Path,
    *,
    key: str = "",
    keep: Callable[[Any], bool] = bool,
    unit: str = "question",
    left_out: str = "",
) -> Rows:
    """Return the records of a JSON file of questions as `Rows`.

    Args:
        path, key: as for `json_entries`.
        name: record -> the id of its sample.
        make: entry -> sample.
        root: where media paths start.
        keep: whether a record is a question of those wanted; others are counted in a note.
        unit, left_out: what these are: "question" and "of other tasks".
    """
    records = json_entries(path, key)
    # A record that is no object is kept, so that the error names it.
    kept = [(place, record) for place, record in records if not isinstance(record, dict) or keep(record)]
    left = len(records) - len(kept)
    notes = [f"{counted(left, unit)} {left_out} left out of {path.name}"] if left else []
    return Entries(kept, name).rows(make, root, notes)


def question_sample(
    id: str,
    media: Iterable[tuple[str, Any]],
    question: str,
    answer: str | None,
    **extra: Any,
) -> dict[str, Any]:
    """Return a sample of one question: the media in order, then the text; the answer is the last message, if there is one.

    Args:
        id: unique in its data set.
        media: ``(type, path or bytes)`` pairs.
        question: the text after the media.
        answer: what an assistant is to say; None where the truth is not published.
        extra: further keys, such as ``reference``, ``category``, ``group``; those that are None are left out.
    """
    content = [{"type": kind, kind: medium} for kind, medium in media]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": id, **{key: value for key, value in extra.items() if value is not None}, "messages": messages}


def lettered(question: str, options: Sequence[str], hint: str = "", instruction: str = LETTER_INSTRUCTION) -> str:
    """Return a multiple-choice question: hint, question, one line ``A. option`` each, and what is to be answered."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join(line for line in [hint, question, *lines, instruction] if line)


def json_entries(path: Path, key: str = "") -> list[tuple[str, Any]]:
    """Return the records of a JSON file as ``(place, record)``: its list, or the list under ``key`` of its object.

    Raises:
        MokaError: not JSON, or no such list.
    """
    records = load_json(path)
    if key and isinstance(records, dict):
        records = records.get(key)
    if not isinstance(records, list):
        due = f'an object with a list under "{key}"' if key else "a list of records"
        raise MokaError(f"{path}: {due} is expected at the top of the file. Use the file as it is published.")
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def load_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        MokaError: not UTF-8, or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MokaError(
            f"{path}: is not valid JSON, or not UTF-8 text ({error}). Use the file as it is published."
        ) from error


def text_lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a text file that are not blank, as ``(place, line)``.

    Raises:
        MokaError: not UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MokaError(f"{path}: is not UTF-8 text ({error.reason}). Use the file as it is published.") from error
    return [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def csv_rows(path: Path, columns: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table with a header line, each with the number of its last line.

    Raises:
        MokaError: not UTF-8, not CSV, a header without one of ``columns``, or a row of another length than the header.
    """
    csv.field_size_limit(2**31 - 1)  # a picture in base64 is one field, far longer than the default limit
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            given = reader.fieldnames or ()
            if absent := [column for column in columns if column not in given]:
                raise MokaError(
                    f"{path}: the first line has no column {', '.join(absent)}; it has {', '.join(given) or 'nothing'}. "
                    "Use the file as it is published."
                )
            for row in reader:
                if None in row or None in row.values():
                    raise MokaError(f"{path}:{reader.line_num}: has other columns than the first line.")
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise MokaError(f"{path}: is not a table in UTF-8 ({error}). Use the file as it is published.") from error


def take(record: Any, *names: str, allowed: Iterable[str] = ()) -> str:
    """Return the text of the first of the fields ``names`` that the record has; a number becomes text.

    Args:
        allowed: the values that it may have, if they are few.

    Raises:
        MokaError: the record is no object, has none of them, or what it has is blank, not text, or not allowed.
    """
    if not isinstance(record, dict):
        raise MokaError(f"is {type(record).__name__}; an object with {', '.join(map(repr, names))} is expected.")
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        fields, given = " or ".join(map(repr, names)), ", ".join(map(repr, record)) or "no fields"
        raise MokaError(f"field {fields} is missing; the record has {given}.")
    value = record[name]
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise MokaError(f"field {name!r} is {value!r}; text is expected.")
    return among(name, text.strip(), allowed)


def among(field: str, value: str, allowed: Iterable[str], remedy: str = "") -> str:
    """Return the value of a field.

    Raises:
        MokaError: some values are allowed, and it is none of them.
    """
    known = tuple(allowed)
    if not known or value in known:
        return value
    listed = ", ".join(known) if len(known) <= 12 else f"one of {len(known)}, such as {', '.join(known[:3])}"
    raise MokaError(f"field {field!r} is {value!r}; allowed are {listed}.{nearest(value, known)}{remedy}")
