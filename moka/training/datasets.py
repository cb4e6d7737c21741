"""The data of a run: opened before anything is written, and its media tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moka.config import RunConfig
from moka.data import open_source, sources
from moka.data.dataset import BAR_AFTER_S, where_of
from moka.data.lengths import undecoded
from moka.data.media import BadMediaPolicy, DecodedDataset, MediaDecoding
from moka.data.media_validation import SkipReport, find_usable, read_usable
from moka.data.streaming import SampleStream
from moka.errors import MokaError, counted
from moka.features.cache import FeatureCache
from moka.features.setup import check_features, with_features
from moka.modeling import MokaProcessor

# Decoding every file of a large data set would take longer than its first epoch; a data set of this size is tried full.
_TRIED = 200


def open_data(config: RunConfig, reports: Path | None = None, features: FeatureCache | None = None) -> dict[str, Any]:
    """Samples with decoded media of each part that the stages need.

    Args:
        reports: folder for the reports of bad media.
        features: computed before, instead of the media that they are of.
    """
    data = config.data
    datasets: dict[str, Any] = {}

    def open_one(name: str, split: Any, stage: int, size: int | None) -> None:
        samples = open_source(
            getattr(data, name),
            split,
            stage=stage,
            size=size,
            seed=config.data_seed(stage),
            media_root=data.media_root,
            decoding=MediaDecoding.of(data),
            policy=BadMediaPolicy(data.on_bad_media, data.bad_media_budget),
            report_path=None if reports is None else bad_media_report(reports, name),
            look_for_files=False,
        )
        if isinstance(samples, SampleStream) and (name == "validation" or data.feature_cache is not None):
            what = "validation data are read again and again" if name == "validation" else "a feature cache is indexed"
            raise MokaError(
                f"data.{name}: {what}, and this source is streamed. Take streaming out, or data.feature_cache."
            )
        datasets[name] = with_features(samples, features)

    for stage, name in ((1, "alignment"), (2, "train")):
        if stage in config.stages:
            open_one(name, "train", stage, data.train_size if name == "train" else None)
    if data.validation is not None:
        open_one("validation", "validation", max(config.stages), data.validation_size)
    return datasets


def try_media(
    datasets: dict[str, Any], config: RunConfig, folder: Path, resume: bool, share: tuple[int, int]
) -> dict[str, SkipReport]:
    """``on_bad_media: skip``: every file of this process's share of every set is tried; a resumed run keeps to what was found
    when it began.

    Raises:
        MokaError: more bad samples than the budget allows.
    """
    data = config.data
    reports = {}
    for name, samples in datasets.items():
        if not isinstance(samples, DecodedDataset):
            continue  # embedded
        settings: dict[str, Any] = {"budget": data.bad_media_budget, "name": f"data.{name}"}
        path = bad_media_report(folder, name)
        if resume and path.exists():
            reports[name] = read_usable(path, len(samples), **settings)
        else:
            reports[name] = find_usable(samples.dataset, **settings, decoding=samples.decoding, share=share)
    return reports


def write_reports(tried: dict[str, SkipReport], folder: Path) -> None:
    """Return what ``try_media`` found, into the run folder, for people and for resumed runs."""
    for name, report in tried.items():
        report.write(bad_media_report(folder, name))


def bad_media_report(folder: Path, name: str) -> Path:
    return folder / f"bad-media-{name}.jsonl"


def check_files(datasets: dict[str, Any], config: RunConfig, share: tuple[int, int]) -> None:
    """``on_bad_media: error``: look for the files of this process's share of every set."""
    for samples in datasets.values():
        if config.data.on_bad_media == "error" and isinstance(samples, DecodedDataset):
            sources.check_files(samples.dataset, share)


def check_media(datasets: dict[str, Any], config: RunConfig, share: tuple[int, int] = (0, 1)) -> None:
    """Decode the media of up to 200 samples of each set, so that a damaged file is reported before training; and of every sample
    look for its features, where they come from a cache.

    Args:
        share: (k, n): of n processes that look at a part each, this is the k-th.
    """
    for name, samples in datasets.items():
        if config.data.on_bad_media == "skip" or isinstance(samples, SampleStream):
            continue  # all were tried, or are tried as they come
        embedded = sources.is_embedded(getattr(config.data, name))
        if config.data.feature_cache is None and embedded:
            continue
        if config.data.feature_cache is not None and not embedded:
            check_features(samples, f"data.{name}", share)
        tried = np.unique(np.linspace(0, len(samples) - 1, min(_TRIED, len(samples))).astype(int))
        mine = tried[share[0] :: share[1]]
        for index in tqdm(mine, f"trying media of data.{name}", unit="sample", delay=BAR_AFTER_S, leave=False):
            samples[int(index)]


def check_chats(datasets: dict[str, Any], config: RunConfig, processor: MokaProcessor, share: tuple[int, int]) -> None:
    """Render every chat of this process's share with the template, media undecoded.

    Raises:
        MokaError: under ``on_bad_media: error``, the first one that the template or the tokenizer refuses. Otherwise they are
            counted in a printed line, and replaced when they come.
    """
    for name, samples in datasets.items():
        if isinstance(samples, SampleStream) or sources.is_embedded(getattr(config.data, name)):
            continue
        chats, _ = undecoded(samples)
        refused, first = 0, ""
        numbers = range(share[0], len(chats), share[1])
        for index in tqdm(numbers, f"checking chats of data.{name}", unit="sample", delay=BAR_AFTER_S, leave=False):
            try:
                processor.check_chat(chats[index]["messages"])
            except MokaError as error:
                refused, first = refused + 1, first or f"{where_of(chats, index)}: {error}"
                if config.data.on_bad_media == "error":
                    raise MokaError(first) from error
        if refused:
            print(
                f"note: data.{name}: {counted(refused, 'sample')} cannot be used and will be replaced; the first: {first}"
            )
