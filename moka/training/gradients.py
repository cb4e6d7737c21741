"""Norms of the gradients of one optimizer step, by parameter and by part of the model, also of sharded parameters."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

_MEDIA_PART = re.compile(r"(?:^|\.)(encoder|projector)s\.([^.]+)\.")


def gradient_norms(trainer: Any) -> dict[str, list[float] | None]:
    """Return the norm of each trainable parameter's gradient, averaged over the processes. All processes have to call it.

    Only between the backward pass and the optimizer step. Under DeepSpeed before ``engine.step``, which frees them.

    Returns:
        parameter name -> [norm]; of ``moka_A`` [M, r, in] one for each modality; None if there is no gradient.
    """
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_grad as read
    else:

        def read(parameter: torch.nn.Parameter) -> torch.Tensor | None:
            return parameter.grad

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


def _squares(gradient: torch.Tensor, by_row: bool) -> torch.Tensor:
    """Return sums of squares [rows] or [1], float32; of a sharded gradient over all its shards."""
    squares = gradient.detach().float().pow(2)
    total = squares.flatten(1).sum(1) if by_row and squares.dim() == 3 else squares.sum().reshape(1)
    return total.full_tensor() if isinstance(total, DTensor) else total


class GradientReader(TrainerCallback):
    """Calls ``on_gradients`` of the trainer's callbacks before each optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            return
        # accelerate's ``backward`` also takes DeepSpeed's optimizer step, and has no hook before it.
        engine = self.trainer.accelerator.deepspeed_engine_wrapped.engine
        step = engine.step

        def read_and_step(*args: Any, **kwargs: Any) -> Any:
            self.read()
            return step(*args, **kwargs)

        engine.step = read_and_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:  # its engine has taken the step already
            self.read()

    def read(self) -> None:
        """Offer the norms to every callback; they are computed if one asks for them."""
        self.trainer.notify("on_gradients", functools.cache(lambda: gradient_norms(self.trainer)))


def modality_rows(model: Any) -> list[str]:
    """Return the modalities of the rows of ``moka_A``; none without a MokA adapter, and none of another method."""
    config: Any = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    return list(getattr(config, "modalities", [])) if getattr(config, "method", None) == "moka" else []


def media_part(name: str) -> tuple[str, str] | None:
    """Return ("encoder" or "projector", modality) of a parameter outside the language model."""
    found = _MEDIA_PART.search(name)
    return None if found is None else (found[1], found[2])


def norms_by_part(norms: dict[str, list[float] | None], rows: list[str]) -> dict[str, float]:
    """Return the norm of the gradient by part: A/MODALITY (A with other methods), B, projector/MODALITY, encoder/MODALITY, other."""
    squares: dict[str, float] = {}
    for name, values in norms.items():
        media, dotted = media_part(name), f".{name}"
        for index, value in enumerate(values or []):
            if media is not None:
                part = "/".join(media)
            elif ".moka_A." in dotted and rows:
                part = f"A/{rows[index]}"
            elif ".lora_A." in dotted or ".moka_A." in dotted:
                part = "A"
            else:
                part = "B" if ".moka_B." in dotted or ".lora_B." in dotted else "other"
            squares[part] = squares.get(part, 0.0) + value**2
    return {part: math.sqrt(square) for part, square in squares.items()}
