"""Batches of samples of similar length: ``train_sampling_strategy: group_by_length``.

    permutation by (seed, epoch) -> stretches of many batches -> each sorted by length, then by media -> cut in batches
    -> the batches shuffled

Within a batch the padding is small, and what the processes compute at the same time costs each of them about the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from moka.data.lengths import Lengths

# As in transformers' own sampler: batches that are sorted together, fewer in a data set of fewer than four times that.
_SORTED_TOGETHER = 50
# Lengths within this ratio count as equal, and the number of media decides.
_ALIKE = 1.1


class LengthGroupedSampler(Sampler[int]):
    """Indices of one epoch, grouped; those of ``batch_size`` in a row belong together.

    The order depends on (seed, epoch) only, so all processes and a resumed run draw the same. Every index comes once an
    epoch; an incomplete batch comes last.

    Args:
        lengths: of the data set's items.
        batch_size: items of one optimizer step, over all processes and accumulated batches. Within it they are sorted,
            so that the batches that processes get in turn are as equal.
        seed: with the epoch, of the order.
    """

    def __init__(self, lengths: Lengths, batch_size: int, seed: int = 0) -> None:
        self.tokens, self.media = lengths.tokens, lengths.media_items
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return map(int, grouped_order(self.tokens, self.media, self.batch_size, self.seed, self.epoch))


def grouped_order(tokens: np.ndarray, media: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return all indices of ``tokens`` [items] as int64 [items], those of a batch about equal in length and then in ``media`` [items].

    The batch with the longest item comes first: what does not fit into memory is known at once.
    """
    random = np.random.default_rng([seed, epoch])
    size = len(tokens)
    stretch = batch_size * max(1, min(size // (batch_size * 4), _SORTED_TOGETHER))
    alike = (np.log(np.maximum(tokens, 1)) / np.log(_ALIKE)).astype(int)
    order = random.permutation(size)
    batches: list[np.ndarray] = []
    for start in range(0, size, stretch):
        part = order[start : start + stretch]
        # The last key decides first.
        part = part[np.lexsort((tokens[part], media[part], alike[part]))]
        batches += [part[cut : cut + batch_size] for cut in range(0, len(part), batch_size)]
    last = [batches.pop()] if batches and len(batches[-1]) < batch_size else []
    batches = [batches[k] for k in random.permutation(len(batches))]
    if batches:
        longest = max(range(len(batches)), key=lambda k: tokens[batches[k]].max())
        batches.insert(0, batches.pop(longest))
    return np.concatenate([*batches, *last]) if size else order


def padding_share(tokens: np.ndarray, order: Sequence[int] | np.ndarray, batch_size: int) -> float:
    """Return share of positions that are padding where ``batch_size`` items in a row are padded to their longest."""
    taken = tokens[np.asarray(order, np.int64)]
    if not len(taken):
        return 0.0
    starts = np.arange(0, len(taken), batch_size)
    padded = np.maximum.reduceat(taken, starts) * np.diff(starts, append=len(taken))
    return 1 - float(taken.sum()) / float(padded.sum())
