"""Callbacks of a training: figures for the log, metrics.jsonl, a bar or lines on the screen, TensorBoard and other trackers.

Besides the events of ``transformers.TrainerCallback``, ``MokaTrainer`` calls these methods of every callback that has them, at
the same moments on all processes, so that they may use collectives:

- ``on_fetch_begin(trainer)``, ``on_fetch_end(trainer)``: around the fetching of the batches of one optimizer step.
- ``on_batch(trainer, inputs, sample_ids)``: a batch of this process, on its device, before the model sees it.
- ``on_loss(trainer, loss, sample_ids)``: the loss of that batch, still on the device.
- ``on_gradients(trainer, norms)``: before the optimizer step; ``norms()`` is the result of ``gradients.gradient_norms``.
- ``on_measure(trainer, logs)``: a log with the loss, to add figures to before anything reads it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from statistics import fmean
from typing import Any

import psutil
import torch
from accelerate.utils import gather
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
    is_tensorboard_available,
)
from transformers.trainer_utils import IntervalStrategy

from moka.analysis.gradients import FisherInformation, ModalityGradients, average, observed_gradients
from moka.errors import MokaError, nearest

from .gradients import modality_rows, norms_by_part
from .run_dir import RunFolder

_GIB = 2**30
_PIP_NAMES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}


class Meter(TrainerCallback):
    """Adds to every logged loss, over all processes and the steps since the last log:

    ``tokens_per_second``, ``samples_per_second`` (without padding); ``data_wait``: share of the time spent waiting for data, 0
    to 1, of the process that waited most, as the others wait for it; ``memory_gib``: of the process that takes most, the peak
    of its GPU or its resident memory on a CPU; ``tokens/MODALITY``, ``tokens/supervised`` and ``padding``, the share of the
    batches that is padding; of the last step, before clipping, ``grad_norm/PART`` (see ``gradients.norms_by_part``). Counts
    stay on the device until they are logged.

    Evaluation and saving between two steps do not count as time. The device computes while the host counts, so the time of the
    last step ends when the trainer, to log, has fetched the loss from the device.
    """

    def __init__(self, type_ids: dict[str, list[int]]) -> None:
        self.names = ["text", *type_ids]
        self.owner = {0: 0} | {i: index for index, ids in enumerate(type_ids.values(), start=1) for i in ids}
        self.start: float | None = None  # of the first step since the last log
        self.end: float | None = None  # of the last one
        self.waited = self.paused = self.fetching = 0.0
        self.counts: torch.Tensor | None = None
        self.norms: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.logging_strategy == IntervalStrategy.EPOCH and state.is_world_process_zero:
            print("note: logging_strategy epoch logs no gradient norms by part; logging_strategy steps does.")

    def on_fetch_begin(self, trainer: Any) -> None:
        self.fetching = time.perf_counter()
        if self.start is None:
            self.start = self.fetching
        elif self.end is not None:
            self.paused += self.fetching - self.end
        self.end = None

    def on_fetch_end(self, trainer: Any) -> None:
        self.waited += time.perf_counter() - self.fetching

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = time.perf_counter()

    def read_times(self) -> tuple[float, float]:
        """Return (seconds, seconds waited for data) since the last reading, and start again with the next step."""
        seconds = 0.0 if self.start is None else time.perf_counter() - self.start - self.paused
        waited = self.waited
        self.start, self.end, self.waited, self.paused = None, None, 0.0, 0.0
        return max(seconds, 1e-9), waited

    def on_batch(self, trainer: Any, inputs: dict[str, Any], sample_ids: list[str]) -> None:
        types, labels, mask = inputs["mm_token_type_ids"], inputs["labels"], inputs["attention_mask"]
        present = mask > 0 if mask.dim() == 2 else torch.ones_like(types, dtype=torch.bool)
        packed = inputs.get("position_ids")  # [batch, seq], from 0 at each sample of a row
        samples = present.any(1).sum() if packed is None else ((packed == 0) & present).sum()
        sums = [((types == i) & present).sum() for i in self.owner]
        counts = torch.stack([*sums, (labels != -100).sum(), (~present).sum(), samples])
        self.counts = counts if self.counts is None else self.counts + counts

    def on_gradients(self, trainer: Any, norms: Callable[[], dict[str, list[float] | None]]) -> None:
        """Read the norms at steps that will be logged."""
        args, step = trainer.args, trainer.state.global_step + 1
        by_steps = args.logging_strategy == IntervalStrategy.STEPS and step % trainer.state.logging_steps == 0
        logged = by_steps or (step == 1 and args.logging_first_step)
        self.norms = norms_by_part(norms(), modality_rows(trainer.model)) if logged else {}

    def on_measure(self, trainer: Any, logs: dict[str, Any]) -> None:
        if self.counts is None:
            return
        seconds, waited = self.read_times()
        device, n = self.counts.device, len(self.counts)
        own = torch.tensor([seconds, waited / seconds, memory_gib(device)], dtype=torch.float64)
        every = gather(torch.cat([self.counts.double(), own.to(device)])[None])  # [ranks, n + 3]
        self.counts = None
        *by_type, supervised, padding, samples = every[:, :n].sum(0).tolist()
        seconds, waited, memory = every[:, n:].amax(0).tolist()
        tokens = dict.fromkeys(self.names, 0)
        for index, count in zip(self.owner.values(), by_type, strict=True):
            tokens[self.names[index]] += int(count)
        total = sum(tokens.values())
        clipped = 1.0
        limit, norm = trainer.args.max_grad_norm, logs.get("grad_norm")
        if limit and norm is not None and not trainer.is_deepspeed_enabled:
            # Except DeepSpeed's, gradients are read after clipping (torch.nn.utils.clip_grad_norm_).
            clipped = max(1.0, (norm + 1e-6) / limit)
        logs |= {
            "tokens_per_second": total / seconds,
            "samples_per_second": samples / seconds,
            "data_wait": waited,
            "memory_gib": memory,
            **{f"tokens/{name}": count for name, count in tokens.items()},
            "tokens/supervised": int(supervised),
            "padding": padding / (total + padding),
            **{f"grad_norm/{part}": norm * clipped for part, norm in self.norms.items()},
        }
        self.norms = {}


class ModalityObserver(TrainerCallback):
    """Splits the gradient of the shared B by modality in every ``every``-th step, and adds to the next logged loss the means
    over the steps that were observed since the last log:

    ``update_share/MODALITY`` and ``fisher_share/MODALITY``, 0 to 1; ``gradient_cosine/A-B``, below 0 if two modalities are in
    conflict; ``non_text_dominance``, IMoD's rate; ``z_norm/MODALITY``, of a token (see ``moka.analysis.gradients``). Of the
    gradient of the full step, all micro-batches and processes; the training itself is the same.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.block = ExitStack()
        self.observed: ModalityGradients | None = None
        self._forget()

    def _forget(self) -> None:
        self.fisher = FisherInformation()
        self.figures: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.every == 0:
            self.observed = self.block.enter_context(observed_gradients(kwargs["model"]))

    def on_gradients(self, trainer: Any, norms: Callable[[], dict[str, list[float] | None]]) -> None:
        if self.observed is None:
            return
        self.block.close()
        found, self.observed = average(self.observed), None
        self.fisher.add(found)
        cosines = {f"{a}-{b}": cosine for (a, b), cosine in found.cosines().items()}
        groups = {"update_share": found.update_shares(), "gradient_cosine": cosines, "z_norm": found.z_norms()}
        self.figures.append({f"{group}/{name}": x for group, values in groups.items() for name, x in values.items()})

    def on_measure(self, trainer: Any, logs: dict[str, Any]) -> None:
        if self.figures:
            names = dict.fromkeys(name for figures in self.figures for name in figures)
            logs |= {name: fmean(one[name] for one in self.figures if name in one) for name in names}
            logs |= {f"fisher_share/{name}": share for name, share in self.fisher.shares().items()}
            logs["non_text_dominance"] = self.fisher.non_text_dominance_rate()
        self._forget()


