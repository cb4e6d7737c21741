"""Samples with decoded media, and what a run does about files that cannot be used.

The readers themselves are in `moka.data.media_io`, the windows of sound in `moka.data.audio_segments`, and the trial of every
file before a run in `moka.data.media_validation`; all but the last are offered here too.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moka.data.schema import map_media
from moka.errors import MokaError, NotCachedError, nearest
from moka.io import append_jsonl, read_jsonl
from moka.modeling.media import AudioFeatures, Waveform

from .audio_segments import AudioWindows, audio_windows
from .media_io import (
    BadMediaError,
    file_problem,
    load_audio,
    load_features,
    load_image,
    load_video,
)

if TYPE_CHECKING:
    from moka.features.cache import FeatureCache


__all__ = [
    "AudioWindows",
    "BadMediaError",
    "BadMediaPolicy",
    "DecodedDataset",
    "audio_windows",
    "decode_medium",
    "decode_sample",
    "file_problem",
    "load_audio",
    "load_features",
    "load_image",
    "load_video",
]

POLICIES = ("error", "skip", "substitute")
SUBSTITUTE = "substitute_index"  # key of a sample that replaces another: its own index
_TRIES = 20  # draws of a substitute: with the budget kept, that many bad ones in a row do not happen


def decode_medium(
    kind: str,
    medium: Any,
    video_frames: int = 10,
    windows: AudioWindows | None = None,
    features: FeatureCache | None = None,
) -> Any:
    """One medium of a sample, decoded; arguments as for `decode_sample`.

    Raises:
        BadMediaError: a file that cannot be used.
        MokaError: windows are asked of ready-made features, which hold no sound to cut; a medium that is not in
            ``features``, which hold its kind.
    """
    if features is not None and kind in features.kinds:
        return features.read(kind, medium)
    if isinstance(medium, (str, bytes)):
        if kind == "image":
            return load_image(medium)
        if kind == "video":
            return load_video(medium, video_frames)
        ready_made = isinstance(medium, str) and medium.lower().endswith(".npy")
        decoded: Any = load_features(medium) if ready_made else load_audio(medium)
    else:
        decoded = medium
    if windows is None or kind != "audio":
        return decoded
    if isinstance(decoded, AudioFeatures):
        what = medium if isinstance(medium, str) else f"audio features of kind {decoded.kind!r}"
        raise MokaError(
            f"{what}: audio_windows cut windows from sound, and these are ready-made features. Give the sound files, "
            "or take data.audio_windows out."
        )
    return windows.cut(decoded) if isinstance(decoded, Waveform) else decoded


def decode_sample(
    sample: dict[str, Any],
    video_frames: int = 10,
    audio_windows: AudioWindows | None = None,
    features: FeatureCache | None = None,
) -> dict[str, Any]:
    """A copy of a checked sample with every path, and the bytes of every encoded file, replaced by its decoded medium.

    Decoded media pass unchanged. Audio parts that name a ``.npy`` file become `AudioFeatures` of kind ``"mfcc"``.

    Args:
        sample: from `moka.data.schema.check_sample`, with paths that can be opened.
        video_frames: images taken from each video.
        audio_windows: the windows that each clip is cut into: an audio part becomes a list of `Waveform`.
        features: computed before; media of their kinds become lists of `Features` and are not decoded.

    Raises:
        BadMediaError: a file that cannot be used; the message begins with the sample's id.
        MokaError: ``audio_windows`` with ready-made audio features; a medium that is not in ``features``.
    """

    def decode(kind: str, medium: Any) -> Any:
        try:
            return decode_medium(kind, medium, video_frames, audio_windows, features)
        except NotCachedError as error:
            raise MokaError(f"sample {sample['id']!r}: {error}") from error
        except BadMediaError as error:
            if isinstance(medium, bytes):
                file, message = f"{kind} bytes of sample {sample['id']!r}", f"{kind}, {error}"
            else:
                file, message = error.file, str(error)
            raise BadMediaError(f"sample {sample['id']!r}: {message}", file, error.reason) from error

    return map_media(sample, decode)


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
        """How many of ``samples`` may be bad."""
        return math.ceil(self.budget * samples - 1e-9)


class DecodedDataset:
    """Wraps a map-style dataset of checked samples; indexing decodes the media.

    The substitute of a bad sample depends on ``seed`` and the index only, so each rank, run and resume draws the same.

    Args:
        dataset: anything with ``len`` and indexing that gives checked samples, such as `JsonlDataset`.
        policy: what to do about bad media; `BadMediaPolicy` by default stops at the first.
        seed: of the substitutes.
        video_frames, audio_windows, features: as for `decode_sample`.
        report_path: a JSONL file that collects the report. Without it the report and the budget are those of the
            process, and loader workers each have their own; with it all processes share them.

    Raises:
        BadMediaError: on indexing, under ``"error"`` and ``"skip"``.
        MokaError: on indexing, when more samples are bad than the budget allows.
    """

    def __init__(
        self,
        dataset: Any,
        policy: BadMediaPolicy | None = None,
        seed: int = 0,
        video_frames: int = 10,
        report_path: str | os.PathLike[str] | None = None,
        audio_windows: AudioWindows | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        self.dataset = dataset
        self.policy = policy or BadMediaPolicy()
        self.seed = seed
        self.video_frames = video_frames
        self.audio_windows = audio_windows
        self.features = features
        self.report_path = None if report_path is None else Path(report_path)
        self._seen: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        """Return file and line of a sample."""
        return self.dataset.where(index)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One record a bad sample, in the order met: ``index``, ``id``, ``file``, ``reason`` and ``action`` (policy)."""
        if self.report_path is not None:
            for record in read_jsonl(self.report_path):
                if "index" in record:  # the first line of what `SkipReport.write` wrote has totals
                    self._seen.setdefault(record["index"], record)
        return list(self._seen.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = tried = index % len(self)  # -1 and the last index are one sample
        draw = np.random.default_rng([self.seed, tried])
        for _ in range(_TRIES):
            sample = self.dataset[tried]
            try:
                decoded = decode_sample(sample, self.video_frames, self.audio_windows, self.features)
                return decoded if tried == first else {**decoded, SUBSTITUTE: tried}
            except BadMediaError as error:
                self._record(tried, sample["id"], error)
                if self.policy.policy != "substitute":
                    raise
            tried = int(draw.integers(len(self)))
        raise MokaError(
            f"No usable substitute for sample {index} in {_TRIES} draws. Correct the media files in the report."
        )

    def _record(self, index: int, sample_id: str, error: BadMediaError) -> None:
        if index in self._seen:
            return
        action = "substitute" if self.policy.policy == "substitute" else "error"
        self._seen[index] = bad_media_record(index, sample_id, error.file, error.reason, action)
        if self.report_path is not None:
            append_jsonl(self.report_path, self._seen[index])  # one short write: lines of workers do not mix
        report = self.report
        allowed = self.policy.allowed(len(self))
        if self.policy.policy == "substitute" and len(report) > allowed:
            raise MokaError(
                f"{len(report)} of {len(self)} samples have media that cannot be used, more than the budget of "
                f"{self.policy.budget:g} allows ({allowed}). The last: {error} Correct the files, or raise the budget."
            ) from error


def bad_media_record(index: int, sample_id: str, file: str, reason: str, action: str) -> dict[str, Any]:
    """One line of a report; ``action`` says what was done: "error", "skip" or "substitute"."""
    return {"index": index, "id": sample_id, "file": file, "reason": reason, "action": action}
