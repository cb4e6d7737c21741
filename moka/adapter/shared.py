"""From a layer's input to z~, together for the projections that read the same tensor (q, k, v; gate, up).

The first of them to be called computes z~ for all: the input is read once, drops out once, and is kept for backward once.
The others find theirs by the identity of their input; a layer that is given another tensor computes its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .kernels import compute_dtype, down, has_hooks, is_partitioned
from .routing import View
from .selection import attend, select

if TYPE_CHECKING:
    from .layer import MokaLinear

# Names, under one parent, of linear layers that transformers' models call with one and the same tensor.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


# What the base layer is to read, and z~ [tokens, r].
Computed = tuple[torch.Tensor, torch.Tensor]


class SharedInputs:
    """z~ that is computed and not fetched yet; of one input at a time. Held by the router of a model."""

    def __init__(self) -> None:
        self._siblings: dict[int, tuple[MokaLinear, ...]] | None = None  # by the id of each layer
        self._partners: dict[tuple[int, str, bool], list[MokaLinear]] = {}  # by that, adapter, and whether in training
        self.clear()

    def clear(self) -> None:
        """Let go of the input and what was computed of it."""
        self._input: torch.Tensor | None = None
        self._state: tuple = ()
        self._waiting: dict[tuple[int, str], Computed] = {}

    def changed(self) -> None:
        """Forget which layers there are."""
        self._siblings = None
        self._partners.clear()
        self.clear()

    def fetch(self, layer: MokaLinear, name: str, x: torch.Tensor) -> Computed | None:
        """What a partner of this layer computed of the same input in the same state."""
        if self._input is not x or self._state != _state(layer, x):
            return None
        computed = self._waiting.pop((id(layer), name), None)
        if not self._waiting:
            self.clear()
        return computed

    def leave(self, layers: list[MokaLinear], name: str, x: torch.Tensor, values: list[Computed]) -> None:
        """Keep what was computed for these layers until they fetch it."""
        state = _state(layers[0], x)
        if self._input is not x or self._state != state:
            self.clear()
            self._input, self._state = x, state
        self._waiting |= {(id(layer), name): computed for layer, computed in zip(layers, values, strict=True)}

    def partners(self, layer: MokaLinear, name: str) -> list[MokaLinear]:
        """The layers to compute for when ``layer`` is called, itself first. Settled once, until an adapter changes: a
        recomputation under gradient checkpointing must come to the same."""
        router = layer.moka_router
        if not router.running:
            return [layer]
        key = (id(layer), name, layer.training)
        found = self._partners.get(key)
        if found is None:
            if self._siblings is None:
                self._siblings = _find_siblings(router.root, type(layer))
            own = _traits(layer, name)
            others = self._siblings.get(id(layer), ()) if own is not None else ()
            found = [layer] + [other for other in others if other is not layer and _traits(other, name) == own]
            self._partners[key] = found
        return found


def _find_siblings(root: nn.Module, kind: type) -> dict[int, tuple[MokaLinear, ...]]:
    found = {}
    for parent in root.modules():
        children = parent._modules
        for names in SAME_INPUT:
            layers = tuple(children[n] for n in names if type(children.get(n)) is kind)
            if len(layers) > 1:
                found |= {id(layer): layers for layer in layers}
    return found


def _traits(layer: MokaLinear, name: str) -> tuple | None:
    """What layers must have in common to be computed together; None: this one stands alone."""
    if name not in layer.moka_A:
        return None
    A = layer.moka_A[name]
    if layer.merged or layer._disable_adapters or name not in layer.active_adapters:
        return None
    # A layer that is watched may be an FSDP unit of its own, whole in its own calls alone.
    if is_partitioned(A) or has_hooks(layer):
        return None
    return A.shape, A.dtype, A.device, layer.moka_scaling[name], layer.dropout_rate(name)


def _state(layer: MokaLinear, x: torch.Tensor) -> tuple:
    """What else than the input itself must be as it was."""
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), id(layer.moka_router.routing)


def rank_space(layer: MokaLinear, name: str, x: torch.Tensor, view: View) -> Computed:
    """What the base layer is to read in the place of x [..., in], and z~ [tokens, r] in the dtype of this layer's products."""
    shared = layer.moka_router.shared
    computed = shared.fetch(layer, name, x)
    if computed is not None:
        return computed
    layers = shared.partners(layer, name)
    values = _compute(layers, name, x, view)
    if len(layers) > 1:
        shared.leave(layers[1:], name, x, values[1:])
    return values[0]


def _compute(layers: list[MokaLinear], name: str, x: torch.Tensor, view: View) -> list[Computed]:
    layer = layers[0]
    config = layer.moka_config[name]
    given = x.to(compute_dtype(x))
    selection = select(view, config, given)
    if selection.index is None:
        A = [own.moka_A[name][config.text_row, None] for own in layers]  # [1, r, in] each
    else:
        A = [own.moka_A[name] for own in layers]  # [M, r, in] each
    stacked = (A[0] if len(A) == 1 else torch.cat(A, dim=1)).to(given.dtype)
    factor = layer.moka_scaling[name] if config.scale_position == "input" else 1.0
    forks = given is x and x.requires_grad and torch.is_grad_enabled()
    owns_gradient = forks and all(own.makes_its_result() for own in layers)
    again, z = down(given, stacked, selection.index, selection.keep, factor, layer.dropout_rate(name), owns_gradient)
    if selection.attention is not None:
        z = attend(z, selection.attention, len(layers))
    own = z.view(len(z), len(layers), layer.moka_r[name]).unbind(1) if len(layers) > 1 else [z]
    return [(again if forks else x, part) for part in own]
