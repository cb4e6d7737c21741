"""The order of samples of an epoch in which some come more often than others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from moka.data import EncodedDataset
from moka.data.lengths import undecoded


class WeightedOrder(Sampler[int]):
    """Indices of one epoch, as many as there are samples; the same on every process and after a resume.

    Args:
        size: samples.
        weights: epoch -> [size] how often each sample comes, relative to the others; called when an epoch begins.
        epoch: () -> the number of the epoch that begins.
        seed: with the epoch, of the order.
    """

    def __init__(
        self, size: int, weights: Callable[[int], Sequence[float]], epoch: Callable[[], int], seed: int
    ) -> None:
        self.size, self.weights, self.epoch, self.seed = size, weights, epoch, seed

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        return map(int, weighted_order(self.weights(epoch), np.random.default_rng([self.seed, epoch])))


def weighted_order(weights: Sequence[float], random: np.random.Generator) -> np.ndarray:
    """Return as many indices as there are weights [samples], int64, each about as often as its weight says.

    Each comes floor(n) or floor(n) + 1 times, n its share of all; equal weights give a permutation.
    """
    expected = np.asarray(weights, np.float64)
    expected = expected * (len(expected) / expected.sum())
    counts = np.floor(expected + 1e-9).astype(int)
    rest = np.clip(expected - counts, 0, None)
    missing = len(expected) - int(counts.sum())
    if missing > 0:
        # Systematic sampling: one place in each of `missing` equal parts of the remainders.
        places = (np.arange(missing) + random.random()) * (rest.sum() / missing)
        counts += np.bincount(np.searchsorted(np.cumsum(rest), places).clip(max=len(rest) - 1), minlength=len(rest))
    return random.permutation(np.repeat(np.arange(len(expected)), counts))


def ids_of(dataset: Any) -> list[str]:
    """Return the id of every sample, without decoding its media where that is possible."""
    samples = undecoded(dataset.dataset)[0] if isinstance(dataset, EncodedDataset) else dataset
    return [str(samples[index].get("id", index)) for index in range(len(samples))]
