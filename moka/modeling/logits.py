"""The head of a language model on the supervised positions only, which have other columns in each row.

    hidden [batch, seq, width] -> of the positions that predict a label [1, positions, width] -> head
        -> what the model does after its head (scaling, soft-capping) -> logits [1, positions, vocabulary]

The model's own forward runs unchanged, and the input of its head is cut: so hooks of DeepSpeed and FSDP, quantised and
tied heads, and what a model does with its logits keep working.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .processing import IGNORE


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Return what each position predicts: labels [batch, seq] one to the left, -100 at the end of each row."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def supervised_places(labels: torch.Tensor) -> torch.Tensor:
    """Find the positions (row * seq + column) that predict a label, in order: int64 [positions]."""
    return (shifted(labels) != IGNORE).flatten().nonzero().squeeze(1)


class HeadCut:
    """A hook that cuts the input of a language model's head to some positions.

    It stays on the head and does nothing outside of ``with cut.at(...)``: a hook added and removed in every forward would
    make ``torch.compile`` compile again each time.
    """

    def __init__(self) -> None:
        self.places: torch.Tensor | None = None
        self.tokens: torch.Size | None = None
        self._head: nn.Module | None = None
        self._handle: Any = None

    @contextmanager
    def at(self, head: nn.Module | None, places: torch.Tensor | None, embeds: torch.Tensor) -> Iterator[None]:
        """Give ``head`` only the hidden states at ``places`` [positions] of ``embeds`` [batch, seq, width].

        Without places, or with an adapter on the head, which needs every position for its routing, it gets them all.
        """
        if places is not None and head is not None and not isinstance(head, BaseTunerLayer):
            self._stay_on(head)
            self.places, self.tokens = places, embeds.shape[:2]
        try:
            yield
        finally:
            self.places = self.tokens = None

    def _stay_on(self, head: nn.Module) -> None:
        if head is not self._head:
            if self._handle is not None:
                self._handle.remove()
            self._head, self._handle = head, head.register_forward_pre_hook(self)

    def __call__(self, head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.places is None or not arguments or arguments[0].shape[:-1] != self.tokens:
            return None
        return _pick(arguments[0], self.places), *arguments[1:]


def logits_at(logits: torch.Tensor, places: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Return logits [1, positions, vocabulary] of a forward inside ``HeadCut.at``, whether or not its head was cut.

    The last position of a row predicts nothing, so there are never as many places as positions.
    """
    return _pick(logits, places) if logits.shape[:2] == embeds.shape[:2] else logits


def _pick(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Select positions: [batch, seq, n] -> [1, positions, n]."""
    return values.flatten(0, 1).index_select(0, places)[None]
