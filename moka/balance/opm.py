"""OPM: drop the modality that leads, sample by sample. AMCo is a mode.

Wei, Hu, Du and Wen, "On-the-fly Modulation for Balanced Multimodal Learning", T-PAMI 2024, https://arxiv.org/abs/2410.11582;
Zhou et al., "Adaptive Mask Co-optimization for Modal Dependence in Multimodal Learning" (AMCo), ICASSP 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .strategy import BalanceStrategy, Context, Needs, Scores, dominance


@dataclass
class OPM(BalanceStrategy):
    """Hide the leading modality's tokens from a share of the samples.

        q_m = q_base * (1 + lam * tanh(max(0, rho_m - 1))) if rho_m > 1, else 0; at most 1

    With the probability ``p_exe`` a step is one in which samples lose modality m with the probability q_m. A sample never
    loses all of its modalities.

    Source: T-PAMI 2024, https://arxiv.org/abs/2410.11582. Adapted: tokens are hidden from attention instead of features set to
    zero, so nothing is rescaled, as attention normalises over what is left; a sample that would lose everything keeps the
    last modality instead of being removed, so that the batch stays the trainer's; the warm-up is a share of the steps.

    Args:
        q_base: base rate.
        lam: growth of the rate with the ratio.
        p_exe: share of the steps in which it acts.
        warmup: share of the training before it acts; the paper's 5 of 100 epochs.
        every: steps between two measurements.
        mode: "drop", or "partial" of AMCo: of the dependent modality (softmax of the scores above 1 / M) a growing share of
            the tokens, up to ``epsilon``, is hidden in every sample: p_t = sin(pi / 2 * min(epsilon, l_t) / epsilon), l_t the
            progress, times epsilon.
        epsilon: of AMCo; its 0.3.
        decay: of the running mean of the scores.
        random_side: a control: the rates are dealt to the modalities by chance.
    """

    q_base: float = 0.5
    lam: float = 0.5
    p_exe: float = 0.7
    warmup: float = 0.05
    every: int = 8
    mode: Literal["drop", "partial"] = "drop"
    epsilon: float = 0.3
    decay: float = 0.9
    random_side: bool = False
    name: ClassVar[str] = "opm"
    changes: ClassVar[frozenset[str]] = frozenset({"visible tokens"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        unit = (0.0, 1.0)
        self._check(
            **dict.fromkeys(("q_base", "p_exe", "warmup", "decay"), unit),
            lam=(0, 100),
            every=(1, 1_000_000),
            epsilon=(1e-6, 1),
        )
        self.scores = Scores(self.decay)
        self.rates: dict[str, float] = {}

    def needs(self) -> Needs:
        return Needs(likelihoods="single", every=self.every)

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if ctx.step % self.every == 0:
            self.scores.measure(ctx)
        if ctx.progress < self.warmup:
            return
        if self.mode == "partial":
            self._hide_parts(ctx)
        elif ctx.draw(self.name, "exe", ctx.step).random() < self.p_exe:
            self._drop(ctx)

    def _drop(self, ctx: Context) -> None:
        rows = {name: ctx.present(name).tolist() for name in ctx.media}
        lost = {name: [False] * len(here) for name, here in rows.items()}
        for i, key in enumerate(ctx.row_keys()):
            drawn = ctx.draw(self.name, ctx.step, key)
            own = [name for name in ctx.media if rows[name][i]]
            # One number a modality, in their order, whatever is drawn for the others.
            gone = [name for name in ctx.media if drawn.random() < self.rates.get(name, 0.0) and rows[name][i]]
            if len(gone) == len(own):  # the one with the lowest rate stays
                gone = sorted(gone, key=lambda name: -self.rates[name])[: len(own) - 1]
            for name in gone:
                lost[name][i] = True
        for name, flags in lost.items():
            if any(flags):
                ctx.hide(name, torch.tensor(flags))
            if self.rates.get(name):
                ctx.log(f"{self.name}/dropped/{name}", sum(flags) / max(sum(rows[name]), 1))

    def _hide_parts(self, ctx: Context) -> None:
        share = amco_share(ctx.progress, self.epsilon)
        for name, rate in self.rates.items():
            if rate:
                ctx.hide_part(name, share, self.name)

    def update(self, handles: Any, ctx: Context) -> None:
        if ctx.step % self.every or not self.scores.reduce(ctx):
            return
        running = {m: self.scores.running[m] for m in self.scores.current}
        if self.mode == "partial":
            self.rates = {m: float(share > 1 / len(running)) for m, share in dependence(running).items()}
        else:
            self.rates = opm_rates(dominance(running), self.q_base, self.lam)
        if self.random_side:
            values = list(self.rates.values())
            ctx.draw(self.name, "side", ctx.step).shuffle(values)
            self.rates = dict(zip(self.rates, values, strict=True))
        for name, rate in self.rates.items():
            ctx.log(f"{self.name}/{name}", rate)

    def state_dict(self) -> dict[str, Any]:
        return {**self.scores.state_dict(), "rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state)
        self.rates = dict(state["rates"])


def opm_rates(ratios: Mapping[str, float], q_base: float, lam: float) -> dict[str, float]:
    """Return q_m of OPM for each rho_m, 0 to 1."""
    return {
        m: min(max(q_base * (1 + lam * math.tanh(max(0.0, rho - 1))), 0.0), 1.0) if rho > 1 else 0.0
        for m, rho in ratios.items()
    }


def dependence(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the softmax of -s_m over the players: who is depended on."""
    values = torch.softmax(-torch.tensor(list(scores.values()), dtype=torch.float64), 0)
    return dict(zip(scores, values.tolist(), strict=True))


def amco_share(progress: float, epsilon: float) -> float:
    """Return the share of the tokens that AMCo hides: epsilon * sin(pi / 2 * min(epsilon, progress) / epsilon)."""
    return epsilon * math.sin(math.pi / 2 * min(epsilon, progress) / epsilon)
