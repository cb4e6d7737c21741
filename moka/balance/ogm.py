"""On-the-fly gradient modulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moka.errors import MokaError

from .handles import Handles
from .strategy import BalanceStrategy, Needs, StepContext


class OGM(BalanceStrategy):
    """Slows down the modality that explains the answers better.

        k_m = 1 - tanh(alpha rho_m)  if rho_m > 1,  else 1

    rho: `StepContext.dominance_ratios`, measured every few steps and smoothed. k scales the update of A_m (``apply="update"``,
    the default: Adam does not notice a constant factor on its gradient) or its gradient (``"gradient"``, the paper's, for SGD).
    B, which all modalities share, is left alone, as the classifier is in the paper. Its noise (OGM-GE) is not added.

    Source: Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022, arXiv 2203.15332.

    Args:
        alpha: strength, above 0.
        apply: "update" or "gradient".
        every: steps between two measurements.
        smoothing: weight of the past in the mean of log rho, 0 to below 1.
        continuous: ``k = 1 - tanh(alpha (rho - 1))``, which has no jump at rho = 1 (ours).
    """

    name = "ogm"

    def __init__(
        self,
        alpha: float = 0.1,
        apply: Literal["update", "gradient"] = "update",
        every: int = 8,
        smoothing: float = 0.0,
        continuous: bool = False,
    ) -> None:
        super().__init__()
        if not alpha > 0:
            raise MokaError(f"balance.ogm.alpha: {alpha}; allowed: above 0.")
        if apply not in ("update", "gradient"):
            raise MokaError(f"balance.ogm.apply: {apply!r}; allowed: update, gradient.")
        if every < 1:
            raise MokaError(f"balance.ogm.every: {every}; at least 1 is expected.")
        if not 0 <= smoothing < 1:
            raise MokaError(f"balance.ogm.smoothing: {smoothing}; allowed: 0 to below 1.")
        self.alpha, self.apply, self.every, self.smoothing, self.continuous = alpha, apply, every, smoothing, continuous
        self.log_rho: dict[str, float] = {}

    def needs(self, modalities: Sequence[str]) -> Needs:
        return Needs(forwards=len(modalities), every=self.every, modalities=2, updates=True)

    def coefficient(self, rho: float) -> float:
        """Return k for a dominance ratio."""
        if rho <= 1:
            return 1.0
        return 1.0 - math.tanh(self.alpha * (rho - 1 if self.continuous else rho))

    def update(self, handles: Handles, step: StepContext) -> None:
        if step.number % self.every == 0 or not self.log_rho:
            for modality, rho in (step.dominance_ratios() or {}).items():
                past = self.log_rho.get(modality)
                now = math.log(max(rho, 1e-8))
                self.log_rho[modality] = now if past is None else self.smoothing * past + (1 - self.smoothing) * now
        for modality, value in self.log_rho.items():
            rho = math.exp(min(value, 50.0))
            k = self.coefficient(rho)
            self.figures |= {f"rho/{modality}": rho, f"k/{modality}": k}
            (handles.multiply if self.apply == "update" else handles.scale_gradients)(modality, k)

    def state_dict(self) -> dict[str, Any]:
        return {"log_rho": self.log_rho}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.log_rho = dict(state["log_rho"])
