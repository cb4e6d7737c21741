"""Samples: their schema, readers, media decoding, collation, and the embedded data sets."""

from moka.demo.digit_tasks import EmbeddedTask
from moka.demo.embedded import resolve_backbone

from .formats import FORMATS, open_format
from .jsonl import JsonlDataset
from .media import BadMediaPolicy, DecodedDataset, decode_sample, load_audio, load_image, load_video
from .schema import check_sample
from .sources import Collator, EncodedDataset, attribution, open_samples, open_source

__all__ = [
    "FORMATS",
    "BadMediaPolicy",
    "Collator",
    "DecodedDataset",
    "EmbeddedTask",
    "EncodedDataset",
    "JsonlDataset",
    "attribution",
    "check_sample",
    "decode_sample",
    "load_audio",
    "load_image",
    "load_video",
    "open_format",
    "open_samples",
    "open_source",
    "resolve_backbone",
]
