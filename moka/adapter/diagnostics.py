"""A look inside the adapter: partial-modality inference, the maps of the interaction, and norms by modality.

All run as context managers or single forwards of their own; no hook and no state stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError, nearest

from .config import MokaConfig
from .interaction import attention_shares, interact
from .layer import MokaLayer
from .router import MokaRouter
from .routing import View


@contextmanager
def active_modalities(model: nn.Module, modalities: Collection[str]) -> Iterator[None]:
    """Partial-modality inference (arXiv 2506.05191, figure 1): only these modalities' tokens go through the adapter.

    The tokens of the others are computed by the backbone alone, and take no part in the interaction. An empty list is
    the backbone.

    Args:
        model: an adapted model, merged or not, or any module that holds one.
        modalities: names from ``MokaConfig.modalities``.
    Raises:
        MokaError: no adapter in ``model``; a name that no adapter knows.
    """
    routers = _routers(model)
    names = [modalities] if isinstance(modalities, str) else list(modalities)
    known = list(dict.fromkeys(name for router in routers for c in router.configs.values() for name in c.modalities))
    for name in names:
        if name not in known:
            raise MokaError(f"active_modalities: unknown modality {name!r}; known: {known}.{nearest(name, known)}")
    before = [router.only for router in routers]
    try:
        for router in routers:
            router.only = frozenset(names)
            router.changed()
        yield
    finally:
        for router, only in zip(routers, before, strict=True):
            router.only = only
            router.changed()


@dataclass(frozen=True)
class InteractionMap:
    """What the non-text tokens of a batch read from the question in one layer (with ``reversed``, the text tokens)."""

    weights: torch.Tensor  # [batch, queries, keys] softmax over the keys, float32; 0 where there is no pair
    query_index: torch.Tensor  # [batch, queries] positions in the row
    key_index: torch.Tensor  # [batch, keys]
    query_mask: torch.Tensor  # [batch, queries] bool: a query that has a key (rows are padded to the longest)
    key_mask: torch.Tensor  # [batch, keys] bool


def interaction_weights(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, InteractionMap]:
    """The softmax maps of the interaction in every adapted layer, by layer name.

    Args:
        model: an adapted model with one active adapter.
        batch: what its ``forward`` takes, with the routing arguments; runs without gradients, in eval mode.
    Raises:
        MokaError: no adapter, or several; no token of the batch interacts.
    """
    found: dict[str, InteractionMap] = {}

    def record(layer: str, config: MokaConfig, scaling: float, z_all: torch.Tensor, view: View) -> None:
        if view.pairs is not None:
            pairs = view.pairs
            shares = attention_shares(_own(z_all, view, config), pairs, config.interaction)
            found[layer] = InteractionMap(
                shares.float(), pairs.query_index, pairs.key_index, pairs.mask.any(2), pairs.mask.any(1)
            )

    _forward(model, batch, record)
    if not found:
        raise MokaError(
            "interaction_weights: no token of this batch interacts. It needs media tokens and a question "
            "(mm_token_type_ids with interaction_ids or question_mask), and a config whose interaction is not 'none'."
        )
    return found


@dataclass(frozen=True)
class ModalityNorms:
    """Mean norms over one modality's tokens in one layer."""

    tokens: int  # of this modality in the batch, padding left out
    z: float  # mean L2 norm of A_m x
    interaction: float  # mean L2 norm of lambda * sum_j softmax_j z_j
    update: float  # mean L2 norm of s B z~


