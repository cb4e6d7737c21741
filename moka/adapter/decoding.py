"""What a layer's forward comes to while text is decoded: a step has hundreds of such calls, each for a token or a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .kernels import compute_dtype, has_hooks, is_partitioned
from .routing import View

if TYPE_CHECKING:
    from .layer import MokaLinear


def text_step(layer: MokaLinear, views: Mapping[str, View]) -> Callable[..., torch.Tensor] | None:
    """A function to call in the place of ``layer.forward`` for text tokens without gradients; None: nothing simpler.

    It holds until an adapter is changed, added or switched. ``views``: those of text, by adapter.
    """
    replaced = "forward" in vars(layer)  # by accelerate, which moves weights between devices
    if replaced or layer._disable_adapters or has_hooks(layer.base_layer):
        return None
    factors = {name: layer.text_factor(name, views[name]) for name in layer.adapters_in_use()}
    factors = {name: factor for name, factor in factors.items() if factor}
    base = layer.base_layer.forward
    if not factors:
        return base
    partitioned = any(is_partitioned(layer.moka_A[name]) for name in factors)
    if partitioned or layer.quantization_backend is not None or any(map(layer.dropout_rate, factors)):
        return None
    return _TextStep(layer, base, factors)


class _TextStep:
    """The base layer, and the text path of all adapters in use as one pair of matrices."""

    def __init__(self, layer: MokaLinear, base: Callable, factors: dict[str, float]) -> None:
        self.base = base
        A, B = [], []
        for name, factor in factors.items():
            row = layer.moka_config[name].text_row
            A.append(layer.moka_A[name][row].detach() * factor)  # [r, in]
            own = layer.moka_B[name].detach()
            B.append(own if own.dim() == 2 else own[row])  # [out, r]
        self.A, self.B = torch.cat(A), torch.cat(B, dim=1).t().contiguous()  # [r, in], [r, out]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base(x, *args, **kwargs)
        dtype = compute_dtype(x)
        if self.A.dtype != dtype:
            self.A, self.B = self.A.to(dtype), self.B.to(dtype)
        z = F.linear(x, self.A).view(-1, len(self.A))
        if y.dtype != dtype or not y.is_contiguous():
            return y + (z @ self.B).view(y.shape).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(z, self.B)
        return y
