"""Samples from a JSONL file: one JSON object a line, in the format of `moka.data.schema`.

Only the places of the lines are kept in memory (16 bytes a sample), so a file of any size opens in the time of one
read. Media paths are relative to one folder, the media root, and may not lead out of it.
"""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S, SampleDataset, checked_root
from moka.data.media_io import file_problem
from moka.errors import MokaError


class JsonlDataset(SampleDataset):
    """The samples of a JSONL file.

    Args:
        path: the file, UTF-8. Blank lines are skipped.
        media_root: the folder that relative media paths start from and that no path may leave, be it by ``..``, as an
            absolute path or through a symbolic link; the file's own folder by default.
        require_answer: whether every sample must have an assistant message with text.

    Raises:
        MokaError: the file is absent, empty or not a file, or the media root is not a folder. Indexing raises it for
            bad JSON, a bad sample or a path that leaves the media root, with file and line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_root: str | os.PathLike[str] | None = None,
        require_answer: bool = True,
    ) -> None:
        self.path = Path(path)
        self.require_answer = require_answer
        if problem := file_problem(self.path):
            raise MokaError(f"{self.path}: {problem}. A JSONL file is expected, one sample a line.")
        self.media_root = checked_root(self.path.parent if media_root is None else media_root)
        self._offsets, self._lines = index_lines(self.path)
        if not self._offsets:
            raise MokaError(f"{self.path}: has blank lines only. A JSONL file is expected, one sample a line.")

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def read(self, index: int) -> Any:
        return read_line(self.path, self._offsets[index], self.where(index))


def index_lines(path: Path) -> tuple[array[int], array[int]]:
    """Return the byte offset and the number (from 1) of every line that is not blank."""
    offsets, lines = array("q"), array("q")
    offset = 0
    with open(path, "rb") as file, indexing_bar(path) as bar:
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                lines.append(number)
            offset += len(line)
            bar.update(len(line))
    return offsets, lines


def indexing_bar(path: Path) -> Any:
    """Return a progress bar over the bytes of a file."""
    size = path.stat().st_size
    return tqdm(total=size, desc=f"indexing {path.name}", unit="B", unit_scale=True, delay=BAR_AFTER_S, leave=False)


def read_line(path: Path, offset: int, where: str) -> Any:
    """Return the JSON value of the line that begins at a byte."""
    # Opened for each sample: a shared handle would be one file position for all forked loader workers.
    with open(path, "rb") as file:
        file.seek(offset)
        return parse_line(file.readline(), where)


def parse_line(line: bytes, where: str) -> Any:
    """Return the JSON value of one line.

    Raises:
        MokaError: not UTF-8, not JSON, nested too deep, or with a number of thousands of digits; opens with ``where``.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))  # some editors open the file with a byte order mark
    except (ValueError, RecursionError) as error:
        hint = "Correct or remove the line."
        if line.strip() in (b"[", b"{") or line.lstrip().startswith(b"[{"):
            hint = "Each line must be one complete object: this looks like indented JSON or a JSON array."
        raise MokaError(f"{where}: is not valid JSON, or not UTF-8 text ({error}). {hint}") from error
