"""moka: efficient fine-tuning of multimodal LLMs with MokA (https://arxiv.org/abs/2506.05191)."""

from importlib import import_module

from . import adapter, modeling  # register PeftType.MOKA, and the model type "moka" with transformers' Auto classes
from .adapter import MokaConfig, routing, turn_markers
from .errors import MokaError
from .modeling import MokaForConditionalGeneration, MokaProcessor

__version__ = "0.1.0"

# Loaded on first use: the adapter and the model must not cost the import of data and training.
_LAZY = {
    "load": "moka.inference",
    "load_base": "moka.inference",
}

__all__ = [
    "MokaConfig",
    "MokaError",
    "MokaForConditionalGeneration",
    "MokaProcessor",
    "adapter",
    "modeling",
    "routing",
    "turn_markers",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ImportError as error:
            needed = "transformers 5.20 and peft 0.21 or newer (moka-peft[train]); moka.adapter works with older ones"
            raise ImportError(f"moka.{name} needs {needed}: {error}") from error
    raise AttributeError(f"module 'moka' has no attribute {name!r}")
