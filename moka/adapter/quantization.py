"""peft's quantisation backends, as far as the installed peft has them (0.20 and newer)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

try:
    from peft.utils import get_quantization_kwargs, quantization_extra_repr, resolve_quantization_backend
except ImportError:  # peft 0.19

    class _ForwardOnly:
        """Quantised layers under peft 0.19: forward and backward, no merging."""

        layer_type, supports_merge = "linear", False

        def __init__(self, base: nn.Module) -> None:
            self.backend_name = type(base).__name__

        def maybe_clone_base_result(self, result: torch.Tensor) -> torch.Tensor:
            # bitsandbytes' 4-bit backward fails on a view that was written to.
            return result.clone()

        def get_base_weight(self, base: nn.Module) -> torch.Tensor:
            from peft.utils.integrations import dequantize_module_weight

            return dequantize_module_weight(base)

    def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:  # type: ignore[misc]
        """Return a backend for the linear layers of bitsandbytes, else None."""
        quantized = type(base_layer).__module__.startswith("bitsandbytes.") and isinstance(base_layer, nn.Linear)
        return _ForwardOnly(base_layer) if quantized else None

    def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
        """Return nothing: peft 0.19 has no settings of a backend."""
        return {}

    def quantization_extra_repr(module: nn.Module) -> str:
        """Return nothing."""
        return ""


__all__ = ["get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend"]
