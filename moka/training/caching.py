"""`moka cache`: every medium of a run's data through its frozen encoder, once, into ``data.feature_cache``.

samples -> the share of this process -> decode, front end (threads) -> encoder, in batches -> shards (`FeatureWriter`)
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from moka.data.decoders import BadMediaError, file_problem
from moka.data.feature_writer import SHARD_BYTES, FeatureWriter, create_set, next_number, remove_damaged, remove_partial
from moka.data.features import FeatureSet, Stamp, medium_id, stamp
from moka.data.media import BadMediaPolicy, DecodedDataset, decode_medium
from moka.data.schema import media_parts
from moka.data.usable import usable_cores
from moka.errors import MokaError
from moka.modeling.encoders import Encoder, build_encoder

from .arguments import DataSection, RunConfig
from .build import build_processor
from .datasets import open_data
from .feature_cache import feature_settings, frozen, kinds_of
from .lock import FolderLock
from .processes import agree, everyones, is_main, on_main, share_of_work

_BAR_AFTER_S = 2.0
_AHEAD = 4  # media in work per thread: keeps all busy, and few decoded media in memory
# Processes whose share is done wait for the others; the launcher ends them where one dies.
_PATIENCE = timedelta(days=2)


@dataclass
class _Done:
    """What was done for one modality, by one process or by all."""

    media: int = 0
    computed: int = 0
    items: int = 0
    bytes: int = 0
    bad: dict[Any, str] = field(default_factory=dict)  # key of the medium -> reason

    def __add__(self, other: _Done) -> _Done:
        return _Done(
            self.media + other.media,
            self.computed + other.computed,
            self.items + other.items,
            self.bytes + other.bytes,
            {**self.bad, **other.bad},
        )


class _Job:
    """One modality: media that threads have looked at go through its encoder, a batch at a time."""

    def __init__(self, name: str, encoder: Encoder, front_end: Any, kinds: list[str], settings: dict[str, Any]) -> None:
        self.name, self.encoder, self.front_end, self.kinds, self.settings = name, encoder, front_end, kinds, settings
        self.writer: FeatureWriter = None  # type: ignore[assignment]  # once the folder is there
        self.done = _Done()
        self._waiting: list[tuple[str, np.ndarray]] = []  # (id, values [items, ...])

    def take(self, identity: str, values: np.ndarray, batch_size: int) -> None:
        self._waiting.append((identity, values))
        if sum(len(values) for _, values in self._waiting) >= batch_size:
            self.encode(batch_size)

    def encode(self, batch_size: int) -> None:
        """What waits, to the writer."""
        if not self._waiting:
            return
        device = next(self.encoder.parameters()).device
        values = torch.from_numpy(np.concatenate([values for _, values in self._waiting]))  # [items, ...]
        try:
            features = torch.cat([self.encoder(part.to(device)).cpu() for part in values.split(batch_size)])
        except torch.OutOfMemoryError as error:
            raise MokaError(
                f"{self.name}: {batch_size} items at once need too much memory; lower --batch-size."
            ) from error
        start = 0
        for identity, own in self._waiting:
            self.writer.add(identity, features[start : start + len(own)])
            start += len(own)
        self.done.computed += len(self._waiting)
        self.done.items += start
        self.done.bytes = self.writer.bytes
        self._waiting = []


@dataclass(frozen=True)
class _Medium:
    """One medium of a sample, before a thread looks at it."""

    job: _Job
    key: tuple[str, Any]  # kind; path, or where it lies: data set, index
    sample_id: str
    kind: str
    value: Any


@dataclass
class _Seen:
    """What a thread found of a medium; ``values`` are for the encoder, None where its features are there."""

    at: Stamp | None = None
    identity: str | None = None
    values: np.ndarray | None = None
    bad: BadMediaError | None = None
    noted: bool = False


def cache_features(
    config: RunConfig,
    *,
    splits: list[str] | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Compute the features that ``config`` needs and ``data.feature_cache`` has not; returns a summary, line by line.

    Run by several processes (torchrun, `accelerate launch`), each takes a share of the media. Started again after it
    was killed, it goes on.

    Args:
        splits: of "train", "alignment", "validation"; all that the stages read by default.
        batch_size: items (pictures, frames, clips) that go through an encoder at once.
        dtype: float32, float16 or bfloat16: how features are kept.
        workers: threads that decode, in each process; its cores by default.
        shard_bytes: about the size of a file.

    Raises:
        MokaError: nothing to cache, a folder that cannot be written or that another process is filling, bad media beyond
            what ``data.on_bad_media`` allows.
    """
    if config.data.feature_cache is None:
        raise MokaError("data.feature_cache is not set: name the folder for the features, data.feature_cache=FOLDER.")
    started, cache = time.monotonic(), Path(config.data.feature_cache)
    on_cpu = bool(config.training.get("use_cpu")) or not torch.cuda.is_available()
    device = PartialState(cpu=on_cpu, timeout=_PATIENCE).device  # connects the processes
    jobs = agree(lambda: _jobs(config), main_first=True)
    datasets = agree(lambda: _datasets(config, splits), main_first=True)
    lock = FolderLock(cache, "filled", "data.feature_cache")
    on_main(lambda: _open_folder(cache, lock))
    try:
        on_main(lambda: _prepare_folders(cache, jobs, dtype))
        agree(lambda: _open_writers(cache, jobs, dtype, shard_bytes, device))
        filler = _Filler(jobs, config.data.on_bad_media, batch_size, workers)
        for name, samples in datasets.items():
            agree(lambda: filler.fill(name, samples))  # noqa: B023  # called at once
            _check_budget(name, samples, filler.bad, config.data)
        return _summary(jobs, dtype, time.monotonic() - started)
    finally:
        lock.release()


