"""Checks that refuse or stop a training that cannot succeed, and say why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback

from moka.data.streaming import EncodedStream
from moka.distributed import all_gather_object, all_reduce_any, collective_errors, is_main
from moka.errors import MokaError, counted
from moka.io import write_json
from moka.modeling.hf_model import base_info, model_inputs

from .gradients import media_part
from .run_dir import DIVERGED, RunFolder

_SHOWN = 5  # names in a message
ADAPTED_SAMPLES = 2  # whose logits are compared
_CANDIDATES = 256  # samples among which they are looked for
_MOST_LOSSES = 512  # kept on the device before they are read


def check_dtypes(model: torch.nn.Module) -> None:
    """Refuse trainable parameters in float16: their updates are lost below 6e-8, or they become infinite.

    Raises:
        MokaError: naming the first such parameter.
    """
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise MokaError(
            f"{len(half)} trainable parameters are float16 (the first: {half[0]}), in which training diverges. Make them "
            "float32 with parameter.data = parameter.data.float(); training.bf16 or training.fp16 still compute in half "
            "precision."
        )


class DivergenceGuard(TrainerCallback):
    """Stops a run whose loss is NaN, infinite, or exactly zero at ``patience`` optimizer steps in a row.

    The losses stay on the device and are read when the trainer logs, so that no step waits for them. RUN/diverged.json lists
    the bad steps with the ids of their samples, of all processes.
    """

    def __init__(self, folder: RunFolder, section: str = "training", patience: int = 3) -> None:
        self.folder, self.section, self.patience = folder, section, patience
        self.window: list[tuple[int, torch.Tensor, list[str]]] = []
        self.bad: list[dict[str, Any]] = []

    def on_loss(self, trainer: Any, loss: torch.Tensor, sample_ids: list[str]) -> None:
        self.window.append((trainer.state.global_step + 1, loss, sample_ids))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.window) >= _MOST_LOSSES:
            self._read()
        self._check_before_use(control, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_before_use(control, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self._read()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_before_use(None, kwargs["model"])

    def _check_before_use(self, control: Any, model: torch.nn.Module) -> None:
        """Stop after fewer bad steps too if what was trained is about to be used and is not finite."""
        if control is None or control.should_evaluate or control.should_save:
            self._read()
            if self.bad:
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                if all_reduce_any(not all(bool(parameter.isfinite().all()) for parameter in trained)):
                    self._stop()

    def _read(self) -> None:
        window, self.window = self.window, []
        if not window:
            return
        own = torch.stack([loss.float() for _, loss, _ in window])  # [batches]
        means = gather(own[None]).mean(0).tolist()  # of all processes
        totals: dict[int, float] = {}
        for (step, _, _), mean in zip(window, means, strict=True):
            totals[step] = totals.get(step, 0.0) + mean
        for step, total in totals.items():
            if math.isfinite(total) and total != 0.0:
                self.bad.clear()
                continue
            batches = [(loss, ids) for (when, _, ids), loss in zip(window, own.tolist(), strict=True) if when == step]
            culprits = [ids for loss, ids in batches if not math.isfinite(loss) or total == 0.0]
            self.bad.append({"step": step, "loss": str(total), "sample_ids": [i for ids in culprits for i in ids]})
            if len(self.bad) >= self.patience:
                self._stop()

    def _stop(self) -> None:
        """End all processes, which come here together, as they share the mean losses."""
        parts = all_gather_object([record["sample_ids"] for record in self.bad])  # [ranks][steps][ids]
        for index, record in enumerate(self.bad):
            record["sample_ids"] = [i for part in parts for i in part[index]]
        with collective_errors():
            if is_main():
                write_json(self.folder / DIVERGED, {"section": self.section, "steps": self.bad})
                first = self.bad[0]
                raise MokaError(
                    f"The loss was {first['loss']} at {counted(len(self.bad), 'step')} in a row, first at step {first['step']} "
                    f"with the samples {_some(first['sample_ids'])}; all of them are in {self.folder / DIVERGED}. Lower "
                    f"{self.section}.learning_rate in a new run, or look at these samples: their media, and whether answers "
                    "are all masked."
                )


class GradientGuard(TrainerCallback):
    """Checks once, at the first step with finite gradients, that they reach what is trained (`unreached`)."""

    def __init__(self, type_ids: dict[str, list[int]], section: str = "training") -> None:
        self.type_ids, self.section = type_ids, section
        self.done = False
        self.ids: set[int] = set()
        self.batch: dict[str, Any] = {}

    def on_batch(self, trainer: Any, inputs: dict[str, Any], sample_ids: list[str]) -> None:
        self.batch = {} if self.done else inputs

    def on_loss(self, trainer: Any, loss: torch.Tensor, sample_ids: list[str]) -> None:
        if not self.done:
            # Balance strategies may have hidden media, which get no gradient then.
            ctx, types = trainer.balance.ctx, self.batch["mm_token_type_ids"]
            if ctx is not None and ctx.hidden is not None:
                types = types.masked_fill(ctx.hidden.to(types.device), 0)
            self.ids |= supervised_type_ids({**self.batch, "mm_token_type_ids": types})

    def on_gradients(self, trainer: Any, norms: Callable[[], dict[str, list[float] | None]]) -> None:
        if self.done:
            return
        found = norms()
        ids, self.ids = set().union(*all_gather_object(self.ids)), set()
        if not all(math.isfinite(value) for values in found.values() for value in values or []):
            return  # a loss scale still too large, or a divergence, which has its own guard
        self.done = True
        seen = {name for name, its in self.type_ids.items() if ids & set(its)}
        missing = unreached(found, seen)
        with collective_errors():
            if missing:
                raise MokaError(
                    f"Step {trainer.state.global_step + 1}: no gradient reaches {_some(missing)}. Likely: answers that are all "
                    "masked, a layer that the forward does not use, or a part cut off from the graph (checkpointing over inputs "
                    f"without gradients, torch.no_grad). Nothing would be learned there; {self.section} was stopped."
                )


def supervised_type_ids(inputs: dict[str, Any]) -> set[int]:
    """Return the type ids of tokens that come before a supervised token of their sample: others can get no gradient.

    Args:
        inputs: a batch with "labels", "mm_token_type_ids" and, of packed rows, "position_ids", from 0 at each sample: [batch, seq].
    """
    labels, types, positions = inputs["labels"], inputs["mm_token_type_ids"], inputs.get("position_ids")
    index = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    sample = torch.zeros_like(labels) if positions is None else (positions == 0).cumsum(1)
    last = torch.full(
        (len(labels), labels.shape[1] + 1), -1, device=labels.device
    )  # [batch, samples], more than needed
    last = last.scatter_reduce(1, sample, torch.where(labels != -100, index, -1), "amax")
    return set(types[index < last.gather(1, sample)].unique().tolist())


def unreached(norms: dict[str, list[float] | None], seen: set[str]) -> list[str]:
    """Return what must have a gradient at a first step and has none.

    That is every parameter of the adapter and of the projectors; and of the projector or trainable encoder of each modality in
    ``seen`` at least one that is not zero. Single parameters of an encoder may be unused (a pooling head), and A's gradient is
    zero as long as B is.
    """
    missing, parts = [], dict[tuple[str, str], bool]()
    for name, values in norms.items():
        part = media_part(name)
        if values is None and (part is None or part[0] == "projector"):
            missing.append(name)
        if part is not None and part[1] in seen:
            parts[part] = parts.get(part, False) or any(values or [])
    return missing + [f"the {part} of {modality} (all zero)" for (part, modality), any_ in parts.items() if not any_]


def logits_change(trainer: Any) -> float | None:
    """Return how far the adapter moves the logits of some training samples: the root mean square of the change, as a share of
    that of the logits. None if no sample that was looked at has a token of an adapted modality.

    Every process computes it on the same samples, as sharded weights need.
    """
    dataset, model = trainer.train_dataset, trainer.model_wrapped
    chosen = _adapted_samples(dataset, trainer.model)
    if not chosen:
        return None
    batch = trainer.data_collator(chosen)
    # Logits of complete prompts would take memory that training never needs.
    answers = (batch["labels"] != -100).any(0).nonzero().squeeze(1)
    inputs = trainer._prepare_inputs({key: batch[key] for key in batch if key not in ("sample_ids", "labels")})
    inputs["logits_to_keep"] = answers.to(trainer.args.device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        inputs = model_inputs(trainer.model, inputs)
        adapted = model(**inputs).logits.float()
        # Not peft's disable_adapter, which also takes trained projectors out.
        layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        plain = model(**inputs).logits.float()
        for layer in layers:
            layer.enable_adapters(True)
    model.train(was_training)
    return ((adapted - plain).pow(2).mean() / plain.pow(2).mean()).sqrt().item()


def _adapted_samples(dataset: Any, model: Any) -> list[Any]:
    """Return the first samples that have tokens of the modalities that the adapter adapts."""
    config = model.peft_config[model.active_adapter]
    adapted = set(getattr(config, "adapted", ["text"]))
    ids = {0} if "text" in adapted else set()
    ids |= {i for name, its in base_info(model).type_ids.items() if name in adapted for i in its}
    found = []
    stream = dataset.of_one_process() if isinstance(dataset, EncodedStream) else None
    samples = stream if stream is not None else (dataset[index] for index in range(len(dataset)))
    for sample in itertools.islice(samples, _CANDIDATES):
        if ids.intersection(torch.as_tensor(sample["mm_token_type_ids"]).unique().tolist()):
            found.append(sample)
        if len(found) == ADAPTED_SAMPLES:
            break
    return found


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
