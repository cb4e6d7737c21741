"""The trainer: ``transformers.Trainer`` for connectors and adapters of a composed model.

Overridden methods of ``Trainer``, and why:

- ``create_optimizer``: encoders and projectors have learning rates of their own.
- ``compute_loss``: callbacks see each batch with the ids of its samples, and its loss; no logits are computed.
- ``get_batch_samples``: the wait for data is timed; embedding alignment sees the captions of the full step; a run that was
  resumed after its last step trains no other.
- ``log``: figures are added to the loss before anything reads them.
- ``save_model``: a checkpoint has what is trained, never the frozen backbone.
- ``_get_dataloader``: samples grouped by length, validation data in their own order, and loaders that resume exactly.
- ``_prepare_for_training``: DeepSpeed's engine saves only what is trained, and resumes with another number of processes.
- ``_save_checkpoint``: metadata, written last, mark a checkpoint as complete; an error on one process ends all of them.
- ``_load_from_checkpoint``: connectors, and adapters under FSDP, which transformers' loader does not know.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers.trainer
from accelerate.utils import DistributedType, DynamoBackend
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import is_liger_kernel_available

from moka.config import OWN_TRAINING_KEYS
from moka.data.streaming import EncodedStream
from moka.distributed import all_gather_object, is_main, run_on_all, run_on_main
from moka.errors import MokaError
from moka.io import disk_full_errors
from moka.modeling import MokaForConditionalGeneration
from moka.modeling.artifacts import connector_state, load_connector, save_connector
from moka.modeling.sharding import fsdp_requested, full_state_dict, loading_full_tensors, without_wrappers

from .alignment import EmbeddingAlignment, share_captions
from .callbacks import check_reports
from .checkpointing import CheckpointMetadata, complete, file_sizes, rotate
from .dataloading import (
    data_fingerprint,
    data_seed,
    dismiss_workers,
    divided,
    loader_settings,
    prepare_loader,
    sampler,
    stream_loader,
)
from .distributed_backend import describe, exclude_frozen, load_checkpoint, move_unsharded, use_deepspeed
from .gradients import GradientReader
from .launch import check_deepspeed
from .run_dir import save_adapter

# Files of the optimizer's state in a checkpoint, by what wrote it.
_PLAIN = "neither DeepSpeed nor FSDP"
_OPTIMIZER_FILES = {
    "DeepSpeed": ("global_step*",),
    "FSDP": ("optimizer.bin", "optimizer_0"),
    _PLAIN: ("optimizer.pt",),
}
_MANY_STEPS = 1_000_000  # to try a schedule before the number of steps is known


class MokaTrainer(Trainer):
    """Trains either the connectors of a composed model (stage 1) or its adapter and connectors (stage 2).

    Args:
        rates: learning rates other than ``args.learning_rate``, by part: "encoders", "projectors".
    """

    def __init__(self, *args: Any, rates: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates = rates or {}
        # Done here, after the metadata were written and the training has ended.
        self._save_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._loads_best, self.args.load_best_model_at_end = self.args.load_best_model_at_end, False
        self.data_fingerprint = data_fingerprint(self.train_dataset) if is_main() else None
        self._save_error: Exception | None = None
        self._loaders: list[Any] = []
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(GradientReader(self))
        model: Any = self.model
        model.train()  # encoders freeze again what peft let train and can have no gradient
        run_on_all(self._check_fsdp)

    def notify(self, event: str, *values: Any) -> None:
        """Call ``event`` of each callback that has it (see ``callbacks``)."""
        for callback in self.callback_handler.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self, *values)

    def run(self, checkpoint: Path | None = None, section: str = "training") -> None:
        """Train from the beginning or from ``checkpoint``; afterwards the model is the best one, if that was asked for.

        Args:
            section: of the configuration, for messages.
        Raises:
            MokaError: the checkpoint was written under another engine; memory ran out.
        """
        if checkpoint is not None:
            run_on_all(lambda: self._check_engine(checkpoint))
            if isinstance(self.train_dataset, EncodedStream):
                # The stream itself passes over what was consumed; transformers would decode it again.
                step = CheckpointMetadata.read(checkpoint).step
                self.train_dataset.start = step * self.args.gradient_accumulation_steps
                self.args.ignore_data_skip = True
        try:
            with _memory_errors(self.args, section):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            for loader in self._loaders:
                dismiss_workers(loader)
        best = self.state.best_model_checkpoint
        if self._loads_best and best is not None:
            if self.is_deepspeed_enabled and isinstance(self.model, PeftModel):
                load_checkpoint(self.model_wrapped, Path(best), self.args.world_size)
            else:
                self._load_from_checkpoint(best)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return the full tensors of what is trained, on the CPU; every process has to call it."""
        return trained_state(self.accelerator.unwrap_model(self.model))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create one group per learning rate and weight decay (biases and norms have none)."""
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

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss without logits, and in training show batch and loss to the callbacks."""
        sample_ids = inputs.pop("sample_ids", [])
        if model.training:
            self.notify("on_batch", inputs, sample_ids)
        found: Any = super().compute_loss(model, {**inputs, "loss_only": True}, return_outputs, num_items_in_batch)
        if model.training:
            self.notify("on_loss", (found[0] if return_outputs else found).detach(), sample_ids)
        return found

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """Fetch the micro-batches of one step; none after the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        self.notify("on_fetch_begin")
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.notify("on_fetch_end")
        if batches and isinstance(self.model, EmbeddingAlignment):
            share_captions(batches)
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add figures to a log with the loss."""
        if "loss" in logs:
            self.notify("on_measure", logs)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained: an adapter folder, or a connector."""
        folder = Path(output_dir or self.args.output_dir or ".")
        state = self.trained_state()
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if isinstance(model, PeftModel):
                    save_adapter(model, self.processing_class, folder, state)
                else:
                    save_connector(composed_of(model), folder, state)
                torch.save(self.args, folder / "training_args.bin")
            except Exception as error:
                if not _internal_call:
                    raise
                self._save_error = error  # the others wait for this process: it fails after they have met
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        own = sampler(dataset, self.args) if is_training else None
        if own is not None or not is_training:
            # transformers would group validation data too, by the lengths of decoded samples.
            sampler_fn = None if own is None else lambda _: own
        if isinstance(dataset, EncodedStream):
            loader: Any = stream_loader(dataset, self.args, self.data_collator)
        else:
            loader = super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        if prepare_loader(loader).persistent_workers:
            self._loaders.append(loader)
        return loader

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        move_unsharded(self.model, self.args.device)
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        exclude_frozen(model)
        if resume_from_checkpoint is not None:
            load_checkpoint(model, Path(resume_from_checkpoint), self.args.world_size)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return model, train_dataloader

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir or ".")
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        zero_stage = describe(self)["zero_stage"]
        self._save_error = None

        def write() -> None:
            with disk_full_errors(checkpoint), _without_fsdp_model_copy():
                super(MokaTrainer, self)._save_checkpoint(model, trial)

        def fail() -> None:
            with disk_full_errors(checkpoint):
                if self._save_error is not None:
                    raise self._save_error

        def both() -> None:
            write()
            fail()

        def finish() -> None:
            with disk_full_errors(checkpoint):
                metadata = CheckpointMetadata(step, self.args.world_size, zero_stage, self.data_fingerprint)
                complete(checkpoint, metadata, written)
            rotate(folder, self._save_limit, checkpoint, self.state.best_model_checkpoint)

        try:
            run_on_main(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                # These write together: one that fails in the middle can say the others only by ending.
                write()
                run_on_all(fail)
            else:
                run_on_all(both)
            written = all_gather_object(file_sizes(checkpoint))
            run_on_main(finish)
        except BaseException:
            if is_main():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped = self.accelerator.unwrap_model(model or self.model)
        with loading_full_tensors(unwrapped), without_wrappers(unwrapped):
            if isinstance(unwrapped, PeftModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_connector(composed_of(unwrapped), resume_from_checkpoint)

    def _check_fsdp(self) -> None:
        kind = self.accelerator.distributed_type
        if fsdp_requested() and self.args.world_size > 1 and kind != DistributedType.FSDP:
            raise MokaError(
                f"FSDP is asked for, and accelerate would run {kind.value} instead: it shards models only on GPUs. Launch "
                "with configs/accelerate/ddp.yaml or, without GPUs, cpu.yaml."
            )

    def _check_engine(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another engine: transformers would resume with a new optimizer and schedule, silently."""
        ours = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else _PLAIN
        found = (e for e, names in _OPTIMIZER_FILES.items() if any(any(checkpoint.glob(n)) for n in names))
        wrote = next(found, "no engine")
        then, now = CheckpointMetadata.read(checkpoint).zero_stage, describe(self)["zero_stage"]
        if wrote != ours or then != now:
            stages = f" (ZeRO stage {then}, now {now})" if then is not None or now is not None else ""
            raise MokaError(
                f"--resume: {checkpoint} was written under {wrote}, and this run is under {ours}{stages}, where its optimizer "
                "cannot resume. Launch the run as it began."
            )


