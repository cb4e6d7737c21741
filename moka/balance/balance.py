"""Several strategies as one: checked together before training, called at the same moments, saved in one file.

         on_step_begin   compute_loss (every micro-batch)           training_step      Trainer's step       on_step_end
epoch --> [open hooks] -> prepare -> forward -> loss -> backward -> update -> clip -> before | step | after -> interval
sampling
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moka.adapter.config import TEXT
from moka.analysis.contribution import adapter_config
from moka.analysis.gradients import ModalityGradients, average, observed_gradients
from moka.distributed import is_main
from moka.errors import MokaError
from moka.modeling.sharding import is_sharded_tensor

from .handles import Handles
from .strategy import BalanceStrategy, Context, media_of

FILE = "balance.pt"  # in a checkpoint


class Balance:
    """The strategies of one training.

    Args:
        strategies: none: nothing is ever done.
        seed: of what they draw.
    Raises:
        MokaError: two of them change the same thing.
    """

    def __init__(self, strategies: Iterable[BalanceStrategy] = (), seed: int = 0) -> None:
        self.strategies, self.seed = list(strategies), seed
        check_together(self.strategies)
        self.needs = [strategy.needs() for strategy in self.strategies]
        self.handles: Handles | None = None
        self.ctx: Context | None = None
        self._observed: ModalityGradients | None = None
        self._block = ExitStack()
        self._loaded: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.strategies)

    def begin(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, validation: Any = None, step: int = 0
    ) -> None:
        """Start or resume a training of ``model``.

        Args:
            step: steps that are done.
            total_steps: optimizer steps of the training.
            optimizer: whose moments `Handles.set` clears.
            validation: () -> batches of this process, if there are validation data.
        """
        check_model(self.strategies, model)
        self.ctx = Context(model, self.seed)
        self.ctx.total_steps, self.ctx.validation, self.ctx.step = total_steps, validation, step
        if any(need.adapter for need in self.needs):
            self.handles = Handles(model)
            self.handles.optimizer = optimizer
            self.handles.keep_init()
            self.ctx.handles = self.handles
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            names = [strategy.name for strategy in self.strategies]
            if loaded["names"] != names:
                raise MokaError(
                    f"--resume: balance: the checkpoint was written with {loaded['names']}, and this run has {names}. Resume "
                    "with the strategies that it began with."
                )
            for strategy, state in zip(self.strategies, loaded["states"], strict=True):
                strategy.load_state_dict(state)
            if self.handles is not None and loaded["init"] is not None:
                self.handles.init = loaded["init"]

    def estimate(self, model: nn.Module) -> list[str]:
        """Return a line for each strategy: what it costs."""
        media = len(media_of(model))
        return [
            f"balance: {strategy.name}: {need.cost(media + (getattr(strategy, 'ablate', 'tokens') == 'adapter'))}"
            for strategy, need in zip(self.strategies, self.needs, strict=True)
        ]

    def sampling(self, ids: Sequence[str], epoch: int) -> list[float]:
        """Return how often each sample comes in an epoch, relative to the others."""
        assert self.ctx is not None
        found = [strategy.sampling(ids, epoch, self.ctx) for strategy in self.strategies]
        return next((weights for weights in found if weights is not None), [1.0] * len(ids))

    def step_begin(self, step: int) -> None:
        """Begin a step of all micro-batches, after ``step`` others."""
        assert self.ctx is not None
        self.ctx.step, self.ctx.micro = step, 0
        if self.handles is not None:
            self.ctx.learning_rate = self.handles.learning_rate()
        if any(need.parts_of_B for need in self.needs):
            paths = any(need.paths_of_B for need in self.needs)
            self._observed = self._block.enter_context(observed_gradients(self.ctx.model, paths=paths))

    def prepare(self) -> None:
        """Let strategies act before the forward of the current micro-batch."""
        assert self.ctx is not None
        for strategy in self.strategies:
            strategy.prepare(self.ctx.batch, self.ctx)

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of the current micro-batch with what strategies add."""
        assert self.ctx is not None
        for strategy in self.strategies:
            loss = strategy.loss(loss, self.ctx)
        return loss

    def update(self) -> None:
        """Let strategies act on gradients and rates, once a step."""
        assert self.ctx is not None
        self._block.close()
        if self._observed is not None and self.handles is not None:
            self.handles.parts, self._observed = average(self._observed), None
        for strategy in self.strategies:
            strategy.update(self.handles, self.ctx)
        self.ctx.end_step()

    def before_step(self) -> None:
        """Prepare the optimizer's step."""
        if self.handles is not None:
            self.handles.before_step()

    def after_step(self, skipped: bool) -> None:
        """Complete the optimizer's step; strategies do not advance over one that was skipped."""
        assert self.ctx is not None
        if self.handles is not None:
            self.handles.after_step(skipped)
        if not skipped:
            for strategy in self.strategies:
                strategy.interval(self.handles, self.ctx)
            self.ctx.step += 1

    def save(self, folder: str | Path) -> None:
        """Write the state into a checkpoint; equal on all processes, so the main one writes."""
        if is_main():
            init = None if self.handles is None else self.handles.init
            names = [strategy.name for strategy in self.strategies]
            states = [strategy.state_dict() for strategy in self.strategies]
            torch.save({"names": names, "states": states, "init": init}, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read the state of a checkpoint, for the next `begin`.

        Raises:
            MokaError: the checkpoint has none.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise MokaError(
                f"--resume: balance: {folder} has no {FILE}: it was written without strategies. Take balance out, or start a "
                "new run."
            )
        self._loaded = torch.load(path, map_location="cpu", weights_only=True)


def check_together(strategies: Sequence[BalanceStrategy]) -> None:
    """Refuse two strategies that change the same thing.

    Raises:
        MokaError: naming both and what they share.
    """
    owners: dict[str, str] = {}
    for strategy in strategies:
        for thing in sorted(strategy.changes):
            if thing in owners:
                raise MokaError(
                    f"balance: {owners[thing]} and {strategy.name} both change the {thing}, and their effects could not be told "
                    "apart. Keep one of them."
                )
            owners[thing] = strategy.name


def check_modalities(strategies: Sequence[BalanceStrategy], media: Sequence[str]) -> None:
    """Refuse a strategy that needs more modalities than the model has.

    Args:
        media: the model's modalities other than text.
    """
    for strategy in strategies:
        needs = strategy.needs()
        if len(media) < needs.media:
            raise MokaError(
                f"balance: {strategy.name}: compares {needs.media} modalities, and the model has {len(media)} beside text "
                f"({', '.join(media) or 'none'}). Take it out{_way_out(strategy)}."
            )
        for name in getattr(strategy, "named_modalities", lambda: ())():
            if name not in (TEXT, *media):
                known = ", ".join((TEXT, *media))
                raise MokaError(f"balance: {strategy.name}: unknown modality {name!r}; the model has {known}.")


def _way_out(strategy: BalanceStrategy) -> str:
    if hasattr(strategy, "ablate"):
        return ", or set ablate: adapter, in which text is compared too"
    return ", or use lr_scale, which needs one modality only"


def check_engine(strategies: Sequence[BalanceStrategy], zero_stage: int | None, fsdp: bool) -> None:
    """Refuse what DeepSpeed or FSDP cannot give.

    Args:
        zero_stage: DeepSpeed's; None without it.
    """
    for strategy in strategies:
        needs = strategy.needs()
        if needs.adapter and (fsdp or zero_stage == 3):
            engine = "FSDP" if fsdp else "ZeRO-3"
            raise MokaError(
                f"balance: {strategy.name}: acts on the rows of A, of which under {engine} each process has a part. Launch with "
                "ddp, zero1 or zero2."
            )
        if zero_stage is not None and needs.moments:
            raise MokaError(
                f"balance: {strategy.name}: clears moments of the optimizer, which DeepSpeed keeps elsewhere. Launch with ddp."
            )
        if zero_stage is not None and needs.gradients:
            raise MokaError(
                f"balance: {strategy.name}: changes gradients, which DeepSpeed does not show. Launch with ddp"
                f"{', or set apply: update' if getattr(strategy, 'apply', '') == 'grad' else ''}."
            )


def check_model(strategies: Sequence[BalanceStrategy], model: nn.Module) -> None:
    """Refuse a model that a strategy cannot work with: without a MokA adapter, sharded, with one modality, with a B for each.

    Raises:
        MokaError: naming the strategy and the way out.
    """
    check_modalities(strategies, media_of(model))
    config = adapter_config(model)
    for strategy in strategies:
        needs = strategy.needs()
        if (needs.adapter or needs.parts_of_B) and config is None:
            raise MokaError(
                f"balance: {strategy.name}: acts on a MokA adapter, and {type(model).__name__} has none. Set adapter.method: "
                "moka, or take it out."
            )
        if needs.parts_of_B and config is not None and not config.share_b:
            raise MokaError(
                f"balance: {strategy.name}: acts on the B that modalities share, and adapter.share_b is false. Set it to true, or "
                "take it out."
            )
        strategy.check(model)
    if any(need.adapter for need in (s.needs() for s in strategies)) and config is not None:
        sharded = any(is_sharded_tensor(p) for n, p in model.named_parameters() if ".moka_A." in n)
        if sharded:
            check_engine(strategies, 3, fsdp=not any(hasattr(p, "ds_id") for p in model.parameters()))
