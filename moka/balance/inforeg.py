"""InfoReg: slow the modality that already has enough information, while it learns fastest.

Huang et al., "Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition", CVPR 2025,
https://arxiv.org/abs/2503.18595.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .handles import Rows
from .strategy import BalanceStrategy, Context, Needs, Scores


@dataclass
class InfoReg(BalanceStrategy):
    """Pull A of the leading modality towards where the interval began, inside its prime learning window.

        F_m(e) = sum over layers and steps of the interval e of mean(grad(A_m)^2)              (Fisher information)
        inside the window: (mean of the last 10 F(e) - the mean before) / mean of the last 10 > threshold
        A_m <- A_m - lr * beta * exp(tanh(gap)) * (A_m - A_m at the beginning of the interval)

    with gap = mean NLL of the others only - that of m only, in nats per token. The first interval counts as inside.

    Source: CVPR 2025, https://arxiv.org/abs/2503.18595. Adapted: mean gaps, as the paper's sums over a batch saturate tanh; an
    interval of steps instead of an epoch; one beta for all modalities; the pull is decoupled from the gradient, so that Adam
    does not divide it. The paper also trains on unimodal losses: add ``unimodal_losses``.

    Args:
        beta: strength; the paper's 0.95, for SGD at 2e-3. It is multiplied by the learning rate.
        window: steps of an interval.
        threshold: of the growth of the Fisher information; paper 0.05.
        average: intervals of the moving mean; paper 10.
        every: steps between two measurements of the likelihoods.
        decay: of their running mean.
    """

    beta: float = 0.95
    window: int = 50
    threshold: float = 0.05
    average: int = 10
    every: int = 8
    decay: float = 0.9
    name: ClassVar[str] = "inforeg"
    changes: ClassVar[frozenset[str]] = frozenset({"pull of A"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        steps = (1, 1_000_000)
        self._check(beta=(0, 1e6), window=steps, threshold=(-10, 10), average=(1, 1000), every=steps, decay=(0, 1))
        self.scores = Scores(self.decay)
        self.history: dict[str, list[float]] = {}
        self.anchor: dict[str, Rows] = {}
        self._fisher: dict[str, float] = {}

    def needs(self) -> Needs:
        return Needs(likelihoods="single", every=self.every, adapter=True, gradients=True)

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if ctx.step % self.every == 0:
            self.scores.measure(ctx)

    def update(self, handles: Any, ctx: Context) -> None:
        if not self.anchor:
            self.anchor = {name: handles.copy(name) for name in ctx.media}
        if ctx.step % self.every == 0:
            self.scores.reduce(ctx)
        for name in ctx.media:
            means = [float(grad.float().pow(2).mean()) for grad in handles.gradient(name).values()]
            self._fisher[name] = self._fisher.get(name, 0.0) + sum(means)
        if len(self.scores.running) < 2:
            return
        lead, gap = leading(self.scores.running)
        inside = in_window(self.history.get(lead, ()), self.threshold, self.average)
        ctx.log(f"{self.name}/inside/{lead}", float(inside))
        if inside and gap > 0:
            strength = ctx.learning_rate * self.beta * math.exp(math.tanh(gap))
            handles.pull(lead, self.anchor[lead], strength)
            ctx.log(f"{self.name}/pull/{lead}", strength)

    def interval(self, handles: Any, ctx: Context) -> None:
        if (ctx.step + 1) % self.window:
            return
        for name, value in self._fisher.items():
            self.history.setdefault(name, []).append(value)
            del self.history[name][: -self.average - 1]  # all that the two means need
            ctx.log(f"{self.name}/fisher/{name}", value)
        self._fisher = {}
        self.anchor = {name: handles.copy(name) for name in ctx.media}

    def state_dict(self) -> dict[str, Any]:
        own = {"history": self.history, "anchor": self.anchor, "fisher": self._fisher}
        return {**self.scores.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state)
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.anchor, self._fisher = state["anchor"], dict(state["fisher"])


def leading(scores: Mapping[str, float]) -> tuple[str, float]:
    """Return the modality with the lowest score and by how much it is below the mean of the others."""
    lead = min(scores, key=lambda name: scores[name])
    others = [score for name, score in scores.items() if name != lead]
    return lead, sum(others) / len(others) - scores[lead]


def in_window(history: Sequence[float], threshold: float, average: int) -> bool:
    """Return whether the moving mean of the Fisher information grows by more than ``threshold``, relative to itself."""
    if len(history) < 2:
        return True
    now, before = list(history[-average:]), list(history[:-1][-average:])
    mean_now, mean_before = sum(now) / len(now), sum(before) / len(before)
    return mean_now > 0 and (mean_now - mean_before) / mean_now > threshold
