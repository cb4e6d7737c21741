"""The trainer: ``transformers.Trainer`` with a learning rate for each part, and saving of what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from moka.errors import MokaError
from moka.modeling import MokaForConditionalGeneration

from .connector import WEIGHTS, load_connector, save_connector
from .folder import save_adapter
from .objectives import EmbeddingAlignment


class MokaTrainer(Trainer):
    """Trains either the connectors of a composed model (stage 1) or its adapter and connectors (stage 2).

    Args:
        rates: learning rates other than ``args.learning_rate``, by part: "encoders", "projectors".
    """

    def __init__(self, *args: Any, rates: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates = rates or {}

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds what is trained, never the frozen backbone."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save_adapter(model, self.processing_class, folder, state_dict)
        else:
            composed = composed_of(model)
            if state_dict is not None:
                state_dict = (
                    {key.removeprefix("model."): value for key, value in state_dict.items()}
                    if (isinstance(model, EmbeddingAlignment))
                    else state_dict
                )
            save_connector(composed, folder, state_dict)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped = self.accelerator.unwrap_model(model or self.model)
        if isinstance(unwrapped, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif (Path(resume_from_checkpoint) / WEIGHTS).is_file():
            load_connector(composed_of(unwrapped), resume_from_checkpoint)
        else:
            raise MokaError(f"{resume_from_checkpoint} holds no {WEIGHTS}; it is no stage-1 checkpoint.")


def composed_of(model: Any) -> MokaForConditionalGeneration:
    """The composed model inside an objective, a peft model, or itself."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, EmbeddingAlignment) else model


def training_arguments(section: dict[str, Any], output_dir: str | Path, **fixed: Any) -> TrainingArguments:
    """``TrainingArguments`` of one stage from its section; our own keys are translated or left to the caller.

    Raises:
        MokaError: a global batch that the number of processes does not divide.
    """
    settings = {
        key: value
        for key, value in section.items()
        if key not in ("global_batch_size", "encoder_learning_rate", "projector_learning_rate", "objective")
    }
    if not torch.cuda.is_available():
        settings.setdefault("use_cpu", True)
    settings = {
        "logging_steps": 10,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "logging_first_step": True,
        "disable_tqdm": False,
        **settings,
        **fixed,
    }
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), **settings)
    except (ValueError, TypeError) as error:
        raise MokaError(f"training: transformers refuses these settings: {str(error).splitlines()[0]}") from error
    total = section.get("global_batch_size")
    if total is not None:
        step = arguments.per_device_train_batch_size * arguments.world_size
        if total % step:
            raise MokaError(
                f"training.global_batch_size: {total} is no multiple of {arguments.per_device_train_batch_size} samples x "
                f"{arguments.world_size} processes = {step}. Change per_device_train_batch_size or the number of processes."
            )
        arguments.gradient_accumulation_steps = total // step
    return arguments


def read_trained(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter or connector."""
    folder = Path(folder)
    names = ("adapter_model.safetensors", WEIGHTS)
    return load_file(next(folder / name for name in names if (folder / name).is_file()))
