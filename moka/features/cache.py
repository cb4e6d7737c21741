"""Features of frozen encoders on disk: computed once by `moka cache`, read in training instead of media.

    FOLDER/clip-1f0c3b9a5d7e2468/     one for each encoder and its settings, by their hash
        settings.json                 what the features depend on, and their type
        shard-00001-000.safetensors   features [items, tokens, width] of many media, under the ids of the media
        shard-00001-000.json          its size, sha256 and ids, written after it: a shard without one is not full
        media-00001-000.jsonl         path, size and times of each file, and the id of its content; what is bad, and why

A medium's id is the hash of its content, so files may be moved, copied and repeated. The content of a file whose path, size
and times are those recorded is not looked at again; that of any other is.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from moka.data.media_io import BadMediaError, file_problem
from moka.errors import MokaError, NotCachedError
from moka.modeling.media import AudioFeatures, Features, Waveform

# Part of what a set is found by. Raise it when moka itself makes other features of the same media and settings (decoders,
# windows, front ends, encoders), hashes media otherwise or lays out files otherwise: sets made before are then not used.
FORMAT_VERSION = 1
SETTINGS = "settings.json"
# What features may be kept as; they are read as float32.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OPEN_SHARDS = 128  # mapped at a time by one process
_HEX = 32  # digits of a sha256 that are kept: 128 bits
_NOWHERE = -1

Stamp = tuple[int, int, int]


def stamp(path: str) -> Stamp:
    """Size in bytes, and the times (ns) of the last change of content and of anything. The last cannot be set back."""
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def medium_id(kind: str, medium: Any) -> str:
    """The hash of a medium's content: of the bytes of a file (given by path or as bytes), or of decoded values.

    Args:
        kind: "image", "audio" or "video": a film may be cached for its pictures and for its sound.
    """
    digest = hashlib.sha256(f"{kind}\0".encode())
    if isinstance(medium, str):
        with open(medium, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
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
    """sha256 (32 hex digits) over the name, shape and every value of the module's tensors, as float32 on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_HEX]


