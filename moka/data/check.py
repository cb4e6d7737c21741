"""A data set looked at from end to end before a run: ``moka data check``.

    samples --schema, ids--> media --decode, front end--> placeholders and text --processor--> lengths, labels

Nothing is computed by a model: the processor only reports what each sample would become.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S, where_of
from moka.data.lengths import token_counter
from moka.data.media import MediaDecoding
from moka.data.media_io import BadMediaError, file_problem
from moka.data.media_validation import try_media
from moka.data.schema import map_media, media_parts
from moka.errors import MokaError
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.hf_processing import ChatProcessor
from moka.modeling.media import Waveform
from moka.modeling.processing import IGNORE, MokaProcessor, TooLongError

# Kind of problem -> what it is called in the table, in the order in which a sample meets them.
PROBLEMS = {
    "schema": "samples that cannot be read",
    "duplicate": "ids used before",
    "missing": "media files absent, empty or unreadable",
    "decoding": "media that cannot be decoded",
    "encoder": "media that no encoder takes",
    "template": "chats that the template or the tokenizer refuses",
    "too long": "samples too long, though their text is shortened",
    "unsupervised": "samples without a supervised token",
}


@dataclass(frozen=True)
class Problem:
    """A fault of one sample: ``kind`` of `PROBLEMS`; ``text`` says where and what; ``file`` for media."""

    kind: str
    index: int
    text: str
    file: str | None = None


@dataclass
class CheckReport:
    """The result of `check_samples`.

    Attributes:
        name: of the data set.
        samples: how many it has.
        max_length: tokens that a sample may have, if limited.
        problems: at most one of a kind for each sample.
        categories: samples of each category ("-": none).
        layouts: samples with each combination of media, such as "1 image, 1 audio" ("text only": none).
        sampling_rates: sound files by their own rate (Hz); each file counts once.
        resampled: those whose rate is not the encoder's.
        cut: sound files longer than what the encoder takes, whose rest it never hears.
        lengths: tokens of each sample that could be encoded, media expanded, before any shortening.
        media_tokens: those of them that are placeholders of media.
        supervised: tokens that carry loss, after shortening.
        shortened: samples longer than ``max_length`` whose text is cut to fit.
    """

    name: str
    samples: int
    max_length: int | None = None
    problems: list[Problem] = field(default_factory=list)
    categories: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    sampling_rates: Counter[int] = field(default_factory=Counter)
    resampled: int = 0
    cut: int = 0
    lengths: list[int] = field(default_factory=list)
    media_tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    shortened: int = 0

    @property
    def good(self) -> list[int]:
        """Indices of the samples without a problem, ascending."""
        bad = {problem.index for problem in self.problems}
        return [index for index in range(self.samples) if index not in bad]

    def of(self, kind: str) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """Return the full report, fit for JSON."""
        return {
            "name": self.name,
            "samples": self.samples,
            "good": len(self.good),
            "max_length": self.max_length,
            "problems": {
                kind: [
                    {"index": p.index, "text": p.text, **({"file": p.file} if p.file else {})} for p in self.of(kind)
                ]
                for kind in PROBLEMS
            },
            "categories": dict(self.categories.most_common()),
            "media_per_sample": dict(self.layouts.most_common()),
            "sampling_rates": {str(rate): count for rate, count in sorted(self.sampling_rates.items())},
            "resampled": self.resampled,
            "longer_than_encoder": self.cut,
            "tokens": spread(self.lengths),
            "media_tokens": spread(self.media_tokens),
            "supervised_tokens": spread(self.supervised),
            "shortened": self.shortened,
        }


def spread(values: list[int]) -> dict[str, int]:
    """Return the smallest, median, 95th percentile and largest; each is one of the values. Empty for none."""
    if not values:
        return {}
    quantiles = np.quantile(values, [0, 0.5, 0.95, 1], method="higher")
    return dict(zip(("min", "median", "p95", "max"), map(int, quantiles), strict=True))


def check_samples(
    samples: Any,
    processor: MokaProcessor | ChatProcessor,
    *,
    encoders: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    decoding: MediaDecoding | None = None,
    workers: int | None = None,
    name: str = "data",
) -> CheckReport:
    """Look at every sample and try every medium once, in parallel.

    Args:
        samples: map-style, as `moka.data.sources.open_samples` opens it: media as paths, bytes or decoded.
        processor: of the model that will learn from them.
        encoders: modality -> encoder, whose ``length_in_seconds`` is the longest sound it takes; weights do not matter.
        max_length, decoding: as the run will use them.
        workers: threads for the media; the cores of this process by default.
        name: of the data set, for the report and the progress bar.

    Raises:
        MokaError: what is wrong with the settings rather than with a sample.
    """
    report = CheckReport(name, len(samples), max_length)
    look = _Look(processor, encoders or {}, decoding or MediaDecoding())
    # Of a Hugging Face model only its processor knows how many tokens a medium takes.
    counter = token_counter(processor) if isinstance(processor, MokaProcessor) else None
    bar = tqdm(desc=f"checking {name}", total=len(samples), unit="sample", delay=BAR_AFTER_S, leave=False)
    with bar:
        counted: set[tuple[str, str]] = set()
        for index, sample, seen in try_media(_readable(samples, report, bar), look, workers):
            where = f"{where_of(samples, index)}: sample {sample['id']!r}"
            _count_media(report, sample, seen, counted)
            bad = _media_problem(where, index, sample, seen)
            if bad is not None:
                report.problems.append(bad)
            elif counter is None:
                _count_tokens(report, processor, where, index, look.decoding.decode_sample(sample))
            else:
                items = iter([facts.items for facts in seen])
                light = map_media(sample, lambda kind, medium: [0] * next(items))  # noqa: B023  # used at once
                _count_tokens(report, counter, where, index, light)
            bar.update()
    report.problems.sort(key=lambda problem: problem.index)
    return report


def _readable(samples: Any, report: CheckReport, bar: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the samples that can be read; the others, and ids that come again, become problems."""
    ids: dict[str, int] = {}
    for index in range(len(samples)):
        try:
            sample = samples[index]
        except MokaError as error:
            report.problems.append(Problem("schema", index, str(error)))
            bar.update()
            continue
        first = ids.setdefault(sample["id"], index)
        if first != index:
            text = f"{where_of(samples, index)}: id {sample['id']!r} is that of {where_of(samples, first)} too"
            report.problems.append(Problem("duplicate", index, text))
        report.categories[sample.get("category") or "-"] += 1
        kinds = Counter(kind for kind, _ in media_parts(sample))
        report.layouts[", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "text only"] += 1
        yield index, sample


@dataclass(frozen=True)
class _Facts:
    """The facts of one medium: items for the encoder, or a problem's (kind, reason, file)."""

    items: int = 0
    rate: int | None = None
    resampled: bool = False
    cut: bool = False
    problem: tuple[str, str, str | None] | None = None


class _Look:
    """Decodes one medium, passes it through its front end, and keeps only what is known of it then."""

    def __init__(
        self, processor: MokaProcessor | ChatProcessor, encoders: Mapping[str, Any], decoding: MediaDecoding
    ) -> None:
        self.processor, self.encoders, self.decoding = processor, encoders, decoding
        self.full_sound = dataclasses.replace(decoding, audio_windows=None)
        self.owner = {type_id: name for name, spec in processor.modalities.items() for type_id in spec["type_ids"]}

    def __call__(self, kind: str, medium: Any) -> _Facts:
        file = medium if isinstance(medium, str) else None
        if isinstance(medium, (str, bytes)) and (reason := file_problem(medium)):
            return _Facts(problem=("missing", reason, file))
        try:
            decoded = self.full_sound.decode(kind, medium)
        except BadMediaError as error:
            return _Facts(problem=("decoding", error.reason, file))
        items = self.decoding.decode(kind, decoded)
        items = items if isinstance(items, (list, tuple)) else [items]
        name = self.owner.get(MEDIA_TYPE_IDS[kind])
        if name is None:
            known = ", ".join(self.processor.modalities) or "none"
            reason = f"the model has no encoder for {kind}; its modalities: {known}"
            return _Facts(problem=("encoder", reason, file))
        if isinstance(self.processor, ChatProcessor):
            return self._sound(self.processor.sampling_rate, None, decoded, items)
        front_end = self.processor.front_ends[name]
        try:
            for item in items:
                front_end(item)
        except MokaError as error:
            return _Facts(problem=("encoder", str(error), file))
        seconds = getattr(self.encoders.get(name), "length_in_seconds", None)
        return self._sound(front_end.sampling_rate, seconds, decoded, items)

    @staticmethod
    def _sound(wanted: int | None, seconds: float | None, decoded: Any, items: Any) -> _Facts:
        if not isinstance(decoded, Waveform):
            return _Facts(len(items))
        longest = max(len(item.samples) / item.rate for item in items)
        return _Facts(
            items=len(items),
            rate=decoded.rate,
            resampled=wanted is not None and decoded.rate != wanted,
            cut=seconds is not None and longest > seconds + 1e-6,
        )


def _count_media(
    report: CheckReport, sample: dict[str, Any], seen: list[_Facts], counted: set[tuple[str, str]]
) -> None:
    for (kind, medium), facts in zip(media_parts(sample), seen, strict=True):
        if facts.rate is None or (kind, medium) in counted:
            continue
        if isinstance(medium, str):
            counted.add((kind, medium))
        report.sampling_rates[facts.rate] += 1
        report.resampled += facts.resampled
        report.cut += facts.cut


def _media_problem(where: str, index: int, sample: dict[str, Any], seen: list[_Facts]) -> Problem | None:
    for (part, _), facts in zip(media_parts(sample), seen, strict=True):
        if facts.problem is not None:
            kind, reason, file = facts.problem
            return Problem(kind, index, f"{where}: {part} {file or 'in memory'}: {reason}", file)
    return None


def _count_tokens(
    report: CheckReport, counter: MokaProcessor | ChatProcessor, where: str, index: int, sample: dict[str, Any]
) -> None:
    """Return what the sample becomes in training: its length, and what is left when it has to be shortened."""
    try:
        counter.check_chat(sample["messages"])
        encoded = counter.encode(sample["messages"])
        report.lengths.append(len(encoded["input_ids"]))
        report.media_tokens.append(sum(kind > 0 for kind in encoded["mm_token_type_ids"]))
        if report.max_length is not None and len(encoded["input_ids"]) > report.max_length:
            encoded = counter.encode(sample["messages"], max_length=report.max_length, truncate=True)
            report.shortened += 1
    except TooLongError as error:
        report.problems.append(Problem("too long", index, f"{where}: {error}"))
        return
    except MokaError as error:
        report.problems.append(Problem("template", index, f"{where}: {error}"))
        return
    supervised = sum(label != IGNORE for label in encoded["labels"])
    report.supervised.append(supervised)
    if not supervised:
        text = f"{where}: no token would be learnt from: every assistant message is blank"
        report.problems.append(Problem("unsupervised", index, text))