def memory_gib(device: torch.device) -> float:
    """Return the peak of this process on its GPU, or its resident memory where there is no such figure, in GiB."""
    peak = getattr(getattr(torch, device.type), "max_memory_allocated", None)  # of torch.cuda, torch.xpu, torch.npu
    return (psutil.Process().memory_info().rss if peak is None else peak(device)) / _GIB


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


class ProgressBar(TrainerCallback):
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
        text = summarize(logs or {})
        if not state.is_world_process_zero or not text:
            return
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(text)
        elif self.bar is not None:
            self.bar.write(f"stage {self.stage}, step {state.global_step}: {text}")
        else:
            done, left = state.global_step - self.first_step, state.max_steps - state.global_step
            if done > 0 and left > 0:
                text += f", {timedelta(seconds=round((time.monotonic() - self.began) / done * left))} left"
            print(f"stage {self.stage}, step {state.global_step}/{state.max_steps}: {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def summarize(logs: dict[str, float]) -> str:
    """Return the figures of one log that people read, on one line; nothing for a log without a loss."""
    parts = [f"{label} {logs[key]:.4g}" for key, label in (("loss", "loss"), ("eval_loss", "eval loss")) if key in logs]
    if parts and "tokens_per_second" in logs:
        parts += [
            f"{logs['tokens_per_second']:,.0f} tokens/s",
            f"waiting for data {100 * logs['data_wait']:.0f} %",
            f"{logs['memory_gib']:.1f} GiB",
        ]
    return ", ".join(parts)


def check_reports(report_to: Any, field: str) -> None:
    """Refuse a tracker that is unknown or whose library is missing, before training.

    Raises:
        MokaError: naming it, and the command that installs it.
    """
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in report_to if isinstance(report_to, list) else [report_to or "none"]:
        if name not in known:
            raise MokaError(f"{field}: {name!r} is not one of {', '.join(known)}.{nearest(str(name), known)}")
        if name not in ("all", "none", *get_available_reporting_integrations()):
            raise MokaError(
                f"{field}: {name} is not installed. Install it with `pip install {_PIP_NAMES.get(name, name)}`, or set "
                "report_to: none."
            )


def add_tensorboard(trainer: Any, folder: RunFolder, stage: int, step: int, chosen: Any) -> None:
    """Write TensorBoard's files into RUN/tensorboard/stageN, if ``report_to`` names it or is not set and it is installed.

    Args:
        step: the stage resumes from it; what an earlier process wrote after it is hidden.
        chosen: ``report_to`` of the configuration, None if not set.
    """
    arguments: TrainingArguments = trainer.args
    named = "tensorboard" in (arguments.report_to or [])
    trainer.remove_callback(TensorBoardCallback)  # transformers' own writes into the checkpoints
    if arguments.process_index or not (named or (chosen is None and is_tensorboard_available())):
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / f"tensorboard/stage{stage}"), purge_step=step + 1)
    trainer.add_callback(TensorBoardCallback(writer))
