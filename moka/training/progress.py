"""How fast a training goes and on what: numbers for the log, and a bar or lines for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers.trainer_utils import IntervalStrategy

from .callbacks import Watcher
from .gradients import modality_rows, norms_by_part

TEXT = "text"
_GIB = 2**30


class StepClock:
    """Seconds of the training steps since the last log, and those of them spent waiting for data.

    Evaluation and saving between two steps do not count. The device works on while the host counts, so the time of the
    last step ends where the trainer, to log, has fetched the loss from the device.
    """

    def __init__(self) -> None:
        self.start: float | None = None
        self.end: float | None = None
        self.waited = self.paused = 0.0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of one step, the time for each counted as waiting."""
        now = time.perf_counter()
        if self.start is None:
            self.start = now
        elif self.end is not None:
            self.paused += now - self.end
        self.end = None
        return _Timed(batches, self)

    def step_ended(self) -> None:
        self.end = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(seconds, seconds waited) since the last reading; the next step begins anew."""
        seconds = 0.0 if self.start is None else time.perf_counter() - self.start - self.paused
        waited = self.waited
        self.start, self.end, self.waited, self.paused = None, None, 0.0, 0.0
        return max(seconds, 1e-9), waited


class _Timed:
    def __init__(self, batches: Iterator[Any], clock: StepClock) -> None:
        self.batches, self.clock = batches, clock

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Any:
        begun = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.clock.waited += time.perf_counter() - begun


class Meter(Watcher):
    """Adds to every logged loss, over all processes and the steps since the last log:

    ``tokens_per_second``, ``samples_per_second`` (padding left out); ``data_wait``: share of the time spent waiting for
    data, 0 to 1, of the process that waited most, as the others wait for it; ``memory_gib``: of the process that takes
    most, the peak of its GPU or its resident memory on a CPU; ``tokens/MODALITY``, ``tokens/supervised`` and ``padding``,
    the share of the batches that is padding; of the last step, before clipping, ``grad_norm/PART`` (see
    ``gradients.norms_by_part``). Counts stay on the device until they are logged.
    """

    adds_to_log = True

    def __init__(self, type_ids: dict[str, list[int]]) -> None:
        self.names = [TEXT, *type_ids]
        self.owner = {i: place for place, ids in enumerate(type_ids.values(), start=1) for i in ids}
        self.clock = StepClock()
        self.counts: torch.Tensor | None = None
        self.norms: dict[str, float] = {}

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        return self.clock.waiting(batches)

    def on_batch(self, inputs: dict[str, Any], sample_ids: list[str]) -> None:
        types, labels, mask = inputs["mm_token_type_ids"], inputs["labels"], inputs["attention_mask"]
        present = mask > 0 if mask.dim() == 2 else torch.ones_like(types, dtype=torch.bool)
        packed = inputs.get("position_ids")  # [batch, seq], from 0 at each sample of a row
        samples = present.any(1).sum() if packed is None else ((packed == 0) & present).sum()
        sums = [((types == i) & present).sum() for i in (0, *self.owner)]
        counts = torch.stack([*sums, (labels != -100).sum(), (~present).sum(), samples])
        self.counts = counts if self.counts is None else self.counts + counts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.step_ended()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.logging_strategy == IntervalStrategy.EPOCH and state.is_world_process_zero:
            print("note: logging_strategy epoch logs no gradient norms by part; logging_strategy steps does.")

    def wants_gradients(self) -> bool:
        """At steps that will be logged."""
        args, state = self.trainer.args, self.trainer.state
        step = state.global_step + 1
        if step == 1 and args.logging_first_step:
            return True
        return args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0

    def on_gradients(self, norms: dict[str, list[float] | None]) -> None:
        self.norms = norms_by_part(norms, modality_rows(self.trainer.model)) if self.wants_gradients() else {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the figures to ``logs`` for the callbacks that come later, and to the trainer's history."""
        if logs is not None and "loss" in logs and self.counts is not None:
            found = self._measured(logs)
            logs.update(found)
            state.log_history[-1].update(found)

    def _measured(self, logs: dict[str, Any]) -> dict[str, float]:
        (*by_type, supervised, padding, samples), (seconds, waited, memory) = self._gathered()
        tokens = dict.fromkeys(self.names, 0)
        for place, count in zip((0, *self.owner.values()), by_type, strict=True):
            tokens[self.names[place]] += int(count)
        total = sum(tokens.values())
        norms, self.norms = self.norms, {}
        return {
            "tokens_per_second": total / seconds,
            "samples_per_second": samples / seconds,
            "data_wait": waited,
            "memory_gib": memory,
            **{f"tokens/{name}": count for name, count in tokens.items()},
            "tokens/supervised": int(supervised),
            "padding": padding / (total + padding),
            **{f"grad_norm/{part}": norm * self._unclipped(logs) for part, norm in norms.items()},
        }

    def _gathered(self) -> tuple[list[float], list[float]]:
        """Sums over the processes: tokens by type id, supervised ones, padding, samples. And the largest of the processes:
        seconds, share of them waited, GiB.
        """
        assert self.counts is not None
        seconds, waited = self.clock.read()
        device, n = self.counts.device, len(self.counts)
        own = torch.tensor([seconds, waited / seconds, memory_gib(device)], dtype=torch.float64)
        every = self.trainer.accelerator.gather(torch.cat([self.counts.double(), own.to(device)])[None])  # [ranks, k]
        self.counts = None
        return every[:, :n].sum(0).tolist(), every[:, n:].amax(0).tolist()

    def _unclipped(self, logs: dict[str, Any]) -> float:
        """What gradients read after clipping (all but DeepSpeed's) are to be multiplied by."""
        limit, norm = self.trainer.args.max_grad_norm, logs.get("grad_norm")
        if not limit or norm is None or self.trainer.is_deepspeed_enabled:
            return 1.0
        return max(1.0, (norm + 1e-6) / limit)  # as torch.nn.utils.clip_grad_norm_


def memory_gib(device: torch.device) -> float:
    """Peak of this process on its GPU, or its resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return psutil.Process().memory_info().rss / _GIB


class ProgressBar(Watcher):
    """The main process's bar on a terminal; elsewhere, and with ``disable_tqdm``, a line at each log."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.bar: Any = None
        self.evaluated = 0
        self.began = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=f"stage {self.stage}", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.evaluated += 1
            self.bar.set_description(f"stage {self.stage}, evaluating: batch {self.evaluated}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated = 0
        if self.bar is not None:
            self.bar.set_description(f"stage {self.stage}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        text = in_words(logs or {})
        if not state.is_world_process_zero or not text:
            return
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(text)
        elif self.bar is not None:
            self.bar.write(f"stage {self.stage}, step {state.global_step}: {text}")
        else:
            print(f"stage {self.stage}, step {state.global_step}/{state.max_steps}: {text}{self._left(state)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _left(self, state: Any) -> str:
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if done <= 0 or left <= 0:
            return ""
        return f", {timedelta(seconds=round((time.monotonic() - self.began) / done * left))} left"


def in_words(logs: dict[str, float]) -> str:
    """The numbers of one log that people look at, on one line; nothing for a log without a loss."""
    parts = [f"{label} {logs[key]:.4g}" for key, label in (("loss", "loss"), ("eval_loss", "eval loss")) if key in logs]
    if not parts or "tokens_per_second" not in logs:
        return ", ".join(parts)
    return ", ".join(
        [
            *parts,
            f"{logs['tokens_per_second']:,.0f} tokens/s",
            f"waiting for data {100 * logs['data_wait']:.0f} %",
            f"{logs['memory_gib']:.1f} GiB",
        ]
    )
