"""Diagnosing & Re-learning: take a modality that is over-trained back towards its start.

Wei et al., "Diagnosing and Re-learning for Balanced Multimodal Learning", ECCV 2024, https://arxiv.org/abs/2407.09705.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from .events import Means, at_event, check_events
from .strategy import BalanceStrategy, Context, Needs


class Lifts(Means):
    """Mean lift l({m}) - l({}) of each modality, over rows that have it: nats per token."""

    def measure(self, ctx: Context) -> None:
        """Add the current micro-batch of this process."""
        empty = ctx.log_likelihood(())
        for name in ctx.media:
            rows = ctx.present(name)
            single = ctx.log_likelihood([name]) if empty is not None and bool(rows.any()) else None
            if empty is not None and single is not None:
                self.add(name, single - empty, rows)


@dataclass
class Relearning(BalanceStrategy):
    """At a few moments, move A_m back by as much as the modality's use has stopped to generalise.

        gap_m = |g_m(train) - g_m(validation)| / (|g_m(train)| + 0.001),   g_m the lift of m only
        w_m = min(cap, tanh(lam * gap_m)),    A_m <- w_m A_m(start) + (1 - w_m) A_m

    and the optimizer's moments of A_m are cleared. B and the projectors stay.

    Source: ECCV 2024, https://arxiv.org/abs/2407.09705. Adapted: the gap is that of the lift, where the paper clusters features by
    class and compares purities, as an open answer has no class; events come at shares of the training, not every 20 epochs;
    w is capped, as with a trained B the start of A_m is a random map and not the base model.

    Args:
        lam: the paper's 3.
        events: shares of the training at which it acts, above 0 and below 1.
        cap: the largest w.
        target: "init", A_m as it began, or "zero": towards the base model.
        every: steps between two measurements on training batches.
        batches: validation batches of an event, of each process.
    """

    lam: float = 3.0
    events: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    cap: float = 0.5
    target: Literal["init", "zero"] = "init"
    every: int = 8
    batches: int = 8
    name: ClassVar[str] = "relearning"
    changes: ClassVar[frozenset[str]] = frozenset({"values of A"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(lam=(0, 1000), cap=(0, 1), every=(1, 1_000_000), batches=(1, 1_000_000))
        check_events(self.name, self.events)
        self.lifts = Lifts()

    def needs(self) -> Needs:
        return Needs(
            likelihoods="lift",
            every=self.every,
            once=len(self.events) * self.batches,
            adapter=True,
            moments=True,
            validation=True,
            media=1,
        )

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if ctx.step % self.every == 0:
            self.lifts.measure(ctx)

    def interval(self, handles: Any, ctx: Context) -> None:
        if not at_event(self.events, ctx):
            return
        train, held_out = self.lifts.read(ctx), Lifts()
        held_out.sweep(ctx, self.batches)
        validation = held_out.read(ctx)
        for name in ctx.media:
            if name not in train or name not in validation:
                continue
            gap, w = relearning_weight(train[name], validation[name], self.lam, self.cap)
            for key, value in (("gap", gap), ("w", w)):
                ctx.log(f"{self.name}/{key}/{name}", value)
            start = handles.init[name]
            rows = {}
            for layer, row in handles.A(name).items():
                goal = start[layer].to(row) if self.target == "init" else torch.zeros_like(row)
                rows[layer] = w * goal + (1 - w) * row
            handles.set(name, rows)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.lifts.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lifts.sums = {name: list(sums) for name, sums in state["sums"].items()}


def relearning_weight(train: float, validation: float, lam: float, cap: float) -> tuple[float, float]:
    """Return (gap, w) of a modality's lifts: w = min(cap, tanh(lam * gap))."""
    gap = abs(train - validation) / (abs(train) + 1e-3)
    return gap, min(cap, math.tanh(lam * gap))
