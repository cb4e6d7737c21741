"""A run from its configuration: check -> stage 1 (connectors) -> stage 2 (adapter) -> artefacts."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers.trainer_utils import get_last_checkpoint

from moka.data import Collator, EncodedDataset, open_source
from moka.errors import MokaError
from moka.modeling import MokaProcessor

from .arguments import RunConfig
from .build import attach_adapter, build_for_stage_two, context_length, count_parameters
from .callbacks import DivergenceGuard, MetricsWriter
from .connector import load_connector, save_connector, trained_parts
from .folder import ADAPTER, CONNECTOR, RunFolder, check_trained, save_adapter
from .objectives import EmbeddingAlignment
from .report import plot_loss, write_card
from .trainer import MokaTrainer, training_arguments


def run_training(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Train what ``config`` says; returns the run folder.

    Raises:
        MokaError: anything in the configuration, data or folder that must be mended first; nothing is written then.
    """
    started = time.monotonic()
    folder = RunFolder(config.output.dir)
    folder.check(resume, overwrite)
    datasets = _open_data(config)
    _seed(config)
    model, processor = build_for_stage_two(config)
    _fit_one_sample(datasets, processor, context_length(config.model, model))
    # Every argument is checked before the folder exists.
    arguments = {stage: _arguments(config, folder, stage) for stage in config.stages}
    main = all(a.process_index == 0 for a in arguments.values())
    if main and not resume:
        folder.create(config, overwrite)
    for a in arguments.values():
        if a.parallel_mode == transformers.training_args.ParallelMode.DISTRIBUTED:
            torch.distributed.barrier()
            break

    summary: dict[str, Any] = {"method": config.adapter.method if 2 in config.stages else "stage 1 only"}
    if 1 in config.stages:
        _stage_one(config, folder, model, processor, datasets, arguments[1], resume)
    result: Any = model
    if 2 in config.stages:
        result = _stage_two(config, folder, model, processor, datasets, arguments[2], resume)
        counts = count_parameters(result)
        summary |= {f"trainable parameters, {part}": f"{n:,}" for part, n in counts.items() if part != "total"}
        summary["all parameters"] = f"{counts['total']:,}"
    summary |= _environment(config, time.monotonic() - started)
    if main:
        plot_loss(folder)
        if 2 in config.stages and datasets.get("validation") is not None:
            _write_samples(folder, result, processor, datasets["validation"], config)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_card(folder, config, summary)
    return folder.path


def _seed(config: RunConfig) -> None:
    seed = int(config.training.get("seed", 42))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _open_data(config: RunConfig) -> dict[str, Any]:
    """Samples with decoded media of each part that the stages need."""
    data = config.data
    common = {
        "media_root": data.media_root,
        "on_bad_media": data.on_bad_media,
        "bad_media_budget": data.bad_media_budget,
        "video_frames": data.video_frames,
        "seed": int(config.training.get("data_seed") or config.training.get("seed", 42)),
    }
    datasets: dict[str, Any] = {}
    for stage, name in ((1, "alignment"), (2, "train")):
        if stage in config.stages:
            source = getattr(data, name)
            if source is None:
                raise MokaError(
                    f"data.{name} is not set, and stage {stage} trains on it: a JSONL file or embedded:TASK."
                )
            size = data.train_size if name == "train" else None
            datasets[name] = open_source(source, "train", stage=stage, size=size, **common)
    if data.validation is not None:
        stage = max(config.stages)
        datasets["validation"] = open_source(
            data.validation, "validation", stage=stage, size=data.validation_size, **common
        )
    return datasets


def _fit_one_sample(datasets: dict[str, Any], processor: MokaProcessor, max_length: int | None) -> None:
    """Encode one sample of each set: a template, encoder or length that cannot work is told before training."""
    for samples in datasets.values():
        processor.encode(samples[0]["messages"], max_length=max_length, truncate=True)


def _arguments(config: RunConfig, folder: RunFolder, stage: int) -> transformers.TrainingArguments:
    section = config.alignment if stage == 1 else config.training
    section = {"seed": config.training.get("seed", 42), **section}
    if config.data.validation is None:
        section["eval_strategy"] = "no"
    return training_arguments(section, folder / f"checkpoints/stage{stage}")


