"""A modality's own parameters: the rows of the stacked A of every MokA layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moka.adapter.layer import MokaLinear
from moka.errors import MokaError, nearest


class Handles:
    """Scales what the optimizer does to a modality's A, ``row <- before + k (after - before)``.

    That is right for every optimizer: Adam does not notice a constant factor on its gradient.

    Args:
        model: adapted with MokA; the first active adapter of each layer counts.
    Raises:
        MokaError: no MokA adapter, or A is sharded (ZeRO-3, FSDP2).
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.Parameter, dict[str, int]]] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, MokaLinear) or layer.moka_tower:
                continue
            adapter = layer.adapters_in_use()[0]
            weight: Any = layer.moka_A[adapter].weight
            rows = {modality: row for row, modality in enumerate(layer.moka_config[adapter].modalities)}
            if (
                tuple(weight.shape[:1]) != (len(rows),)
                or type(weight).__name__ == "DTensor"
                or hasattr(weight, "device_mesh")
            ):
                raise MokaError(
                    f"balance: {name}.moka_A is sharded over processes (ZeRO-3 or FSDP), so that a modality's rows cannot be "
                    "scaled. Use DDP, ZeRO-1 or ZeRO-2, or a strategy that scales no updates (opm)."
                )
            self._layers.append((weight, rows))
        if not self._layers:
            raise MokaError(f"balance: {type(model).__name__} has no MokA adapter, so no modality has an A of its own.")
        self.scale: dict[str, float] = {}
        self._before: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    @property
    def modalities(self) -> list[str]:
        """Return the names of the rows, text included."""
        return list(self._layers[0][1])

    def rows(self, modality: str) -> list[torch.Tensor]:
        """Return views [r, in] of a modality's rows.

        Raises:
            MokaError: an unknown modality.
        """
        if modality not in self.modalities:
            raise MokaError(
                f"balance: unknown modality {modality!r}; the adapter has {', '.join(self.modalities)}."
                f"{nearest(modality, self.modalities)}"
            )
        return [weight.data[rows[modality]] for weight, rows in self._layers]

    def multiply(self, modality: str, factor: float) -> None:
        """Scale this step's update of a modality; factors of several strategies multiply."""
        self.rows(modality)
        self.scale[modality] = self.scale.get(modality, 1.0) * factor

    def scale_gradients(self, modality: str, factor: float) -> None:
        """Scale a modality's gradient, as the papers do for SGD; Adam hardly notices."""
        self.rows(modality)
        for weight, rows in self._layers:
            if weight.grad is not None:
                weight.grad[rows[modality]] *= factor

    def before_step(self) -> None:
        """Remember the rows whose update is scaled."""
        self._before = [
            (row, row.clone(), factor)
            for modality, factor in self.scale.items()
            if factor != 1.0
            for row in self.rows(modality)
        ]
        self.scale = {}

    def after_step(self) -> None:
        """Apply the factors to what the optimizer did."""
        for row, before, factor in self._before:
            torch.lerp(before, row, factor, out=row)
        self._before = []
