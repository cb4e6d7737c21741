"""Opening a run: everything is tried that can be tried before training, and then its folder is made."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainingArguments

from moka.balance import build_strategies
from moka.balance.balance import check_engine, check_modalities
from moka.config import SECTIONS, MokaTrainingArguments, RunConfig, check_complete
from moka.data import EncodedDataset, MediaDecoding
from moka.data.media_io import BadMediaError
from moka.data.media_validation import SkipReport, joined
from moka.data.streaming import EncodedStream, SampleStream
from moka.distributed import (
    all_gather_object,
    broadcast_from_main,
    is_main,
    print_main,
    rank_and_world_size,
    run_on_all,
    run_on_main,
)
from moka.errors import Interrupted, MokaError
from moka.features.cache import FeatureCache
from moka.features.setup import describe, open_features, with_features
from moka.modeling import MokaForConditionalGeneration, MokaProcessor
from moka.modeling.build import (
    adapter_parameters,
    build_for_stage_two,
    check_not_sharded,
    context_length,
    resolve_backbone,
)
from moka.modeling.hf_model import base_info
from moka.modeling.sharding import fsdp_requested, zero_stage

from .arguments import training_arguments
from .dataloading import check_packing
from .datasets import check_chats, check_files, check_media, open_data, try_media, write_reports
from .preemption import Interruption
from .run_dir import SUMMARY, RunFolder


@dataclass
class Run:
    """The state that the stages of one run share: its configuration and folder, the data, the model and its processor."""

    config: RunConfig
    folder: RunFolder
    arguments: dict[int, MokaTrainingArguments]
    resume: bool
    datasets: dict[str, Any]
    model: MokaForConditionalGeneration
    processor: MokaProcessor
    interruption: Interruption = field(default_factory=Interruption)
    started: float = 0.0
    features: FeatureCache | None = None
    engines: dict[int, dict[str, Any]] = field(default_factory=dict)
    logits_change: float | None = None

    @property
    def max_length(self) -> int | None:
        return context_length(self.config.model, self.model.config)


@contextmanager
def open_run(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Iterator[Run | None]:
    """Everything that can be tried before training is tried; the run folder is made; then the run is yours.

    None where a run to be resumed is complete. What is refused before training leaves no folder, and neither does a medium
    that cannot be read before there is anything to continue from.

    Raises:
        MokaError: as ``run_training``.
    """
    folder = RunFolder(config.output.dir)
    began = False
    with Interruption() as interruption:
        try:
            with _open_run(config, folder, resume, overwrite) as run:
                began = True
                if run is not None:
                    run.interruption = interruption
                yield run
        except Interrupted as stop:
            if began or resume:
                stop.remedy = "resume with `moka train ... --resume`"
            raise
        finally:
            folder.lock.release()


@contextmanager
def _open_run(config: RunConfig, folder: RunFolder, resume: bool, overwrite: bool) -> Iterator[Run | None]:
    started = time.monotonic()
    check_complete(config)
    # The arguments come first: they connect the processes.
    arguments = {stage: _arguments(config, folder, stage) for stage in config.stages}
    run_on_all(lambda: check_not_sharded(config.model, arguments.values()))
    run_on_main(lambda: folder.check(resume, overwrite))
    if resume:
        run_on_all(lambda: folder.check_same(config))
        if broadcast_from_main((folder / SUMMARY).exists):
            print_main(f"note: {folder.path} is complete; there is nothing to continue with.")
            yield None
            return
    # What has to be downloaded and prepared is so once.
    if config.model.kind == "composed":
        run_on_all(lambda: resolve_backbone(config.model.backbone), main_first=True)
    datasets = run_on_all(lambda: open_data(config), main_first=True)
    run_on_all(lambda: check_files(datasets, config, rank_and_world_size()))
    for note in dict.fromkeys(note for samples in datasets.values() for note in samples.notes):
        print_main(f"note: {note}")
    run = run_on_all(lambda: _prepare(config, folder, arguments, resume, datasets))
    tried = _leave_out(run.datasets, config, folder, resume)
    run_on_all(lambda: _try_first(run))
    run_on_all(lambda: check_chats(run.datasets, config, run.processor, rank_and_world_size()))
    run_on_all(lambda: check_media(run.datasets, config, rank_and_world_size()))
    run.started = started
    if not resume:
        run_on_main(lambda: folder.create(config))
        run_on_main(lambda: write_reports(tried, folder.path))
    if config.data.on_bad_media == "substitute":
        run.datasets = run_on_all(lambda: open_data(config, folder.path, run.features))
    try:
        yield run
    except BadMediaError as error:
        # A file that cannot be read is found as late as its sample comes; with nothing to resume, nothing stays.
        if is_main():
            folder.discard()
        remedy = "Or let the run do without it: data.on_bad_media=skip or substitute."
        raise BadMediaError(f"{str(error).rstrip()} {remedy}", error.file, error.reason) from error


def _leave_out(datasets: dict[str, Any], config: RunConfig, folder: RunFolder, resume: bool) -> dict[str, SkipReport]:
    """``on_bad_media: skip``: replace each data set by its samples that can be used, the same on every process."""
    if config.data.on_bad_media != "skip":
        return {}
    parts = all_gather_object(
        run_on_all(lambda: try_media(datasets, config, folder.path, resume, rank_and_world_size()))
    )
    tried = run_on_all(lambda: {name: joined([part[name] for part in parts]) for name in parts[0]})
    for name, report in tried.items():
        datasets[name] = datasets[name].select(report.indices)
        print_main(report.summary())
    return tried


def _prepare(
    config: RunConfig,
    folder: RunFolder,
    arguments: dict[int, MokaTrainingArguments],
    resume: bool,
    datasets: dict[str, Any],
) -> Run:
    """The model, after everything was tried that can be tried before training."""
    draw_seed(config, config.stages[0])
    model, processor = build_for_stage_two(config)
    processor.decoding = MediaDecoding.of(config.data).to_dict()
    run = Run(config, folder, arguments, resume, datasets, model, processor)
    if 2 in config.stages:
        strategies = build_strategies(config.balance)
        check_modalities(strategies, list(base_info(model).type_ids))
        zero = arguments[2].deepspeed_plugin is not None
        check_engine(strategies, zero_stage(arguments[2]) if zero else None, fsdp_requested())
        _check_adapter_size(config, adapter_parameters(model, config.adapter), arguments[2])
    if config.data.feature_cache is not None:
        run.features = open_features(config.data, model, processor)
        run.datasets = {name: with_features(samples, run.features) for name, samples in datasets.items()}
        for line in describe(run.features):
            print_main(line)
    return run


def _check_adapter_size(config: RunConfig, parameters: int, arguments: TrainingArguments) -> None:
    """Refuse an adapter whose weights only, in float32, need more memory than the machine has."""
    device, memory = arguments.device, psutil.virtual_memory().total
    properties = getattr(getattr(torch, device.type), "get_device_properties", None)
    if properties is not None:
        memory = properties(device).total_memory * arguments.world_size
    if 4 * parameters > memory:
        raise MokaError(
            f"adapter.r: {config.adapter['r']} makes an adapter of {parameters:,} parameters, {4 * parameters / 2**30:,.0f} GiB, and "
            f"{device} has {memory / 2**30:,.0f} GiB. Lower it, or name fewer adapter.target_modules."
        )


def _try_first(run: Run) -> None:
    """A template, encoder, length or backbone that cannot work."""
    for samples in run.datasets.values():
        if isinstance(samples, SampleStream):
            next(iter(EncodedStream(samples, run.processor, run.max_length, 1).of_one_process()))
        else:
            EncodedDataset(samples, run.processor, run.max_length)[0]
    check_packing(run.config, run.model, run.arguments[run.config.stages[0]].device)


def draw_seed(config: RunConfig, stage: int) -> None:
    """Begin all random numbers with the seed of a stage."""
    seed = config.seed(stage)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _arguments(config: RunConfig, folder: RunFolder, stage: int) -> MokaTrainingArguments:
    name = SECTIONS[stage]
    of_both = ("deepspeed", "fsdp", "fsdp_config")
    shared = {key: config.training[key] for key in of_both if key in config.training}
    section = {**shared, **config.section(stage), "seed": config.seed(stage)}
    if stage == 1 and 2 in config.stages:
        section["eval_strategy"] = "no"  # the validation data are those of stage 2
    if stage == 1 and section.get("objective") == "embedding":
        # There is no pass through the language model to save memory in.
        section = {key: value for key, value in section.items() if "checkpointing" not in key}
    return training_arguments(section, folder / f"checkpoints/stage{stage}", name)
