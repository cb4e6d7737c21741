"""The current routing, kept per thread: two threads, or a forward inside another, never see each other's.

A ``threading.local`` and not a ``ContextVar``, which ``torch.compile`` cannot trace: each read of one would break the
graph of the layer that reads it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .input_groups import SharedInput

if TYPE_CHECKING:
    from .inputs import GivenIds
    from .routing import Routing
    from .wrapping import RoutedModel


@dataclass(frozen=True, eq=False)
class Call:
    """One running forward of a model with adapters."""

    model: RoutedModel
    hook: Any  # the hook that began it
    routing: Routing | None  # None: nothing is known of its tokens; a module inside may know more
    parent: Call | None  # the forward that it runs in
    tokens: torch.Tensor | None = None  # its input_ids
    shared: SharedInput = field(default_factory=SharedInput)  # z of the projections that read the same input


@dataclass(eq=False)
class Block:
    """Ids and settings that hold for every forward of a model inside a ``with`` block or inside ``generate``."""

    model: RoutedModel
    parent: Block | None
    ids: GivenIds | None = None
    only: frozenset[str] | None = None  # modalities whose tokens go through the adapter; None: all that it adapts
    routing: Routing | None = None  # built when the block began, if its ids are complete
    mask: torch.Tensor | None = None  # the attention mask that it was built with
    outside: dict = field(default_factory=dict)  # routings of layers that run outside of any forward
    text_steps: dict = field(default_factory=dict)  # per layer: its text path, while generate decodes
    caches: list = field(default_factory=list)  # those that the prompt of this generate was put into
    decoding: Any = None  # a cache that contains the complete prompt of this generate


class _Current(threading.local):
    """What runs in this thread. Set in ``__init__``: torch.compile of torch 2.11 would read a class's default instead."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.block: Block | None = None
        # Ids that were embedded outside of any forward, until the next one; by a weak reference, as that may never come.
        self.embedded: tuple[weakref.ref[RoutedModel], torch.Tensor] | None = None


current = _Current()


def running_call(model: RoutedModel) -> Call | None:
    """Return the innermost running forward of ``model`` in this thread."""
    call = current.call
    while call is not None and call.model is not model:
        call = call.parent
    return call


def ids_block(model: RoutedModel) -> Block | None:
    """Return the innermost block of ``model`` that gives ids."""
    block = current.block
    while block is not None and (block.model is not model or block.ids is None):
        block = block.parent
    return block


def active_only(model: RoutedModel) -> frozenset[str] | None:
    """Return the modalities of the innermost ``active_modalities`` block; None: there is none."""
    block = current.block
    while block is not None and (block.model is not model or block.only is None):
        block = block.parent
    return None if block is None else block.only


@contextmanager
def entered(block: Block) -> Iterator[Block]:
    """Make ``block`` the innermost one."""
    before, current.block = current.block, block
    try:
        yield block
    finally:
        current.block = before


@contextmanager
def resumed(call: Call | None) -> Iterator[None]:
    """Run under the routing of ``call`` again, as a recomputation in backward does."""
    before = current.call
    current.call = call if call is None else replace(call, parent=before, shared=SharedInput())
    try:
        yield
    finally:
        current.call = before
