"""Streams: samples of data sets that are too large to index, read in order and never kept.

    JSONL lines | tar shards (WebDataset) | tables (`datasets`) | any map-style data set
        -> an endless pass over each, shuffled in a buffer -> mixed by weight -> encoded, a share for each process and worker

The mixed stream is one sequence of samples, the same for a seed, regardless of what reads it. Process ``rank`` of R and worker w of W
take from it the batches that are theirs, so that no sample is read twice, every process gets as many, and a run resumes at
the batch where it stopped, also with other numbers of processes and workers. What belongs to others is passed over without
being decoded.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from moka.data.dataset import absolute_paths, checked_root
from moka.data.encoding import encode_sample
from moka.data.formats.files import open_table, table_rows
from moka.data.formats.general import ROW_MAKERS
from moka.data.jsonl import parse_line, read_line
from moka.data.media import MediaDecoding, UnusableError
from moka.data.media_io import BadMediaError, file_problem
from moka.data.schema import check_sample, map_media
from moka.distributed import rank_and_world_size
from moka.errors import MokaError
from moka.io import append_jsonl

DEFAULT_BUFFER = 1000  # samples that are shuffled with each other
_WARM_UP = 100  # samples seen before the share of bad ones counts
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Source(Protocol):
    """One source of a stream."""

    def references(self, order: np.random.Generator) -> Iterator[Any]:
        """Yield what means each sample, once; ``order`` shuffles the files of the source."""

    def read(self, reference: Any) -> dict[str, Any]:
        """Return the checked sample, media undecoded."""


class JsonlLines:
    """The lines of a JSONL file in the format of `moka.data.schema`.

    Args:
        path: the file.
        media_root: folder that relative media paths start from and that none may leave; default: the file's own.
    """

    def __init__(self, path: str | os.PathLike[str], media_root: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        if problem := file_problem(self.path):
            raise MokaError(f"{self.path}: {problem}. Give a JSONL file, one sample a line.")
        self.media_root = checked_root(self.path.parent if media_root is None else media_root)

    def references(self, order: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Yield (line number, first byte) of every line that is not blank."""
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset
                offset += len(line)

    def read(self, reference: tuple[int, int]) -> dict[str, Any]:
        """Read and check one line."""
        number, offset = reference
        where = f"{self.path}:{number}"
        return absolute_paths(check_sample(read_line(self.path, offset, where), where), self.media_root, where)


@dataclass(frozen=True)
class TarSample:
    """The files of one sample in a tar shard: name -> (first byte, bytes)."""

    shard: str
    key: str
    members: Mapping[str, tuple[int, int]]


