"""From a name in the configuration to a data set of model inputs.

"embedded:audio-visual-text" | "train.jsonl"  ->  samples with decoded media  ->  EncodedDataset  ->  Collator
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moka.data.embedded import ATTRIBUTION, PREFIX, Split
from moka.data.embedded_tasks import EmbeddedTask
from moka.data.jsonl import JsonlDataset
from moka.data.media import BadMediaPolicy, DecodedDataset
from moka.errors import MokaError
from moka.modeling.processing import IGNORE, TooLongError

_TRIES = 20


def open_source(
    source: str,
    split: Split,
    *,
    stage: int = 2,
    size: int | None = None,
    seed: int = 0,
    media_root: str | None = None,
    on_bad_media: str = "error",
    bad_media_budget: float = 0.01,
    video_frames: int = 10,
    report_path: str | Path | None = None,
) -> Any:
    """A map-style data set of samples with decoded media.

    Args:
        source: ``embedded:TASK``, or the path of a JSONL file of chat messages.
        split: which split of an embedded task; a JSONL file is a split by itself.
        stage: 1 pairs single media with captions (embedded tasks), 2 asks questions.
        size: use that many samples, from the start.
        seed: of the embedded training questions, and of substitutes for bad media.
    Raises:
        MokaError: no such file or task; media that are not there.
    """
    if source.startswith(PREFIX):
        return EmbeddedTask(source.removeprefix(PREFIX), split, size=size, seed=seed, stage=stage)
    dataset = JsonlDataset(source, media_root=media_root)
    missing = dataset.missing_media(limit=1) if on_bad_media == "error" else []
    if missing:
        raise MokaError(
            f"{'; '.join(missing)}. Put the files under the media root, or set data.on_bad_media=substitute."
        )
    policy = BadMediaPolicy(on_bad_media, bad_media_budget)
    decoded = DecodedDataset(dataset, policy, seed=seed, video_frames=video_frames, report_path=report_path)
    return decoded if size is None else Prefix(decoded, size)


def attribution(source: str) -> str:
    """Where the data come from and under which licence, for model cards."""
    return ATTRIBUTION if source.startswith(PREFIX) else f"- {source}\n"


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


class EncodedDataset:
    """Samples as model inputs, for training.

    Text is shortened to fit ``max_length``; a sample that cannot be (its media alone are too long) or that has nothing to
    learn from is replaced by another, chosen by (seed, index) alone, and counted in ``dropped``.
    """

    def __init__(
        self,
        samples: Any,
        processor: Any,
        max_length: int | None,
        seed: int = 0,
        report_path: str | Path | None = None,
    ) -> None:
        self.samples, self.processor, self.max_length, self.seed = samples, processor, max_length, seed
        self.report_path = None if report_path is None else Path(report_path)
        self._dropped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def dropped(self) -> dict[int, str]:
        """Index -> reason of every sample replaced so far; with a report also by the other loader workers and ranks."""
        if self.report_path is not None and self.report_path.exists():
            for record in map(json.loads, self.report_path.read_text("utf-8").splitlines()):
                self._dropped.setdefault(record["index"], record["reason"])
        return self._dropped

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tried = int(index) % len(self)  # -1 and the last index are one sample
        draw = np.random.default_rng([self.seed, tried])
        for _ in range(_TRIES):
            sample = self.samples[tried]
            try:
                encoded = self.processor.encode(sample["messages"], max_length=self.max_length, truncate=True)
                if any(label != IGNORE for label in encoded["labels"]):
                    return encoded
                reason = "no supervised token: the assistant's text is empty"
            except TooLongError as error:
                reason = str(error)
            self._drop(tried, sample.get("id", str(tried)), reason)
            tried = int(draw.integers(len(self)))
        raise MokaError(f"{_TRIES} samples in a row cannot be used; the last, {sample.get('id')}: {reason}")

    def _drop(self, index: int, sample_id: str, reason: str) -> None:
        if index in self.dropped:
            return
        self._dropped[index] = reason
        if self.report_path is not None:
            with open(self.report_path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"index": index, "id": sample_id, "reason": reason}) + "\n")


class Collator:
    """Encoded samples to one padded batch of tensors. Left padding aligns the answers, so that few positions carry loss."""

    def __init__(self, processor: Any, padding_side: str = "left") -> None:
        self.processor, self.padding_side = processor, padding_side

    def __call__(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.processor.pad(encoded, padding_side=self.padding_side))
