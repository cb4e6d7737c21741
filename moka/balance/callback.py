"""`BalanceCallback`: balance strategies in any `Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from moka.analysis.contribution import hidden_from_attention, media_modalities, unwrapped
from moka.distributed import is_main, rank_and_world_size
from moka.errors import MokaError

from .handles import Handles
from .strategy import BalanceStrategy, StepContext

_KEY = "BalanceCallback"  # of its state in a checkpoint


class BalanceCallback(TrainerCallback, ExportableState):
    """Runs strategies in a training.

        Trainer(model, args, ..., callbacks=[BalanceCallback([OGM(alpha=0.3)])])

    Hooks on the model see each training forward; what strategies log is added to the trainer's logs as
    ``balance/NAME/KEY``. Their state is part of every checkpoint.

    Args:
        strategies: run in this order.
        seed: of what strategies draw; each process draws its own.
    Raises:
        MokaError: two strategies of one name, or two that scale updates by a measured ratio; when training begins, a model
            that a strategy cannot work on.
    """

    def __init__(self, strategies: Sequence[BalanceStrategy], seed: int = 42) -> None:
        self.strategies = list(strategies)
        names = [strategy.name for strategy in self.strategies]
        if len(set(names)) < len(names):
            raise MokaError(f"balance: {', '.join(names)}: a strategy is named twice; give each once.")
        self.seed = seed
        self._labels: torch.Tensor | None = None
        self._step: StepContext | None = None
        self._number = self._micro = 0
        self._block = ExitStack()
        self._hooks: list[Any] = []

    def state(self) -> dict[str, Any]:
        """Return the strategies' states for ``trainer_state.json``."""
        states = {strategy.name: strategy.state_dict() for strategy in self.strategies}
        return {"args": {}, "attributes": {"states": states}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the strategies need, print the cost, restore their states, and hook the model."""
        model = kwargs["model"]
        media = list(media_modalities(model))
        needs = {strategy.name: strategy.needs(media) for strategy in self.strategies}
        for name, need in needs.items():
            if need.modalities > len(media):
                raise MokaError(
                    f"balance.{name}: it compares {need.modalities} or more modalities besides text, and the model has "
                    f"{', '.join(media) or 'none'}. Take it out, or use learning_rates."
                )
        self.handles = Handles(model) if any(need.updates for need in needs.values()) else None
        saved = (state.stateful_callbacks or {}).get(_KEY)
        states = saved["attributes"]["states"] if saved is not None and state.global_step else {}
        for strategy in self.strategies:
            if strategy.name in states:
                strategy.load_state_dict(states[strategy.name])
        extra = sum(need.forwards_per_step for need in needs.values())
        if is_main():
            print(
                f"balance: {', '.join(needs)}: {extra:.2f} additional forwards a step on average (a step costs about 3)"
            )
        self._model, self._number = model, state.global_step
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def on_batch(self, trainer: Any, inputs: dict[str, Any], sample_ids: list[str]) -> None:
        """Keep the labels, which moka's trainer may not give the model."""
        self._labels = inputs.get("labels")

    def _before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels") if kwargs.get("labels") is not None else self._labels
        if not module.training or not torch.is_grad_enabled() or labels is None:
            return
        batch = {k: v for k, v in kwargs.items() if k not in ("loss_only", "logits_to_keep", "num_items_in_batch")}
        self._step = StepContext(self._model, {**batch, "labels": labels}, self._number + 1)
        rank, _ = rank_and_world_size()
        number = ((self.seed * 1_000_003 + self._number) * 1_000_003 + rank) * 1_000_003 + self._micro
        generator = torch.Generator().manual_seed(number % 2**63)
        self._micro += 1
        hidden = [tokens for s in self.strategies if (tokens := s.prepare(self._step, generator)) is not None]
        if hidden:
            self._block.enter_context(hidden_from_attention(unwrapped(self._model), torch.stack(hidden).any(0)))

    def _after_forward(self, *args: Any) -> None:
        self._block.close()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let strategies scale this step's updates."""
        if self._step is None:
            return
        for strategy in self.strategies:
            strategy.update(self.handles, self._step)  # type: ignore[arg-type]
        if self.handles is not None:
            self.handles.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale what the optimizer did."""
        if self.handles is not None:
            self.handles.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the batch."""
        self._step, self._labels, self._micro, self._number = None, None, 0, state.global_step

    def figures(self) -> dict[str, float]:
        """Return what strategies measured last, by its key in the logs."""
        return {f"balance/{s.name}/{key}": value for s in self.strategies for key, value in s.figures.items()}

    def on_measure(self, trainer: Any, logs: dict[str, Any]) -> None:
        """Add the figures to a log of moka's trainer."""
        logs |= self.figures()
