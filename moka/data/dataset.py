"""Data sets of samples: checked when they are read, media as paths inside one folder; parts of them, and several as one.

source.read(index) --check_sample--> normal form --media_root--> absolute paths
dataset.select(indices)      SampleDataset.concat([a, b])      SampleDataset.mix([a, b], weights, seed)
"""

from __future__ import annotations

import bisect
import itertools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moka.data.media_io import file_problem
from moka.data.schema import check_sample, map_media, media_parts
from moka.errors import MokaError

BAR_AFTER_S = 2.0  # seconds before a progress bar is shown


class SampleDataset(Sequence[dict[str, Any]]):
    """A map-style data set of checked samples with absolute media paths; lazy. A source gives ``len``, `where` and `read`.

    Attributes:
        media_root: folder that relative media paths start from and that no path may leave, resolved; None if the source has
            no files.
        notes: what the source left out and why, a line each.
        require_answer: whether every sample must have an assistant message with text.
    """

    media_root: Path | None = None
    notes: tuple[str, ...] = ()
    require_answer = True

    def read(self, index: int) -> dict[str, Any]:
        """Return the sample at a position from 0 to ``len - 1`` as it is stored."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Return where a sample is stored, such as ``"train.jsonl:12"``, as it opens error messages."""
        return f"{type(self).__name__} {index}"

    def __getitem__(self, index: Any) -> Any:
        position = self.position(index)
        where = self.where(position)
        sample = check_sample(self.read(position), where, self.require_answer)
        return absolute_paths(sample, self.media_root, where)

    def position(self, index: Any) -> int:
        """Return an index, which may be negative, as a position from 0; an ``IndexError`` beyond the ends."""
        try:
            return range(len(self))[operator.index(index)]
        except IndexError:
            raise IndexError(f"sample {index} of {len(self)}") from None

    def select(self, indices: Sequence[int] | np.ndarray) -> SampleDataset:
        """Return the samples at ``indices``, in that order."""
        return Selection([self], indices)

    def first(self, size: int | None) -> SampleDataset:
        """Return the first ``size`` samples, or all if there are fewer or ``size`` is None."""
        return self if size is None or size >= len(self) else self.select(range(size))

    @staticmethod
    def concat(datasets: Sequence[SampleDataset]) -> SampleDataset:
        """Return several data sets as one, one after another."""
        return Selection(datasets)

    @staticmethod
    def mix(datasets: Sequence[SampleDataset], weights: Sequence[float], seed: int = 0) -> SampleDataset:
        """Return as many samples as the data sets have together, drawn by a seed, of each in proportion to its weight: a part of
        it in random order, or all of it several times.
        """
        sizes = [len(dataset) for dataset in datasets]
        shares = np.asarray(weights, float) / np.sum(weights)
        numbers = np.diff(np.round(np.cumsum(shares) * sum(sizes)).astype(np.int64), prepend=0)
        draw = np.random.default_rng([seed, 7])
        chosen, start = [np.zeros(0, np.int64)], 0
        for size, number in zip(sizes, numbers, strict=True):
            passes = [draw.permutation(size) for _ in range(-(-int(number) // size))]
            chosen += [start + np.concatenate(passes)[:number]] if passes else []
            start += size
        every = np.concatenate(chosen)
        return Selection(datasets, every[draw.permutation(len(every))])

    def missing_media(self, limit: int = 20, share: tuple[int, int] = (0, 1)) -> list[str]:
        """List media files that are absent, empty or folders. Reads and checks every sample, but opens no medium.

        Args:
            limit: how many files are listed.
            share: (k, n): of n processes that look through a part of the samples each, this is the k-th.

        Returns:
            One line a file, in the order of the samples, with the place that first names it; if there are more than
            ``limit``, a last line says how many in all.

        Raises:
            MokaError: as for indexing.
        """
        if self.media_root is None:
            return []
        missing: dict[str, str] = {}
        indices = range(share[0], len(self), share[1])
        for index in tqdm(indices, "checking media", unit="sample", delay=BAR_AFTER_S, leave=False):
            for kind, medium in media_parts(self[index]):
                if isinstance(medium, str) and medium not in missing and (problem := file_problem(medium)):
                    missing[medium] = f"{self.where(index)}: {kind} {medium}: {problem}"
        more = [f"... and {len(missing) - limit} more: {len(missing)} media files are missing in all"]
        return list(missing.values())[:limit] + (more if len(missing) > limit else [])


class Selection(SampleDataset):
    """Samples of several data sets: those at ``indices`` of all of them, one after another."""

    def __init__(self, parts: Sequence[SampleDataset], indices: Sequence[int] | np.ndarray | None = None) -> None:
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))
        self.indices = range(self._ends[-1]) if indices is None else indices
        self.notes = tuple(note for part in self.parts for note in getattr(part, "notes", ()))
        roots = [str(part.media_root) for part in self.parts if getattr(part, "media_root", None) is not None]
        self.media_root = Path(os.path.commonpath(roots)) if roots else None

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, indices: Sequence[int] | np.ndarray) -> SampleDataset:
        return Selection(self.parts, np.asarray(self.indices, np.int64)[np.asarray(indices, np.int64)])

    def _in_part(self, index: int) -> tuple[Any, int]:
        position = int(self.indices[self.position(index)])
        part = bisect.bisect_right(self._ends, position)
        return self.parts[part], position - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: Any) -> Any:
        part, position = self._in_part(index)
        return part[position]

    def where(self, index: int) -> str:
        return where_of(*self._in_part(index))

    def missing_media(self, limit: int = 20, share: tuple[int, int] = (0, 1)) -> list[str]:
        """As for every data set; a sample that is chosen several times is looked at once, and sources without files are not."""
        positions = np.unique(np.asarray(self.indices, np.int64))
        has_files = np.array([getattr(part, "media_root", None) is not None for part in self.parts])
        positions = positions[has_files[np.searchsorted(self._ends, positions, "right")]]
        return SampleDataset.missing_media(Selection(self.parts, positions), limit, share)


def where_of(samples: Any, index: int) -> str:
    """Return where a sample of any map-style data set is stored, for messages."""
    return samples.where(index) if hasattr(samples, "where") else f"sample {index}"


def checked_root(root: str | os.PathLike[str]) -> Path:
    """Return a media root, resolved.

    Raises:
        MokaError: it is not a folder.
    """
    if not os.path.isdir(root):
        raise MokaError(f"media_root {str(root)!r} is not a folder. Give the folder that the media paths start from.")
    return Path(root).resolve()


def absolute_paths(sample: dict[str, Any], root: Path | None, where: str) -> dict[str, Any]:
    """Return a copy of a checked sample whose media paths are absolute; other media pass, and all of them without a ``root``.

    Raises:
        MokaError: a path leaves the media root.
    """
    if root is None:
        return sample

    def resolve(kind: str, medium: Any) -> Any:
        if not isinstance(medium, str):
            return medium
        problem = f"{where}: {kind} path {medium!r}"
        try:
            path = (root / medium).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL character
            raise MokaError(f"{problem} is not a path that can be followed: {error}.") from error
        if not path.is_relative_to(root):
            raise MokaError(
                f"{problem} leads to {path}, outside the media root {root}. Give a path inside it, or set media_root to a "
                "folder that has all the media."
            )
        return str(path)

    return map_media(sample, resolve)