def _jobs(config: RunConfig) -> list[_Job]:
    skeleton, processor = build_processor(config.model)
    modalities = skeleton.config.modalities
    names = frozen((name, skeleton.encoders[name]) for name in modalities)  # type: ignore[misc]
    trained = [name for name in modalities if name not in names]
    if trained and is_main():
        print(f"note: {', '.join(trained)}: the encoder is trained; its media are decoded in training as before.")
    jobs = []
    for name in names:
        encoder = build_encoder(config.model.modalities[name]["encoder"]).float()
        front_end, kinds = processor.front_ends[name], kinds_of(modalities[name])
        settings = feature_settings(encoder, front_end, kinds, config.data)
        jobs.append(_Job(name, encoder, front_end, kinds, settings))
    return jobs


def _datasets(config: RunConfig, splits: list[str] | None) -> dict[str, DecodedDataset]:
    opened = {name: samples for name, samples in open_data(config).items() if splits is None or name in splits}
    if not opened:
        raise MokaError(
            f"--split: stages {config.stages} of this configuration read no {' or '.join(splits or [])} data."
        )
    # Embedded tasks come decoded; the wrapper has nothing to decode then.
    return {name: s if isinstance(s, DecodedDataset) else DecodedDataset(s) for name, s in opened.items()}


def _open_folder(cache: Path, lock: FolderLock) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.take()
    except OSError as error:
        raise MokaError(
            f"data.feature_cache: {cache} cannot be written ({error.strerror}). Choose another folder."
        ) from error


def _prepare_folders(cache: Path, jobs: list[_Job], dtype: str) -> None:
    """Make the folders; what an earlier run left half-written or damaged is removed, and so computed again."""
    for job in jobs:
        folder = create_set(cache, job.encoder.name, job.settings, dtype)
        remove_partial(folder)
        for line in remove_damaged(folder):
            print(f"note: {line}; its features are computed again.")


def _open_writers(cache: Path, jobs: list[_Job], dtype: str, shard_bytes: int, device: torch.device) -> None:
    for job in jobs:
        known = FeatureSet(create_set(cache, job.encoder.name, job.settings, dtype))
        number = everyones(next_number(known.folder))[0]  # before any process writes
        job.writer = FeatureWriter(known, number, share_of_work()[0], shard_bytes)
        job.encoder.to(device).eval()


