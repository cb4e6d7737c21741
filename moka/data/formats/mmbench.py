"""MMBench: multiple-choice questions about pictures, once each or in every rotation of their options (CircularEval).

one TSV file, a row a question, pictures in base64  ->  samples that hold the pictures' bytes
"""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.questions import LETTERS, Entries, Entry, among, csv_rows, lettered, question_sample
from moka.errors import MokaError, counted

_MMBENCH_FILES = {
    "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN_V11.tsv"),
    "test": (
        "mmbench_test_20230712.tsv",
        "MMBench_TEST_EN.tsv",
        "mmbench_test_en_20231003.tsv",
        "MMBench_TEST_EN_V11.tsv",
    ),
}
_COPY = 1_000_000  # the index of a rotated copy is that of its question plus a multiple of this
_INDEX_LENGTH = 64  # an image column shorter than this has the index of the row that has the picture


def _read_mmbench(root: Path, split: str, circular: bool = False) -> Rows:
    path = find_file(root, *_MMBENCH_FILES[split], format=MMBENCH)
    rows = _mmbench_rows(path)
    pictures = {row["index"]: row["image"] for _, row in rows if len(row["image"]) > _INDEX_LENGTH}
    first = [(place, row) for place, row in rows if int(row["index"]) < _COPY]
    asked = [(place, (row, turn)) for place, row in first for turn in range(len(_options(row)) if circular else 1)]
    found = Entries(asked, lambda data: f"{data[0]['index']}-{data[1]}" if circular else data[0]["index"])
    notes = []
    if left := len(rows) - len(first):
        made = "; rotations are made here instead" if circular else ""
        notes.append(f"{counted(left, 'rotated copy', 'rotated copies')} of questions left out of {path.name}{made}")
    return found.rows(partial(_mmbench_sample, pictures=pictures), root, notes)


def _mmbench_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    rows: list[tuple[str, dict[str, str]]] = []
    for _, cells in csv_rows(path, ("index", "question", "A", "B", "image"), delimiter="\t"):
        place = f"{path}: row {len(rows) + 1}"
        row = {name: "" if cell.strip().lower() == "nan" else cell.strip() for name, cell in cells.items()}
        if not row["index"].isdecimal():
            raise MokaError(f"{place}: field 'index' is {row['index']!r}; a number is expected.")
        rows.append((place, row))
    return rows


def _options(row: dict[str, str]) -> list[str]:
    return [row[letter] for letter in "ABCDE" if row.get(letter)]


def _mmbench_sample(entry: Entry, pictures: dict[str, str]) -> dict[str, Any]:
    row, turn = entry.data
    options, truth = _options(row), row.get("answer") or None
    if truth is not None:
        right = LETTERS.index(among("answer", truth, LETTERS[: len(options)]))
        truth = LETTERS[(right - turn) % len(options)]
    options = options[turn:] + options[:turn]  # CircularEval: they move on by one place each time
    return question_sample(
        entry.id,
        [("image", _picture(row["image"], pictures))],
        lettered(row["question"], options, row.get("hint", "")),
        truth,
        category=row.get("category") or None,
        group=row["index"],
        options=options,
        reference=truth,
    )


def _picture(cell: str, pictures: dict[str, str]) -> bytes:
    if len(cell) <= _INDEX_LENGTH:
        if cell not in pictures:
            raise MokaError(f"image is {cell!r}; a picture in base64, or the index of a row that has one, is expected.")
        cell = pictures[cell]
    try:
        return base64.b64decode(cell, validate=True)
    except ValueError as error:
        raise MokaError(f"image is not base64 ({error}). Get the file again.") from error


MMBENCH = Format(
    name="mmbench",
    about="MMBench: multiple-choice questions about pictures (Liu et al. 2023, arXiv 2307.06281)",
    media=("image",),
    splits=("dev", "test"),
    layout="mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv (mmbench_test_20230712.tsv or MMBench_TEST_EN.tsv, which hold "
    "no answers)",
    fields={
        "index": "the sample's id and group; 1,000,000 and more: a rotated copy of the question index modulo 1,000,000",
        "question": "the question",
        "hint": "text before the question, if there is any",
        "A, B, C, D": "the options; an empty one, or nan, is none",
        "answer": "the letter; absent from the test files",
        "category": "the ability asked for",
        "image": "the picture in base64, or the index of the row that holds it",
    },
    read=_read_mmbench,
    options={
        "circular": Option(False, "CircularEval: each question once per option, which rotate; ids {index}-{turn}")
    },
    benchmark="mmbench",
)

FORMATS: tuple[Format, ...] = (MMBENCH,)
