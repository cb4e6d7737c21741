"""Figures with their 95 % intervals: Wilson's for independent proportions, the seeded bootstrap for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moka.evaluation.scoring import wilson

RESAMPLES, SEED = 1000, 0
_FEW_KINDS = 64
WILSON, BOOTSTRAP = "Wilson", f"bootstrap, {RESAMPLES} resamples, seed {SEED}"


def figure(value: float | None, interval: Sequence[float] | None, n: int, method: str) -> dict[str, Any]:
    """One number of a result: its value, its 95 % interval, and the number of things it is taken over.

    The value is None where it is not defined (an accuracy of nothing, an F1 without a positive).
    """
    if value is None or not np.isfinite(value):
        return {"value": None, "interval": None, "n": n, "method": method}
    interval = None if interval is None else [float(end) for end in interval]
    return {"value": float(value), "interval": interval, "n": n, "method": method}


def proportion(right: int, n: int, scale: float = 100.0) -> dict[str, Any]:
    """``right`` of ``n`` independent things, in per cent, with Wilson's interval."""
    if n == 0:
        return figure(None, None, 0, WILSON)
    return figure(scale * right / n, [scale * end for end in wilson(right, n)], n, WILSON)


def resampled(units: np.ndarray) -> np.ndarray:
    """Return sums over bootstrap resamples of the units.

    Args:
        units: counts of every unit, [n, k]; a unit is what was drawn as one: a clip, an image, an utterance.

    Returns:
        The counts summed over each resample, [RESAMPLES, k]; the same for the same units.
    """
    generator = np.random.default_rng(SEED)
    n = len(units)
    kinds, counts = np.unique(units, axis=0, return_counts=True)
    if len(kinds) <= _FEW_KINDS:  # as a draw of n units one by one, without going through them
        return generator.multinomial(n, counts / n, size=RESAMPLES) @ kinds
    return np.stack([units[generator.integers(0, n, n)].sum(axis=0) for _ in range(RESAMPLES)])


def percentiles(values: np.ndarray) -> list[float] | None:
    """The 2.5 % and 97.5 % points of a statistic over resamples; resamples in which it is undefined are left out."""
    values = values[np.isfinite(values)]
    return None if not len(values) else [float(end) for end in np.percentile(values, (2.5, 97.5))]


def bootstrap(units: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int | None = None) -> dict[str, Any]:
    """A statistic of summed counts with its percentile bootstrap interval.

    Args:
        units: [n, k], as for `resampled`.
        statistic: sums [..., k] -> values [...]; NaN where it is undefined.
        n: the number reported (default: the number of units).
    """
    n = len(units) if n is None else n
    if not len(units):
        return figure(None, None, n, BOOTSTRAP)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = float(statistic(units.sum(axis=0))), statistic(resampled(units))
    return figure(value, percentiles(drawn), n, BOOTSTRAP)


def percent(sums: np.ndarray) -> np.ndarray:
    """100 x the first count over the second: [..., 2] -> [...]."""
    return 100.0 * sums[..., 0] / sums[..., 1]


def clustered_proportion(right: Sequence[bool], clusters: Sequence[Any]) -> dict[str, Any]:
    """A proportion in per cent over records some of which belong together.

    Wilson's interval where every record is a cluster of its own; else clusters are resampled, because the answers
    to questions on one image are not independent.
    """
    if len(set(clusters)) == len(clusters):
        return proportion(sum(right), len(right))
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    units = np.zeros((len(index), 2))  # [clusters, (right, all)]
    for hit, cluster in zip(right, clusters, strict=True):
        units[index[cluster]] += (hit, 1)
    return bootstrap(units, percent, len(right))
