"""Writing features of frozen encoders to disk, as `moka.features.cache` reads them: what is in the index is complete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moka.errors import MokaError
from moka.io import atomic_file, disk_full_errors, sha256_of, write_json

from .cache import DTYPES, INDEX, FeatureSet, Index, set_folder, shard_problem

SHARD_BYTES = 256 * 2**20
_SHARD_MEDIA = 20_000  # a shard's header names each of them


class FeatureWriter:
    """Adds features to a set, in shards of bounded size that appear complete or not at all.

    Args:
        known: the set as it was opened; what it has is not added again.
        number, rank: of this writer, for the names of its files: a number that no file of the set has, and the process.
        shard_bytes: a shard is written when it has as many.

    Raises:
        MokaError: a folder that cannot be written, a full disk, values that the set's type cannot hold.
    """

    def __init__(self, known: FeatureSet, number: int, rank: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        self.known, self.folder = known, known.folder
        self.number, self.rank, self.shard_bytes = number, rank, shard_bytes
        self.bytes = 0  # of all that was added
        self.bad: dict[str, str] = {}  # id of a medium that cannot be used -> the reason
        self._added: set[str] = set()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0

    def __contains__(self, identity: str) -> bool:
        return identity in self._added or identity in self.known

    def add(self, identity: str, features: torch.Tensor) -> None:
        """Add the features [items, tokens, width] of one medium."""
        if identity in self:
            return
        kept = features.detach().to("cpu", DTYPES[self.known.dtype]).contiguous()
        if not torch.isfinite(kept).all():
            largest = features.abs().max().item()
            raise MokaError(
                f"The features have values up to {largest:g}, which {self.known.dtype} cannot hold, or that are not finite. "
                "Use --dtype bfloat16 or float32, and another folder."
            )
        self._added.add(identity)
        self._pending[identity] = kept
        size = kept.numel() * kept.element_size()
        self._pending_bytes += size
        self.bytes += size
        if self._pending_bytes >= self.shard_bytes or len(self._pending) >= _SHARD_MEDIA:
            self.flush()

    def flush(self) -> None:
        """Write what was added into a shard; called once more at the end."""
        if self._pending:
            path = self.folder / f"shard-{self.number:05d}-{self.rank:03d}.safetensors"
            with disk_full_errors(path), atomic_file(path) as part, open(part, "wb") as file:
                file.write(save(self._pending))
                file.flush()
                os.fsync(file.fileno())
            self.number += 1
        self._pending, self._pending_bytes = {}, 0


def create_set(cache: str | Path, name: str, settings: Mapping[str, Any], dtype: str = "float32") -> Path:
    """Return the folder of the set of ``settings``, made if there is none; its index has every complete shard.

    A lost or damaged index is made again from the shards: only which media were bad is lost.

    Raises:
        MokaError: a folder that cannot be made, or a set of another type.
    """
    folder = set_folder(cache, name, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MokaError(
            f"data.feature_cache: {folder} cannot be made ({error.strerror}). Choose another folder."
        ) from error
    try:
        index = Index.read(folder)
    except MokaError:
        index = Index(dtype, dict(settings))  # type: ignore[arg-type]
        write_json(folder / INDEX, asdict(index))
    if index.dtype != dtype:
        raise MokaError(
            f"{folder} has {index.dtype} features, and {dtype} is asked for. Use --dtype {index.dtype}, or another "
            "data.feature_cache."
        )
    return folder


def update_index(folder: Path, bad: Mapping[str, str] | None = None, check: bool = True) -> list[str]:
    """Bring the index up to date: shards that differ from it are removed, new ones are added. No other may be writing.

    Args:
        bad: media that cannot be used, and why.
        check: compare the shards that are in the index with their checksums.
    Returns:
        a line for each shard that was removed.
    """
    index, removed = Index.read(folder), []
    for left in folder.glob(".*.tmp"):
        left.unlink()
    for name, sha256 in list(index.shards.items()) if check else ():
        if problem := shard_problem(folder / name, sha256):
            removed.append(f"{folder / name} {problem}")
            (folder / name).unlink(missing_ok=True)
            del index.shards[name]
    for path in sorted(set(folder.glob("shard-*.safetensors")) - {folder / name for name in index.shards}):
        if problem := _unreadable(path, index.dtype):
            removed.append(f"{path} {problem}")
            path.unlink()
        else:
            index.shards[path.name] = sha256_of(path)
    index.bad |= bad or {}
    write_json(folder / INDEX, asdict(index))
    return removed


def _unreadable(path: Path, dtype: str) -> str | None:
    """Return why a file that no index has is no complete shard; opening compares its size with its header."""
    try:
        with safe_open(path, "pt") as file:
            kept = next((file.get_tensor(name).dtype for name in file.keys()), None)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({error})"
    return None if kept in (None, DTYPES[dtype]) else f"has features of type {kept}, not {dtype}"


def next_number(paths: Iterable[Path]) -> int:
    """Return a number for a `FeatureWriter` that none of the shards has."""
    numbers = [path.stem.split("-")[1] for path in paths]
    return max((int(number) for number in numbers if number.isdigit()), default=0) + 1
