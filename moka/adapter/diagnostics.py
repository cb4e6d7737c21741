"""A look inside the adapter: partial-modality inference, the maps of the interaction, and norms by modality.

All run as context managers or single forwards of their own; no hook and no state remains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError, nearest

from .config import MokaConfig
from .context import Block, current, entered, running_call
from .layer import MokaLinear
from .ops import interact, mean_weights
from .routing import Attention, View
from .wrapping import routed_models


@contextmanager
def active_modalities(model: nn.Module, modalities: Collection[str]) -> Iterator[None]:
    """Partial-modality inference (arXiv 2506.05191, figure 1): only these modalities' tokens go through the adapter.

    The tokens of the others are computed only by the backbone, and take no part in the interaction. An empty list is
    the backbone.

    Args:
        model: an adapted model, merged or not, or any module that contains one.
        modalities: names from ``MokaConfig.modalities``.
    Raises:
        MokaError: no adapter in ``model``; a name that no adapter knows.
    """
    routed = routed_models(model, "active_modalities")
    names = [modalities] if isinstance(modalities, str) else list(modalities)
    configs = [config for one in routed for layer in one.layers for config in layer.moka_config.values()]
    known = list(dict.fromkeys(name for config in configs for name in config.modalities))
    for name in names:
        if name not in known:
            raise MokaError(f"active_modalities: unknown modality {name!r}; known: {known}.{nearest(name, known)}")
    with ExitStack() as blocks:
        for one in routed:
            blocks.enter_context(entered(Block(one, current.block, only=frozenset(names))))
        yield


@dataclass(frozen=True)
class InteractionMap:
    """Attention of the non-text tokens of a batch: what they read from the question in one layer (with ``reversed``, the text tokens)."""

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
        if view.attention is not None:
            own = view.attention
            weights = _attention_weights(_own(z_all, view, config), own, config)
            mask = own.mask if own.mask is not None else torch.ones_like(weights, dtype=torch.bool)
            found[layer] = InteractionMap(weights, own.query, own.key, mask.any(2), mask.any(1))

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
        mixed = z
        if view.attention is not None:
            mixed = interact(z.flatten(0, 1), view.attention, 1, config.interaction == "mean").view(z.shape)
        rows = view.rows if view.rows is not None else torch.full(z.shape[:2], view.row, device=z.device)
        adapted = torch.full(z.shape[:2], not view.disabled, device=z.device)
        if view.adapter_mask is not None:
            adapted &= view.adapter_mask.view(z.shape[:2])
        if (mask := batch.get("attention_mask")) is not None and mask.shape == rows.shape:
            adapted &= mask.to(z.device).bool()
        module = layers[layer]
        B: torch.Tensor = module.moka_B[module.active_adapters[0]].weight.float()
        after = scaling if config.scale_position == "output" else 1.0
        found[layer] = {}
        for row, name in enumerate(config.modalities):
            here = adapted & (rows == row)  # [batch, seq]
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
        if key not in layer.moka_A or layer.moka_A[key].weight.grad is None:
            continue
        config = layer.moka_config[key]
        config.require_moka("gradient_norms")
        norms = layer.moka_A[key].weight.grad.float().flatten(1).norm(dim=1)  # [M]
        found[name] = {f"A.{m}": norm.item() for m, norm in zip(config.modalities, norms, strict=True)}
        grad = layer.moka_B[key].weight.grad
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
    """Run one forward in eval mode, without gradients, that hands ``record`` each layer's z of all modalities."""
    used = {name for _, layer in _layers(model) if not layer.disable_adapters for name in layer.adapters_in_use()}
    if len(used) != 1:
        raise MokaError(f"The diagnostics look at one adapter; active here: {sorted(used) or 'none'}. Use set_adapter.")
    (adapter,) = used
    for _, layer in _layers(model):
        if adapter in layer.moka_config:
            layer.moka_config[adapter].require_moka("The diagnostics")
    training = {module: module.training for module in model.modules()}
    with ExitStack() as hooks:
        for name, layer in _layers(model):
            if adapter in layer.moka_A and not layer.moka_tower:
                handle = layer.register_forward_pre_hook(partial(_record, name, adapter, record))
                hooks.callback(handle.remove)
        for module, mode in training.items():
            hooks.callback(setattr, module, "training", mode)
        model.eval()
        with torch.no_grad():
            model(**batch)


def _record(name: str, adapter: str, record: Record, layer: MokaLinear, args: tuple) -> None:
    call = running_call(layer.moka_model)
    if call is None or call.routing is None:
        return
    x, config = args[0], layer.moka_config[adapter]
    view = layer.view(adapter, x, call.routing)
    shape = x.shape[:2] if x.dim() == 3 else call.routing.shape
    A = layer.moka_A[adapter]()  # [M, r, in]
    z_all = x.reshape(*shape, -1) @ A.flatten(0, 1).t().to(x.dtype)  # [batch, seq, M * r]
    if config.scale_position == "input":
        z_all = z_all * layer.moka_scaling[adapter]
    record(name, config, layer.moka_scaling[adapter], z_all.unflatten(-1, A.shape[:2]), view)


def _own(z_all: torch.Tensor, view: View, config: MokaConfig) -> torch.Tensor:
    """Return each token's z under its own modality's A: [batch, seq, M, r] -> [batch, seq, r]."""
    if view.rows is None:
        return z_all[:, :, view.row]
    return z_all.gather(2, view.rows[..., None, None].expand(-1, -1, 1, z_all.shape[-1])).squeeze(2)


def _attention_weights(z: torch.Tensor, attention: Attention, config: MokaConfig) -> torch.Tensor:
    """Return what each query takes from each of its keys: [batch, queries, keys] float32, rows that sum to 1 or 0."""
    if config.interaction == "mean":
        return mean_weights(attention)
    width = z.shape[-1]
    q, k = (z.gather(1, index[..., None].expand(-1, -1, width)).float() for index in (attention.query, attention.key))
    logits = q @ k.transpose(1, 2) / width**0.5
    if attention.mask is None:
        return logits.softmax(-1)
    return logits.masked_fill(~attention.mask, torch.finfo(torch.float32).min).softmax(-1) * attention.mask


def _layers(model: nn.Module) -> list[tuple[str, MokaLinear]]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MokaLinear)]
    if not layers:
        raise MokaError(f"{type(model).__name__} has no MokA adapter; attach one with get_peft_model.")
    return layers