class TarShards:
    """Tar shards in the layout of WebDataset: ``KEY.json`` with a sample in our format, and its media as ``KEY.EXTENSION``.

    A media part names the file, or only its extension: ``{"type": "image", "image": "jpg"}``. The files of one key follow
    each other.

    Args:
        pattern: a path with ``*`` or ``{000..099}``.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.shards = expand_shards(pattern)

    def references(self, order: np.random.Generator) -> Iterator[TarSample]:
        """Yield the samples of all shards, whose order is shuffled; only headers are read."""
        for index in order.permutation(len(self.shards)):
            shard = self.shards[index]
            try:
                with tarfile.open(shard) as file:
                    files = ((m.name, (m.offset_data, m.size)) for m in file if m.isfile())
                    for key, members in itertools.groupby(files, key=lambda one: _key(one[0])):
                        found = dict(members)
                        if any(name.endswith(".json") for name in found):
                            yield TarSample(shard, key, found)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise MokaError(f"{shard} cannot be read as a tar file ({error}). Copy it again.") from error

    def read(self, reference: TarSample) -> dict[str, Any]:
        """Read the sample's JSON and the bytes of its media."""
        where = f"{reference.shard}:{reference.key}"
        name = next(name for name in reference.members if name.endswith(".json"))
        raw = parse_line(self._bytes(reference, name), where)
        if isinstance(raw, dict):
            raw.setdefault("id", reference.key)
        sample = check_sample(raw, where)

        def load(kind: str, medium: Any) -> Any:
            if not isinstance(medium, str):
                return medium
            for candidate in (medium, f"{reference.key}.{medium}", str(PurePosixPath(name).parent / medium)):
                if candidate in reference.members:
                    return self._bytes(reference, candidate)
            raise MokaError(
                f"{where}: {kind} {medium!r} is not among the files of its key: {', '.join(reference.members)}."
            )

        return map_media(sample, load)

    def _bytes(self, reference: TarSample, name: str) -> bytes:
        offset, size = reference.members[name]
        with open(reference.shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


def _key(name: str) -> str:
    """Return the name of a member up to the first point of its last part."""
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def expand_shards(pattern: str) -> list[str]:
    """Return the paths that a pattern with ``*`` or ``{000..099}`` means, in order.

    Raises:
        MokaError: a file that is not there, or no match.
    """
    found = _BRACES.search(pattern)
    if found is not None:
        first, last = found[1], found[2]
        names = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        return [
            path for name in names for path in expand_shards(pattern[: found.start()] + name + pattern[found.end() :])
        ]
    paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    missing = next((path for path in paths if file_problem(Path(path))), None)
    if not paths or missing is not None:
        raise MokaError(f"{missing or pattern}: {file_problem(Path(missing)) if missing else 'no such shard'}.")
    return paths


class TableRows:
    """The rows of a data set that `datasets` streams, in one of our formats.

    Args:
        format: name of the format.
        make: a row -> a sample.
        what: arguments of ``datasets.load_dataset``.
    """

    def __init__(self, format: str, make: Callable[[dict[str, Any]], dict[str, Any]], what: dict[str, Any]) -> None:
        self.format, self.make, self.what = format, make, what
        self.rows = open_table(what["path"], what, streaming=True)

    def references(self, order: np.random.Generator) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every row, with the stored bytes of its media."""
        yield from enumerate(table_rows(self.rows), start=1)

    def read(self, reference: tuple[int, dict[str, Any]]) -> dict[str, Any]:
        """Make a sample of a row."""
        number, row = reference
        where = f"{self.what['path']}: row {number}"
        try:
            return check_sample(self.make(row), where)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise MokaError(f"{where}: is not a record of format {self.format} ({error}).") from error


class MappedSamples:
    """A map-style data set of checked samples, in an order of its own for each pass."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def references(self, order: np.random.Generator) -> Iterator[int]:
        """Yield every index."""
        return iter(order.permutation(len(self.samples)).tolist())

    def read(self, reference: int) -> dict[str, Any]:
        """Return the sample at an index."""
        return self.samples[reference]


class SampleStream:
    """Sources mixed by weight into one endless sequence of samples.

    Args:
        sources: at least one.
        weights: of each: how often a sample comes from it, relative to the others.
        seed: of the order.
        buffer: samples of each source that are shuffled with each other.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], seed: int = 0, buffer: int = DEFAULT_BUFFER
    ) -> None:
        self.sources, self.seed, self.buffer = list(sources), seed, buffer
        self.notes: tuple[str, ...] = ()
        self.weights = np.asarray(weights, float) / np.sum(weights)

    def __iter__(self) -> Iterator[tuple[Source, Any]]:
        """Yield (source, reference) without end; the same sequence each time."""
        choose = np.random.default_rng([self.seed, 0])
        passes = [self._passes(index) for index in range(len(self.sources))]
        while True:
            chosen = int(choose.choice(len(passes), p=self.weights)) if len(passes) > 1 else 0
            yield self.sources[chosen], next(passes[chosen])

    def _passes(self, index: int) -> Iterator[Any]:
        """Yield the references of one source, pass after pass, each shuffled within the buffer."""
        source = self.sources[index]
        for number in itertools.count():
            draw = np.random.default_rng([self.seed, 1 + index, number])
            waiting: list[Any] = []
            for reference in source.references(draw):
                if len(waiting) < self.buffer:
                    waiting.append(reference)
                    continue
                place = int(draw.integers(len(waiting)))
                yield waiting[place]
                waiting[place] = reference
            if not waiting:
                raise MokaError(f"a streamed source has no sample: {_describe(source)}.")
            for place in draw.permutation(len(waiting)):
                yield waiting[place]

    def first(self, number: int) -> list[dict[str, Any]]:
        """Return the first samples of the sequence, undecoded."""
        return [source.read(reference) for source, reference in itertools.islice(self, number)]


def _describe(source: Any) -> str:
    return str(getattr(source, "path", getattr(source, "pattern", type(source).__name__)))


class EncodedStream(IterableDataset):
    """The batches of one process as encoded samples, one after another, without end.

    A sample that cannot be used (too long, no answer, bad media if ``on_bad_media`` allows) is replaced by the last good one
    of the same worker, and reported.

    Args:
        stream: the samples.
        processor: a ``MokaProcessor``.
        max_length: tokens; text is shortened to fit.
        batch_size: samples of a batch on one process.
        decoding: how media become pictures and sound.
        on_bad_media: "error", or "skip" or "substitute", which are one here.
        budget: share of the samples whose media may be bad.
        report_path: a JSONL file that collects what was replaced.
    """

    def __init__(
        self,
        stream: SampleStream,
        processor: Any,
        max_length: int | None,
        batch_size: int,
        decoding: MediaDecoding | None = None,
        on_bad_media: str = "error",
        budget: float = 0.01,
        report_path: Path | None = None,
    ) -> None:
        self.stream, self.processor, self.max_length, self.batch_size = stream, processor, max_length, batch_size
        self.decoding, self.on_bad_media, self.budget = decoding or MediaDecoding(), on_bad_media, budget
        self.report_path = report_path
        self.start = 0  # batches of each process that an earlier part of the run has consumed
        self.share = rank_and_world_size()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rank, world = self.share
        last: dict[str, Any] | None = None
        bad = seen = 0
        for position, (source, reference) in enumerate(self.stream):
            batch, place = divmod(position, world * self.batch_size)
            if batch < self.start or place // self.batch_size != rank or (batch - self.start) % workers != worker_index:
                continue
            seen += 1
            try:
                last = self._encode(source, reference)
            except (BadMediaError, UnusableError) as error:
                is_media = isinstance(error, BadMediaError)
                if is_media and self.on_bad_media == "error":
                    raise
                bad += is_media
                self._report(position, str(error))
                if last is None or (seen > _WARM_UP and bad > self.budget * seen):
                    raise MokaError(
                        f"{bad} of {seen} streamed samples have media that cannot be used, more than "
                        f"data.bad_media_budget={self.budget:g} allows, or the first one has. The last: {error}"
                    ) from error
            yield last

    def _encode(self, source: Source, reference: Any) -> dict[str, Any]:
        sample = self.decoding.decode_sample(source.read(reference))
        try:
            return encode_sample(self.processor, sample, self.max_length)[0]
        except UnusableError as error:
            raise UnusableError(f"sample {sample['id']!r}: {error}") from error

    def _report(self, position: int, reason: str) -> None:
        if self.report_path is not None:
            record = {"index": position, "id": reason.partition(":")[0], "reason": reason, "action": "replaced"}
            append_jsonl(self.report_path, record)

    def of_one_process(self) -> EncodedStream:
        """Return the same stream from its beginning, as a single process would see it."""
        single = EncodedStream(self.stream, self.processor, self.max_length, self.batch_size, self.decoding)
        single.share = (0, 1)
        return single

    def summary(self, samples: int = 64) -> str:
        """Return what the first samples take, as no length of a stream is counted."""
        lengths = [len(one["input_ids"]) for one in itertools.islice(self.of_one_process(), samples)]
        return f"streamed: the first {len(lengths)} samples take {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most"


@dataclass(frozen=True)
class MixtureEntry:
    """One source of a mixture: how often a sample comes from it, relative to the others; whether it is streamed, and how many of
    its samples are then shuffled with each other.
    """

    source: str | dict
    weight: float = 1.0
    streaming: bool = False
    buffer: int | None = None

    def __post_init__(self) -> None:
        for name in ("source", "weight", "buffer"):
            value = getattr(self, name)
            if (value is not None and not value) or (name != "source" and value is not None and value < 0):
                raise MokaError(
                    f"data source {self.source!r}: {name} is {value!r}; allowed: a file, a task or a format, and numbers above 0."
                )

    @property
    def streamed(self) -> bool:
        return self.streaming or is_tar(self.source)

    def open(self, open_samples: Any, media_root: str | None) -> Source:
        """Open the source as a stream reads it.

        Args:
            open_samples: opens one that is not streamed, as a map-style data set.

        Raises:
            MokaError: a source that cannot be streamed.
        """
        source = self.source
        if not self.streamed:
            return MappedSamples(open_samples(source))
        if isinstance(source, dict) and source.get("hub"):
            name = str(source.get("format"))
            if name not in ROW_MAKERS:
                raise MokaError(f"streaming: format {name!r} is not known; allowed are {', '.join(ROW_MAKERS)}.")
            what = {"path": source["hub"], "name": source.get("config"), "split": source.get("split", "train")}
            return TableRows(name, ROW_MAKERS[name], what)
        if is_tar(source):
            return TarShards(str(source))
        if isinstance(source, str) and source.endswith((".jsonl", ".json")):
            return JsonlLines(source, media_root)
        raise MokaError(
            f"streaming: {source!r} cannot be streamed; a JSONL file, tar shards (*.tar) or a format with hub can."
        )


def open_stream(
    entries: Sequence[MixtureEntry], open_samples: Any, *, seed: int, media_root: str | None
) -> SampleStream:
    """Open the entries of a mixture, of which one at least is streamed, as `MixtureEntry.open` does."""
    sources = [entry.open(open_samples, media_root) for entry in entries]
    buffers = [entry.buffer for entry in entries if entry.buffer is not None]
    return SampleStream(sources, [entry.weight for entry in entries], seed, min(buffers, default=DEFAULT_BUFFER))


def is_tar(source: Any) -> bool:
    """Return whether a source names tar shards."""
    return isinstance(source, str) and source.endswith(".tar")
