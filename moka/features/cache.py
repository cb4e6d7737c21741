"""Features of frozen encoders on disk: computed once by `moka cache`, read in training instead of media.

    FOLDER/clip-1f0c3b9a5d7e2468/     one for each encoder, its weights, front end and decoding, by their hash
        index.json                    these settings; the sha256 of each shard; what is bad, and why
        shard-00001-000.safetensors   features [items, tokens, width] of many media, under the ids of the media

A file's id is the hash of its path, size and time of change; that of a medium in memory is the hash of its values.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S
from moka.data.media_io import BadMediaError, file_problem
from moka.errors import MokaError, NotCachedError
from moka.io import sha256_of
from moka.modeling.media import AudioFeatures, Features, Waveform
from moka.type_checks import read_dataclass

# Raise it when moka itself makes other features of the same media and settings (decoders, windows, front ends, encoders),
# hashes media otherwise or lays out files otherwise: sets made before are then not used.
FORMAT_VERSION = 2
INDEX = "index.json"
# What features may be kept as; they are read as float32.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OPEN_SHARDS = 128  # mapped at a time by one process
_HEX = 32  # digits of a sha256 that are kept: 128 bits
_AGAIN = "Run `moka cache` again: it makes such shards again."


@dataclass
class Index:
    """The content of ``index.json``.

    Args:
        dtype: what features are kept as.
        settings: all that they depend on next to the medium.
        shards: file name -> sha256 of its content.
        bad: id of a medium that cannot be used -> the reason.
    """

    dtype: Literal["float32", "float16", "bfloat16"]
    settings: dict[str, Any]
    shards: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a set.

        Raises:
            MokaError: it is absent or damaged.
        """
        try:
            return read_dataclass(cls, folder / INDEX)
        except MokaError as error:
            raise MokaError(
                f"data.feature_cache: {error} Run `moka cache` again: it writes the index again."
            ) from error


def medium_id(kind: str, medium: Any) -> str:
    """Return the id of a medium: of a file by its path, size and time of change, of anything else by its values.

    Args:
        kind: "image", "audio" or "video": a film may be cached for its pictures and for its sound.
    """
    digest = hashlib.sha256(f"{kind}\0".encode())
    if isinstance(medium, str):
        info = os.stat(medium)
        about = f"{os.path.abspath(medium)}\0{info.st_size}\0{info.st_mtime_ns}"
        digest.update(about.encode("utf-8", "surrogateescape"))
    else:
        _hash_value(digest, medium)
    return digest.hexdigest()[:_HEX]


def _hash_value(digest: Any, medium: Any) -> None:
    if isinstance(medium, bytes):
        digest.update(medium)
    elif isinstance(medium, (list, tuple)):
        digest.update(f"list {len(medium)}".encode())
        for one in medium:
            _hash_value(digest, one)
    elif isinstance(medium, Image.Image):
        # What front ends read next to the pixels: how the picture is turned, its colours, what is transparent.
        look = (medium.mode, medium.size, medium.getpalette(), medium.info.get("transparency"))
        digest.update(f"image {look} {medium.getexif().get(0x0112)}".encode() + medium.tobytes())
    elif isinstance(medium, (Waveform, AudioFeatures)):
        about = medium.rate if isinstance(medium, Waveform) else medium.kind
        values = np.ascontiguousarray(medium.samples if isinstance(medium, Waveform) else medium.values)
        digest.update(f"{about} {values.dtype} {values.shape}".encode() + values.tobytes())
    else:
        raise MokaError(f"a {type(medium).__name__} is no medium whose features can be cached.")


def weights_sha256(module: torch.nn.Module) -> str:
    """Return a sha256 (32 hex digits) of the name, shape and every value of the module's tensors, as float32 on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_HEX]


def set_folder(cache: str | Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Return where a cache keeps the features that depend on ``settings`` (fit for JSON); ``name`` begins the folder's."""
    text = json.dumps({"format_version": FORMAT_VERSION, "settings": settings}, sort_keys=True)
    return Path(cache) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def open_set(cache: str | Path, name: str, settings: Mapping[str, Any], share: tuple[int, int] = (0, 1)) -> FeatureSet:
    """Return the features that depend on ``settings``, after their checksums were compared.

    Args:
        share: (k, n): of n processes that compare a part each, this is the k-th.
    Raises:
        MokaError: there are none; if there are some of other settings, it says which differ. A damaged set.
    """
    folder = set_folder(cache, name, settings)
    if (folder / INDEX).is_file():
        found = FeatureSet(folder)
        found.check(share)
        return found
    remedy = "Compute them with `moka cache` and this configuration"
    others = [Index.read(path.parent).settings for path in sorted(Path(cache).glob(f"{name}-*/{INDEX}"))]
    if not others:
        raise MokaError(f"data.feature_cache: {cache} has no features of encoder {name!r}. {remedy}.")
    nearest = min((_differences(other, settings) for other in others), key=len)
    shown = "; ".join(f"{key} is {there} there and {here} here" for key, (there, here) in list(nearest.items())[:4])
    raise MokaError(
        f"data.feature_cache: {cache} has features of encoder {name!r} with other settings: {shown}. {remedy}, or use "
        "the settings they were made with."
    )


