"""A run from its configuration: check -> stage 1 (connectors) -> stage 2 (adapter) -> artefacts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers.trainer_utils import IntervalStrategy

from moka.adapter.wrapping import set_auxiliary_scale
from moka.balance import build_strategies
from moka.config import DATA, SECTIONS, RunConfig
from moka.data import Collator, EncodedDataset, MediaDecoding
from moka.data.streaming import EncodedStream, SampleStream
from moka.distributed import broadcast_from_main, collective_errors, is_main, print_main, run_on_all, run_on_main
from moka.errors import MokaError, counted
from moka.io import atomic_dir, read_jsonl, write_json
from moka.modeling.artifacts import ADAPTER, load_connector, save_connector, save_result, take_connector, trained_parts
from moka.modeling.build import adapter_coverage, attach_adapter, build_for_stage_two, count_parameters
from moka.modeling.encoders import CachedEncoder, bring_back, set_aside
from moka.modeling.hf_model import base_info
from moka.modeling.sharding import is_sharded

from .alignment import EmbeddingAlignment
from .arguments import data_seed
from .callbacks import Meter, MetricsWriter, ModalityObserver, ProgressBar, add_tensorboard
from .checkpointing import last_checkpoint, print_changes
from .dataloading import build_train_dataset
from .datasets import bad_media_report
from .distributed_backend import BackendNote, forget_engine
from .model_card import plot_metrics, write_card, write_samples
from .preemption import SaveAndLeave
from .run_dir import CONNECTOR, SUMMARY
from .sanity_callbacks import ADAPTED_SAMPLES, DivergenceGuard, GradientGuard, check_dtypes, logits_change
from .setup import Run, draw_seed, open_run
from .trainer import MokaTrainer

_BAD_MEDIA = {
    "error": "with bad media",
    "skip": "left out for bad media",
    "substitute": "replaced for bad media",
}


def run_training(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Train what ``config`` asks for; return the run folder.

    Raises:
        MokaError: anything in the configuration, data or folder that must be corrected first; nothing is written then.
    """
    with open_run(config, resume, overwrite) as run:
        if run is not None:
            if 1 in config.stages:
                train_connectors(run)
            finish(run, train_adapter(run) if 2 in config.stages else None)
    return Path(config.output.dir)


def _trainer(run: Run, stage: int, module: torch.nn.Module, step: int) -> MokaTrainer:
    arguments = run.arguments[stage]
    forget_engine(arguments)
    train = run.datasets[DATA[stage]]
    strategies = build_strategies(run.config.balance) if stage == 2 else []
    validates = arguments.eval_strategy != IntervalStrategy.NO or any(s.needs().validation for s in strategies)
    validation = run.datasets.get("validation") if validates else None
    check_dtypes(module)
    dropped = run.folder / f"dropped-stage{stage}.jsonl"
    trainer = MokaTrainer(
        model=module,
        args=arguments,
        train_dataset=build_train_dataset(
            _encoded(run, train, arguments, dropped),
            arguments,
            path=run.folder / f"lengths-stage{stage}.npz",
            resume=run.resume,
            name=f"data.{DATA[stage]}",
        ),
        eval_dataset=None if validation is None else EncodedDataset(validation, run.processor, run.max_length),
        data_collator=Collator(run.processor),
        processing_class=run.processor,
        callbacks=_callbacks(run, stage),
        balance=strategies,
    )
    add_tensorboard(trainer, run.folder, stage, step, run.config.section(stage).get("report_to"))
    return trainer


def _encoded(run: Run, samples: Any, arguments: Any, report: Path) -> EncodedDataset | EncodedStream:
    """Return the training samples of a stage as model inputs."""
    if not isinstance(samples, SampleStream):
        return EncodedDataset(
            samples, run.processor, run.max_length, data_seed(arguments), report, run.config.data.on_bad_media
        )
    data = run.config.data
    return EncodedStream(
        samples,
        run.processor,
        run.max_length,
        arguments.per_device_train_batch_size,
        decoding=MediaDecoding.of(data),
        on_bad_media=data.on_bad_media,
        budget=data.bad_media_budget,
        report_path=report,
    )


