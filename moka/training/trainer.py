"""The trainer: ``transformers.Trainer`` with a learning rate for each part, and saving of what is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, save_fsdp_optimizer
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from moka.config import OWN_TRAINING_KEYS
from moka.distributed import run_on_all
from moka.errors import MokaError
from moka.modeling import MokaForConditionalGeneration
from moka.modeling.artifacts import connector_state, load_connector, save_connector
from moka.modeling.sharding import fsdp_requested, full_state_dict, loading_full_tensors, without_wrappers

from .alignment import EmbeddingAlignment, share_captions
from .batches import reach_sampler, sampler
from .callbacks import Watcher
from .checkpointing import read_seal
from .distributed_backend import describe, leave_frozen_out, load_checkpoint, place, use_deepspeed
from .global_batch import divided
from .gradients import GradientReader
from .launch import check_deepspeed
from .loaders import loader_settings
from .resuming import ResumableTrainer
from .run_dir import save_adapter
from .trackers import check_reports

# Where the optimizer's state lies in a checkpoint.
_NEITHER = "neither DeepSpeed nor FSDP"
_OPTIMIZER_FILES = {
    "DeepSpeed": ("global_step*",),
    "FSDP": ("optimizer.bin", "optimizer_0"),
    _NEITHER: ("optimizer.pt",),
}


class MokaTrainer(ResumableTrainer):
    """Trains either the connectors of a composed model (stage 1) or its adapter and connectors (stage 2).

    Args:
        rates: learning rates other than ``args.learning_rate``, by part: "encoders", "projectors".
    """

    _parameters: int | None = None  # without embeddings

    def __init__(self, *args: Any, rates: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates = rates or {}
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        for watcher in self.watchers:
            watcher.trainer = self
        self.add_callback(GradientReader(self))
        model: Any = self.model
        model.train()  # encoders freeze again what peft let train and can have no gradient
        run_on_all(self._check_fsdp)

    def _check_fsdp(self) -> None:
        kind = self.accelerator.distributed_type
        if fsdp_requested() and self.args.world_size > 1 and kind != DistributedType.FSDP:
            raise MokaError(
                f"FSDP is asked for, and accelerate would run {kind.value} in its place: it shards models on GPUs alone. "
                "Launch with configs/accelerate/ddp.yaml or, without GPUs, cpu.yaml."
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group per learning rate and weight decay (biases and norms decay in none)."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = next((p for p in self.rates if f"{p}." in name), None)
                rate = self.args.learning_rate if part is None else self.rates[part]
                groups.setdefault((rate, self.args.weight_decay if name in decayed else 0.0), []).append(parameter)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        settings.pop("lr", None)
        self.optimizer = optimizer_class(
            [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
            lr=self.args.learning_rate,
            **settings,
        )
        return self.optimizer

    @property
    def watchers(self) -> list[Watcher]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Watcher)]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        own = sampler(self.train_dataset if train_dataset is None else train_dataset, self.args)
        return super()._get_train_sampler(train_dataset) if own is None else own

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # transformers would group these too, by the lengths of decoded samples.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        reach_sampler(loader)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        for watcher in self.watchers:
            epoch_iterator = watcher.watched(epoch_iterator)
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and isinstance(self.model, EmbeddingAlignment):
            share_captions(batches)
        return batches, items

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        place(self.model, self.args.device)
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        leave_frozen_out(model)
        if resume_from_checkpoint is not None:
            run_on_all(lambda: self._check_optimizer(Path(resume_from_checkpoint)))
            load_checkpoint(model, Path(resume_from_checkpoint), self.args.world_size)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return model, train_dataloader

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Whole tensors of what is trained, on the CPU; every process has to call it."""
        return trained_state(self.accelerator.unwrap_model(self.model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, which would gather the frozen backbone too."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        sample_ids = inputs.pop("sample_ids", [])
        for watcher in self.watchers:
            watcher.on_batch(inputs, sample_ids)
        inputs["loss_only"] = True
        loss = super().training_step(model, inputs, num_items_in_batch)
        for watcher in self.watchers:
            watcher.on_loss(loss, sample_ids)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in transformers, which counts the parameters anew in every step."""
        if self._parameters is None:
            model: Any = self.model
            self._parameters = model.num_parameters(exclude_embeddings=True) if hasattr(model, "num_parameters") else 0
        return 6 * inputs["input_ids"].numel() * self._parameters

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        inputs.pop("sample_ids", None)
        inputs["loss_only"] = prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            for watcher in self.watchers:
                logs.update(watcher.measured(logs))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds what is trained, never the frozen backbone."""
        folder = Path(output_dir or self.args.output_dir or ".")
        state = self.trained_state()
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        with self.failing_later():
            if isinstance(model, PeftModel):
                save_adapter(model, self.processing_class, folder, state)
            else:
                save_connector(composed_of(model), folder, state)
            torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # As in transformers, without its own copy of the model: `_save` has written what is trained.
        plugin, scheduler = self.accelerator.state.fsdp_plugin, cast("Any", self.lr_scheduler)
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            run_on_all(lambda: self._check_optimizer(Path(checkpoint)))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _check_optimizer(self, checkpoint: Path) -> None:
        """transformers goes on with a fresh optimizer and schedule where it finds no state of theirs."""
        ours = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else _NEITHER
        found = (e for e, names in _OPTIMIZER_FILES.items() if any(any(checkpoint.glob(n)) for n in names))
        wrote = next(found, "no engine")
        then, now = read_seal(checkpoint).zero_stage, describe(self)["zero_stage"]
        if wrote != ours or then != now:
            stages = f" (ZeRO stage {then}, now {now})" if then is not None or now is not None else ""
            raise MokaError(
                f"--resume: {checkpoint} was written under {wrote}, and this run is under {ours}{stages}, where its optimizer "
                "cannot go on. Launch the run as it began."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped = self.accelerator.unwrap_model(model or self.model)
        with loading_full_tensors(unwrapped), without_wrappers(unwrapped):
            if isinstance(unwrapped, PeftModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_connector(composed_of(unwrapped), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        unwrapped = self.accelerator.unwrap_model(self.model)
        if best is None or (isinstance(unwrapped, PeftModel) and not self.is_fsdp_enabled):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter with its saved modules, or the connector: whole, on the CPU; every process has to call it."""
    composed_of(model).backbone_fingerprint()  # what is saved names it; of parts, one process alone could not tell
    if not isinstance(model, PeftModel):
        return connector_state(composed_of(model))
    return full_state_dict(model, lambda key, tensor: tensor.requires_grad or ".modules_to_save." in key)


def composed_of(model: Any) -> MokaForConditionalGeneration:
    """The composed model inside an objective, a peft model, or itself."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return model.model if isinstance(model, EmbeddingAlignment) else model


def training_arguments(
    section: dict[str, Any], output_dir: str | Path, name: str = "training", **fixed: Any
) -> TrainingArguments:
    """``TrainingArguments`` of one stage from its section; our own keys are translated or left to the caller.

    Args:
        name: of the section, for messages.
    Raises:
        MokaError: what transformers refuses, or this machine cannot do; a global batch that cannot be had.
    """
    check_deepspeed(section, name)
    check_reports(section.get("report_to"), f"{name}.report_to")
    settings = {key: value for key, value in section.items() if key not in OWN_TRAINING_KEYS}
    if not torch.cuda.is_available():
        settings.setdefault("use_cpu", True)
    settings |= loader_settings(settings)
    settings = {
        "logging_steps": 10,
        "report_to": "none",
        "logging_first_step": True,
        # The filter would put the mean of earlier steps in the place of NaN, and hide a run that diverged.
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        # Every parameter has a gradient in every step; to look for others breaks reentrant checkpointing.
        "ddp_find_unused_parameters": False,
        **settings,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        **fixed,
    }
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in settings and new in TrainingArguments.__dataclass_fields__:  # transformers 5.23 renamed them
            settings[new] = settings.pop(old)
    for key in ("bf16", "fp16", "tf32"):
        if settings.get(key) and (settings.get("use_cpu") or not torch.cuda.is_available()):
            raise MokaError(f"{name}.{key}: true needs a GPU, and this run is on the CPU. Take it out.")
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), **settings)
        Trainer.get_optimizer_cls_and_kwargs(arguments)  # an optimizer whose library is missing
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MokaError(f"{name}: transformers refuses these settings: {reason}") from error
    run_on_all(lambda: _check_processes(arguments))
    run_on_all(lambda: _set_accumulation(arguments, section, name))
    run_on_all(lambda: use_deepspeed(arguments, name))
    return arguments


def _check_processes(arguments: TrainingArguments) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise MokaError(
            f"The launcher started {started} processes, and each would train alone (device {arguments.device.type}, world "
            f"size {arguments.world_size}). Take use_cpu out of the settings, or launch one process."
        )
    if arguments.n_gpu > 1:
        # DataParallel would cut media and text of a batch at different places.
        print(f"note: {arguments.n_gpu} GPUs are visible and one is used; --launcher ddp or zero2 uses all.")
        arguments._n_gpu = 1


def _set_accumulation(arguments: TrainingArguments, section: dict[str, Any], name: str) -> None:
    parts = divided(section, arguments.world_size, name)
    if parts is None:
        return
    (size, steps), total = parts, section["global_batch_size"]
    given = section.get("gradient_accumulation_steps")
    if given is not None and given != steps:
        raise MokaError(
            f"{name}: global_batch_size {total} takes {steps} accumulation steps, and gradient_accumulation_steps is "
            f"{given}. Take one of the two out."
        )
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, steps