def _differences(theirs: Any, ours: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Return dotted key -> (their value, our value) of all that differ."""
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return {} if theirs == ours else {prefix.rstrip("."): (_shown(theirs), _shown(ours))}
    found: dict[str, tuple[str, str]] = {}
    for key in dict.fromkeys([*theirs, *ours]):
        found |= _differences(theirs.get(key), ours.get(key), f"{prefix}{key}.")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shard_problem(path: Path, sha256: str) -> str | None:
    """Return why a file is not the shard that the index has; None if it is."""
    if not path.is_file():
        return "is absent"
    return None if sha256_of(path) == sha256 else "is damaged: its sha256 is another than in the index"


class FeatureSet:
    """The features of one encoder and its settings, to read. Tensors are mapped from disk when they are asked for.

    The index takes about 40 bytes a medium, in arrays that forked loader workers share.

    Raises:
        MokaError: a damaged index, or a shard that cannot be opened.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = Index.read(self.folder)
        self.settings, self.dtype, self.bad = index.settings, str(index.dtype), index.bad
        self.shards = {self.folder / name: sha256 for name, sha256 in sorted(index.shards.items())}
        self._paths = list(self.shards)
        ids: list[str] = []
        numbers: list[int] = []
        for number, path in enumerate(self._paths):
            with _shard_errors(path), safe_open(path, "pt") as file:
                names = list(file.keys())
            ids += names
            numbers += [number] * len(names)
        array = np.array(ids, f"S{_HEX}")
        order = np.argsort(array, kind="stable")
        self._ids, self._numbers = array[order], np.array(numbers, np.int32)[order]
        self._open: _OpenShards | None = None

    def check(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the shards with their checksums.

        Raises:
            MokaError: the first that differs.
        """
        mine = self._paths[share[0] :: share[1]]
        for path in tqdm(mine, f"checking {self.folder}", unit="file", delay=BAR_AFTER_S, leave=False):
            if problem := shard_problem(path, self.shards[path]):
                raise MokaError(f"data.feature_cache: {path} {problem}. {_AGAIN}")

    def __len__(self) -> int:
        """Return the number of media whose features are there."""
        return len(np.unique(self._ids))

    def __contains__(self, identity: str) -> bool:
        return self._number(identity) is not None

    def _number(self, identity: str) -> int | None:
        """Return the number of the shard that has the features of a medium."""
        wanted = np.bytes_(identity)
        found = int(np.searchsorted(self._ids, wanted))
        return int(self._numbers[found]) if found < len(self._ids) and self._ids[found] == wanted else None

    def find(self, kind: str, medium: Any) -> str:
        """Return the id of a medium whose features are there.

        Raises:
            BadMediaError: a file that cannot be used, now or when the features were computed.
            NotCachedError: its features are not there; a file that has changed since is another medium.
        """
        name = medium if isinstance(medium, str) else f"{kind} in memory"
        if isinstance(medium, str) and (problem := file_problem(medium)):
            raise BadMediaError(f"{name}: {problem}. Correct or replace the file.", name, problem)
        identity = medium_id(kind, medium)
        if identity in self:
            return identity
        if identity in self.bad:
            reason = self.bad[identity]
            raise BadMediaError(f"{name}: {reason}. Correct or replace the file, or remove the sample.", name, reason)
        now = f", as the file is now ({os.stat(medium).st_size} bytes)" if isinstance(medium, str) else ""
        raise NotCachedError(
            f"the features of {kind} {name}{now}, are not in {self.folder}: it is new, was moved or has changed. Run `moka "
            "cache` again: it computes what is not there."
        )

    def read(self, identity: str) -> np.ndarray:
        """Return float32 [items, tokens, width] of a medium that is there."""
        opened = self._open
        if opened is None or opened.process != os.getpid():  # a forked loader worker maps its own
            opened = self._open = _OpenShards()
        path = self._paths[self._number(identity)]  # type: ignore[index]
        with _shard_errors(path):
            return opened.get(path).get_tensor(identity).float().numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


@contextmanager
def _shard_errors(path: Path) -> Iterator[None]:
    """Turn a shard that cannot be read into a ``MokaError``."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise MokaError(f"data.feature_cache: {path} cannot be read ({error}). {_AGAIN}") from error


class _OpenShards:
    """The shards that one process has mapped, for all of its threads; the one mapped first goes first."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._files: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def get(self, shard: Path) -> Any:
        with self._lock:
            if shard not in self._files:
                while len(self._files) >= _OPEN_SHARDS:
                    del self._files[next(iter(self._files))]  # a thread that reads it keeps it mapped
                self._files[shard] = safe_open(shard, "pt")
            return self._files[shard]


class FeatureCache:
    """The features that training reads: for each kind of medium whose encoder is frozen, the set that has its features."""

    def __init__(self, sets: Mapping[str, FeatureSet]) -> None:
        self.sets = dict(sets)

    @property
    def kinds(self) -> frozenset[str]:
        """Return "image", "audio", "video": those that are read here and not decoded."""
        return frozenset(self.sets)

    def check(self, kind: str, medium: Any) -> None:
        """Raise what `read` would raise, without reading the features."""
        self.sets[kind].find(kind, medium)

    def read(self, kind: str, medium: Any) -> list[Features]:
        """Return the features of one medium, one entry for each item of its encoder.

        Raises:
            BadMediaError, NotCachedError: as `FeatureSet.find`.
        """
        chosen = self.sets[kind]
        return [Features(values) for values in chosen.read(chosen.find(kind, medium))]
