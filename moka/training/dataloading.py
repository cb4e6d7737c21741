"""How samples become the batches of a step: lengths and packing, the sampler, loaders and their workers, the global batch."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from moka.config import MokaTrainingArguments, RunConfig
from moka.data import EncodedDataset
from moka.data.batching import LengthGroupedSampler, grouped_order, padding_share
from moka.data.lengths import Lengths, count_lengths, joined_lengths, lengths_key, read_lengths, save_lengths, undecoded
from moka.data.packing import PackedDataset
from moka.data.streaming import EncodedStream
from moka.distributed import (
    all_gather_object,
    broadcast_from_main,
    is_main,
    print_main,
    rank_and_world_size,
    run_on_all,
    run_on_main,
)
from moka.errors import MokaError
from moka.modeling import MokaForConditionalGeneration
from moka.modeling.packing_isolation import check_confined
from moka.modeling.sharding import is_sharded

from .arguments import data_seed
from .preemption import outlive

BY_LENGTH = "group_by_length"
_FINGERPRINTED = 1000  # samples, evenly spaced


def check_packing(config: RunConfig, model: MokaForConditionalGeneration, device: torch.device) -> None:
    """Where a stage packs, refuse a backbone in which samples of a row see each other; every process calls it."""
    # Without parts one process is enough; FSDP may have left the others without weights.
    if any(config.section(stage).get("packing") for stage in config.stages) and (is_main() or is_sharded(model)):
        check_confined(model, device)


def build_train_dataset(
    dataset: EncodedDataset | EncodedStream,
    arguments: MokaTrainingArguments,
    *,
    path: Path,
    resume: bool,
    name: str = "data",
) -> Any:
    """The data set that the trainer goes through: ``dataset``, or rows of it; with its ``lengths`` where they are used.

    Args:
        path: where the lengths are kept; a resumed run reads them, and goes through the same rows.
        name: of the data set, for the progress bar.
    Raises:
        MokaError: a sample of which the length cannot be reported; data that are not those the run began with.
    """
    grouped = arguments.train_sampling_strategy == BY_LENGTH
    if isinstance(dataset, EncodedStream):
        _check_stream(arguments, grouped, name)
        if is_main():
            print_main(f"{name}: {dataset.summary()}")
        return dataset
    if not arguments.packing and not grouped:
        return dataset
    lengths = _lengths(dataset, path, resume, arguments.dataloader_num_workers, name)
    arranged: Any = dataset
    if arguments.packing:
        capacity = dataset.max_length
        if capacity is None:
            raise MokaError("Packing fills rows up to model.max_length, and the backbone names no context. Set it.")
        arranged = PackedDataset(dataset, lengths, capacity, dataset.seed)
        print_main(f"{arranged.summary()}; the rows are what batch sizes count")
    else:
        dataset.lengths = lengths
    if grouped and is_main():
        print_main(_grouping(arranged.lengths, arguments))
    return arranged


def _check_stream(arguments: MokaTrainingArguments, grouped: bool, name: str) -> None:
    if arguments.max_steps < 1:
        raise MokaError(f"training.max_steps: {name} is streamed and has no end; set the number of steps.")
    for asked, key in (
        (arguments.packing, "training.packing: true"),
        (grouped, f"training.train_sampling_strategy: {BY_LENGTH}"),
    ):
        if asked:
            raise MokaError(
                f"{key}: needs the length of every sample, and {name} is streamed. Take one of the two out."
            )


def sampler(dataset: Any, arguments: TrainingArguments) -> LengthGroupedSampler | None:
    """The sampler of a data set from `build_train_dataset`, or None where transformers' own will do."""
    lengths = getattr(dataset, "lengths", None)
    if arguments.train_sampling_strategy != BY_LENGTH or lengths is None:
        return None
    return LengthGroupedSampler(lengths, _step(arguments), data_seed(arguments))


def _step(arguments: TrainingArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def data_fingerprint(dataset: Any) -> dict[str, Any] | None:
    """Return what says training data from others: the number of samples, and a hash of the ids of up to 1,000 of them."""
    encoded = dataset.dataset if isinstance(dataset, PackedDataset) else dataset
    if not isinstance(encoded, EncodedDataset):
        return None
    samples, _ = undecoded(encoded.dataset)
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(_FINGERPRINTED, len(samples))).astype(int))
    ids = [str(samples[int(index)].get("id", index)) for index in chosen]
    return {"samples": len(samples), "ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}


def _lengths(dataset: EncodedDataset, path: Path, resume: bool, workers: int, name: str) -> Lengths:
    """Counted by all processes together, or read by the main one and handed to the others."""

    known = broadcast_from_main(lambda: read_lengths(path, dataset) if resume and path.exists() else None)
    if known is not None:
        return known
    parts = all_gather_object(
        run_on_all(lambda: count_lengths(dataset, workers=workers, share=rank_and_world_size(), name=name))
    )
    lengths = run_on_all(lambda: joined_lengths(dataset, parts))
    run_on_main(lambda: save_lengths(path, lengths, lengths_key(dataset)))
    return lengths


def _grouping(lengths: Lengths, arguments: TrainingArguments) -> str:
    """Return what grouping saves: the padding of the first epoch, and that of an order without it."""
    batch = arguments.per_device_train_batch_size
    order = grouped_order(lengths.tokens, lengths.media_items, _step(arguments), data_seed(arguments), epoch=0)
    mixed = np.random.default_rng(0).permutation(len(lengths))
    before, after = (padding_share(lengths.tokens, one, batch) for one in (mixed, order))
    return f"grouped by length: {after:.0%} of a batch is padding ({before:.0%} in random order)"


def prepare_loader(loader: Any) -> Any:
    """Return a trainer's loader, prepared for exact resumption and for signals.

    Its workers outlive a signal. Its random numbers are its own: every pass draws the seed of its workers, with workers that
    stay only the first one; drawn from the generator that dropout draws from, a resumed run would differ from one that was
    never interrupted. And accelerate's ``set_epoch`` reaches its sampler also in a resumed epoch, which skips batches: with
    several processes the sampler would be one level deeper than accelerate looks.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper
    if getattr(inner.worker_init_fn, "func", None) is not outlive:  # transformers may return the same loader again
        inner.worker_init_fn = partial(outlive, inner.worker_init_fn)
    if inner.generator is None:
        inner.generator = torch.Generator()
        inner.generator.manual_seed(0)
    shard = getattr(loader, "batch_sampler", None)
    sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
    if shard is not None and sampler is not None and not hasattr(shard, "sampler"):
        shard.sampler = sampler
    return loader


def stream_loader(dataset: EncodedStream, arguments: TrainingArguments, collate: Any) -> Any:
    """Return a loader of a stream, whose batches are this process's own already: accelerate moves them, and shares nothing."""
    workers = arguments.dataloader_num_workers
    loader: Any = DataLoader(
        dataset,
        batch_size=arguments.per_device_train_batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=arguments.dataloader_prefetch_factor,
    )
    return prepare_data_loader(
        loader,
        device=arguments.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=True,
        dispatch_batches=False,
    )


def dismiss_workers(loader: Any) -> None:
    """End the workers of a loader, which would otherwise stay for another epoch."""
    inner = getattr(loader, "base_dataloader", loader)
    inner._iterator = None  # they end with what iterates over them
