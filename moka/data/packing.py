"""Packing: several samples in one row, each as if it were alone in it.

    samples      a a a   b b   c c c c          row   a a a b b c c c c
    position_ids 0 1 2   0 1   0 1 2 3                0 1 2 0 1 0 1 2 3     attention stays within each restart
    interaction  1 1 0   1 1   1 2 2 0                1 1 0 2 2 3 4 4 0     groups of different samples stay apart
    labels       . . A   . B   . . . C                . . A . B . . . C     nothing predicts the first token of a sample

The rows are made once, from the lengths only (`moka.data.lengths`): best fit, longest samples first, within shuffled
windows of the data set. They depend on the seed and stay the same in all epochs, which shuffle full rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moka.data.encoding import EncodedDataset
from moka.data.lengths import Lengths
from moka.modeling.processing import IGNORE

# Samples that are packed with each other: enough to fill rows well, few enough to mix the data set.
_WINDOW = 1024


@dataclass(frozen=True)
class Rows:
    """Which samples share a row.

    Attributes:
        indices: int64 [samples] those of one row after those of another.
        offsets: int64 [rows + 1] where each row begins and the last one ends.
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return int64 [samples of the row]."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.indices[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Of [samples], the sum of each row: [rows]."""
        return np.add.reduceat(values[self.indices], self.offsets[:-1])


def pack_rows(tokens: Sequence[int] | np.ndarray, capacity: int, seed: int = 0, window: int = _WINDOW) -> Rows:
    """Return which samples share a row: every index once, at most ``capacity`` tokens a row (a longer sample has its own).

    Args:
        tokens: [samples] length of each.
        seed: of the windows; the same seed gives the same rows.
        window: samples, drawn at random, among which rows are filled.
    """
    tokens = np.asarray(tokens)
    order = np.random.default_rng(seed).permutation(len(tokens))
    indices: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        rows: list[list[int]] = []  # of this window
        room: list[tuple[int, int]] = []  # (what is left, row), ascending
        for index in part[np.argsort(-tokens[part], kind="stable")]:
            length = int(tokens[index])
            fits = bisect.bisect_left(room, (length, -1))
            if fits < len(room):
                left, row = room.pop(fits)
                rows[row].append(int(index))
            else:
                left, row = capacity, len(rows)
                rows.append([int(index)])
            if left > length:
                bisect.insort(room, (left - length, row))
        indices.append(np.array([index for row in rows for index in row], np.int64))
        sizes.append(np.array([len(row) for row in rows], np.int64))
    return Rows(np.concatenate(indices), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


class PackedDataset:
    """Rows of several samples of an `EncodedDataset`.

    Args:
        dataset: encoded samples.
        lengths: of its samples.
        capacity: tokens of a row.
        seed: of the rows.

    A sample that turns out longer than was counted (the substitute of one whose files are bad) and does not fit is left
    out of its row.
    """

    def __init__(self, dataset: EncodedDataset, lengths: Lengths, capacity: int, seed: int = 0) -> None:
        self.dataset, self.capacity, self.counted = dataset, capacity, lengths.tokens
        self.rows = pack_rows(lengths.tokens, capacity, seed)
        self.samples = len(dataset)
        items = {name: self.rows.sums(values) for name, values in lengths.items.items()}
        self.lengths = Lengths(self.rows.sums(lengths.tokens), items)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of the rows' room that has tokens."""
        return float(self.lengths.tokens.sum()) / (len(self.rows) * self.capacity)

    def summary(self) -> str:
        return (
            f"packing: {self.samples} samples in {len(self.rows)} rows of {self.capacity} tokens, fill {self.fill:.0%}"
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        taken = [(self.dataset[int(place)], int(self.counted[place])) for place in self.rows[index]]
        excess = [len(encoded["input_ids"]) - counted for encoded, counted in taken]
        while len(taken) > 1 and sum(len(encoded["input_ids"]) for encoded, _ in taken) > self.capacity:
            longest = excess.index(max(excess))
            del taken[longest], excess[longest]
        return join_samples([encoded for encoded, _ in taken])


def join_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return encoded samples (``MokaProcessor.encode``) as one row, with ``position_ids`` that begin again at each.

    Returns the fields of one encoded sample: lists end to end, media [items, ...] in the order of their placeholders,
    ``sample_id`` the ids joined by commas.
    """
    row: dict[str, Any] = {"position_ids": [p for one in samples for p in range(len(one["input_ids"]))]}
    groups = 0
    shifted = []
    for one in samples:
        ids = one["interaction_ids"]
        shifted.append({**one, "interaction_ids": [i and i + groups for i in ids]})
        shifted[-1]["labels"] = [IGNORE, *one["labels"][1:]]
        groups += max(ids, default=0)
    for name in dict.fromkeys(name for one in samples for name in one):
        values = [one[name] for one in shifted if name in one]
        if isinstance(values[0], str):
            row[name] = ", ".join(values)
        elif isinstance(values[0], np.ndarray):
            row[name] = np.concatenate(values)
        else:
            row[name] = [value for one in values for value in one]
    return row
