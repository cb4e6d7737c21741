"""``on_bad_media: skip``: every file is tried before training, and samples whose media cannot be used are left out.

    data set --every medium once, in parallel--> report --its indices--> dataset.select(report.indices)

Each process tries a share of the samples, and all put their reports together (`joined`), so that all ranks have the same
samples. The report is written for people and for a resumed run, which reads it (`read_usable`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S
from moka.data.media import BadMediaPolicy, MediaDecoding
from moka.data.media_io import BadMediaError
from moka.data.schema import map_media, media_parts
from moka.errors import MokaError, NotCachedError
from moka.io import atomic_file

T = TypeVar("T")
_SHOWN = 3
_AHEAD = 4  # samples in work per worker: keeps all busy, and few decoded media in memory


@dataclass(frozen=True)
class SkipReport:
    """The samples that were left out of a data set.

    Attributes:
        name: of the data set, for messages.
        tried: samples tried.
        allowed: how many the budget lets go.
        skipped: one record a sample left out: ``index``, ``id``, ``file``, ``reason``, ``action`` ("skip").
        path: the JSONL file that lists them, if any.
    """

    name: str
    tried: int
    allowed: int
    skipped: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    @property
    def indices(self) -> list[int]:
        """The samples that stay, ascending."""
        bad = {record["index"] for record in self.skipped}
        return [index for index in range(self.tried) if index not in bad]

    def summary(self) -> str:
        """Return one line for the start of a run."""
        listed = f"; listed in {self.path}" if self.path is not None and self.skipped else ""
        return (
            f"{self.name}: {len(self.skipped)} of {self.tried} samples left out for media that cannot be used "
            f"(budget: {self.allowed}){listed}"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Return the report as JSONL for `read_usable`, complete or not at all: another process never reads half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"tried": self.tried, "skipped": len(self.skipped)}, *self.skipped]
        with atomic_file(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def check(self) -> None:
        """Raise a ``MokaError`` if more samples are bad than the budget allows, or none is left."""
        if len(self.skipped) <= self.allowed and len(self.skipped) < self.tried:
            return
        first = "; ".join(f"sample {r['id']!r}: {r['file']}: {r['reason']}" for r in self.skipped[:_SHOWN])
        listed = f" All are listed in {self.path}." if self.path is not None else ""
        full = len(self.skipped) == self.tried
        remedy = "Correct the files." if full else "Correct the files, or raise data.bad_media_budget."
        raise MokaError(
            f"{self.name}: {len(self.skipped)} of {self.tried} samples have media that cannot be used, and "
            + ("none is left" if full else f"the budget allows {self.allowed}")
            + f". The first: {first}.{listed} {remedy}"
        )


def find_usable(
    dataset: Any,
    *,
    budget: float = 0.01,
    workers: int | None = None,
    decoding: MediaDecoding | None = None,
    name: str = "data",
    share: tuple[int, int] = (0, 1),
) -> SkipReport:
    """Find the samples of which every medium can be used; all are tried, each file once.

    The result depends on the files only, not on ``workers``.

    Args:
        dataset: map-style, of checked samples with media as paths or bytes.
        budget: share of the samples that may be left out, as in `BadMediaPolicy`.
        workers: threads; decoding releases Python's lock. Default: the cores of this process.
        decoding: as the run will decode; media of kinds in its features are looked up there, and not decoded or read.
        name: of the data set, for the progress bar and messages.
        share: (k, n): of n processes that try a part each, this is the k-th; `joined` puts their reports together, and
            checks the budget.

    Raises:
        MokaError: more bad samples than the budget allows, a sample that cannot be read, or one without features.
    """

    decoding = decoding or MediaDecoding()

    def look(kind: str, medium: Any) -> BadMediaError | NotCachedError | None:
        try:
            if decoding.features is not None and kind in decoding.features.kinds:
                decoding.features.check(kind, medium)
            else:
                decoding.decode(kind, medium)
        except (BadMediaError, NotCachedError) as error:
            return error
        return None

    skipped = []
    mine = range(share[0], len(dataset), share[1])
    tried = try_media(((index, dataset[index]) for index in mine), look, workers)
    for index, sample, errors in tqdm(
        tried, f"trying media of {name}", len(mine), unit="sample", delay=BAR_AFTER_S, leave=False
    ):
        for (kind, medium), error in zip(media_parts(sample), errors, strict=True):
            if isinstance(error, NotCachedError):
                raise MokaError(f"{name}: sample {sample['id']!r}: {error}") from error
            if error is not None:
                file = error.file if medium is not None else f"{kind} bytes of sample {sample['id']!r}"
                found = {"index": index, "id": sample["id"], "file": file, "reason": error.reason, "action": "skip"}
                skipped.append(found)
                break
    report = SkipReport(name, len(dataset), BadMediaPolicy("skip", budget).allowed(len(dataset)), skipped)
    if share[1] == 1:
        report.check()
    return report


def joined(reports: Sequence[SkipReport]) -> SkipReport:
    """Return the report of a data set of which several processes tried a part each.

    Raises:
        MokaError: more bad samples than the budget allows.
    """
    found = {record["index"]: record for report in reports for record in report.skipped}
    full = dataclasses.replace(reports[0], skipped=[found[index] for index in sorted(found)])
    full.check()
    return full


def read_usable(
    report_path: str | os.PathLike[str], samples: int, *, budget: float = 0.01, name: str = "data"
) -> SkipReport:
    """Return what `find_usable` found and `SkipReport.write` wrote, without trying the files again.

    Args:
        samples: of the data set; a report of another number of samples is refused.

    Raises:
        MokaError: no report there, one of another data set, or more bad samples than the budget allows.
    """
    path = Path(report_path)
    try:
        totals, *records = map(json.loads, path.read_text("utf-8").splitlines())
        tried = totals["tried"]
        # A file that has gone bad since may be listed too, by the data set that met it.
        skipped = [record for record in records if record["action"] == "skip"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MokaError(f"{path} is no report of tried media ({error}). Let the files be tried again.") from error
    if tried != samples or totals["skipped"] != len(skipped):
        raise MokaError(
            f"{path} is of {tried} samples, and the data set has {samples}. Delete it to have the files tried again."
        )
    report = SkipReport(name, tried, BadMediaPolicy("skip", budget).allowed(tried), skipped, path)
    report.check()
    return report


def try_media(
    samples: Iterable[tuple[int, dict[str, Any]]], look: Callable[[str, Any], T], workers: int | None = None
) -> Iterator[tuple[int, dict[str, Any], list[T]]]:
    """Return what ``look(kind, medium)`` says of every medium, in parallel; results come in the order of the samples.

    A path is looked at once, however many samples name it. Bytes and decoded media are let go as soon as they were
    looked at: the sample comes back with None in their place.

    Args:
        samples: (index, sample); read in this thread.
        look: called in threads. What it raises is raised here.
        workers: threads; the cores of this process by default.
    """
    workers = workers or usable_cores()
    known: dict[tuple[str, str], Future[T]] = {}
    waiting: deque[tuple[int, dict[str, Any], list[Future[T]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:

        def submit(kind: str, medium: Any) -> Future[T]:
            if not isinstance(medium, str):
                return pool.submit(look, kind, medium)
            if (kind, medium) not in known:
                known[kind, medium] = pool.submit(look, kind, medium)
            return known[kind, medium]

        def finished() -> tuple[int, dict[str, Any], list[T]]:
            index, sample, futures = waiting.popleft()
            return index, sample, [future.result() for future in futures]

        try:
            for index, sample in samples:
                futures = [submit(kind, medium) for kind, medium in media_parts(sample)]
                waiting.append((index, map_media(sample, lambda _, m: m if isinstance(m, str) else None), futures))
                if len(waiting) > _AHEAD * workers:
                    yield finished()
            while waiting:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Return the cores that this process may use: its share of them, if a launcher started several on this machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
