"""Callbacks: the writer of metrics.jsonl, and the base of those that also see batches, losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from .run_dir import RunFolder


class Watcher(TrainerCallback):
    """A callback that ``MokaTrainer`` also shows batches, losses and gradients. All processes are shown the same moments, so
    that a watcher may use collectives.
    """

    trainer: Any = None  # set by the trainer
    adds_to_log = False  # its ``on_log`` changes the logs, and comes before those of others

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the batches of the coming step, before they are fetched."""
        return batches

    def on_batch(self, inputs: dict[str, Any], sample_ids: list[str]) -> None:
        """See a batch of this process, on its device, before the model does."""

    def on_loss(self, loss: torch.Tensor, sample_ids: list[str]) -> None:
        """See the loss of that batch, still on the device."""

    def wants_gradients(self) -> bool:
        """Return whether to call ``on_gradients`` before the coming optimizer step; the same on all processes."""
        return False

    def on_gradients(self, norms: dict[str, list[float] | None]) -> None:
        """See the result of ``gradients.gradient_norms``, before the optimizer step."""


class MetricsWriter(TrainerCallback):
    """Appends every log record to RUN/metrics.jsonl, with its stage."""

    def __init__(self, folder: RunFolder, stage: int) -> None:
        self.folder, self.stage = folder, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # how it ended

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            # The trainer's mean over the run counts only the steps since the last resume.
            kept = {key: value for key, value in logs.items() if key != "train_loss"}
            self.folder.log({"stage": self.stage, "step": state.global_step, **kept})
