"""The interface of a reader of a published data set layout.

    root folder  ->  Format.read(root, split, **options)  ->  Rows  ->  FormatDataset  ->  checked samples, media as paths

A reader knows one published layout and nothing else: it finds the annotation files, and turns one record into one sample
of `moka.data.schema` whose media paths start from a media root. Decoding, checking and counting are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moka.errors import MokaError, nearest


@dataclass(frozen=True)
class Rows:
    """The records of one split.

    Attributes:
        items: the raw records; anything with ``len`` and indexing (a list, a lazily parsed file, a Parquet table).
        make: one record -> one sample of `moka.data.schema`, media as paths under ``media_root`` (or as ``bytes``). What
            it raises (a MokaError, or the KeyError of a missing field) is reported with the place of the record in front.
        where: position -> what opens an error message, such as ``"annotations.json: record 7"``.
        media_root: folder that the media paths start from and may not leave.
        notes: what the reader left out and why, as one line each ("3 videos of 'bad' quality left out").
    """

    items: Sequence[Any]
    make: Callable[[Any], dict[str, Any]]
    where: Callable[[int], str]
    media_root: Path
    notes: tuple[str, ...] = ()


class Option(NamedTuple):
    """One option of a format: its default, its meaning, and the values that it may have, if they are few.

    A default that is a tuple means one of the choices or a list of them.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()

    def check(self, where: str, value: Any) -> None:
        """Raise a MokaError, which opens with ``where``, if the value is not a choice, or neither true nor false."""
        several = isinstance(self.default, tuple) and isinstance(value, (list, tuple))
        bad = [one for one in (value if several else [value]) if self.choices and one not in self.choices]
        if bad:
            allowed, hint = ", ".join(self.choices), nearest(str(bad[0]), self.choices)
            raise MokaError(f"{where} is {bad[0]!r}; allowed are {allowed}.{hint}")
        if isinstance(self.default, bool) and not isinstance(value, bool):
            raise MokaError(f"{where} is {value!r}; true or false is expected.")


@dataclass(frozen=True)
class Format:
    """One published layout.

    Attributes:
        name: what a configuration calls it.
        about: one line: what it has and where it is published.
        media: of "image", "audio", "video", those its samples carry.
        splits: the names of its splits; the first is the default.
        layout: the tree expected under ``root``, for errors and the documentation.
        fields: the fields read from each record, for the documentation: name -> meaning.
        read: ``read(root, split, **options) -> Rows``.
        options: name -> `Option`; ``read`` takes their values as keyword arguments.
        benchmark: the scorer (`moka score`) that its predictions go to, where it has one.
        any_split: whether other split names are allowed too (the files of the user decide).
        experimental: what was not checked against the published files; None if the layout follows the publisher's own
            description or code.
    """

    name: str
    about: str
    media: tuple[str, ...]
    splits: tuple[str, ...]
    layout: str
    fields: Mapping[str, str]
    read: Callable[..., Rows]
    options: Mapping[str, Option] = field(default_factory=dict)
    benchmark: str | None = None
    any_split: bool = False
    experimental: str | None = None


def find_file(root: Path, *candidates: str, format: Format | str, layout: str = "") -> Path:
    """Return the first of ``candidates`` (relative paths) that is a file under ``root``.

    Raises:
        MokaError: the root is absent, or none is there; names every file looked for, and the layout expected.
    """
    name = format if isinstance(format, str) else format.name
    layout = layout or ("" if isinstance(format, str) else format.layout)
    if not root.is_dir():
        raise MokaError(
            f"format {name}: root {str(root)!r} is not a folder. Put the data set there, or name another root."
        )
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    looked = ", ".join(str(root / candidate) for candidate in candidates)
    expected = f" Expected under the root: {' '.join(layout.split())}." if layout else ""
    raise MokaError(f"format {name}: looked for {looked}, and found none.{expected}")
