"""How the samples of a stage are put together: as they come, grouped by length, or packed into rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from moka.config import RunConfig
from moka.data import EncodedDataset
from moka.data.batching import LengthGroupedSampler, grouped_order, padding_share
from moka.data.lengths import Lengths, count_lengths, joined_lengths, lengths_key, read_lengths, save_lengths
from moka.data.packing import PackedDataset
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

BY_LENGTH = "group_by_length"


def check_packing(config: RunConfig, model: MokaForConditionalGeneration, device: torch.device) -> None:
    """Where a stage packs, refuse a backbone in which samples of a row see each other; every process calls it."""
    # Without parts one process is enough; FSDP may have left the others without weights.
    if any(config.section(stage).get("packing") for stage in config.stages) and (is_main() or is_sharded(model)):
        check_confined(model, device)


def put_together(
    dataset: EncodedDataset,
    arguments: TrainingArguments,
    *,
    packing: bool,
    path: Path,
    resume: bool,
    name: str = "data",
) -> Any:
    """The data set that the trainer goes through: ``dataset``, or rows of it; with its ``lengths`` where they are used.

    Args:
        packing: fill rows of ``dataset.max_length`` tokens.
        path: where the lengths are kept; a resumed run reads them, and goes through the same rows.
        name: of the data set, for the progress bar.
    Raises:
        MokaError: a sample of which the length cannot be told; data that are not those the run began with.
    """
    grouped = arguments.train_sampling_strategy == BY_LENGTH
    if not packing and not grouped:
        return dataset
    lengths = _lengths(dataset, path, resume, arguments.dataloader_num_workers, name)
    arranged: Any = dataset
    if packing:
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


def sampler(dataset: Any, arguments: TrainingArguments) -> LengthGroupedSampler | None:
    """The sampler of a data set from `put_together`, or None where transformers' own will do."""
    lengths = getattr(dataset, "lengths", None)
    if arguments.train_sampling_strategy != BY_LENGTH or lengths is None:
        return None
    return LengthGroupedSampler(lengths, _step(arguments), data_seed(arguments))


def reach_sampler(loader: Any) -> None:
    """Let accelerate's ``set_epoch`` find the sampler of a loader also where a resumed epoch skips batches.

    With several processes it would lie one level deeper than accelerate looks, and the rest of the epoch would come in
    the order of the first epoch.
    """
    shard = getattr(loader, "batch_sampler", None)
    inner = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
    if shard is not None and inner is not None and not hasattr(shard, "sampler"):
        shard.sampler = inner


def _step(arguments: TrainingArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def data_seed(arguments: TrainingArguments) -> int:
    """What the order of samples is drawn by."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


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
    """What grouping saves: the padding of the first epoch, and that of an order without it."""
    batch = arguments.per_device_train_batch_size
    order = grouped_order(lengths.tokens, lengths.media_items, _step(arguments), data_seed(arguments), epoch=0)
    mixed = np.random.default_rng(0).permutation(len(lengths))
    before, after = (padding_share(lengths.tokens, one, batch) for one in (mixed, order))
    return f"grouped by length: {after:.0%} of a batch is padding ({before:.0%} in random order)"
