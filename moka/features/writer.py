"""Writing features of frozen encoders to disk, as `moka.features.cache` reads them: what is there is always full."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moka.demo.wheels import sha256_of
from moka.errors import MokaError
from moka.io import atomic_file

from .cache import (
    DTYPES,
    FORMAT_VERSION,
    SETTINGS,
    FeatureSet,
    Stamp,
    read_seal,
    read_settings,
    set_folder,
    shard_problem,
)

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
        self._added: set[str] = set()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._notes: list[dict[str, Any]] = []

    def __contains__(self, identity: str) -> bool:
        return identity in self._added or identity in self.known

    def add(self, identity: str, features: torch.Tensor) -> None:
        """Features [items, tokens, width] of one medium."""
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

    def note(self, kind: str, path: str, at: Stamp, identity: str) -> None:
        """A file and what its content is: it is then recognised by its size and times."""
        self._notes.append({"path": path, "kind": kind, "stamp": at, "id": identity})

    def note_bad(self, identity: str, reason: str) -> None:
        """A medium that cannot be used, and why."""
        self._notes.append({"id": identity, "bad": reason})

    def flush(self) -> None:
        """Write what was added; called once more at the end."""
        name = f"{self.number:05d}-{self.rank:03d}"
        if self._pending:
            data = save(self._pending)
            shard = self.folder / f"shard-{name}.safetensors"
            _write(shard, data)
            seal = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "media": list(self._pending)}
            _write(shard.with_suffix(".json"), json.dumps(seal).encode())
        if self._notes:
            lines = "".join(json.dumps(note) + "\n" for note in self._notes)
            _write(self.folder / f"media-{name}.jsonl", lines.encode())
        if self._pending or self._notes:
            self.number += 1
        self._pending, self._pending_bytes, self._notes = {}, 0, []


def create_set(cache: str | Path, name: str, settings: Mapping[str, Any], dtype: str = "float32") -> Path:
    """The folder of the set of ``settings``, made where there is none.

    Raises:
        MokaError: a folder that cannot be made, or a set of another type.
    """
    folder = set_folder(cache, name, settings)
    path = folder / SETTINGS
    if not path.is_file():
        about = {"format_version": FORMAT_VERSION, "dtype": dtype, "settings": settings}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MokaError(
                f"data.feature_cache: {folder} cannot be made ({error.strerror}). Choose another folder."
            ) from error
        _write(path, (json.dumps(about, indent=2) + "\n").encode())
    kept = read_settings(path)["dtype"]
    if kept != dtype:
        raise MokaError(
            f"{folder} has {kept} features, and {dtype} is asked for. Use --dtype {kept}, or another data.feature_cache."
        )
    return folder


def remove_partial(folder: str | Path) -> None:
    """Remove what a killed `moka cache` left half-written. No other process may be writing the set."""
    for left in (*Path(folder).glob("*.part"), *Path(folder).glob(".*.tmp")):
        left.unlink()
    sealed = {seal.with_suffix(".safetensors") for seal in Path(folder).glob("shard-*.json")}
    for shard in set(Path(folder).glob("shard-*.safetensors")) - sealed:
        shard.unlink()


def remove_damaged(folder: str | Path) -> list[str]:
    """Compare every shard with its seal, byte for byte, and remove those that differ; returns a line for each."""
    removed = []
    for seal in sorted(Path(folder).glob("shard-*.json")):
        shard = seal.with_suffix(".safetensors")
        try:
            record = read_seal(seal)
            problem = shard_problem(shard, record)
            if problem is None and sha256_of(shard) != record["sha256"]:
                problem = "is damaged: its sha256 is not the one noted"
        except MokaError as error:
            problem = f"has a seal that cannot be read ({error})"
        if problem is not None:
            seal.unlink()
            shard.unlink(missing_ok=True)
            removed.append(f"{shard} {problem}")
    return removed


def next_number(folder: str | Path) -> int:
    """A number for a `FeatureWriter` that no file of the set has."""
    names = [path.stem.split("-") for kind in ("shard-*", "media-*") for path in Path(folder).glob(kind)]
    return max((int(parts[1]) for parts in names if len(parts) == 3 and parts[1].isdigit()), default=0) + 1


def _write(path: Path, data: bytes) -> None:
    """A file that is there complete or not at all, also after a power failure."""
    try:
        with atomic_file(path) as part, open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MokaError(
            f"{path} cannot be written ({error.strerror}). What was written before stays: free space or fix the folder, and "
            "run the same command again; it continues from there."
        ) from error
