"""One split of a published data set as a map-style dataset of checked samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Rows
from moka.data.records import RecordDataset, checked_root
from moka.data.schema import check_sample
from moka.errors import MokaError

_WRONG_RECORD = (KeyError, IndexError, TypeError, ValueError, AttributeError)


class FormatDataset(RecordDataset):
    """A map-style dataset (``len`` and indexing) of checked samples with absolute media paths; lazy.

    Args:
        format: the layout that the records have.
        split: its split.
        rows: what `Format.read` gave.
        require_answer: whether every sample must hold an assistant message with text.
        media_root: the folder that media paths start from and may not leave; the reader's by default.

    Attributes:
        notes: what the reader left out and why, as one line each.

    Raises:
        MokaError: the media root is not a folder. Indexing raises it for a record that is not of the format, and for a
            path that leaves the media root, with file and record.
    """

    def __init__(
        self,
        format: Format,
        split: str,
        rows: Rows,
        *,
        require_answer: bool = True,
        media_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.format, self.split, self.rows, self.require_answer = format, split, rows, require_answer
        self.notes = rows.notes
        if format.experimental:
            text = f"format {format.name} is experimental: its {format.experimental} were not checked against the published files"
            self.notes = (text, *rows.notes)
        self.media_root = checked_root(rows.media_root if media_root is None else Path(media_root))

    def __len__(self) -> int:
        return len(self.rows.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self._position(index)
        where = self.rows.where(position)
        item = self.rows.items[position]
        try:
            sample = self.rows.make(item)
        except MokaError as error:
            raise MokaError(f"{where}: {error}") from error
        # An IndexError let through would end a loop over the data set as if the record were the last.
        except _WRONG_RECORD as error:
            raise MokaError(f"{where}: {_wrong(error, item, self.format)}") from error
        return self.with_absolute_paths(check_sample(sample, where, self.require_answer), where)

    def where(self, index: int) -> str:
        return self.rows.where(self._position(index))

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(index) % len(self)


def _wrong(error: Exception, item: Any, format: Format) -> str:
    """Return what is the matter with a record that the reader stumbled over."""
    read = f"Format {format.name} reads {', '.join(format.fields)}"
    if isinstance(error, KeyError) and isinstance(item, dict):
        return f"field {error.args[0]!r} is missing; the record has {', '.join(map(repr, item))}. {read}."
    return f"is not a record of format {format.name} ({type(error).__name__}: {error}). {read}."