def set_folder(cache: str | Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Where a cache keeps the features that depend on ``settings`` (fit for JSON); ``name`` begins the folder's."""
    text = json.dumps({"format_version": FORMAT_VERSION, "settings": settings}, sort_keys=True)
    return Path(cache) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def open_set(cache: str | Path, name: str, settings: Mapping[str, Any]) -> FeatureSet:
    """The features that depend on ``settings``.

    Raises:
        MokaError: there are none; where there are some of other settings, it says which differ. A damaged set.
    """
    folder = set_folder(cache, name, settings)
    if (folder / SETTINGS).is_file():
        return FeatureSet(folder)
    others = [read_settings(path) for path in sorted(Path(cache).glob(f"{name}-*/{SETTINGS}"))]
    remedy = "Compute them with `moka cache` and this configuration"
    if not others:
        raise MokaError(f"data.feature_cache: {cache} has no features of encoder {name!r}. {remedy}.")
    ours = {"format_version": FORMAT_VERSION, **settings}
    theirs = [{"format_version": other["format_version"], **other["settings"]} for other in others]
    nearest = min((_differences(other, ours) for other in theirs), key=len)
    shown = "; ".join(f"{key} is {there} there and {here} here" for key, (there, here) in list(nearest.items())[:4])
    raise MokaError(
        f"data.feature_cache: {cache} has features of encoder {name!r} with other settings: {shown}. {remedy}, or use "
        "the settings they were made with."
    )


def _differences(theirs: Any, ours: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Dotted key -> (their value, our value), of all that differ."""
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return {} if theirs == ours else {prefix.rstrip("."): (_shown(theirs), _shown(ours))}
    found: dict[str, tuple[str, str]] = {}
    for key in dict.fromkeys([*theirs, *ours]):
        found |= _differences(theirs.get(key), ours.get(key), f"{prefix}{key}.")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_settings(path: Path) -> dict[str, Any]:
    remedy = "cannot be used ({}). Delete its folder and run `moka cache` again."
    return _read_record(path, {"format_version", "dtype", "settings"}, remedy)


def read_seal(path: Path) -> dict[str, Any]:
    return _read_record(
        path, {"bytes", "sha256", "media"}, "is damaged ({}). Run `moka cache` again: it makes such shards again."
    )


def _read_record(path: Path, keys: set[str], problem: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
        if keys <= {*record}:
            return record
        reason = "it lacks keys"
    except (OSError, ValueError, TypeError) as error:
        reason = str(error)
    raise MokaError(f"{path} {problem.format(reason)}")


class FeatureSet:
    """The features of one encoder and its settings, to read. Tensors are mapped from disk when they are asked for.

    The index takes about 150 bytes a medium, in arrays that forked loader workers share.

    Raises:
        MokaError: a shard that is absent or incomplete; in reading, one that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = read_settings(self.folder / SETTINGS)
        self.settings, self.dtype = about["settings"], str(about["dtype"])
        self._shards: list[Path] = []
        ids: list[str] = []
        places: list[int] = []
        for seal in sorted(self.folder.glob("shard-*.json")):
            record = read_seal(seal)
            shard = seal.with_suffix(".safetensors")
            if problem := shard_problem(shard, record):
                raise MokaError(f"{shard} {problem}. Run `moka cache` again: it makes such shards again.")
            ids += record["media"]
            places += [len(self._shards)] * len(record["media"])
            self._shards.append(shard)
        self._ids, order = _sorted(ids)
        self._places = np.array(places, np.int32)[order]
        self._read_media()
        self._moved: dict[str, tuple[Stamp, str]] = {}
        self._open: _OpenShards | None = None

    def _read_media(self) -> None:
        keys: list[str] = []
        targets: list[str] = []
        stamps: list[Stamp] = []
        self.bad: dict[str, str] = {}
        for path in sorted(self.folder.glob("media-*.jsonl")):
            for record in map(json.loads, path.read_text("utf-8").splitlines()):
                if "bad" in record:
                    self.bad[record["id"]] = record["bad"]
                if "path" in record:
                    keys.append(_path_key(record["kind"], record["path"]))
                    stamps.append(tuple(record["stamp"]))
                    targets.append(record["id"])
        self._files, order = _sorted(keys)  # stable: of a file noted twice the later note comes last
        self._stamps = np.array(stamps, np.int64).reshape(-1, 3)[order]
        self._targets = np.array(targets, f"S{_HEX}")[order]

    def __len__(self) -> int:
        """Media whose features are there; a content that two processes computed counts once."""
        return len(np.unique(self._ids))

    def __contains__(self, identity: str) -> bool:
        return self._place(identity) != _NOWHERE

    def _place(self, identity: str) -> int:
        found = _last(self._ids, identity)
        return _NOWHERE if found is None else int(self._places[found])

    def noted(self, kind: str, path: str) -> tuple[Stamp, str] | None:
        """Return what was noted of a file, its stamp and the id of its content then; None if it was never seen."""
        key = _path_key(kind, path)
        found = _last(self._files, key)
        if found is None:
            return self._moved.get(key)
        size, mtime, ctime = map(int, self._stamps[found])
        return (size, mtime, ctime), self._targets[found].decode()

    def identify(self, kind: str, medium: Any) -> str:
        """The id of a medium as it is now; of a file that is as it was noted without reading it."""
        if not isinstance(medium, str):
            return medium_id(kind, medium)
        now, key = stamp(medium), _path_key(kind, medium)
        for known in (self._moved.get(key), self.noted(kind, medium)):
            if known is not None and known[0] == now:
                return known[1]
        identity = medium_id(kind, medium)
        self._moved[key] = (now, identity)
        return identity

    def find(self, kind: str, medium: Any) -> str:
        """The id of a medium whose features are there.

        Raises:
            BadMediaError: a file that cannot be used, now or when the features were computed.
            NotCachedError: features that are not there, or of a file that has changed since.
        """
        name = medium if isinstance(medium, str) else f"{kind} in memory"
        if isinstance(medium, str) and (problem := file_problem(medium)):
            raise BadMediaError(f"{name}: {problem}. Correct or replace the file.", name, problem)
        identity = self.identify(kind, medium)
        if identity in self:
            return identity
        if identity in self.bad:
            reason = self.bad[identity]
            raise BadMediaError(f"{name}: {reason}. Correct or replace the file, or remove the sample.", name, reason)
        before = self.noted(kind, medium) if isinstance(medium, str) else None
        remedy = "Run `moka cache` again: it computes what is not there."
        if before is not None and before[1] != identity:
            raise NotCachedError(
                f"{kind} {name} has changed since its features were computed into {self.folder} (it had {before[0][0]} bytes "
                f"then, and has {os.stat(name).st_size}). {remedy}"
            )
        raise NotCachedError(f"the features of {kind} {name} are not in {self.folder}. {remedy}")

    def read(self, identity: str) -> np.ndarray:
        """float32 [items, tokens, width] of a medium that is there."""
        place = self._place(identity)
        try:
            opened = self._open
            if opened is None or opened.process != os.getpid():  # a forked loader worker maps its own
                opened = self._open = _OpenShards()
            tensor = opened.get(self._shards[place]).get_tensor(identity)
        except (SafetensorError, OSError) as error:
            raise MokaError(
                f"{self._shards[place]} cannot be read ({error}). Run `moka cache` again: it makes damaged shards again."
            ) from error
        return tensor.float().numpy()

    @property
    def moved(self) -> int:
        """Files that were recognised, or not, by reading them: their path, size and times are not those noted."""
        return len(self._moved)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


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
        """ "image", "audio", "video": those that are read here and not decoded."""
        return frozenset(self.sets)

    def check(self, kind: str, medium: Any) -> None:
        """Raises what `read` would raise, without reading the features."""
        self.sets[kind].find(kind, medium)

    def read(self, kind: str, medium: Any) -> list[Features]:
        """The features of one medium, one entry for each item of its encoder.

        Raises:
            BadMediaError, NotCachedError: as `FeatureSet.find`.
        """
        chosen = self.sets[kind]
        return [Features(values) for values in chosen.read(chosen.find(kind, medium))]


def shard_problem(shard: Path, record: Mapping[str, Any]) -> str | None:
    size = shard.stat().st_size if shard.is_file() else None
    if size is None:
        return "is not there"
    return None if size == record["bytes"] else f"is not full: it has {size} of {record['bytes']} bytes"


def _path_key(kind: str, path: str) -> str:
    return hashlib.sha256(f"{kind}\0{os.path.abspath(path)}".encode("utf-8", "surrogateescape")).hexdigest()[:_HEX]


def _sorted(keys: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The keys as sorted bytes, and the order that sorts them."""
    array = np.array(list(keys), f"S{_HEX}")
    order = np.argsort(array, kind="stable")
    return array[order], order


def _last(keys: np.ndarray, key: str) -> int | None:
    """Where the key is last in sorted keys."""
    wanted = np.bytes_(key)
    found = int(np.searchsorted(keys, wanted, side="right")) - 1
    return found if found >= 0 and keys[found] == wanted else None
