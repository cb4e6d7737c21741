"""One process's share of the media of a run, through the frozen encoders, to the writers of their features.

samples -> the share of this process -> decode, front end (threads) -> encoder, in batches -> shards (`FeatureWriter`)
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S
from moka.data.media import DecodedDataset
from moka.data.media_io import BadMediaError, file_problem
from moka.data.media_validation import usable_cores
from moka.data.schema import media_parts
from moka.distributed import all_reduce_any, is_main, rank_and_world_size, run_on_all
from moka.errors import MokaError
from moka.modeling.encoders import Encoder

from .cache import medium_id
from .writer import FeatureWriter

_TOGETHER = 1000  # samples after which processes tell each other whether one has failed
_AHEAD = 4  # media in work per thread: keeps all busy, and few decoded media in memory


@dataclass
class Done:
    """The counts of what was done for one modality, by one process or by all."""

    media: int = 0
    computed: int = 0
    there: int = 0
    items: int = 0
    bytes: int = 0
    bad: dict[Any, str] = field(default_factory=dict)  # key of the medium -> reason

    def __add__(self, other: Done) -> Done:
        return Done(
            self.media + other.media,
            self.computed + other.computed,
            self.there + other.there,
            self.items + other.items,
            self.bytes + other.bytes,
            {**self.bad, **other.bad},
        )


class Job:
    """One modality: media that threads have looked at go through its encoder, a batch at a time."""

    def __init__(self, name: str, encoder: Encoder, front_end: Any, kinds: list[str], settings: dict[str, Any]) -> None:
        self.name, self.encoder, self.front_end, self.kinds, self.settings = name, encoder, front_end, kinds, settings
        self.writer: FeatureWriter = None  # type: ignore[assignment]  # once the folder is there
        self.done = Done()
        self._waiting: list[tuple[str, np.ndarray]] = []  # (id, values [items, ...])

    def take(self, identity: str, values: np.ndarray, batch_size: int) -> None:
        """``values`` [items, ...] of one medium; encoded when there are ``batch_size`` items."""
        if identity in self.writer or any(identity == other for other, _ in self._waiting):
            self.done.there += 1
            return
        self._waiting.append((identity, values))
        if sum(len(values) for _, values in self._waiting) >= batch_size:
            self.encode(batch_size)

    def encode(self, batch_size: int) -> None:
        """Return what waits, to the writer."""
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

    job: Job
    key: tuple[str, Any]  # kind; path, or where it is: data set, index
    sample_id: str
    kind: str
    value: Any


@dataclass
class _Seen:
    """The result of a thread for a medium; ``values`` are for the encoder, None where its features are there."""

    identity: str | None = None
    values: np.ndarray | None = None
    bad: BadMediaError | None = None


class Filler:
    """This process's share of the media, one data set after another."""

    def __init__(self, jobs: list[Job], policy: str, batch_size: int, workers: int | None) -> None:
        self.jobs, self.policy = jobs, policy
        self.batch_size, self.workers = batch_size, workers or usable_cores()
        self.by_kind = {kind: job for job in jobs for kind in job.kinds}
        self.known: set[tuple[str, str]] = set()
        self.bad: dict[tuple[str, Any], tuple[str, str]] = {}  # key of the medium -> (id of its first sample, reason)

    def fill(self, name: str, samples: DecodedDataset) -> None:
        """Called by all processes together; where one fails, the others stop soon, and what was done is written.

        Raises:
            BadMediaError: the first bad file, where the policy is "error".
        """
        self.name, self.samples = name, samples
        failed: Exception | None = None
        bar = tqdm(desc=f"caching data.{name}", total=len(samples), unit="sample", delay=BAR_AFTER_S, leave=False)
        bar.disable = bar.disable or not is_main()
        try:
            with bar:
                for start in range(0, len(samples), _TOGETHER):
                    failed = self._work(range(start, min(start + _TOGETHER, len(samples))), bar)
                    if all_reduce_any(failed is not None):
                        break
            run_on_all(lambda: self._end(failed))
        finally:
            self._flush()  # also where it is interrupted

    def _work(self, part: range, bar: Any) -> Exception | None:
        """This process's share of a part of the samples; returns what stopped it, for others wait to hear of it."""
        try:
            for medium, seen in self._look_ahead(part, bar):
                self._take(medium, seen)
        except Exception as error:
            return error
        return None

    def _end(self, failed: Exception | None) -> None:
        if failed is None:
            for job in self.jobs:
                job.encode(self.batch_size)
        self._flush()
        if failed is not None:
            raise failed

    def _flush(self) -> None:
        for job in self.jobs:
            job.writer.flush()

    def _take(self, medium: _Medium, seen: _Seen) -> None:
        job = medium.job
        job.done.media += 1
        if seen.bad is not None and self.policy == "error":
            raise BadMediaError(
                f"sample {medium.sample_id!r}: {seen.bad}", seen.bad.file, seen.bad.reason
            ) from seen.bad
        if seen.bad is not None:
            self.bad[medium.key] = (medium.sample_id, seen.bad.reason)
            job.done.bad[medium.key] = seen.bad.reason
            if seen.identity is not None:
                job.writer.bad[seen.identity] = seen.bad.reason
        elif seen.values is not None and seen.identity is not None:
            job.take(seen.identity, seen.values, self.batch_size)
        else:
            job.done.there += 1

    def _media(self, part: range, bar: Any) -> Iterator[_Medium]:
        """A file comes once, and belongs to one process by its path."""
        rank, processes = rank_and_world_size()
        for index in part:
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
            bar.update()

    def _look_ahead(self, part: range, bar: Any) -> Iterator[tuple[_Medium, _Seen]]:
        """Media in order, looked at by threads: decoding releases Python's lock."""
        waiting: deque[tuple[_Medium, Future[_Seen]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for medium in self._media(part, bar):
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
            if isinstance(value, str) and (problem := file_problem(value)):
                raise BadMediaError(f"{value}: {problem}.", value, problem)
            seen.identity = medium_id(kind, value)
            if seen.identity not in writer:
                seen.values = self._values(medium)
        except BadMediaError as error:
            seen.bad = error
        except MokaError as error:
            raise MokaError(f"sample {medium.sample_id!r}: {error}") from error
        return seen

    def _values(self, medium: _Medium) -> np.ndarray:
        """Return what the encoder takes of a medium: float32 [items, ...]."""
        decoded = self.samples.decoding.with_features(None).decode(medium.kind, medium.value)
        items = decoded if isinstance(decoded, (list, tuple)) else [decoded]
        return np.stack([np.asarray(medium.job.front_end(item), np.float32) for item in items])