def _trainer(config, folder, stage, model, processor, datasets, arguments, max_length) -> MokaTrainer:
    section = config.alignment if stage == 1 else config.training
    seed = int(arguments.data_seed or arguments.seed)
    train = datasets["alignment" if stage == 1 else "train"]
    validation = datasets.get("validation") if stage == 2 or 2 not in config.stages else None
    if validation is None:
        arguments.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
    dropped = folder / "dropped.jsonl"
    callbacks: list[Any] = [MetricsWriter(folder, stage), DivergenceGuard()]
    board = _tensorboard(folder, stage, arguments)
    rates = {
        f"{part}s": section[f"{part}_learning_rate"]
        for part in ("encoder", "projector")
        if f"{part}_learning_rate" in section
    }
    return MokaTrainer(
        model=model,
        args=arguments,
        train_dataset=EncodedDataset(train, processor, max_length, seed, dropped),
        eval_dataset=EncodedDataset(validation, processor, max_length) if validation is not None else None,
        data_collator=Collator(processor),
        processing_class=processor,
        callbacks=callbacks + ([board] if board else []),
        rates=rates,
    )


def _tensorboard(folder: RunFolder, stage: int, arguments: transformers.TrainingArguments) -> Any:
    if arguments.process_index or "tensorboard" in arguments.report_to:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError:
        return None
    return TensorBoardCallback(SummaryWriter(str(folder / f"tensorboard/stage{stage}")))


def _last_checkpoint(arguments: transformers.TrainingArguments, resume: bool) -> str | None:
    folder = arguments.output_dir
    return get_last_checkpoint(folder) if resume and Path(folder).is_dir() else None


def _stage_one(config, folder, model, processor, datasets, arguments, resume: bool) -> None:
    """Train encoders and projectors; the language model is frozen and has no adapter."""
    target = folder / CONNECTOR
    if resume and (target / "connector.json").is_file():
        load_connector(model, target)
        return
    model.language_model.requires_grad_(False)
    embedding = config.alignment.get("objective") == "embedding"
    module = EmbeddingAlignment(model) if embedding else model
    trainer = _trainer(config, folder, 1, module, processor, datasets, arguments, context_length(config.model, model))
    trainer.train(resume_from_checkpoint=_last_checkpoint(arguments, resume))
    _say_dropped(trainer, "stage 1")
    if trainer.is_world_process_zero():
        save_connector(model, target)


def _stage_two(config, folder, model, processor, datasets, arguments, resume: bool) -> PeftModel:
    """Train the adapter with projectors and trainable encoders."""
    fresh = 1 not in config.stages and not config.model.connectors
    if fresh and trained_parts(model):
        print(
            f"note: {', '.join(trained_parts(model))} start untrained: neither stage 1 nor model.connectors is given."
        )
    adapted = attach_adapter(model, config.adapter) if config.adapter.method != "none" else None
    if adapted is None:
        raise MokaError("adapter.method: none has nothing to train in stage 2; use stages=[1], or moka or lora.")
    trainer = _trainer(config, folder, 2, adapted, processor, datasets, arguments, context_length(config.model, model))
    trainer.train(resume_from_checkpoint=_last_checkpoint(arguments, resume))
    _say_dropped(trainer, "stage 2")
    if trainer.is_world_process_zero():
        save_adapter(adapted, processor, folder / ADAPTER)
        check_trained(folder / ADAPTER)
    return adapted


def _say_dropped(trainer: MokaTrainer, stage: str) -> None:
    dropped = trainer.train_dataset.dropped
    if dropped:
        index, reason = next(iter(dropped.items()))
        print(f"{stage}: {len(dropped)} samples replaced; see dropped.jsonl. The first, number {index}: {reason}")


@torch.no_grad()
def _write_samples(folder: RunFolder, model: Any, processor: MokaProcessor, samples: Any, config: RunConfig) -> None:
    model.eval()
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for index in range(min(config.output.samples, len(samples))):
            sample = samples[index]
            question = [m for m in sample["messages"] if m["role"] != "assistant"]
            batch = processor(question).to(model.device)
            tokens = model.generate(**batch, max_new_tokens=config.evaluation.max_new_tokens, do_sample=False)
            record = {
                "id": sample["id"],
                "question": _text(question),
                "answer": processor.decode(tokens[0, batch["input_ids"].shape[1] :]),
                "reference": _text([m for m in sample["messages"] if m["role"] == "assistant"]),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _text(messages: list[dict]) -> str:
    parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
    return " ".join(p if isinstance(p, str) else p.get("text", f"[{p['type']}]") for p in parts)


def _environment(config: RunConfig, seconds: float) -> dict[str, Any]:
    return {
        "seed": config.training.get("seed", 42),
        "seconds": round(seconds),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
