"""How many tokens each sample takes with its media expanded, counted without decoding a file.

    sample --schema--> text and media --items per medium--> placeholders --processor--> tokens

A picture is one item of its encoder, a video ``video_frames``, a sound its windows, and an item has a fixed number of
tokens. So the settings of decoding tell what a file gives; only its text has to be tokenized. What a bad file's
substitute (``on_bad_media: substitute``) takes is not known before the file is tried: the length is that of the sample
whose place it takes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S, Selection
from moka.data.encoding import EncodedDataset, encode_sample
from moka.data.media import DecodedDataset, MediaDecoding, UnusableError, stand_ins
from moka.data.schema import map_media
from moka.errors import MokaError
from moka.io import atomic_file
from moka.modeling.processing import MokaProcessor

_CHUNK = 64  # samples that a worker counts at a time
_PROBES = 16  # samples that tell a data set from another in the key
_UNUSABLE = -1


@dataclass(frozen=True)
class Lengths:
    """The lengths of the samples of a data set.

    Attributes:
        tokens: int64 [samples] tokens of each, media expanded, after its text was shortened to fit.
        items: modality -> int64 [samples] items for its encoder: pictures and frames, sounds and windows.
    """

    tokens: np.ndarray
    items: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def media_items(self) -> np.ndarray:
        """int64 [samples] items for all encoders: what a sample costs them."""
        return sum(self.items.values(), np.zeros(len(self), np.int64))


def count_lengths(
    dataset: EncodedDataset, *, workers: int = 0, share: tuple[int, int] = (0, 1), name: str = "data"
) -> np.ndarray:
    """Return tokens, and items of each modality, of the samples of a share: int64 [share, 1 + modalities]; `joined_lengths` next.

    A sample that cannot be used is marked with -1. Samples that hold decoded media (of embedded tasks) are read as they
    are; no front end runs.

    Args:
        workers: processes that count; 0: this one only.
        share: (k, n): of n processes that count a part each, this is the k-th.
        name: of the data set, for the progress bar.

    Raises:
        MokaError: a sample that cannot be read, a medium that no encoder takes, a template that refuses a chat.
    """
    mine = range(share[0], len(dataset), share[1])
    chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
    counted: Any = DataLoader(_Counted(dataset, chunks), batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    bar = tqdm(desc=f"counting tokens of {name}", total=len(mine), unit="sample", delay=BAR_AFTER_S, leave=False)
    parts = []
    with bar:
        for part in counted:
            parts.append(part.numpy())
            bar.update(len(part))
    return np.concatenate(parts) if parts else np.zeros((0, 1 + len(dataset.processor.modalities)), np.int64)


def joined_lengths(dataset: EncodedDataset, parts: Sequence[np.ndarray]) -> Lengths:
    """Return the shares of `count_lengths`, in order, as one; a sample that cannot be used has the length of its stand-in.

    Raises:
        MokaError: a sample for which `EncodedDataset` finds no stand-in.
    """
    modalities = dataset.processor.modalities
    own = np.zeros((len(dataset), 1 + len(modalities)), np.int64)
    for k, part in enumerate(parts):
        own[k :: len(parts)] = part
    resolved = own.copy()
    for index in np.flatnonzero(own[:, 0] == _UNUSABLE):
        tried = stand_ins(dataset.seed, int(index), len(dataset))
        found = next((own[one] for one in tried if own[one, 0] != _UNUSABLE), None)
        if found is None:
            raise MokaError(
                f"Sample {index} cannot be used, nor can those that would replace it: too long, or no answer to "
                "learn. See `moka data check`; raise model.max_length, or fix the data."
            )
        resolved[index] = found
    items = {name: resolved[:, 1 + k] for k, name in enumerate(modalities)}
    return Lengths(resolved[:, 0], items)


def token_counter(processor: MokaProcessor) -> MokaProcessor:
    """Return the processor without its front ends: it encodes samples whose media are lists of anything, one entry an item."""
    counter = copy.copy(processor)
    counter.front_ends = dict.fromkeys(processor.front_ends, _nothing)  # type: ignore[arg-type]
    return counter


def _nothing(medium: Any) -> np.ndarray:
    """Stand in for a front end: the number of tokens does not depend on the values."""
    return np.zeros(0, np.float32)


class _Counted:
    """Indexing counts a chunk of samples; fit for the workers of a ``DataLoader``."""

    def __init__(self, dataset: EncodedDataset, chunks: Sequence[range]) -> None:
        self.samples, self.decoding = undecoded(dataset.dataset)
        self.counter, self.max_length, self.chunks = token_counter(dataset.processor), dataset.max_length, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> np.ndarray:
        return np.array([self._count(self.samples[index]) for index in self.chunks[chunk]], np.int64)

    def _count(self, sample: dict[str, Any]) -> list[int]:
        light = map_media(sample, lambda kind, medium: [0] * self.decoding.items(kind, medium))
        try:
            encoded, _ = encode_sample(self.counter, light, self.max_length)
        except UnusableError:
            return [_UNUSABLE] * (1 + len(self.counter.modalities))
        types = encoded["mm_token_type_ids"]
        counts = [len(encoded["input_ids"])]
        for spec in self.counter.modalities.values():
            counts.append(sum(types.count(type_id) for type_id in spec["type_ids"]) // spec["tokens"])
        return counts


def undecoded(samples: Any) -> tuple[Any, MediaDecoding]:
    """Return the samples of a data set before their media are decoded, and how they would be."""
    if isinstance(samples, DecodedDataset):
        return samples.dataset, samples.decoding
    if isinstance(samples, Selection) and len(samples.parts) == 1:
        inner, decoding = undecoded(samples.parts[0])
        return Selection([inner], samples.indices), decoding
    return samples, MediaDecoding()


def lengths_key(dataset: EncodedDataset) -> str:
    """Return the sha256 of what the lengths depend on: the settings, and of the data their number and a few samples."""
    samples, decoding = undecoded(dataset.dataset)
    processor = dataset.processor
    probes = np.unique(np.linspace(0, len(dataset) - 1, min(_PROBES, len(dataset))).astype(int))
    settings = {
        "samples": len(dataset),
        "max_length": dataset.max_length,
        "seed": dataset.seed,
        "decoding": repr(decoding),
        "modalities": {n: (spec["type_ids"], spec["tokens"]) for n, spec in processor.modalities.items()},
        "template": processor.chat_template or processor.tokenizer.chat_template,
        "probes": [map_media(samples[int(index)], decoding.items)["messages"] for index in probes],
        "tokenized": [processor.tokenizer(_PROBE_TEXT)["input_ids"], len(processor.tokenizer)],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()


_PROBE_TEXT = "Which of these 12345 tokens are mine? Señor, 東京, naïve; <|x|>\n\tdef f(x): return x**2"


def save_lengths(path: str | os.PathLike[str], lengths: Lengths, key: str) -> None:
    """Write them for `read_lengths`, complete or not at all."""
    items = {f"items.{name}": values for name, values in lengths.items.items()}
    with atomic_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, key=np.array(key), tokens=lengths.tokens, **items)  # type: ignore[arg-type]


def read_lengths(path: str | os.PathLike[str], dataset: EncodedDataset) -> Lengths:
    """Return what `save_lengths` wrote of this data set.

    Raises:
        MokaError: no such file, a damaged one, or one of other data or settings.
    """
    modalities = dataset.processor.modalities
    try:
        with np.load(path, allow_pickle=False) as file:
            key, tokens = str(file["key"]), file["tokens"]
            items = {name: file[f"items.{name}"] for name in modalities if f"items.{name}" in file}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MokaError(f"{path} has no lengths of samples ({error}). Delete it to have them counted again.") from error
    if key != lengths_key(dataset) or set(items) != set(modalities):
        raise MokaError(
            f"{path} has the lengths of other data or settings than these, so the order of the samples would differ from "
            "the one the run began with. Restore the data, or start another run."
        )
    return Lengths(tokens, items)
