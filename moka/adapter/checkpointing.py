"""Gradient checkpointing: a recomputation runs under the routing of its own forward, at any time and in any thread.

Only what the checkpoint captures is safe under any order of forwards and backwards, reentrant or not. Module state and
hooks are not (peft#2826, #2860): they are gone, or those of another forward, when backward recomputes a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .context import Call, current, resumed

# Of transformers' blocks, and of torch's ``checkpoint_wrapper`` around a block, as accelerate's FSDP uses it.
_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


class RoutedCheckpoint:
    """A block's checkpointing function that hands on a function that knows its routing."""

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the recomputation is part of the graph
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(_UnderRouting(function, current.call), *args, **kwargs)


class _UnderRouting:
    def __init__(self, function: Callable, call: Call | None) -> None:
        self.function, self.call = function, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with resumed(self.call):
            return self.function(*args, **kwargs)


def route_checkpoints(model: nn.Module) -> None:
    """Wrap the checkpointing function of every block that has one and is not wrapped yet.

    Called before each training forward, as ``gradient_checkpointing_enable()`` sets new functions at any time.
    """
    for module in model.modules():
        for name in _FUNCTIONS:
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, RoutedCheckpoint):
                setattr(module, name, RoutedCheckpoint(function))


def unroute_checkpoints(model: nn.Module) -> None:
    """Remove the wrappers."""
    for module in model.modules():
        for name in _FUNCTIONS:
            function = module.__dict__.get(name)
            if isinstance(function, RoutedCheckpoint):
                setattr(module, name, function.checkpoint)