@contextmanager
def _without_fsdp_model_copy() -> Iterator[None]:
    """Inside, transformers' own copy of an FSDP model is not written: `MokaTrainer.save_model` has written what is trained."""
    module: Any = transformers.trainer
    original: Callable | None = getattr(module, "save_fsdp_model", None)
    module.save_fsdp_model = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if original is None:
            del module.save_fsdp_model
        else:
            module.save_fsdp_model = original


@contextmanager
def _memory_errors(arguments: TrainingArguments, section: str) -> Iterator[None]:
    """Turn exhausted memory, of the device, the host or a data loader's worker, into an error that names what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no memory left"
        if "DataLoader worker (pid" in str(error):
            raise MokaError(
                f"{section}.dataloader_num_workers: {arguments.dataloader_num_workers}: a worker was killed ({reason}). "
                "Probably memory ran out: use fewer workers, a lower dataloader_prefetch_factor, or more shared memory (docker "
                "--shm-size)."
            ) from error
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise MokaError(
                f"{section}.per_device_train_batch_size: {arguments.per_device_train_batch_size} does not fit into the memory "
                f"of {arguments.device} ({reason}). Lower it ({section}.global_batch_size keeps the step), set "
                f"{section}.gradient_checkpointing: true or a lower model.max_length, or quantize the backbone."
            ) from error
        raise


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter with its saved modules, or the connector: full tensors, on the CPU; every process has to call it."""
    composed_of(model).backbone_fingerprint()  # what is saved names it; of shards, one process could not compute it
    if not isinstance(model, PeftModel):
        return connector_state(composed_of(model))
    return full_state_dict(model, lambda key, tensor: tensor.requires_grad or ".modules_to_save." in key)


