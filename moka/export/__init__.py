"""Export: merged models, plain LoRA folders, the authors' checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import ExportReport, export

# Loaded on first use, so that a part of this package does not cost the import of all.
_LAZY = {"ExportReport": "moka.export.run", "export": "moka.export.run"}

__all__ = ["ExportReport", "export"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moka.export' has no attribute {name!r}")
