"""From what the configuration names to a data set of model inputs.

"embedded:TASK" | {source: embedded:TASK, noise: ...} | "train.jsonl" | {format: ave, root: ...} | a list of these
    -> open_samples: checked samples, media as paths -> open_source: media decoded -> EncodedDataset -> Collator
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moka.data.formats import FORMATS, open_format
from moka.data.jsonl import JsonlDataset
from moka.data.media import SUBSTITUTE, AudioWindows, BadMediaPolicy, DecodedDataset
from moka.data.streaming import SampleStream, is_tar, open_stream
from moka.demo import stamps
from moka.demo.digit_tasks import EmbeddedTask
from moka.demo.embedded import ATTRIBUTION, PREFIX, Split
from moka.demo.knobs import KNOBS, Knobs
from moka.demo.stamp_tasks import PhotographsTask
from moka.errors import MokaError, nearest
from moka.io import append_jsonl, read_jsonl
from moka.modeling.encoders import RESOLVERS
from moka.modeling.processing import IGNORE, TooLongError

_TRIES = 20
# What published data sets call the splits of ours.
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
PHOTOGRAPHS = "embedded:photographs"
RESOLVERS[PREFIX] = stamps.resolve_encoder_file  # names of encoders, for every way in which a model is built
Source = str | dict[str, Any] | list[Any]


def describe_source(source: Source | None) -> str:
    """Return a source on one line, for tables and messages."""
    if isinstance(source, dict) and "source" in source:
        weight = f" x {source['weight']:g}" if "weight" in source else ""
        knobs = "".join(f", {name} {source[name]}" for name in KNOBS if name in source)
        return describe_source(source["source"]) + knobs + weight
    if isinstance(source, list):
        return " + ".join(describe_source(one) for one in source)
    if isinstance(source, dict):
        split = f", {source['split']}" if "split" in source else ""
        return f"{source.get('format')} in {source.get('root')}{split}"
    return str(source)


def open_samples(
    source: Source,
    split: Split,
    *,
    stage: int = 2,
    size: int | None = None,
    seed: int = 0,
    media_root: str | None = None,
    require_answer: bool = True,
) -> Any:
    """A map-style data set of checked samples whose media are still paths (those of embedded tasks are decoded).

    Args:
        source: ``embedded:TASK``, or ``{source: embedded:TASK, noise: ...}`` (see ``moka.demo.knobs``), the path of a JSONL
            file of chat messages, a mapping ``{format: NAME, root: FOLDER, split: ..., media_root: ..., option: value}``
            (see ``moka.data.formats``), or a list of these, joined.
        split: which split of an embedded task or of a format that names none; a JSONL file is a split by itself.
        stage: 1 pairs single media with captions (embedded tasks), 2 asks questions.
        size: use that many samples, from the start.
        seed: of the embedded training questions.
        media_root: where the media paths of a JSONL file start.
    Raises:
        MokaError: no such file, task or format; a mapping with unknown keys.
    """
    settings: dict[str, Any] = {
        "stage": stage,
        "seed": seed,
        "media_root": media_root,
        "require_answer": require_answer,
    }
    if is_embedded(source):
        knobs = {} if isinstance(source, str) else {**source}  # type: ignore[dict-item]
        name = str(knobs.pop("source", source)).removeprefix(PREFIX)
        task: Any = PhotographsTask if PREFIX + name == PHOTOGRAPHS else EmbeddedTask
        return task(name, split, size=size, seed=seed, stage=stage, knobs=Knobs(**knobs))
    entries = mixture_of(source)
    if entries is not None and is_streamed(source):
        open_one = partial(open_samples, split=split, **settings)
        return open_stream(entries, open_one, seed=seed, media_root=media_root)
    if entries is not None:
        samples: Any = WeightedDataset(
            [open_samples(entry["source"], split, **settings) for entry in entries],  # type: ignore[arg-type]
            [entry.get("weight", 1.0) for entry in entries],
            seed,
        )
    elif isinstance(source, list):
        if not source:
            raise MokaError("A list of data sources is empty; name at least one.")
        samples = Joined([open_samples(one, split, **settings) for one in source])  # type: ignore[arg-type]
    elif isinstance(source, dict):
        samples = _open_mapping(source, split, require_answer)
    else:
        samples = JsonlDataset(source, media_root=media_root, require_answer=require_answer)
    return samples if size is None else Prefix(samples, size)


def is_embedded(source: Source | None) -> bool:
    """Return whether a source is one embedded task, as it is or with knobs."""
    if isinstance(source, dict) and set(source) > {"source"} and set(source) <= {"source", *KNOBS}:
        source = source["source"]
    return isinstance(source, str) and source.startswith(PREFIX)


_ENTRY = ("source", "weight", "streaming", "buffer")


def mixture_of(source: Source) -> list[dict[str, Any]] | None:
    """Return the entries of a mixture, ``{source, weight, streaming, buffer}`` each; None if the source is none.

    The knobs of an embedded task, which are written next to ``source``, are inside the entry's source.

    A mapping with ``source``, a list in which one has it, or tar shards are mixtures.

    Raises:
        MokaError: an unknown key, a weight that is no positive number, an entry without a source.
    """
    listed = source if isinstance(source, list) else [source]
    if not any(is_tar(one) or (isinstance(one, dict) and "source" in one) for one in listed):
        return None
    entries = [one if isinstance(one, dict) and "source" in one else {"source": one} for one in listed]
    for k, entry in enumerate(entries):
        known = (*_ENTRY, *KNOBS) if is_embedded(entry["source"]) else _ENTRY
        for key in entry:
            if key not in known:
                raise MokaError(
                    f"data source: unknown key {key!r} next to 'source'; known: {', '.join(known)}.{nearest(str(key), known)}"
                )
        knobs = {key: value for key, value in entry.items() if key in KNOBS}
        if knobs:
            rest = {key: value for key, value in entry.items() if key not in KNOBS}
            entries[k] = entry = {**rest, "source": {"source": entry["source"], **knobs}}
        weight, buffer = entry.get("weight", 1.0), entry.get("buffer", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise MokaError(
                f"data source: weight {weight!r} of {describe_source(entry['source'])}: give a number above 0."
            )
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise MokaError(
                f"data source: buffer {buffer!r} of {describe_source(entry['source'])}: give at least 1 sample."
            )
        if not entry["source"] or not isinstance(entry["source"], (str, dict)):
            raise MokaError(f"data source: source {entry['source']!r}: give a file, embedded:TASK or a format.")
    return entries


def is_streamed(source: Source | None) -> bool:
    """Return whether the samples of a source are streamed: it has tar shards, or an entry says so."""
    entries = None if source is None else mixture_of(source)
    return any(is_tar(entry["source"]) or bool(entry.get("streaming")) for entry in entries or [])


class WeightedDataset:
    """Several map-style data sets mixed by weight: as many samples as they have together, drawn by a seed.

    Of each data set its share of the samples is taken: a part of it, in random order, or all of it several times over.

    Args:
        parts: the data sets.
        weights: how often a sample comes from each, relative to the others.
        seed: of the choice and the order.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], seed: int = 0) -> None:
        self.parts = list(parts)
        total = sum(len(part) for part in parts)
        shares = np.asarray(weights, float) / np.sum(weights)
        ends = np.round(np.cumsum(shares) * total).astype(np.int64)
        numbers = np.diff(ends, prepend=0)
        draw = np.random.default_rng([seed, 7])
        part_of, index_of = [], []
        for which, (part, number) in enumerate(zip(self.parts, numbers, strict=True)):
            passes = [draw.permutation(len(part)) for _ in range(-(-int(number) // len(part)))]
            index_of.append(np.concatenate([*passes, np.zeros(0, np.int64)])[:number])
            part_of.append(np.full(number, which, np.int32))
        order = draw.permutation(total)
        self._part, self._index = np.concatenate(part_of)[order], np.concatenate(index_of)[order].astype(np.int64)

    def __len__(self) -> int:
        return len(self._part)

    def _at(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.parts[self._part[index]], int(self._index[index])

    def __getitem__(self, index: int) -> Any:
        part, place = self._at(index)
        return part[place]

    def where(self, index: int) -> str:
        part, place = self._at(index)
        return part.where(place) if hasattr(part, "where") else f"{type(part).__name__} {place}"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in notes_of(part))

    def missing_media(self, limit: int = 20, share: tuple[int, int] = (0, 1)) -> list[str]:
        """Look through the data sets themselves, each once."""
        parts = [part for part in self.parts if hasattr(part, "missing_media")]
        return [line for part in parts for line in part.missing_media(limit, share)][:limit]


def _open_mapping(source: dict[str, Any], split: Split, require_answer: bool) -> Any:
    options = dict(source)
    name, root = options.pop("format", None), options.pop("root", None)
    if name is None:
        colon = " YAML wants a space after each colon." if any(":" in str(key) for key in source) else ""
        raise MokaError(f"A data source has no 'format': {source!r}.{colon} Known: {', '.join(FORMATS)}.")
    if root is None and "hub" not in options:
        raise MokaError(f"A data source of format {name} has no 'root', the folder that has it: {source!r}.")
    chosen = options.pop("split", None) or _default_split(str(name), split)
    return open_format(name, root, chosen, require_answer=require_answer, **options)


def _default_split(name: str, split: Split) -> str | None:
    """Return what format ``name`` calls our split; None leaves the complaint about an unknown format to ``open_format``."""
    if name not in FORMATS:
        return None
    splits = FORMATS[name].splits
    if split == "test" and not any(theirs.startswith("train") for theirs in splits):
        return splits[0]  # all of it is for tests; the first is the one with published answers
    found = next((theirs for theirs in _SPLIT_NAMES[split] if theirs in splits), None)
    if found is None:
        raise MokaError(
            f"A data source of format {name} names no split, and none of it goes by {split!r}. It has "
            f"{', '.join(splits)}; say which one is meant (split: NAME, or --split NAME)."
        )
    return found


def open_source(
    source: Source,
    split: Split,
    *,
    stage: int = 2,
    size: int | None = None,
    seed: int = 0,
    media_root: str | None = None,
    on_bad_media: str = "error",
    bad_media_budget: float = 0.01,
    video_frames: int = 10,
    audio_windows: dict[str, Any] | None = None,
    report_path: str | Path | None = None,
    require_answer: bool = True,
    look_for_files: bool = True,
) -> Any:
    """A map-style data set of samples with decoded media: ``open_samples``, and what to do about bad files.

    Args:
        on_bad_media: "error", "substitute", or "skip", for which the caller leaves samples out (``moka.data.media_validation``).
        audio_windows: fields of ``moka.data.media.AudioWindows``: sound as several short clips.
        look_for_files: with on_bad_media "error", ``check_files`` at once; otherwise the caller does.
    Raises:
        MokaError: as ``open_samples``; media that are not there.
    """
    samples = open_samples(
        source, split, stage=stage, size=size, seed=seed, media_root=media_root, require_answer=require_answer
    )
    if isinstance(samples, SampleStream) or is_embedded(source):
        return samples
    if look_for_files and on_bad_media == "error":
        check_files(samples)
    return DecodedDataset(
        samples,
        BadMediaPolicy(on_bad_media, bad_media_budget),
        seed=seed,
        video_frames=video_frames,
        audio_windows=AudioWindows.from_dict(audio_windows),
        report_path=report_path,
    )


def check_files(samples: Any, share: tuple[int, int] = (0, 1)) -> None:
    """Look for every media file of a data set of undecoded samples.

    Args:
        share: (k, n): of n processes that look for a part each, this is the k-th.
    Raises:
        MokaError: the first file that is not there.
    """
    missing = samples.missing_media(limit=1, share=share)
    if missing:
        raise MokaError(
            f"{'; '.join(missing)}. Put the files under the media root, or leave the samples out: `moka data check "
            "--manifest` writes what is good; in training data.on_bad_media=skip or substitute does without."
        )


def attribution(source: Source) -> str:
    """Where the data come from and under which licence, for model cards."""
    if isinstance(source, list):
        return "".join(dict.fromkeys(attribution(one) for one in source))
    if isinstance(source, dict) and "source" in source:
        return attribution(source["source"])
    if isinstance(source, dict):
        about = FORMATS[source["format"]].about if source.get("format") in FORMATS else ""
        return f"- {describe_source(source)}: {about}\n"
    if source == PHOTOGRAPHS:
        return stamps.ATTRIBUTION
    return ATTRIBUTION if source.startswith(PREFIX) else f"- {source}\n"


def notes_of(samples: Any) -> tuple[str, ...]:
    """Return what the readers left out of a data set and why, a line each; decoded or not."""
    if hasattr(samples, "notes"):
        return tuple(samples.notes)
    return notes_of(samples.dataset) if hasattr(samples, "dataset") else ()


def where_of(samples: Any, index: int) -> str:
    """Return file and line of a sample, of a data set that may decode or select others."""
    while not hasattr(samples, "where") and hasattr(samples, "dataset"):
        index = int(samples.indices[index]) if hasattr(samples, "indices") else index
        samples = samples.dataset
    return samples.where(index) if hasattr(samples, "where") else f"sample {index}"


class Joined:
    """Several data sets as one, one after another."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Any:
        part, place = self._place(index)
        return part[place]

    def where(self, index: int) -> str:
        part, place = self._place(index)
        return part.where(place) if hasattr(part, "where") else f"{type(part).__name__} {place}"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in notes_of(part))

    def missing_media(self, limit: int = 20, share: tuple[int, int] = (0, 1)) -> list[str]:
        parts = [part for part in self.parts if hasattr(part, "missing_media")]
        return [line for part in parts for line in part.missing_media(limit, share)][:limit]


class Prefix:
    """The first ``size`` items of a data set, or all where it has fewer."""

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size = dataset, min(size, len(dataset))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.dataset[index]

    @property
    def notes(self) -> tuple[str, ...]:
        return notes_of(self.dataset)

    def where(self, index: int) -> str:
        return self.dataset.where(index)

    def missing_media(self, limit: int = 20, share: tuple[int, int] = (0, 1)) -> list[str]:
        return self.dataset.missing_media(limit, share)


def stand_ins(seed: int, index: int, size: int) -> Iterator[int]:
    """A sample of ``size`` and those that take its place, one after another, where it cannot be used."""
    draw = np.random.default_rng([seed, index])
    for _ in range(_TRIES):
        yield index
        index = int(draw.integers(size))


class EncodedDataset:
    """Samples as model inputs, for training.

    Text is shortened to fit ``max_length``; a sample that cannot be (its media are too long) or that has nothing to learn from
    is replaced by another, chosen only by (seed, index), and counted in ``dropped``. So is, unless ``on_bad_media`` is "error",
    one that the chat template or a front end refuses.
    """

    lengths: Any = None  # of the samples (`moka.data.lengths`), where batches are grouped by them

    def __init__(
        self,
        samples: Any,
        processor: Any,
        max_length: int | None,
        seed: int = 0,
        report_path: str | Path | None = None,
        on_bad_media: str = "error",
    ) -> None:
        self.samples, self.processor, self.max_length, self.seed = samples, processor, max_length, seed
        self.on_bad_media = on_bad_media
        self.report_path = None if report_path is None else Path(report_path)
        self._dropped: dict[int, str] = {}
        self._shortened: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def dropped(self) -> dict[int, str]:
        """Index -> reason of every sample replaced so far; with a report also by the other loader workers and ranks."""
        if self.report_path is not None:
            for record in read_jsonl(self.report_path):
                if record["action"] == "replaced":
                    self._dropped.setdefault(record["index"], record["reason"])
        return self._dropped

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for tried in stand_ins(self.seed, int(index) % len(self), len(self)):  # -1 and the last index are one sample
            sample = self.samples[tried]
            tried = sample.get(SUBSTITUTE, tried)  # whose media replace those of the sample asked for
            try:
                encoded = self.processor.encode(sample["messages"], max_length=self.max_length, truncate=True)
                if any(label != IGNORE for label in encoded["labels"]):
                    self._shorten(tried, sample.get("id", str(tried)), encoded.pop("cut_from", None))
                    return {**encoded, "sample_id": str(sample.get("id", tried))}
                reason = "no supervised token: the assistant's text is empty"
            except TooLongError as error:
                reason = str(error)
            except Exception as error:  # a template that refuses the chat, a tokenizer, features of another width
                reason = " ".join(str(error).split())
                if self.on_bad_media == "error":
                    raise MokaError(
                        f"{where_of(self.samples, tried)}: sample {sample.get('id')!r}: {reason}"
                    ) from error
            self._drop(tried, sample.get("id", str(tried)), reason)
        raise MokaError(f"{_TRIES} samples in a row cannot be used; the last, {sample.get('id')}: {reason}")

    def _drop(self, index: int, sample_id: str, reason: str) -> None:
        if index in self._dropped:
            return  # by this process; another one may add a second line, which counts once
        self._dropped[index] = reason
        self._report({"index": index, "id": sample_id, "reason": reason, "action": "replaced"})

    def _shorten(self, index: int, sample_id: str, tokens: int | None) -> None:
        if tokens is None or index in self._shortened:
            return
        self._shortened.add(index)
        reason = f"its {tokens:,} tokens were cut to {self.max_length:,}: the end of its text is lost"
        self._report({"index": index, "id": sample_id, "reason": reason, "action": "shortened"})

    def _report(self, record: dict[str, Any]) -> None:
        if self.report_path is not None:
            append_jsonl(self.report_path, record)


class Collator:
    """Encoded samples to one padded batch of tensors. Left padding aligns the answers, so that few positions carry loss.

    ``sample_ids`` (a list of text, one for each row) names the samples of a batch, for messages; no model takes it.
    """

    def __init__(self, processor: Any, padding_side: str = "left") -> None:
        self.processor, self.padding_side = processor, padding_side

    def __call__(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.processor.pad(encoded, padding_side=self.padding_side))
        batch["sample_ids"] = [str(one.get("sample_id", "")) for one in encoded]
        return batch