def modality_norms(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, dict[str, ModalityNorms]]:
    """Norms of z, of the interaction term and of the update, by layer name and modality.

    Args: as ``interaction_weights``. Modalities without tokens in the batch are left out.
    """
    found: dict[str, dict[str, ModalityNorms]] = {}
    layers = dict(_layers(model))

    def record(layer: str, config: MokaConfig, scaling: float, z_all: torch.Tensor, view: View) -> None:
        z = _own(z_all, view, config)
        mixed = z if view.pairs is None else interact(z, view.pairs, config.interaction)
        rows = view.row if view.row is not None else torch.full(z.shape[:2], config.text_row, device=z.device)
        real = torch.full(z.shape[:2], not view.silent, device=z.device)
        real = real if view.adapted is None else real & view.adapted[..., 0]
        module = layers[layer]
        B = module.moka_B[module.active_adapters[0]].float()
        after = scaling if config.scale_position == "output" else 1.0
        found[layer] = {}
        for row, name in enumerate(config.modalities):
            here = real & (rows == row)  # [batch, seq]
            if not here.any():
                continue
            own_z, own_mixed = z[here].float(), mixed[here].float()  # [tokens, r]
            update = own_mixed @ (B if config.share_b else B[row]).T * after
            means = [t.norm(dim=-1).mean().item() for t in (own_z, own_mixed - own_z, update)]
            found[layer][name] = ModalityNorms(int(here.sum()), *means)

    _forward(model, batch, record)
    return found


def gradient_norms(model: nn.Module, adapter: str | None = None) -> dict[str, dict[str, float]]:
    """L2 norms of the gradients that the last backward left: of each modality's A, and of B, by layer name.

    With ``share_b=False`` each modality's B is named ``B.<modality>``. Read them before ``optimizer.zero_grad()``.

    Raises:
        MokaError: no layer has a gradient.
    """
    found: dict[str, dict[str, float]] = {}
    for name, layer in _layers(model):
        key = adapter or next(iter(layer.active_adapters), "")
        if key not in layer.moka_A or layer.moka_A[key].grad is None:
            continue
        config = layer.moka_config[key]
        norms = layer.moka_A[key].grad.float().flatten(1).norm(dim=1)  # [M]
        found[name] = {f"A.{m}": norm.item() for m, norm in zip(config.modalities, norms, strict=True)}
        grad = layer.moka_B[key].grad
        if grad is not None and config.share_b:
            found[name]["B"] = grad.float().norm().item()
        elif grad is not None:
            norms = grad.float().flatten(1).norm(dim=1)
            found[name] |= {f"B.{m}": norm.item() for m, norm in zip(config.modalities, norms, strict=True)}
    if not found:
        raise MokaError("gradient_norms: no MokA layer has a gradient; call it after backward, before zero_grad().")
    return found


Record = Callable[[str, MokaConfig, float, torch.Tensor, View], None]


def _forward(model: nn.Module, batch: Mapping[str, Any], record: Record) -> None:
    """One forward in eval mode, without gradients, that shows ``record`` each layer's z of all modalities."""
    layers = {id(layer): name for name, layer in _layers(model)}
    routers = _routers(model)
    used = {name for router in routers for name in router.used()[0]}
    if len(used) != 1:
        raise MokaError(f"The diagnostics look at one adapter; active here: {sorted(used) or 'none'}. Use set_adapter.")

    def recorder(layer: MokaLayer, name: str, z_all: torch.Tensor, view: View) -> None:
        record(layers[id(layer)], layer.moka_config[name], layer.moka_scaling[name], z_all, view)

    training = {module: module.training for module in model.modules()}
    try:
        for router in routers:
            router.recorder = recorder
        model.eval()
        with torch.no_grad():
            model(**batch)
    finally:
        for router in routers:
            router.recorder = None
        for module, mode in training.items():
            module.training = mode


def _own(z_all: torch.Tensor, view: View, config: MokaConfig) -> torch.Tensor:
    """Each token's z under its own modality's A: [batch, seq, M, r] -> [batch, seq, r]."""
    if view.row is None:
        return z_all[:, :, config.text_row]
    return z_all.gather(2, view.row[..., None, None].expand(-1, -1, 1, z_all.shape[-1])).squeeze(2)


def _layers(model: nn.Module) -> list[tuple[str, MokaLayer]]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MokaLayer)]
    if not layers:
        raise MokaError(f"{type(model).__name__} holds no MokA adapter; attach one with get_peft_model.")
    return layers


def _routers(model: nn.Module) -> list[MokaRouter]:
    return list({id(layer.moka_router): layer.moka_router for _, layer in _layers(model)}.values())
