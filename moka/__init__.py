"""moka: efficient fine-tuning of multimodal LLMs with MokA (https://arxiv.org/abs/2506.05191)."""

import sys
from importlib import import_module
from pathlib import Path

from .errors import MokaError

__version__ = "0.1.0"

# Imported on first use.
_LAZY = {
    "MokaConfig": "moka.adapter",
    "routing": "moka.adapter",
    "turn_markers": "moka.adapter",
    "MokaForConditionalGeneration": "moka.modeling",
    "MokaProcessor": "moka.modeling",
    "MultimodalCollator": "moka.data.encoding",
    "diagnose": "moka.diagnosis.diagnose",
    "load": "moka.inference",
    "load_base": "moka.inference",
}

__all__ = [
    "MokaConfig",
    "MokaError",
    "MokaForConditionalGeneration",
    "MokaProcessor",
    "MultimodalCollator",
    "adapter",
    "diagnose",
    "load",
    "load_base",
    "modeling",
    "routing",
    "turn_markers",
]


def __getattr__(name: str):
    if name in ("adapter", "modeling"):
        return import_module(f"moka.{name}")
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ImportError as error:
            needed = "transformers 5.20 and peft 0.21 or newer (moka-peft[train]); moka.adapter works with older ones"
            raise ImportError(f"moka.{name} needs {needed}: {error}") from error
    raise AttributeError(f"module 'moka' has no attribute {name!r}")


def _is_command_line() -> bool:
    """Return whether this process is ``moka ...`` or ``python -m moka ...``."""
    return Path(sys.argv[0]).name in ("moka", "moka.exe") or sys.orig_argv[1:3] == ["-m", "moka"]


if not _is_command_line():  # `moka --help` does not wait for torch; a command imports what it needs
    # Register PeftType.MOKA with peft, and the model type "moka" with transformers' Auto classes.
    from . import adapter, modeling
    from .adapter import MokaConfig, routing, turn_markers
    from .modeling import MokaForConditionalGeneration, MokaProcessor
