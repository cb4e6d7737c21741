"""The head of a language model on the supervised positions alone, whatever column of its row each lies in.

    hidden [batch, seq, width] -> of the positions that predict a label [1, positions, width] -> head
        -> what the model does behind its head (scaling, soft-capping) -> logits [1, positions, vocabulary]

The model's own forward runs as ever, and what reaches its head is cut before it: so hooks of DeepSpeed and FSDP,
quantised and tied heads, and what a model does with its logits stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moka.host import HostIds, on_device

from .processing import IGNORE


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """What each position predicts: labels [batch, seq] one to the left, -100 at the end of each row."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def supervised_places(labels: torch.Tensor) -> torch.Tensor:
    """Places (row * seq + column) of the positions that predict a label, in order: int64 [positions]."""
    return (shifted(labels) != IGNORE).flatten().nonzero().squeeze(1)


@torch.compiler.disable  # how many there are depends on the data, and is settled outside of any graph
def places_of(labels: torch.Tensor, known: HostIds) -> torch.Tensor:
    """`supervised_places` on the device of ``labels``, found in host memory; ``known`` spares to read them back."""
    held = known.read({"labels": labels})["labels"]
    assert held is not None
    return on_device(supervised_places(held), labels.device)


class HeadCut:
    """Cuts what reaches the head of a language model to some places.

    It stays on the head as a hook and does nothing outside of ``with cut.at(...)``: one that came and went with every
    forward would have ``torch.compile`` begin anew each time.
    """

    def __init__(self) -> None:
        self.places: torch.Tensor | None = None
        self.tokens: torch.Size | None = None
        self._head: nn.Module | None = None
        self._handle: Any = None

    @contextmanager
    def at(self, head: nn.Module | None, places: torch.Tensor | None, embeds: torch.Tensor) -> Iterator[None]:
        """Inside, ``head`` gets the hidden states at ``places`` [positions] of ``embeds`` [batch, seq, width]; without
        places, or with an adapter on the head, which asks for the routing of every position, it gets them all.
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
    """[1, positions, vocabulary] of a forward inside ``HeadCut.at``, whether or not its head was cut.

    The last position of a row predicts nothing, so there are never as many places as positions.
    """
    return _pick(logits, places) if logits.shape[:2] == embeds.shape[:2] else logits


def _pick(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[batch, seq, n] -> [1, positions, n]."""
    return values.flatten(0, 1).index_select(0, places)[None]
