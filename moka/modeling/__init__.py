"""The composed multimodal LLM: encoders, projectors, model and processor."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import MokaModelConfig
    from .encoders import ENCODERS, build_encoder
    from .model import MokaForConditionalGeneration, fingerprint
    from .processing import MokaProcessor, TooLongError
    from .projectors import PROJECTORS, build_projector

# Imported on first use: the types of media need no torch.
_LAZY = {
    "MokaModelConfig": ".configuration",
    "ENCODERS": ".encoders",
    "build_encoder": ".encoders",
    "MokaForConditionalGeneration": ".model",
    "fingerprint": ".model",
    "MokaProcessor": ".processing",
    "TooLongError": ".processing",
    "PROJECTORS": ".projectors",
    "build_projector": ".projectors",
}

__all__ = [
    "ENCODERS",
    "PROJECTORS",
    "MokaForConditionalGeneration",
    "MokaModelConfig",
    "MokaProcessor",
    "TooLongError",
    "build_encoder",
    "build_projector",
    "fingerprint",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
