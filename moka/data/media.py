"""Samples with decoded media, and what a run does about files that cannot be used.

The readers themselves are in `moka.data.decoders` and are offered here too.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moka.data.decoders import (
    BadMediaError,
    file_problem,
    load_audio,
    load_features,
    load_image,
    load_video,
)
from moka.data.schema import map_media
from moka.errors import MokaError, nearest

__all__ = [
    "BadMediaError",
    "BadMediaPolicy",
    "DecodedDataset",
    "decode_sample",
    "file_problem",
    "load_audio",
    "load_features",
    "load_image",
    "load_video",
]

_TRIES = 20  # draws of a substitute: with the budget kept, that many bad ones in a row do not happen


def decode_sample(sample: dict[str, Any], video_frames: int = 10, audio_rate: int | None = None) -> dict[str, Any]:
    """A copy of a checked sample with every path replaced by its decoded medium; decoded media pass unchanged.

    Audio parts that name a ``.npy`` file become `AudioFeatures` of kind ``"mfcc"``.

    Args:
        sample: from `moka.data.schema.check_sample`, with paths that can be opened.
        video_frames: images taken from each video.
        audio_rate: Hz that sound is resampled to; each file's own rate by default.

    Raises:
        BadMediaError: a file that cannot be used; the message begins with the sample's id.
    """

    def decode(kind: str, medium: Any) -> Any:
        if not isinstance(medium, str):
            return medium
        if kind == "image":
            return load_image(medium)
        if kind == "video":
            return load_video(medium, video_frames)
        return load_features(medium) if medium.lower().endswith(".npy") else load_audio(medium, audio_rate)

    try:
        return map_media(sample, decode)
    except BadMediaError as error:
        raise BadMediaError(f"sample {sample['id']!r}: {error}", error.file, error.reason) from error


@dataclass(frozen=True)
class BadMediaPolicy:
    """What to do about media files that cannot be used.

    Attributes:
        policy: ``"error"`` stops at the first; ``"substitute"`` puts another sample, text and media, in its place, so
            that every rank still sees the same number of samples.
        budget: the share of the data set's samples that may be substituted (0 ... 1, rounded up to whole samples).
    """

    policy: str = "error"
    budget: float = 0.01

    def __post_init__(self) -> None:
        if self.policy not in ("error", "substitute"):
            hint = nearest(str(self.policy), ("error", "substitute"))
            raise MokaError(f"Bad-media policy {self.policy!r} is not known; allowed are error and substitute.{hint}")
        if not 0 <= self.budget <= 1:
            raise MokaError(f"Bad-media budget is {self.budget!r}; a share of the samples from 0 to 1 is due.")


class DecodedDataset:
    """Wraps a map-style dataset of checked samples; indexing decodes the media.

    The substitute of a bad sample depends on ``seed`` and the index alone, so each rank, run and resume draws the same.

    Args:
        dataset: anything with ``len`` and indexing that gives checked samples, such as `JsonlDataset`.
        policy: what to do about bad media; `BadMediaPolicy` by default stops at the first.
        seed: of the substitutes.
        video_frames, audio_rate: as for `decode_sample`.
        report_path: a JSONL file that collects the report. Without it the report and the budget are those of the
            process, and loader workers each have their own; with it all processes share them.

    Raises:
        BadMediaError: on indexing, under ``"error"``.
        MokaError: on indexing, when more samples are bad than the budget allows.
    """

    def __init__(
        self,
        dataset: Any,
        policy: BadMediaPolicy | None = None,
        seed: int = 0,
        video_frames: int = 10,
        audio_rate: int | None = None,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.dataset = dataset
        self.policy = policy or BadMediaPolicy()
        self.seed = seed
        self.video_frames = video_frames
        self.audio_rate = audio_rate
        self.report_path = None if report_path is None else Path(report_path)
        self._seen: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One record a bad sample: ``index``, ``id``, ``file`` and ``reason``, in the order in which they were met."""
        if self.report_path is not None and self.report_path.exists():
            for record in map(json.loads, self.report_path.read_text("utf-8").splitlines()):
                self._seen.setdefault(record["index"], record)
        return list(self._seen.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tried = index % len(self)  # -1 and the last index are one sample
        draw = np.random.default_rng([self.seed, tried])
        for _ in range(_TRIES):
            sample = self.dataset[tried]
            try:
                return decode_sample(sample, self.video_frames, self.audio_rate)
            except BadMediaError as error:
                self._record(tried, sample["id"], error)
                if self.policy.policy == "error":
                    raise
            tried = int(draw.integers(len(self)))
        raise MokaError(
            f"No usable substitute for sample {index} in {_TRIES} draws. Mend the media files in the report."
        )

    def _record(self, index: int, sample_id: str, error: BadMediaError) -> None:
        if index in self._seen:
            return
        self._seen[index] = {"index": index, "id": sample_id, "file": error.file, "reason": error.reason}
        if self.report_path is not None:
            with open(self.report_path, "a", encoding="utf-8") as file:  # one short write: lines of workers do not mix
                file.write(json.dumps(self._seen[index]) + "\n")
        report = self.report
        allowed = math.ceil(self.policy.budget * len(self) - 1e-9)
        if self.policy.policy == "substitute" and len(report) > allowed:
            raise MokaError(
                f"{len(report)} of {len(self)} samples have media that cannot be used, more than the budget of "
                f"{self.policy.budget:g} allows ({allowed}). The last: {error} Mend the files, or raise the budget."
            ) from error
