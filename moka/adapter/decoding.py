"""The text path of a layer while ``generate`` decodes: a step has hundreds of such calls, each for a token or a few."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .ops import compute_dtype
from .routing import uniform_view

if TYPE_CHECKING:
    from .layer import MokaLinear
    from .routing import Routing


def text_update(layer: MokaLinear, result: torch.Tensor, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return ``result`` [..., out] of the base layer plus the text path of all adapters in use, kept from step to step."""
    assert routing.text_steps is not None
    kept = routing.text_steps.get(layer)
    # An adapter may be switched or merged between two steps; peft sets a new list when it switches.
    if kept is None or kept[0] is not layer._active_adapter or kept[1] != len(layer.merged_adapters):
        factors = _factors(layer, x, routing)
        kept = routing.text_steps[layer] = layer._active_adapter, len(layer.merged_adapters), factors
    if not kept[2]:
        return result
    A, B = kept[2]  # [in, r], [r, out]
    z = x.reshape(-1, x.shape[-1]).to(A.dtype) @ A
    if result.dtype == A.dtype:
        return torch.addmm(result.view(-1, result.shape[-1]), z, B).view(result.shape)
    return result + (z @ B).view(result.shape).to(result.dtype)


def _factors(layer: MokaLinear, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, ...]:
    """Return A^T [in, r] and B^T [r, out] of all adapters in use side by side; nothing if none has anything to add."""
    A, B = [], []
    for name in layer.adapters_in_use():
        disabled = uniform_view(layer.moka_config[name], only=routing.only).disabled
        # s, 0, or -s: what a text token gets beyond what the base weight contains.
        factor = ((not disabled) - layer.is_merged(name)) * layer.moka_scaling[name]
        if factor:
            down, up = layer.text_path(name)  # [r, in], [out, r]
            A.append(down.detach() * factor)
            B.append(up.detach())
    if not A:
        return ()
    dtype = compute_dtype(x)
    return torch.cat(A).t().contiguous().to(dtype), torch.cat(B, dim=1).t().contiguous().to(dtype)