def composed_of(model: Any) -> MokaForConditionalGeneration:
    """Return the composed model inside an objective or a peft model, or itself."""
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
        # The filter would put the mean of earlier steps instead of NaN, and hide a run that diverged.
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
    with _refused_settings(name):
        arguments = TrainingArguments(output_dir=str(output_dir), **settings)
    _try_settings(arguments, name)
    run_on_all(lambda: _check_processes(arguments))
    run_on_all(lambda: _set_accumulation(arguments, section, name))
    run_on_all(lambda: use_deepspeed(arguments, name))
    return arguments


@contextmanager
def _refused_settings(name: str, fields: str = "") -> Iterator[None]:
    """Turn any error of transformers or torch about settings into one that names the section and the fields."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        of = f" of {fields}" if fields else ""
        raise MokaError(f"{name}: transformers refuses these settings{of}: {reason}") from error


def _try_settings(arguments: TrainingArguments, name: str) -> None:
    """Build, for one small parameter, what transformers builds from the settings only when a stage starts."""
    with _refused_settings(name, "optim, optim_args, learning_rate, adam_beta1, adam_beta2, adam_epsilon"):
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(2, 2, device=arguments.device))], **settings)
    with _refused_settings(name, "lr_scheduler_type, lr_scheduler_kwargs, warmup_steps"):
        warmup, given = arguments.get_warmup_steps(_MANY_STEPS), cast("dict | None", arguments.lr_scheduler_kwargs)
        get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, _MANY_STEPS, given)
    with _refused_settings(name, "seed, data_seed"):
        torch.Generator().manual_seed(data_seed(arguments))
    with _refused_settings(name, "log_level"):
        arguments.get_process_log_level()
    with _refused_settings(name, "torch_compile_backend"):
        DynamoBackend((arguments.torch_compile_backend or "no").upper())
    if arguments.neftune_noise_alpha is not None and not arguments.neftune_noise_alpha >= 0:
        raise MokaError(f"{name}.neftune_noise_alpha: {arguments.neftune_noise_alpha} is negative; 5 is usual.")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise MokaError(f"{name}.use_liger_kernel: liger-kernel is not installed. Install it, or set it to false.")
    if arguments.save_strategy == SaveStrategy.BEST and arguments.metric_for_best_model is None:
        raise MokaError(f"{name}.save_strategy: best needs {name}.metric_for_best_model, for example eval_loss.")


def _check_processes(arguments: TrainingArguments) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise MokaError(
            f"The launcher started {started} processes, and each would train only (device {arguments.device.type}, world "
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
