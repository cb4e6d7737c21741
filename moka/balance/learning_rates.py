"""A learning rate for each modality: the baseline that every strategy has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moka.errors import MokaError

from .handles import Handles
from .strategy import BalanceStrategy, Needs, StepContext


class LearningRates(BalanceStrategy):
    """Scales the updates of A by modality, by constants.

    Args:
        factors: modality -> factor of its learning rate, such as ``{"audio": 2.0}``; others keep theirs.
    """

    name = "learning_rates"

    def __init__(self, factors: Mapping[str, float]) -> None:
        super().__init__()
        for modality, factor in factors.items():
            if not 0 <= factor <= 1e4:
                raise MokaError(f"balance.learning_rates.factors.{modality}: {factor}; allowed: 0 to 10000.")
        self.factors = dict(factors)

    def needs(self, modalities: Sequence[str]) -> Needs:
        return Needs(updates=True, modalities=0)

    def update(self, handles: Handles, step: StepContext) -> None:
        for modality, factor in self.factors.items():
            handles.multiply(modality, factor)
            self.figures[f"k/{modality}"] = factor
