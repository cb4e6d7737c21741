"""The trainer: ``transformers.Trainer`` for connectors and adapters of a composed model.

Balance strategies act through `moka.balance.BalancedTrainerMixin`. Overridden methods of ``Trainer``, and why:

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

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moka.balance import BalancedTrainerMixin
from moka.config import MokaTrainingArguments
from moka.data.streaming import EncodedStream
from moka.distributed import all_gather_object, collective_errors, is_main, run_on_all, run_on_main
from moka.errors import MokaError
from moka.io import disk_full_errors
from moka.modeling.artifacts import connector_state, load_connector, save_adapter, save_connector
from moka.modeling.hf_model import answer_loss, backbone_fingerprint, base_info, logits_to_keep, model_inputs
from moka.modeling.sharding import fsdp_requested, full_state_dict, loading_full_tensors, without_wrappers

from .alignment import EmbeddingAlignment, share_captions
from .checkpointing import CheckpointMetadata, complete, file_sizes, rotate
from .dataloading import (
    data_fingerprint,
    dismiss_workers,
    prepare_loader,
    sampler,
    stream_loader,
)
from .distributed_backend import describe, load_checkpoint, move_unsharded
from .gradients import GradientReader

# Files of the optimizer's state in a checkpoint, by what wrote it.
_PLAIN = "neither DeepSpeed nor FSDP"
_OPTIMIZER_FILES = {
    "DeepSpeed": ("global_step*",),
    "FSDP": ("optimizer.bin", "optimizer_0"),
    _PLAIN: ("optimizer.pt",),
}


class MokaTrainer(BalancedTrainerMixin, Trainer):
    """Trains either the connectors of a composed model (stage 1) or its adapter and connectors (stage 2)."""

    args: MokaTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Done here, after the metadata were written and the training has ended.
        self._save_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._loads_best, self.args.load_best_model_at_end = self.args.load_best_model_at_end, False
        if base_info(self.model).hf:
            self.compute_loss_func = answer_loss  # many of these models pass over num_items_in_batch
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
        own = {"encoders": self.args.encoder_learning_rate, "projectors": self.args.projector_learning_rate}
        rates = {part: rate for part, rate in own.items() if rate is not None}
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = next((rates[part] for part in rates if f"{part}." in name), self.args.learning_rate)
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
        trained: Any = self.model
        own = {**inputs, "loss_only": True}
        if base_info(trained).hf:
            own = {**model_inputs(trained, inputs), **logits_to_keep(trained, inputs["labels"])}
        own["sample_ids"] = sample_ids  # for the balance strategies, which take them out again
        found: Any = super().compute_loss(model, own, return_outputs, num_items_in_batch)
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
        # The frozen backbone stays out of its checkpoints; transformers does so only for adapters.
        model.save_checkpoint = partial(model.save_checkpoint, exclude_frozen_parameters=True)
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
        # DeepSpeed and FSDP write together: a process that fails in the middle ends, and the launcher ends the others.
        together = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self._save_error = None
        try:
            run_on_main(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
            errors = nullcontext() if together else collective_errors()
            with errors, disk_full_errors(checkpoint), _without_fsdp_model_copy():
                super()._save_checkpoint(model, trial)
            with collective_errors(), disk_full_errors(checkpoint):
                if self._save_error is not None:
                    raise self._save_error
            written = all_gather_object(file_sizes(checkpoint))
            with collective_errors(), disk_full_errors(checkpoint):
                if is_main():
                    metadata = CheckpointMetadata(step, self.args.world_size, zero_stage, self.data_fingerprint)
                    complete(checkpoint, metadata, written)
                    rotate(folder, self._save_limit, checkpoint, self.state.best_model_checkpoint)
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
    backbone_fingerprint(composed_of(model))  # what is saved names it; of shards, one process could not compute it
    if not isinstance(model, PeftModel):
        return connector_state(composed_of(model))
    return full_state_dict(model, lambda key, tensor: tensor.requires_grad or ".modules_to_save." in key)


def composed_of(model: Any) -> Any:
    """Return the base model inside an objective or a peft model, or itself."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return model.model if isinstance(model, EmbeddingAlignment) else model
