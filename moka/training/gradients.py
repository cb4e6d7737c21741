"""Norms of the gradients of one optimizer step, by parameter and by part of the model, whatever engine holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

_MEDIA_PART = re.compile(r"(?:^|\.)(encoder|projector)s\.([^.]+)\.")
_UPS, _DOWNS = (".moka_B.", ".lora_B."), (".moka_A.", ".lora_A.")


def gradient_norms(trainer: Any) -> dict[str, list[float] | None]:
    """Norm of each trainable parameter's gradient, averaged over the processes. All processes take part.

    Between the backward pass and the optimizer step alone. Under DeepSpeed before ``engine.step``, which frees them.

    Returns:
        parameter name -> [norm]; of ``moka_A`` [M, r, in] one for each modality; None where there is no gradient.
    """
    read = _reader(trainer)
    squares: dict[str, torch.Tensor | None] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            gradient = read(parameter)
            squares[name] = None if gradient is None else _squares(gradient, by_row=".moka_A." in name)
    found = [square for square in squares.values() if square is not None]
    # One transfer from the device for all of them.
    values = iter(torch.cat(found).sqrt().tolist() if found else [])
    return {
        name: None if square is None else [next(values) for _ in range(square.numel())]
        for name, square in squares.items()
    }


def _reader(trainer: Any) -> Callable[[torch.nn.Parameter], torch.Tensor | None]:
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad
    return lambda parameter: parameter.grad


def _squares(gradient: torch.Tensor, by_row: bool) -> torch.Tensor:
    """Sums of squares [rows] or [1], float32; those of a sharded gradient over all its shards."""
    squares = gradient.detach().float().pow(2)
    total = squares.flatten(1).sum(1) if by_row and squares.dim() == 3 else squares.sum().reshape(1)
    return total.full_tensor() if isinstance(total, DTensor) else total


def before_engine_step(accelerator: Any, action: Callable[[], None]) -> None:
    """Have DeepSpeed's engine do ``action`` before each optimizer step: accelerate's ``backward`` takes the step too, and
    has no hook in between.
    """
    engine = accelerator.deepspeed_engine_wrapped.engine
    step = engine.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        action()
        return step(*args, **kwargs)

    engine.step = watched


class GradientReader(TrainerCallback):
    """Shows the gradient norms to the trainer's watchers at the steps at which one wants them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            before_engine_step(self.trainer.accelerator, self.show)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:  # its engine has taken the step already
            self.show()

    def show(self) -> None:
        wanting = [watcher for watcher in self.trainer.watchers if watcher.wants_gradients()]
        norms = gradient_norms(self.trainer) if wanting else {}
        for watcher in wanting:
            watcher.on_gradients(norms)


def modality_rows(model: Any) -> list[str]:
    """The modalities of the rows of ``moka_A``; none without a MokA adapter."""
    if not isinstance(model, PeftModel):
        return []
    return list(getattr(model.peft_config[model.active_adapter], "modalities", []))


def is_up(name: str) -> bool:
    """Whether the parameter is a B of the adapter."""
    return any(key in f".{name}" for key in _UPS)


def is_down(name: str) -> bool:
    """Whether the parameter is an A of the adapter."""
    return any(key in f".{name}" for key in _DOWNS)


def media_part(name: str) -> tuple[str, str] | None:
    """("encoder" or "projector", modality) of a parameter outside the language model."""
    found = _MEDIA_PART.search(name)
    return None if found is None else (found[1], found[2])


def norms_by_part(norms: dict[str, list[float] | None], rows: list[str]) -> dict[str, float]:
    """Norm of the gradient by part: A/MODALITY (A alone with LoRA), B, projector/MODALITY, encoder/MODALITY, other."""
    squares: dict[str, float] = {}
    for name, values in norms.items():
        for index, value in enumerate(values or []):
            media = media_part(name)
            if media is not None:
                part = "/".join(media)
            elif is_down(name):
                part = f"A/{rows[index]}" if ".moka_A." in name else "A"
            else:
                part = "B" if is_up(name) else "other"
            squares[part] = squares.get(part, 0.0) + value**2
    return {part: math.sqrt(square) for part, square in squares.items()}
