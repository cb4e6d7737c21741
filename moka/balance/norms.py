"""NormBalance: what the shared B reads has the same norm for every modality. The idea of MMCosine, for generation.

Xu, Feng, Wang and Hu, "MMCosine: Multi-Modal Cosine Loss Towards Balanced Audio-Visual Fine-Grained Learning", ICASSP 2023,
https://arxiv.org/abs/2303.05338.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .strategy import BalanceStrategy, Context, Needs


@dataclass
class NormBalance(BalanceStrategy):
    """Scale A_m of each layer so that z~ has the same mean norm for all modalities.

        n_m = running mean of ||z~_t|| over the tokens t of m,   c = mean_m n_m,   A_m <- (c / n_m)^strength A_m

    Not MMCosine itself: its loss takes logits s * sum_m cos(W_m,c, phi_m), with a weight of each class for each modality. A
    language model has one head over the whole vocabulary, which reads states in which modalities are mixed, so there is no term
    of a modality whose norms could be divided out. What is left of the idea is that no modality leads by its norm.

    Source of the idea: ICASSP 2023, https://arxiv.org/abs/2303.05338. By the mean over a modality's tokens and not for each token, so that
    what was trained is an ordinary adapter: a norm for each token would belong to every forward, and could not be merged.

    Args:
        strength: share of the difference that is taken away, on a logarithmic scale.
        every: steps between two.
        decay: of the running mean of the norms.
    """

    strength: float = 1.0
    every: int = 50
    decay: float = 0.9
    name: ClassVar[str] = "norm_balance"
    changes: ClassVar[frozenset[str]] = frozenset({"values of A"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(strength=(0, 1), every=(1, 1_000_000), decay=(0, 1))
        self.norms: dict[str, dict[str, float]] = {}  # layer -> modality -> running mean

    def needs(self) -> Needs:
        return Needs(adapter=True, parts_of_B=True, media=1)

    def update(self, handles: Any, ctx: Context) -> None:
        for layer, norms in handles.parts.layer_norms().items():
            own = self.norms.setdefault(layer, {})
            for name, norm in norms.items():
                own[name] = self.decay * own[name] + (1 - self.decay) * norm if name in own else norm
        for name, norm in handles.parts.z_norms().items():
            ctx.log(f"{self.name}/norm/{name}", norm)

    def interval(self, handles: Any, ctx: Context) -> None:
        if (ctx.step + 1) % self.every:
            return
        scales: dict[str, dict[str, float]] = {}
        for layer, own in self.norms.items():
            for name, factor in norm_factors(own, self.strength).items():
                scales.setdefault(name, {})[layer] = factor
                own[name] *= factor
        for name, factors in scales.items():
            handles.scale(name, factors)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = {layer: dict(own) for layer, own in state["norms"].items()}


def norm_factors(norms: Mapping[str, float], strength: float) -> dict[str, float]:
    """Return (mean norm / n_m)^strength for each modality; nothing for fewer than two, none for a norm of 0."""
    known = {name: norm for name, norm in norms.items() if norm > 0}
    if len(known) < 2:
        return {}
    mean = sum(known.values()) / len(known)
    return {name: (mean / norm) ** strength for name, norm in known.items()}
