"""Moments at shares of a training, and what is measured until then on training batches and then on validation batches."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from moka.distributed import all_reduce_sum
from moka.errors import MokaError

from .strategy import Context


def check_events(name: str, events: Sequence[float]) -> None:
    """Refuse shares that are not inside of the training.

    Args:
        name: of the strategy.
    """
    if not events or any(not 0 < event < 1 for event in events):
        raise MokaError(
            f"balance: {name}: events is {events}; allowed: shares of the training above 0 and below 1, as [0.25, 0.5, 0.75]. "
            "Correct the field."
        )


def at_event(events: Sequence[float], ctx: Context) -> bool:
    """Return whether the step that has just ended, which is no last one, is one of the events."""
    done = ctx.step + 1
    return done < ctx.total_steps and done in {math.ceil(event * ctx.total_steps) for event in events}


class Means(ABC):
    """Means of figures over rows, micro-batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    @abstractmethod
    def measure(self, ctx: Context) -> None:
        """Add the current micro-batch of this process."""

    def add(self, key: str, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the values [batch] of ``rows`` [batch] bool that are not NaN."""
        counted = rows.to(values.device) & ~values.isnan()
        sums = self.sums.setdefault(key, [0.0, 0.0])
        sums[0] += float(values[counted].double().sum())
        sums[1] += int(counted.sum())

    def sweep(self, ctx: Context, batches: int) -> None:
        """Add the first ``batches`` batches of this process's validation data."""
        for batch in itertools.islice(ctx.validation(), batches):
            with ctx.micro_batch({key: value for key, value in batch.items() if key != "sample_ids"}):
                self.measure(ctx)

    def read(self, ctx: Context) -> dict[str, float]:
        """Return the means over all processes, which have to call it, and begin again."""
        keys = [*ctx.media, "joint"]
        flat = all_reduce_sum([value for key in keys for value in self.sums.get(key, (0.0, 0.0))])
        self.sums = {}
        return {key: total / n for key, total, n in zip(keys, flat[::2], flat[1::2], strict=True) if n}
