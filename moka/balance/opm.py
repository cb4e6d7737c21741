"""On-the-fly prediction modulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moka.errors import MokaError

from .handles import Handles
from .strategy import BalanceStrategy, Needs, StepContext


class OPM(BalanceStrategy):
    """Hides the media of the modality that explains the answers better, in some samples of some batches.

        q_m = q_base (1 + lambda tanh(rho_m - 1))  if rho_m > 1,  else 0          (at most 1)

    In a batch, with probability p_execute, each sample loses modality m with probability q_m: its tokens are hidden from
    attention, at the positions that they have. Attention renormalises, so nothing is rescaled (the paper divides the features
    that are left). A sample that would lose all of its media keeps them (the paper removes it). The question is never hidden.

    Source: Wei et al., "On-the-fly Modulation for Balanced Multimodal Learning", TPAMI 2024, arXiv 2410.11582.

    Args:
        q_base, lambda_, p_execute: as above.
        every: steps between two measurements of rho (`StepContext.dominance_ratios`).
        warmup: steps before anything is hidden.
    """

    name = "opm"

    def __init__(
        self, q_base: float = 0.5, lambda_: float = 0.5, p_execute: float = 0.7, every: int = 8, warmup: int = 0
    ) -> None:
        super().__init__()
        for key, value in (("q_base", q_base), ("p_execute", p_execute)):
            if not 0 <= value <= 1:
                raise MokaError(f"balance.opm.{key}: {value}; allowed: 0 to 1.")
        if every < 1 or warmup < 0 or lambda_ < 0:
            raise MokaError(
                f"balance.opm: every {every}, warmup {warmup}, lambda_ {lambda_}; allowed: >= 1, >= 0, >= 0."
            )
        self.q_base, self.lambda_, self.p_execute, self.every, self.warmup = q_base, lambda_, p_execute, every, warmup
        self.rho: dict[str, float] = {}

    def needs(self, modalities: Sequence[str]) -> Needs:
        return Needs(forwards=len(modalities), every=self.every, modalities=2)

    def probability(self, rho: float) -> float:
        """Return q for a dominance ratio."""
        return min(1.0, self.q_base * (1 + self.lambda_ * math.tanh(rho - 1))) if rho > 1 else 0.0

    def prepare(self, step: StepContext, generator: torch.Generator) -> torch.Tensor | None:
        if step.number <= self.warmup or torch.rand((), generator=generator) >= self.p_execute:
            return None
        names = list(step.tokens)
        present = torch.stack([step.tokens[name].any(1).cpu() for name in names])  # [modalities, batch]
        q = torch.tensor([self.probability(self.rho.get(name, 0.0)) for name in names])[:, None]
        lost = (torch.rand(present.shape, generator=generator) < q) & present
        lost &= ~(lost | ~present).all(0)  # a sample keeps its media if it would lose all
        self.figures |= {f"hidden/{name}": float(row.float().mean()) for name, row in zip(names, lost, strict=True)}
        if not lost.any():
            return None
        hidden = [
            step.tokens[name] & row[:, None].to(step.tokens[name].device) for name, row in zip(names, lost, strict=True)
        ]
        return torch.stack(hidden).any(0)

    def update(self, handles: Handles, step: StepContext) -> None:
        if step.number % self.every == 0 or not self.rho:
            self.rho = step.dominance_ratios() or self.rho
            self.figures |= {f"rho/{name}": rho for name, rho in self.rho.items()}
            self.figures |= {f"q/{name}": self.probability(rho) for name, rho in self.rho.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rho": self.rho}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rho = dict(state["rho"])
