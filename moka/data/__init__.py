"""Samples: their schema, readers, media decoding and collation."""

from .dataset import SampleDataset
from .encoding import Collator, EncodedDataset
from .formats import FORMATS, open_format
from .jsonl import JsonlDataset
from .media import BadMediaPolicy, DecodedDataset, MediaDecoding
from .media_io import load_audio, load_image, load_video
from .schema import check_sample
from .sources import attribution, open_samples, open_source

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
