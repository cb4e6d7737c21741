"""Projections that read one and the same tensor (q, k, v; gate, up) and are computed together in the low-rank space.

The first of a group to be called computes z~ for all: the input is read once, drops out once, and is kept for backward once.
The others take theirs if their input is the same tensor in the same state; otherwise they compute their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .layer import MokaLinear
    from .routing import View

# Names, under one parent, of linear layers that transformers' models call with the same tensor.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


class SharedInput:
    """A cache of one slot: z~ [tokens, r] of the layers of one group that were not called yet. Part of a running call."""

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None
        self._view: View | None = None
        self._state: tuple = ()
        self._waiting: dict[tuple[MokaLinear, str], torch.Tensor] = {}

    def pop(self, layer: MokaLinear, name: str, x: torch.Tensor, view: View) -> torch.Tensor | None:
        """Return z~ of ``layer`` if a layer of its group computed it from ``x`` in its present state."""
        if self._input is not x or self._view is not view or self._state != _state(x):
            return None
        z = self._waiting.pop((layer, name), None)
        if not self._waiting:
            self._input = self._view = None
        return z

    def put(self, layers: list[MokaLinear], name: str, x: torch.Tensor, view: View, z: list[torch.Tensor]) -> None:
        """Keep z~ of ``layers`` until they are called."""
        state = _state(x)
        if self._input is not x or self._view is not view or self._state != state:
            self._input, self._view, self._state, self._waiting = x, view, state, {}
        self._waiting |= {(layer, name): own for layer, own in zip(layers, z, strict=True)}


def _state(x: torch.Tensor) -> tuple:
    """Return what must not have changed, in addition to the tensor itself."""
    version = None if x.is_inference() else x._version  # counts what is written to it
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def set_groups(model: nn.Module, kind: type) -> None:
    """Tell each layer of ``model`` which others read its input. Called when an adapter was injected."""
    for parent in model.modules():
        children = parent._modules
        for names in SAME_INPUT:
            layers = [children[n] for n in names if type(children.get(n)) is kind]
            if len(layers) > 1:
                for layer in layers:
                    object.__setattr__(layer, "moka_group", tuple(layers))


def partners(layer: MokaLinear, name: str) -> list[MokaLinear]:
    """Return the layers to compute for when ``layer`` is called: itself, and those of its group with the same settings.

    A layer that has hooks or has only a part of its weights (an FSDP unit of its own) has them complete only in its own call.
    """
    own = _group_key(layer, name) if layer.moka_group else None
    if own is None:
        return [layer]
    return [layer, *(o for o in layer.moka_group if o is not layer and _group_key(o, name) == own)]


def _group_key(layer: MokaLinear, name: str) -> tuple | None:
    if name not in layer.moka_config or layer._forward_pre_hooks or layer._forward_hooks:
        return None
    A = layer.moka_A[name].local()
    if is_sharded(A):
        return None
    state = layer._disable_adapters, layer.active_adapter, layer.merged_adapters
    return *state, A.shape, A.dtype, A.device, layer.moka_scaling[name], layer.dropout_rate(name)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 or FSDP keeps only a part of it here."""
    return hasattr(parameter, "ds_status") or hasattr(parameter, "full_tensor")