def _callbacks(run: Run, stage: int) -> list[Any]:
    type_ids = base_info(run.model).type_ids
    meter = Meter(type_ids)
    guards = [DivergenceGuard(run.folder, SECTIONS[stage]), GradientGuard(type_ids, SECTIONS[stage])]
    every = run.config.section(stage).get("observe_modalities", 0)
    observers = [ModalityObserver(every)] if every else []
    return [meter, *observers, MetricsWriter(run.folder, stage), ProgressBar(stage), *guards]


def _train(run: Run, stage: int, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Train one stage, from the newest checkpoint if the run is resumed; return what was trained, in full tensors."""
    arguments = run.arguments[stage]
    checkpoint, step = None, 0
    if run.resume:
        stage_folder = Path(arguments.output_dir or ".")
        checkpoint, step = broadcast_from_main(lambda: last_checkpoint(stage_folder))
        run_on_main(lambda: run.folder.rewind_metrics(stage, step))
        print_main(
            f"stage {stage}: " + (f"resuming from {checkpoint}" if checkpoint else "no checkpoint; from its beginning")
        )
    _note_batch(run, stage, resumed=checkpoint is not None)
    trainer = _trainer(run, stage, module, step)
    set_auxiliary_scale(module, 1 / arguments.gradient_accumulation_steps)
    if checkpoint is not None and is_main():
        print_changes(checkpoint, arguments.world_size, trainer.data_fingerprint, f"data.{DATA[stage]}")
    trainer.add_callback(BackendNote(trainer, stage, run.engines))
    trainer.add_callback(SaveAndLeave(run.interruption, trainer))
    run.interruption.defer()
    trainer.run(checkpoint, SECTIONS[stage])
    _note_replaced(run, stage)
    if stage == 2:
        run.logits_change = logits_change(trainer)
    return trainer.trained_state()


def _note_batch(run: Run, stage: int, resumed: bool) -> None:
    """Print and record the samples of one optimizer step; a resumed stage keeps them, whatever the number of processes."""
    arguments, name = run.arguments[stage], SECTIONS[stage]
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    total = batch * accumulated * arguments.world_size
    unit = "packed rows" if arguments.packing else "samples"
    print_main(
        f"stage {stage}: {total} {unit} a step ({batch} x {counted(arguments.world_size, 'process', 'processes')} x {accumulated} "
        "accumulated)"
    )
    for what in ("save", "eval"):
        if (
            f"{what}_steps" in run.config.section(stage)
            and getattr(arguments, f"{what}_strategy") == IntervalStrategy.NO
        ):
            print_main(f"note: {name}.{what}_steps does nothing, as {name}.{what}_strategy is no.")
    key = "samples_per_step"
    records = broadcast_from_main(run.folder.metrics)
    began = next((r[key] for r in reversed(records) if r["stage"] == stage and key in r), None)
    with collective_errors():
        if resumed and began not in (None, total):
            raise MokaError(
                f"--resume: stage {stage} began with {began} samples a step, and would continue with {total}. Launch as many "
                f"processes as before; in a new run {name}.global_batch_size keeps the number."
            )
    if began != total:
        run_on_main(lambda: run.folder.log({"stage": stage, "step": 0, key: total}))


def train_connectors(run: Run) -> None:
    """Stage 1: train encoders and projectors; the language model is frozen and has no adapter."""
    target = run.folder / CONNECTOR
    if run.resume and broadcast_from_main((target / "connector.json").is_file):
        load_connector(run.model, target)
        return
    run.model.language_model.requires_grad_(False)
    embedding = run.arguments[1].objective == "embedding"
    state = _train(run, 1, EmbeddingAlignment(run.model) if embedding else run.model)

    with collective_errors():
        if is_main():
            with atomic_dir(target) as part:
                save_connector(run.model, part, state)
    if 2 in run.config.stages and (run.arguments[1].deepspeed_plugin is not None or is_sharded(run.model)):
        # An engine leaves its hooks and its parts of the parameters on the model.
        cached = [name for name, encoder in run.model.encoders.items() if isinstance(encoder, CachedEncoder)]
        run.model = run_on_all(lambda: build_for_stage_two(run.config)[0])
        set_aside(run.model, cached)
        run_on_all(lambda: take_connector(run.model, state))


def train_adapter(run: Run) -> PeftModel:
    """Stage 2: train the adapter with projectors and trainable encoders."""
    parts = trained_parts(run.model)
    if parts and 1 not in run.config.stages and not run.config.model.connectors:
        print_main(f"note: {', '.join(parts)} start untrained: neither stage 1 nor model.connectors is given.")
    run.interruption.check()
    # Again: a resumed run, which has not gone through stage 1, draws the same adapter.
    draw_seed(run.config, 2)
    adapted = attach_adapter(run.model, run.config.adapter, run.processor)
    share = adapter_coverage(adapted)
    remedy = "; leave adapter.target_modules out, or name more layers, if more was intended" if share < 0.5 else ""
    print_main(f"stage 2: the adapter covers {share:.0%} of the decoder's block weights{remedy}")
    state = _train(run, 2, adapted)
    doubts = broadcast_from_main(lambda: save_result(adapted, run.processor, run.folder / ADAPTER, state))
    if run.logits_change is not None and not run.logits_change > 0:
        doubts.append(
            f"the adapter changes the logits of {ADAPTED_SAMPLES} training samples by {run.logits_change:g}: its layers are not "
            "used, or its updates are lost in rounding. Raise the learning rate or train longer."
        )
    for doubt in doubts:
        print_main(f"warning: {doubt}")
    return adapted


def _note_replaced(run: Run, stage: int) -> None:
    """Print how many samples could not be used, or only in part, over all processes and loader workers."""
    paths = [run.folder / f"dropped-stage{stage}.jsonl"]
    if run.config.data.on_bad_media == "substitute":
        paths.append(bad_media_report(run.folder.path, DATA[stage]))
    for path in paths:
        if not is_main() or not path.exists():
            continue
        records = read_jsonl(path)
        for action, done in (("shortened", "shortened"), ("", "replaced by others")):
            found = {r["index"]: r for r in records if (r.get("action") == "shortened") == bool(action)}
            if found:
                first = next(iter(found.values()))
                print(
                    f"stage {stage}: {counted(len(found), 'sample')} {done}; see {path}. The first, {first['id']}: "
                    f"{first['reason']}"
                )


def finish(run: Run, result: PeftModel | None) -> None:
    """Plot, sample answers, model card and summary; the summary, written last, marks the run as complete."""
    run.interruption.check()
    validation = run.datasets.get("validation")
    if result is not None and validation is not None:
        # On all processes: each may hold but a part of the model.
        run_on_all(lambda: write_samples(run.folder, result, run.processor, validation, run.config))
    if run.features is not None:
        bring_back(run.model)
    run_on_main(lambda: _write_artefacts(run, result, time.monotonic() - run.started))


def _write_artefacts(run: Run, result: PeftModel | None, seconds: float) -> None:
    config, folder = run.config, run.folder
    summary: dict[str, Any] = {"method": config.adapter["method"] if 2 in config.stages else "stage 1 only"}
    if result is not None:
        counts = count_parameters(result)
        summary |= {f"trainable parameters, {part}": n for part, n in counts.items() if part != "total"}
        summary["all parameters"] = counts["total"]
        summary["adapter covers"] = f"{adapter_coverage(result):.0%} of the decoder's block weights"
    for name in run.datasets:
        path = bad_media_report(folder.path, name)
        if path.exists():
            bad = {r["index"] for r in read_jsonl(path) if "index" in r}
            summary[f"samples of data.{name} {_BAD_MEDIA[config.data.on_bad_media]}"] = len(bad)
    device = run.arguments[config.stages[-1]].device
    summary |= {
        "seed": config.seed(config.stages[-1]),
        "seconds": round(seconds),
        "processes": next(iter(run.arguments.values())).world_size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if run.logits_change is not None:
        summary["adapter changes logits by"] = f"{100 * run.logits_change:.3g} %"
    plot_metrics(folder)
    summary["engines"] = run.engines
    write_card(folder, config, summary)
    write_json(folder / SUMMARY, summary)
