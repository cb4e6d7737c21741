"""Frozen encoders whose features were computed before (`moka cache`): training then runs their projectors only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .base import Encoder, features_name


class CachedEncoder(nn.Module):
    """Instead of a frozen encoder, whose features go to the projector as they are; it is never called.

    It has no parameters, so nothing of the encoder is moved to a device, partitioned or run, on no process; a batch
    without the modality touches the projector by features of zeros. The encoder waits in ``encoder``.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._aside = (encoder,)  # what is in a tuple is no submodule
        self.name, self.kind, self.input_name = encoder.name, encoder.kind, features_name(encoder)
        self.num_tokens, self.width = encoder.num_tokens, encoder.width
        self.grid = getattr(encoder, "grid", None)

    @property
    def encoder(self) -> Encoder:
        return self._aside[0]

    def dummy_input(self, items: int = 1) -> torch.Tensor:
        """Zeros [items, num_tokens, width]."""
        return torch.zeros(items, self.num_tokens, self.width)


def set_aside(model: Any, names: Iterable[str]) -> None:
    """Put a `CachedEncoder` instead of the encoders of these modalities of a composed model."""
    for name in names:
        model.encoders[name] = CachedEncoder(model.encoders[name])


def bring_back(model: Any) -> None:
    """Put the encoders that were set aside in their places again, on the model's device."""
    for name, encoder in model.encoders.items():
        if isinstance(encoder, CachedEncoder):
            model.encoders[name] = encoder.encoder.to(model.device)
