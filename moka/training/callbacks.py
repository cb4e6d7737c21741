"""What the trainer reports while it runs."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from moka.errors import MokaError

from .folder import RunFolder


class MetricsWriter(TrainerCallback):
    """Appends every log record to RUN/metrics.jsonl, with its stage."""

    def __init__(self, folder: RunFolder, stage: int) -> None:
        self.folder, self.stage = folder, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.folder.log({"stage": self.stage, "step": state.global_step, **logs})


class DivergenceGuard(TrainerCallback):
    """Stops a run whose loss is NaN, infinite, or exactly zero at ``patience`` logging steps in a row."""

    def __init__(self, patience: int = 3) -> None:
        self.patience, self.bad = patience, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.bad = self.bad + 1 if not math.isfinite(loss) or loss == 0.0 else 0
        if self.bad >= self.patience:
            raise MokaError(
                f"The loss was {loss} at {self.bad} logging steps in a row (last: step {state.global_step}). Lower "
                "training.learning_rate, or look for samples whose answers are all masked."
            )
