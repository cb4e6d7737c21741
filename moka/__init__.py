"""moka: efficient fine-tuning of multimodal LLMs with MokA (https://arxiv.org/abs/2506.05191)."""

from importlib import import_module

from . import adapter  # registers PeftType.MOKA
from .adapter import MokaConfig, routing
from .errors import MokaError

__version__ = "0.1.0"

# Loaded on first use: the adapter alone must not cost the import of the rest.
_LAZY = {
    "MokaForConditionalGeneration": "moka.modeling",
    "MokaProcessor": "moka.modeling",
    "load": "moka.inference",
    "load_base": "moka.inference",
}

__all__ = ["MokaConfig", "MokaError", "adapter", "routing", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moka' has no attribute {name!r}")
