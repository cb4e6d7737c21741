"""`moka cache`: every medium of a run's data through its frozen encoder, once, into ``data.feature_cache``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from moka.config import DataSection, RunConfig
from moka.data.media import BadMediaPolicy, DecodedDataset
from moka.data.schema import media_parts
from moka.distributed import (
    all_gather_object,
    broadcast_from_main,
    connect,
    is_main,
    rank_and_world_size,
    run_on_all,
    run_on_main,
)
from moka.errors import MokaError, counted
from moka.modeling.build import build_processor
from moka.modeling.encoders import build_encoder
from moka.training.datasets import open_data
from moka.training.lock import FolderLock

from .cache import FeatureSet
from .extract import Done, Filler, Job
from .setup import feature_settings, frozen, kinds_of
from .writer import SHARD_BYTES, FeatureWriter, create_set, next_number, update_index


def cache_features(
    config: RunConfig,
    *,
    splits: list[str] | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Compute the features that ``config`` needs and ``data.feature_cache`` has not; returns a summary, line by line.

    Run by several processes (torchrun, `accelerate launch`), each takes a share of the media. Started again after it
    was killed, it continues.

    Args:
        splits: of "train", "alignment", "validation"; all that the stages read by default.
        batch_size: items (pictures, frames, clips) that go through an encoder at once.
        dtype: float32, float16 or bfloat16: how features are kept.
        workers: threads that decode, in each process; its cores by default.
        shard_bytes: about the size of a file.

    Raises:
        MokaError: nothing to cache, a folder that cannot be written or that another process is filling, bad media beyond
            what ``data.on_bad_media`` allows.
    """
    if config.data.feature_cache is None:
        raise MokaError("data.feature_cache is not set: name the folder for the features, data.feature_cache=FOLDER.")
    started, cache = time.monotonic(), Path(config.data.feature_cache)
    device = connect(use_cpu=bool(config.training.get("use_cpu")))
    jobs = run_on_all(lambda: _jobs(config), main_first=True)
    datasets = run_on_all(lambda: _datasets(config, splits), main_first=True)
    lock = FolderLock(cache, "filled", "data.feature_cache")
    run_on_main(lambda: _open_folder(cache, lock))
    try:
        numbers = broadcast_from_main(lambda: _prepare_folders(cache, jobs, dtype))
        run_on_all(lambda: _open_writers(cache, jobs, numbers, dtype, shard_bytes, device))
        filler = Filler(jobs, config.data.on_bad_media, batch_size, workers)
        for name, samples in datasets.items():
            filler.fill(name, samples)
            _check_budget(name, samples, filler.bad, config.data)
        bad = [dict(kv for part in all_gather_object(job.writer.bad) for kv in part.items()) for job in jobs]
        run_on_main(lambda: [update_index(job.writer.folder, bad[k], check=False) for k, job in enumerate(jobs)])
        return _summary(jobs, dtype, time.monotonic() - started)
    finally:
        lock.release()


def _jobs(config: RunConfig) -> list[Job]:
    skeleton, processor = build_processor(config.model)
    modalities = skeleton.config.modalities
    names = frozen((name, skeleton.encoders[name]) for name in modalities)  # type: ignore[misc]
    trained = [name for name in modalities if name not in names]
    if trained and is_main():
        print(f"note: {', '.join(trained)}: the encoder is trained; its media are decoded in training as before.")
    jobs = []
    for name in names:
        encoder = build_encoder(config.model.modalities[name]["encoder"]).float()
        front_end, kinds = processor.front_ends[name], kinds_of(modalities[name])
        settings = feature_settings(encoder, front_end, kinds, config.data)
        jobs.append(Job(name, encoder, front_end, kinds, settings))
    return jobs


def _datasets(config: RunConfig, splits: list[str] | None) -> dict[str, DecodedDataset]:
    opened = {name: samples for name, samples in open_data(config).items() if splits is None or name in splits}
    if not opened:
        raise MokaError(
            f"--split: stages {config.stages} of this configuration read no {' or '.join(splits or [])} data."
        )
    # Embedded tasks come decoded; the wrapper has nothing to decode then.
    return {name: s if isinstance(s, DecodedDataset) else DecodedDataset(s) for name, s in opened.items()}


def _open_folder(cache: Path, lock: FolderLock) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.take()
    except OSError as error:
        raise MokaError(
            f"data.feature_cache: {cache} cannot be written ({error.strerror}). Choose another folder."
        ) from error


def _prepare_folders(cache: Path, jobs: list[Job], dtype: str) -> list[int]:
    """Make the folders; what an earlier run left half-written or damaged is removed, and so computed again.

    Returns: the number of the next shard in each.
    """
    numbers = []
    for job in jobs:
        folder = create_set(cache, job.encoder.name, job.settings, dtype)
        for line in update_index(folder):
            print(f"note: {line}; its features are computed again.")
        numbers.append(next_number(folder.glob("shard-*")))
    return numbers


def _open_writers(
    cache: Path, jobs: list[Job], numbers: list[int], dtype: str, shard_bytes: int, device: torch.device
) -> None:
    for job, number in zip(jobs, numbers, strict=True):
        known = FeatureSet(create_set(cache, job.encoder.name, job.settings, dtype))
        job.writer = FeatureWriter(known, number, rank_and_world_size()[0], shard_bytes)
        job.encoder.to(device).eval()


def _check_budget(name: str, samples: DecodedDataset, found: dict[tuple[str, Any], Any], data: DataSection) -> None:
    """Raises ``MokaError`` where more samples have bad media than ``data.bad_media_budget`` allows."""
    bad = {key: why for part in all_gather_object(found) for key, why in part.items()}
    if not bad:
        return

    def check() -> None:
        spoiled = []
        for index in range(len(samples)):
            parts = media_parts(samples.dataset[index])
            keys = [(kind, value if isinstance(value, str) else (name, index)) for kind, value in parts]
            spoiled += [key for key in keys if key in bad][:1]
        if not spoiled:
            return
        allowed = BadMediaPolicy(data.on_bad_media, data.bad_media_budget).allowed(len(samples))
        sample_id, reason = bad[spoiled[0]]
        first = f"the first: sample {sample_id!r}, {spoiled[0][0]} {_place(spoiled[0][1])}: {reason}"
        reported = f"data.{name}: {len(spoiled)} of {len(samples)} samples have media that cannot be used"
        print(f"{reported} ({first})")
        if len(spoiled) > allowed:
            raise MokaError(
                f"{reported}, and the budget allows {allowed}; {first}. Correct the files, or raise data.bad_media_budget. What was "
                "computed stays."
            )

    run_on_main(check)


def _place(medium: Any) -> str:
    return medium if isinstance(medium, str) else "in memory"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _summary(jobs: list[Job], dtype: str, seconds: float) -> list[str]:
    lines = []
    for job in jobs:
        done = sum(all_gather_object(job.done), start=Done())
        bad = f", {len(done.bad)} left out as bad" if done.bad else ""
        lines.append(
            f"{job.name}: {done.media:,} media: {done.computed:,} computed ({done.items:,} items, "
            f"{done.items * job.encoder.num_tokens:,} tokens, {_size(done.bytes)} {dtype}), {done.there:,} were "
            f"there{bad}; {job.writer.folder}"
        )
    lines.append(f"{seconds:.1f} s, {counted(rank_and_world_size()[1], 'process', 'processes')}")
    return lines
