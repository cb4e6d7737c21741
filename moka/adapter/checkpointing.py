"""Gradient checkpointing: a recomputation runs under the routing of its own forward, whenever it happens.

What the checkpoint captures is safe under any order of forwards and backwards, reentrant or not; module state and
hooks are not (peft#2826, #2860): they are gone, or those of another forward, when backward recomputes a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .routing import Routing

if TYPE_CHECKING:
    from .router import MokaRouter

# Of transformers' blocks, and of torch's ``checkpoint_wrapper`` around a block, as accelerate's FSDP uses it.
_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


class RoutedCheckpoint:
    """Stands in for a block's checkpointing function and hands it a function that knows its routing."""

    def __init__(self, checkpoint: Callable, router: MokaRouter) -> None:
        self.checkpoint, self.router = checkpoint, router

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_UnderRouting(function, self.router, self.router.routing), *args, **kwargs)


class _UnderRouting:
    def __init__(self, function: Callable, router: MokaRouter, routing: Routing | None) -> None:
        self.function, self.router, self.routing = function, router, routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.router.active(self.routing):
            return self.function(*args, **kwargs)


def route_checkpoints(model: nn.Module, router: MokaRouter) -> None:
    """Wrap the checkpointing function of every block that has one and is not wrapped yet.

    Called before each training forward, as ``gradient_checkpointing_enable()`` sets new functions at any time.
    """
    for module in model.modules():
        for name in _FUNCTIONS:
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, RoutedCheckpoint):
                setattr(module, name, RoutedCheckpoint(function, router))


def unroute_checkpoints(model: nn.Module) -> None:
    """Take the wrappers off again."""
    for module in model.modules():
        for name in _FUNCTIONS:
            function = module.__dict__.get(name)
            if isinstance(function, RoutedCheckpoint):
                setattr(module, name, function.checkpoint)
