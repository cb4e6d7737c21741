"""Train on one modality only: a teacher of UMT, a member of the ensemble UME, and the yardstick of every balanced run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moka.adapter.config import TEXT
from moka.errors import MokaError

from .strategy import BalanceStrategy, Context, Needs


@dataclass
class SingleModality(BalanceStrategy):
    """Hide all modalities but one from attention, in every step. Questions stay, and the model has the same tensors.

    Args:
        modality: the one that is visible.
    """

    modality: str = ""
    name: ClassVar[str] = "single_modality"
    changes: ClassVar[frozenset[str]] = frozenset({"visible tokens"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check()
        if self.modality in ("", TEXT):
            raise MokaError(
                f"balance: {self.name}: modality is {self.modality!r}; name the modality that stays visible, such as visual."
            )

    def named_modalities(self) -> list[str]:
        """Return the modalities that its settings name."""
        return [self.modality]

    def needs(self) -> Needs:
        return Needs()

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        for other in ctx.media:
            if other != self.modality:
                ctx.hide(other, ctx.present(other))
