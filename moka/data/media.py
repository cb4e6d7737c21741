"""Samples with decoded media, and what a run does about files that cannot be used.

The readers of files are in `moka.data.media_io`, the windows of sound in `moka.data.audio_segments`, and the trial of every
file before a run in `moka.data.media_validation`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moka.data.audio_segments import AudioWindows
from moka.data.dataset import SampleDataset, where_of
from moka.data.media_io import BadMediaError, load_audio, load_features, load_image, load_video
from moka.data.schema import map_media
from moka.errors import MokaError, NotCachedError, nearest
from moka.io import append_jsonl
from moka.modeling.media import AudioFeatures, Waveform

if TYPE_CHECKING:
    from moka.features.cache import FeatureCache

POLICIES = ("error", "skip", "substitute")
SUBSTITUTE = "substitute_index"  # key of a sample that replaces another: its own index
_TRIES = 20  # draws of a substitute: with the budget kept, that many bad ones in a row do not happen


@dataclass(frozen=True)
class MediaDecoding:
    """How media files are decoded: the same in training, evaluation and inference of a model.

    Attributes:
        video_frames: images taken from each video.
        audio_windows: windows that each sound is cut into; None: one item, the full sound.
        audio_track: number of the audio stream, from 0, in files with several (languages, commentaries).
        features: computed before, read instead of the media of their kinds.
    """

    video_frames: int = 10
    audio_windows: AudioWindows | None = None
    audio_track: int = 0
    features: FeatureCache | None = field(default=None, repr=False)

    @classmethod
    def of(cls, settings: Any) -> MediaDecoding:
        """Return the decoding that a ``data`` section, or what `to_dict` wrote, describes; missing settings have their defaults."""
        given = settings if isinstance(settings, Mapping) else vars(settings)
        known = {name: given[name] for name in ("video_frames", "audio_windows", "audio_track") if name in given}
        return cls(**{**known, "audio_windows": AudioWindows.from_dict(known.get("audio_windows"))})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, fit for JSON."""
        windows = None if self.audio_windows is None else dataclasses.asdict(self.audio_windows)
        track = {"audio_track": self.audio_track} if self.audio_track else {}
        return {"video_frames": self.video_frames, "audio_windows": windows, **track}

    def with_features(self, features: FeatureCache | None) -> MediaDecoding:
        return dataclasses.replace(self, features=features)

    def decode(self, kind: str, medium: Any) -> Any:
        """Decode one medium: a path or the bytes of a file; decoded ones pass, sound after it was cut into windows.

        Raises:
            BadMediaError: a file that cannot be used.
            MokaError: windows of ready-made features, which have no sound to cut; a medium that is not in `features`, which
                have its kind.
        """
        if self.features is not None and kind in self.features.kinds:
            return self.features.read(kind, medium)
        decoded = self._load(kind, medium) if isinstance(medium, (str, bytes)) else medium
        if kind != "audio" or self.audio_windows is None:
            return decoded
        if isinstance(decoded, AudioFeatures):
            name = medium if isinstance(medium, str) else f"audio features of kind {decoded.kind!r}"
            raise MokaError(
                f"{name}: audio_windows cut windows from sound, and these are ready-made features. Give the sound files, "
                "or take data.audio_windows out."
            )
        return self.audio_windows.cut(decoded) if isinstance(decoded, Waveform) else decoded

    def _load(self, kind: str, medium: str | bytes) -> Any:
        if kind == "image":
            return load_image(medium)
        if kind == "video":
            return load_video(medium, self.video_frames)
        return load_features(medium) if _is_array(medium) else load_audio(medium, track=self.audio_track)

    def decode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a checked sample with every path, and the bytes of every encoded file, replaced by its medium.

        Audio parts that name a ``.npy`` file become `AudioFeatures` of kind ``"mfcc"``, sound with `audio_windows` a list of
        `Waveform`, and media of kinds in `features` lists of features.

        Raises:
            BadMediaError: a file that cannot be used; the message begins with the sample's id.
            MokaError: as for `decode`.
        """

        def decode(kind: str, medium: Any) -> Any:
            try:
                return self.decode(kind, medium)
            except NotCachedError as error:
                raise MokaError(f"sample {sample['id']!r}: {error}") from error
            except BadMediaError as error:
                file, message = error.file, str(error)
                if isinstance(medium, bytes):
                    file, message = f"{kind} bytes of sample {sample['id']!r}", f"{kind}, {error}"
                raise BadMediaError(f"sample {sample['id']!r}: {message}", file, error.reason) from error

        return map_media(sample, decode)

    def items(self, kind: str, medium: Any) -> int:
        """Return how many items for its encoder a medium gives, without decoding it."""
        if isinstance(medium, (list, tuple)):
            return len(medium)
        is_file = isinstance(medium, (str, bytes))
        if kind == "video" and is_file:
            return self.video_frames
        is_sound = isinstance(medium, Waveform) or (is_file and not _is_array(medium))
        return self.audio_windows.count if kind == "audio" and self.audio_windows is not None and is_sound else 1


def _is_array(medium: Any) -> bool:
    return isinstance(medium, str) and medium.lower().endswith(".npy")


@dataclass(frozen=True)
class BadMediaPolicy:
    """The treatment of media files that cannot be used.

    Attributes:
        policy: ``"error"`` stops at the first; ``"skip"`` leaves bad samples out before the run begins (see
            `moka.data.media_validation.find_usable`), so that one met later stops it; ``"substitute"`` puts another sample,
            text and media, in its place, so that every rank still sees the same number of samples.
        budget: the share of the data set's samples that may be left out or substituted (0 ... 1, rounded up to complete
            samples).
    """

    policy: str = "error"
    budget: float = 0.01

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            hint = nearest(str(self.policy), POLICIES)
            raise MokaError(f"Bad-media policy {self.policy!r} is not known; allowed are {', '.join(POLICIES)}.{hint}")
        if not 0 <= self.budget <= 1:
            raise MokaError(
                f"data.bad_media_budget is {self.budget!r}; a share of the samples from 0 to 1 is expected."
            )

    def allowed(self, samples: int) -> int:
        """Return how many of ``samples`` may be bad."""
        return math.ceil(self.budget * samples - 1e-9)


class SampleReport:
    """Records of single samples, a line of JSON each; with a file, all processes and loader workers share them.

    Args:
        path: the JSONL file, if there is one.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._records: dict[tuple[int, str], dict[str, Any]] = {}
        self._samples: set[int] = set()
        self._read = 0  # bytes of the file

    def add(self, index: int, sample_id: str, reason: str, action: str, **more: Any) -> bool:
        """Note one sample; return False if this process knows it already (another one may add a second line)."""
        if (index, action) in self._records:
            return False
        record = {"index": index, "id": sample_id, "reason": reason, "action": action, **more}
        self._records[index, action] = record
        self._samples.add(index)
        if self.path is not None:
            append_jsonl(self.path, record)  # one short write: lines of workers do not mix
        return True

    def __len__(self) -> int:
        """Return how many samples have a record, also by other processes."""
        self._read_on()
        return len(self._samples)

    def records(self, action: str | None = None) -> dict[int, dict[str, Any]]:
        """Return index -> record in the order met, also those of other processes; of one action, or the first of each sample."""
        self._read_on()
        found: dict[int, dict[str, Any]] = {}
        for (index, done), record in self._records.items():
            if action in (None, done):
                found.setdefault(index, record)
        return found

    def _read_on(self) -> None:
        """Read the lines that were added to the file since the last call."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            lines, _, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + bool(lines)
        for line in lines.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if "index" in record:  # the first line of what `SkipReport.write` wrote has totals
                self._records.setdefault((record["index"], record["action"]), record)
                self._samples.add(record["index"])


class UnusableError(Exception):
    """A sample that cannot be used: nothing to learn from, too long, or refused by the chat template or a front end."""


class SubstitutingDataset(SampleDataset):
    """Base of data sets that make something of each sample of another: one of which nothing can be made is replaced.

    The substitute depends on ``seed`` and the index only, so each rank, run and resume draws the same. A subclass gives
    `make` and `note`.
    """

    def __init__(self, dataset: Any, seed: int, report_path: str | os.PathLike[str] | None) -> None:
        self.dataset, self.seed = dataset, seed
        self.reported = SampleReport(report_path)
        self.notes = tuple(getattr(dataset, "notes", ()))
        self.media_root = getattr(dataset, "media_root", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        return where_of(self.dataset, index)

    def make(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
        """Return what a sample becomes."""
        raise NotImplementedError

    def note(self, index: int, sample: dict[str, Any], error: Exception) -> None:
        """Report a sample of which nothing can be made, or raise."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        position = self.position(index)
        for tried in stand_ins(self.seed, position, len(self)):
            sample = self.dataset[tried]
            if tried != position:
                sample = {SUBSTITUTE: tried, **sample}
            tried = sample.get(SUBSTITUTE, tried)
            try:
                return self.make(tried, sample)
            except (BadMediaError, UnusableError) as error:
                self.note(tried, sample, error)
                last = error
        raise MokaError(
            f"No usable substitute for sample {index} in {_TRIES} draws; the last, {sample.get('id')!r}: {last} Correct "
            "the samples in the report."
        ) from last


