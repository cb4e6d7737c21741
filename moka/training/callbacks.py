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
            # The trainer's mean over the run counts only the steps since the last resume.
            kept = {key: value for key, value in logs.items() if key != "train_loss"}
            self.folder.log({"stage": self.stage, "step": state.global_step, **kept})


class DivergenceGuard(TrainerCallback):
    """Stops a run whose loss is NaN, infinite, or exactly zero at ``patience`` logging steps in a row."""

    def __init__(self, section: str = "training", patience: int = 3) -> None:
        self.section, self.patience, self.bad = section, patience, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.bad = self.bad + 1 if not math.isfinite(loss) or loss == 0.0 else 0
        if self.bad >= self.patience:
            if not state.is_world_process_zero:
                raise SystemExit(2)  # all processes see the same mean loss; one of them says so
            raise MokaError(
                f"The loss was {loss} at {self.bad} logging steps in a row (last: step {state.global_step}). Lower "
                f"{self.section}.learning_rate, or look for samples whose answers are all masked."
            )
