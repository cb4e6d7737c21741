"""What refuses or stops a training that cannot come to anything, and says why."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from moka.data.streaming import EncodedStream
from moka.distributed import all_gather_object, all_reduce_any, run_on_all, run_on_main
from moka.errors import MokaError, counted
from moka.io import write_json

from .callbacks import Watcher
from .gradients import is_down, is_up, media_part, modality_rows
from .run_dir import DIVERGED, RunFolder

_SHOWN = 5  # names in a message
ADAPTED_SAMPLES = 2  # whose logits are compared
_LOOKED_AT = 256  # samples, to find them
_HELD_LOSSES = 512  # on the device between two looks at them


def check_dtypes(model: torch.nn.Module) -> None:
    """Refuse trainable parameters in float16: their updates are lost below 6e-8 of range, or they go to infinity.

    Raises:
        MokaError: naming the first such parameter.
    """
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise MokaError(
            f"{len(half)} trainable parameters are float16 (the first: {half[0]}), in which training goes to infinity. Make "
            "them float32 with parameter.data = parameter.data.float(); training.bf16 or training.fp16 compute in half "
            "precision beside them."
        )


class DivergenceGuard(Watcher):
    """Stops a run whose loss is NaN, infinite, or exactly zero at ``patience`` optimizer steps in a row.

    The losses stay on the device and are looked at where the trainer logs, so that no step waits for them; RUN/diverged.json
    then holds the bad steps with the ids of their samples, of all processes.
    """

    def __init__(self, folder: RunFolder, section: str = "training", patience: int = 3) -> None:
        self.folder, self.section, self.patience = folder, section, patience
        self.window: list[tuple[int, torch.Tensor, list[str]]] = []
        self.bad: list[dict[str, Any]] = []

    def on_loss(self, loss: torch.Tensor, sample_ids: list[str]) -> None:
        self.window.append((self.trainer.state.global_step + 1, loss, sample_ids))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._look(last=True)
        elif len(self.window) >= _HELD_LOSSES:
            self._look()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._look(last=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self._look()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(last=True)

    def _look(self, last: bool = False) -> None:
        """``last``: what was trained is about to be used, so that parameters that are no numbers end the run now."""
        self._read()
        if last and self.bad and all_reduce_any(not _finite(self.trainer.model)):
            self._stop()

    def _read(self) -> None:
        window, self.window = self.window, []
        if not window:
            return
        own = torch.stack([loss.float() for _, loss, _ in window])  # [batches]
        means = self.trainer.accelerator.gather(own[None]).mean(0).tolist()  # of all processes
        totals: dict[int, float] = {}
        for (step, _, _), mean in zip(window, means, strict=True):
            totals[step] = totals.get(step, 0.0) + mean
        for step, total in totals.items():
            if math.isfinite(total) and total != 0.0:
                self.bad.clear()
                continue
            at = [(loss, ids) for (where, _, ids), loss in zip(window, own.tolist(), strict=True) if where == step]
            culprits = [ids for loss, ids in at if not math.isfinite(loss) or total == 0.0]
            self.bad.append({"step": step, "loss": str(total), "sample_ids": [i for ids in culprits for i in ids]})
            if len(self.bad) >= self.patience:
                self._stop()

    def _stop(self) -> None:
        """All processes come here together: they share the mean losses."""
        parts = all_gather_object([record["sample_ids"] for record in self.bad])  # [ranks][steps][ids]
        for index, record in enumerate(self.bad):
            record["sample_ids"] = [i for part in parts for i in part[index]]

        def tell() -> None:
            write_json(self.folder / DIVERGED, {"section": self.section, "steps": self.bad})
            first = self.bad[0]
            raise MokaError(
                f"The loss was {first['loss']} at {counted(len(self.bad), 'step')} in a row, first at step {first['step']} with the "
                f"samples {_some(first['sample_ids'])}; all of them are in {self.folder / DIVERGED}. Lower "
                f"{self.section}.learning_rate in a new run, or look at these samples: their media, and whether answers are all "
                "masked."
            )

        run_on_main(tell)


def _finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


class GradientGuard(Watcher):
    """Checks, at two steps alone, that gradients reach what is trained.

    First step: every parameter of the adapter and the projectors has a gradient, no B's is zero, and neither is that of a
    projector or trainable encoder whose modality is in the step's data. A's gradient is zero as long as B is; so the A of
    every modality in the data is checked at the step after the first with a learning rate above zero.
    """

    def __init__(self, section: str = "training") -> None:
        self.section = section
        self.began = self.moved = self.done = False
        self.types: list[torch.Tensor] = []

    def on_batch(self, inputs: dict[str, Any], sample_ids: list[str]) -> None:
        if self.wants_gradients():
            self.types.append(inputs["mm_token_type_ids"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.types = []

    def wants_gradients(self) -> bool:
        return not self.done

    def on_gradients(self, norms: dict[str, list[float] | None]) -> None:
        if not all(math.isfinite(value) for values in norms.values() for value in values or []):
            return  # a loss scale still on its way down, or a divergence, which has its own guard
        seen = self._seen()
        step = self.trainer.state.global_step + 1
        if not self.began:
            self._refuse(step, reached(norms, self._adapted(), seen))
            self.began = True
        if self.moved or not any(is_down(name) for name in norms):
            self._refuse(step, down_reached(norms, modality_rows(self.trainer.model), self._adapted(), seen))
            self.done = True
        self.moved = any(group["lr"] > 0 for group in self.trainer.optimizer.param_groups)

    def _seen(self) -> set[str]:
        """Modalities in the batches of this step on any process."""
        own = {int(i) for types in self.types for i in types.unique()}
        ids = set().union(*all_gather_object(own))
        return {"text", *(name for name, its in self.trainer.model.config.type_ids.items() if ids & set(its))}

    def _adapted(self) -> list[str]:
        """Modalities whose tokens go through the adapter."""
        model = self.trainer.model
        config = model.peft_config[model.active_adapter] if hasattr(model, "peft_config") else None
        return getattr(config, "adapted", ["text"])

    def _refuse(self, step: int, failed: list[str]) -> None:
        def tell() -> None:
            if failed:
                raise MokaError(
                    f"Step {step}: no gradient reaches {_some(failed)}. Likely: answers that are all masked, a layer that the "
                    "forward does not use, or a part cut off from the graph (checkpointing over inputs without gradients, "
                    f"torch.no_grad). Nothing would be learned there; {self.section} was stopped."
                )

        run_on_all(tell)


def reached(norms: dict[str, list[float] | None], adapted: list[str], seen: set[str]) -> list[str]:
    """What a first step must give a gradient and has not: parameters, or "the projector of MODALITY".

    An encoder's parameter may be unused (a pooling head); its whole may not.
    """
    failed, whole = [], dict[tuple[str, str], bool]()
    last = _last_block(norms)
    for name, values in norms.items():
        media, zero = media_part(name), not any(values or [])
        if values is None and (media is None or media[0] == "projector"):
            failed.append(name)
        elif media is None and is_up(name) and zero and _due(name, last, adapted, seen):
            failed.append(f"{name} (all zero)")
        if media is not None and media[1] in seen:
            whole[media] = whole.get(media, True) and zero
    return failed + [f"the {part} of {modality} (all zero)" for (part, modality), zero in whole.items() if zero]


def down_reached(
    norms: dict[str, list[float] | None], rows: list[str], adapted: list[str], seen: set[str]
) -> list[str]:
    """Return the A matrices of the decoder that have no gradient once B is no longer zero."""
    last = _last_block(norms)
    failed = []
    for name, values in norms.items():
        if not is_down(name) or values is None or media_part(name) is not None:
            continue
        if ".lora_A." in name:
            failed += [] if any(values) else [name]
            continue
        failed += [f"{name}[{row}]" for row in _due(name, last, adapted, seen) if not values[rows.index(row)]]
    return failed


def _due(name: str, last: int, adapted: list[str], seen: set[str]) -> list[str]:
    """Return the modalities whose tokens must give this adapter matrix a gradient.

    The queries, outputs and MLP of media positions in the last block, and the head at those positions, reach no answer: of
    these layers only the A of text must have one.
    """
    before_last = 0 <= _block(name) < last  # the head is in no block
    return [row for row in adapted if row in seen and (row == "text" or before_last)]


def _last_block(norms: dict[str, list[float] | None]) -> int:
    return max((_block(name) for name in norms if is_down(name) and media_part(name) is None), default=0)


def _block(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


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
    ids |= {i for name, its in model.config.type_ids.items() if name in adapted for i in its}
    found = []
    stream = dataset.of_one_process() if isinstance(dataset, EncodedStream) else None
    samples = stream if stream is not None else (dataset[index] for index in range(len(dataset)))
    for sample in itertools.islice(samples, _LOOKED_AT):
        if ids.intersection(torch.as_tensor(sample["mm_token_type_ids"]).unique().tolist()):
            found.append(sample)
        if len(found) == ADAPTED_SAMPLES:
            break
    return found


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