class _Filler:
    """This process's share of the media, one data set after another."""

    def __init__(self, jobs: list[_Job], policy: str, batch_size: int, workers: int | None) -> None:
        self.jobs, self.policy = jobs, policy
        self.batch_size, self.workers = batch_size, workers or usable_cores()
        self.by_kind = {kind: job for job in jobs for kind in job.kinds}
        self.known: set[tuple[str, str]] = set()
        self.bad: dict[tuple[str, Any], tuple[str, str]] = {}  # key of the medium -> (id of its first sample, reason)

    def fill(self, name: str, samples: DecodedDataset) -> None:
        """Raises ``BadMediaError`` at the first bad file where the policy is "error"."""
        self.name, self.samples = name, samples
        try:
            for medium, seen in self._look_ahead():
                self._take(medium, seen)
            for job in self.jobs:
                job.encode(self.batch_size)
        finally:
            for job in self.jobs:  # also what was done before a bad file
                job.writer.flush()

    def _take(self, medium: _Medium, seen: _Seen) -> None:
        job, path = medium.job, medium.value
        job.done.media += 1
        if seen.bad is not None and self.policy == "error":
            raise BadMediaError(
                f"sample {medium.sample_id!r}: {seen.bad}", seen.bad.file, seen.bad.reason
            ) from seen.bad
        if seen.identity is not None and seen.at is not None and not seen.noted:
            job.writer.note(medium.kind, path, seen.at, seen.identity)
        if seen.bad is not None:
            self.bad[medium.key] = (medium.sample_id, seen.bad.reason)
            job.done.bad[medium.key] = seen.bad.reason
            if seen.identity is not None:
                job.writer.note_bad(seen.identity, seen.bad.reason)
        elif seen.values is not None and seen.identity is not None:
            job.take(seen.identity, seen.values, self.batch_size)

    def _media(self) -> Iterator[_Medium]:
        """A file comes once, and belongs to one process by its path."""
        rank, processes = share_of_work()
        bar = tqdm(
            range(len(self.samples)), f"caching data.{self.name}", unit="sample", delay=_BAR_AFTER_S, leave=False
        )
        bar.disable = bar.disable or not is_main()
        for index in bar:
            sample = self.samples.dataset[index]
            for kind, value in media_parts(sample):
                job = self.by_kind.get(kind)
                if job is None or (isinstance(value, str) and (kind, value) in self.known):
                    continue
                if isinstance(value, str):
                    self.known.add((kind, value))
                number = zlib.crc32(value.encode("utf-8", "surrogateescape")) if isinstance(value, str) else index
                if number % processes == rank:
                    key = kind, value if isinstance(value, str) else (self.name, index)
                    yield _Medium(job, key, sample["id"], kind, value)

    def _look_ahead(self) -> Iterator[tuple[_Medium, _Seen]]:
        """Media in order, looked at by threads: decoding releases Python's lock."""
        waiting: deque[tuple[_Medium, Future[_Seen]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for medium in self._media():
                    waiting.append((medium, pool.submit(self._look, medium)))
                    if len(waiting) > _AHEAD * self.workers:
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _look(self, medium: _Medium) -> _Seen:
        seen, kind, value, writer = _Seen(), medium.kind, medium.value, medium.job.writer
        try:
            if isinstance(value, str):
                if problem := file_problem(value):
                    raise BadMediaError(f"{value}: {problem}.", value, problem)
                seen.at = stamp(value)
                noted = writer.known.noted(kind, value)
                if noted is not None and noted[0] == seen.at:
                    seen.identity, seen.noted = noted[1], True
            if seen.identity is None:
                seen.identity = medium_id(kind, value)
            if seen.identity not in writer:
                seen.values = self._values(medium)
        except BadMediaError as error:
            seen.bad = error
        except MokaError as error:
            raise MokaError(f"sample {medium.sample_id!r}: {error}") from error
        return seen

    def _values(self, medium: _Medium) -> np.ndarray:
        """What the encoder takes of a medium: float32 [items, ...]."""
        source = self.samples
        decoded = decode_medium(medium.kind, medium.value, source.video_frames, source.audio_rate, source.audio_windows)
        items = decoded if isinstance(decoded, (list, tuple)) else [decoded]
        return np.stack([np.asarray(medium.job.front_end(item), np.float32) for item in items])


def _check_budget(name: str, samples: DecodedDataset, found: dict[tuple[str, Any], Any], data: DataSection) -> None:
    """Raises ``MokaError`` where more samples have bad media than ``data.bad_media_budget`` allows."""
    bad = {key: why for part in everyones(found) for key, why in part.items()}
    if not bad:
        return

    def check() -> None:
        spoiled = []
        for index in range(len(samples)):
            parts = media_parts(samples.dataset[index])
            keys = [(kind, value if isinstance(value, str) else (name, index)) for kind, value in parts]
            spoiled += [key for key in keys if key in bad][:1]
        if not spoiled:
            return
        allowed = BadMediaPolicy(data.on_bad_media, data.bad_media_budget).allowed(len(samples))
        sample_id, reason = bad[spoiled[0]]
        first = f"the first: sample {sample_id!r}, {spoiled[0][0]} {_place(spoiled[0][1])}: {reason}"
        told = f"data.{name}: {len(spoiled)} of {len(samples)} samples have media that cannot be used"
        print(f"{told} ({first})")
        if len(spoiled) > allowed:
            raise MokaError(
                f"{told}, and the budget allows {allowed}; {first}. Mend the files, or raise data.bad_media_budget. What was "
                "computed stays."
            )

    on_main(check)


def _place(medium: Any) -> str:
    return medium if isinstance(medium, str) else "in memory"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _summary(jobs: list[_Job], dtype: str, seconds: float) -> list[str]:
    lines = []
    for job in jobs:
        done = sum(everyones(job.done), start=_Done())
        there = done.media - done.computed - len(done.bad)
        bad = f", {len(done.bad)} left out as bad" if done.bad else ""
        lines.append(
            f"{job.name}: {done.media:,} media: {done.computed:,} computed ({done.items:,} items, "
            f"{done.items * job.encoder.num_tokens:,} tokens, {_size(done.bytes)} {dtype}), {there:,} were there"
            f"{bad}; {job.writer.folder}"
        )
    lines.append(f"{seconds:.1f} s, {share_of_work()[1]} process{'' if share_of_work()[1] == 1 else 'es'}")
    return lines