def stand_ins(seed: int, index: int, size: int) -> Iterator[int]:
    """Yield a sample of ``size`` and those that replace it, one after another, if it cannot be used."""
    draw = np.random.default_rng([seed, index])
    for _ in range(_TRIES):
        yield index
        index = int(draw.integers(size))


class DecodedDataset(SubstitutingDataset):
    """A data set of checked samples whose media are decoded on indexing.

    Args:
        dataset: map-style, of checked samples.
        decoding: how media become pictures and sound.
        policy: what to do about bad media; `BadMediaPolicy` by default stops at the first.
        seed: of the substitutes.
        report_path: a JSONL file that collects the report. Without it the report and the budget are those of the
            process, and loader workers each have their own; with it all processes share them.

    Raises:
        BadMediaError: on indexing, under ``"error"`` and ``"skip"``.
        MokaError: on indexing, if more samples are bad than the budget allows.
    """

    def __init__(
        self,
        dataset: Any,
        decoding: MediaDecoding | None = None,
        policy: BadMediaPolicy | None = None,
        seed: int = 0,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(dataset, seed, report_path)
        self.decoding, self.policy = decoding or MediaDecoding(), policy or BadMediaPolicy()

    def with_features(self, features: FeatureCache) -> DecodedDataset:
        """Return the same data set with features instead of the media of their kinds."""
        decoding = self.decoding.with_features(features)
        return DecodedDataset(self.dataset, decoding, self.policy, self.seed, self.reported.path)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One record a bad sample, in the order met: ``index``, ``id``, ``file``, ``reason`` and ``action`` (policy)."""
        return list(self.reported.records().values())

    def make(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
        return self.decoding.decode_sample(sample)

    def note(self, index: int, sample: dict[str, Any], error: Exception) -> None:
        assert isinstance(error, BadMediaError)
        substitute = self.policy.policy == "substitute"
        action = "substitute" if substitute else "error"
        new = self.reported.add(index, sample["id"], error.reason, action, file=error.file)
        if not substitute:
            raise error
        bad, allowed = len(self.reported) if new else 0, self.policy.allowed(len(self))
        if bad > allowed:
            raise MokaError(
                f"{bad} of {len(self)} samples have media that cannot be used, more than the budget of "
                f"{self.policy.budget:g} allows ({allowed}). The last: {error} Correct the files, or raise the budget."
            ) from error
