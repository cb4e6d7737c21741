"""Samples: their schema, readers, media decoding and collation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import SampleDataset
    from .encoding import Collator, EncodedDataset
    from .formats import FORMATS, open_format
    from .jsonl import JsonlDataset
    from .media import BadMediaPolicy, DecodedDataset, MediaDecoding
    from .media_io import load_audio, load_image, load_video
    from .schema import check_sample
    from .sources import attribution, open_samples, open_source

# Imported on first use: schema and formats need no torch.
_LAZY = {
    "SampleDataset": ".dataset",
    "Collator": ".encoding",
    "EncodedDataset": ".encoding",
    "FORMATS": ".formats",
    "open_format": ".formats",
    "JsonlDataset": ".jsonl",
    "BadMediaPolicy": ".media",
    "DecodedDataset": ".media",
    "MediaDecoding": ".media",
    "load_audio": ".media_io",
    "load_image": ".media_io",
    "load_video": ".media_io",
    "check_sample": ".schema",
    "attribution": ".sources",
    "open_samples": ".sources",
    "open_source": ".sources",
}

__all__ = [
    "FORMATS",
    "BadMediaPolicy",
    "Collator",
    "DecodedDataset",
    "EncodedDataset",
    "JsonlDataset",
    "MediaDecoding",
    "SampleDataset",
    "attribution",
    "check_sample",
    "load_audio",
    "load_image",
    "load_video",
    "open_format",
    "open_samples",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
