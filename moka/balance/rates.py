"""A learning rate for each modality, fixed: the baseline that every strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from moka.errors import MokaError

from .handles import HIGHEST, LOWEST
from .strategy import BalanceStrategy, Context, Needs


@dataclass
class LearningRates(BalanceStrategy):
    """Train A_m with the learning rate scale_m * lr, for the full training.

    Args:
        scale: modality -> factor, 0.05 to 3; text too. Others keep 1.
    """

    scale: dict[str, float] = field(default_factory=dict)
    name: ClassVar[str] = "lr_scale"
    changes: ClassVar[frozenset[str]] = frozenset({"updates of A"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check()
        if not self.scale:
            raise MokaError("balance: lr_scale: scale is empty; name modalities with their factors, as {visual: 2.0}.")
        for name, factor in self.scale.items():
            if not LOWEST <= factor <= HIGHEST:
                raise MokaError(
                    f"balance: lr_scale: scale.{name} is {factor}; allowed: {LOWEST} to {HIGHEST}. Correct the field."
                )

    def named_modalities(self) -> list[str]:
        """Return the modalities that its settings name."""
        return list(self.scale)

    def needs(self) -> Needs:
        return Needs(adapter=True, media=0)

    def update(self, handles: Any, ctx: Context) -> None:
        for name, factor in self.scale.items():
            handles.lr_scale[name] = factor
