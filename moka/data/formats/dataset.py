"""One split of a published data set as a map-style dataset of checked samples."""

from __future__ import annotations

import os
from typing import Any

from moka.data.dataset import SampleDataset, checked_root
from moka.data.formats.base import Format, Rows
from moka.errors import MokaError

_WRONG_RECORD = (KeyError, IndexError, TypeError, ValueError, AttributeError)


class FormatDataset(SampleDataset):
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
        self.media_root = checked_root(rows.media_root if media_root is None else media_root)

    def __len__(self) -> int:
        return len(self.rows.items)

    def where(self, index: int) -> str:
        return self.rows.where(index)

    def read(self, index: int) -> dict[str, Any]:
        item = self.rows.items[index]
        try:
            return self.rows.make(item)
        except MokaError as error:
            raise MokaError(f"{self.where(index)}: {error}") from error
        # An IndexError let through would end a loop over the data set as if the record were the last.
        except _WRONG_RECORD as error:
            raise MokaError(f"{self.where(index)}: {_wrong(error, item, self.format)}") from error


def _wrong(error: Exception, item: Any, format: Format) -> str:
    """Return what is the matter with a record that the reader stumbled over."""
    read = f"Format {format.name} reads {', '.join(format.fields)}"
    if isinstance(error, KeyError) and isinstance(item, dict):
        return f"field {error.args[0]!r} is missing; the record has {', '.join(map(repr, item))}. {read}."
    return f"is not a record of format {format.name} ({type(error).__name__}: {error}). {read}."
