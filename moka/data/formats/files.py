"""Annotation files of any size as sequences of records: JSON arrays, JSONL, and Parquet tables.

train.json ---- one scan ---> byte offsets (16 bytes a record) ---- on access ---> one record, parsed
*.parquet ----- `datasets` -> memory-mapped table -------------------- on access ---> one row; media stay bytes
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moka.data.jsonl import index_lines, indexing_bar, parse_line
from moka.data.media_io import file_problem
from moka.errors import MokaError

# A complete string, so that brackets inside it do not count, or one bracket.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


class JsonRecords(Sequence[Any]):
    """The records of a JSON array, or of a JSONL file; one is parsed on each access.

    Args:
        path: the file, UTF-8. An array has objects or arrays; JSONL has one object a line, blank lines skipped.

    Raises:
        MokaError: the file is absent, empty, cut, or neither; on indexing, a record is not JSON. Names file and record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if problem := file_problem(self.path):
            raise MokaError(f"{self.path}: {problem}. A JSON array or a JSONL file is expected.")
        with open(self.path, "rb") as file:
            head = file.read(4096).removeprefix(_BOM).lstrip()
        self.lines: array[int] | None = None
        if head.startswith(b"[") and not head.startswith(b"[]"):
            self._starts, self._ends = _index_array(self.path)
        elif head.startswith(b"{"):
            self._starts, self.lines = index_lines(self.path)
            self._ends = array("q", [*self._starts[1:], self.path.stat().st_size])
            self._refuse_one_object()
        else:
            given = "an empty array" if head.startswith(b"[]") else f"text that begins with {head[:20]!r}"
            raise MokaError(f"{self.path}: has {given}. A JSON array of records, or JSONL, is expected.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        start, end = self._starts[index], self._ends[index]
        # Opened for each record: a shared handle would be one file position for all forked loader workers.
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        if self.lines is not None:
            return parse_line(text, self.where(index))
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MokaError(
                f"{self.where(index)}: is not valid JSON ({error}). Correct or remove the record."
            ) from error

    def where(self, index: int) -> str:
        """Return the place of a record: file and line of JSONL, file and position (from 1) in an array."""
        position = index % len(self)
        return f"{self.path}: record {position + 1}" if self.lines is None else f"{self.path}:{self.lines[position]}"

    def _refuse_one_object(self) -> None:
        try:
            self[0]
        except MokaError as error:
            if len(self) == 1:
                raise
            raise MokaError(
                f"{self.path}: neither a JSON array of records nor JSONL: it opens with an object that does not end on "
                "its first line. If the records stand under a key of one object, save that list as the file."
            ) from error


class Chosen(Sequence[Any]):
    """The records of a file at some positions; none is kept in memory."""

    def __init__(self, records: JsonRecords, positions: Sequence[int]) -> None:
        self.records, self.positions = records, array("q", positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        return self.records[self.positions[index]]

    def where(self, index: int) -> str:
        return self.records.where(self.positions[index])


class TableRecords(Sequence[Any]):
    """The rows of a Hub data set or of Parquet files as dicts; nothing is decoded, media are ``{"bytes", "path"}``.

    Args:
        name: ``owner/name`` on the Hub, or a local folder with Parquet files.
        split: its split.
        config: its configuration, where it has several.
        files: Parquet files to read instead; ``name`` is then a label for errors.
        take: stream, and keep this many rows from the start in memory; all rows, memory-mapped, by default.

    Raises:
        MokaError: `datasets` is not installed, or cannot open the data set.
    """

    def __init__(
        self,
        name: str,
        split: str,
        config: str | None = None,
        files: Sequence[Path] = (),
        take: int | None = None,
    ) -> None:
        self.name = name
        # Given files hold one split, whatever its name.
        what: dict[str, Any] = {"path": name, "name": config, "split": split}
        if files:
            what = {"path": "parquet", "data_files": [str(file) for file in files], "split": "train"}
        rows = open_table(name, what, streaming=take is not None)
        self.rows: Any = rows if take is None else list(table_rows(rows.take(take)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        position = range(len(self))[index]
        if isinstance(self.rows, list):
            return self.rows[position]
        return self.rows[position : position + 1].to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.name}: row {index % len(self) + 1}"


def open_table(name: str, what: dict[str, Any], streaming: bool) -> Any:
    """Open a table by `datasets`, in its stored form: images and sounds come as the bytes of their files.

    Args:
        name: for messages.
        what: arguments of ``datasets.load_dataset``.
        streaming: read on, or memory-mapped.

    Raises:
        MokaError: `datasets` is not installed, or cannot open it.
    """
    try:
        import datasets
    except ImportError as error:
        raise MokaError(f"Reading {name} needs `datasets`. Run: pip install 'moka-peft[data]'") from error
    try:
        return datasets.load_dataset(**what, streaming=streaming).with_format("arrow")
    except Exception as error:  # errors of the network, of pyarrow and of `datasets` itself have no common base
        reason = " ".join(str(error).split())
        raise MokaError(f"{name}: split {what['split']!r} cannot be opened by `datasets`: {reason}") from error


def table_rows(tables: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of the tables that a streamed data set consists of."""
    for table in tables:
        yield from table.to_pylist()


def _index_array(path: Path) -> tuple[array[int], array[int]]:
    """Return first byte and byte after the last of each element of the JSON array that fills the file."""
    starts, ends = array("q"), array("q")
    depth = seen = 0
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        indexing_bar(path) as bar,
    ):
        for token in _TOKEN.finditer(text):
            at = token.start()
            byte = text[at]
            if byte in b"[{":
                if depth == 1:
                    _check_between(text[seen:at], b"," if starts else b"", path, len(starts))
                    starts.append(at)
                depth += 1
                seen = at + 1 if depth == 1 else seen
            elif byte in b"]}":
                depth -= 1
                if depth == 1:
                    seen = at + 1
                    ends.append(seen)
                    bar.update(seen - bar.n)
                elif depth == 0:
                    break
        if depth:
            raise MokaError(f"{path}: ends inside record {len(ends) + 1}: the file is cut. Get it again.")
        _check_between(text[seen:at], b"", path, len(starts))
        if rest := text[at + 1 :].strip():
            raise MokaError(f"{path}: continues after its JSON array with {rest[:20]!r}. Correct the file.")
    if not starts:
        raise MokaError(f"{path}: has an empty array. A JSON array of records, or JSONL, is expected.")
    return starts, ends


def _check_between(text: bytes, due: bytes, path: Path, records: int) -> None:
    if text.strip() != due:
        wanted = "a comma and the next" if due else "nothing more"
        raise MokaError(
            f"{path}: after {records} records comes {text.strip()[:20]!r}, where {wanted} is expected. A JSON array of objects "
            "is expected. Correct the file."
        )
