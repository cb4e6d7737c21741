"""Strategies inside a trainer: the mixin for any ``transformers.Trainer``, and the callback for those that act on A only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moka.errors import MokaError
from moka.modeling.sharding import zero_stage

from .balance import FILE, Balance, check_engine, check_model
from .sampler import WeightedOrder, ids_of
from .strategy import BalanceStrategy


class _Steps(TrainerCallback):
    """Tells a `Balance` when a step begins, and what is around the optimizer's step."""

    def __init__(self, balance: Balance) -> None:
        self.balance = balance

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.step_begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.after_step(bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False)))


class BalanceCallback(_Steps):
    """Carries strategies that act only on gradients and rates of the adapter into any Trainer, TRL's too.

        SFTTrainer(model, callbacks=[BalanceCallback(LearningRates({"visual": 2.0}), ParetoB())], ...)

    Their state is in ``balance.pt`` of every checkpoint. For the others, which change batches, losses or samples, there is
    `BalancedTrainerMixin`.

    Raises:
        MokaError: a strategy that a callback cannot carry.
    """

    def __init__(self, *strategies: BalanceStrategy, seed: int = 0) -> None:
        for strategy in strategies:
            needs = strategy.needs()
            if needs.likelihoods != "none" or needs.losses or needs.sample_ids or needs.validation:
                raise MokaError(
                    f"balance: {strategy.name}: sees batches or changes the loss, which a callback cannot. Use "
                    "moka.balance.BalancedTrainerMixin."
                )
            for hook in ("prepare", "loss", "sampling"):
                if getattr(type(strategy), hook) is not getattr(BalanceStrategy, hook):
                    raise MokaError(
                        f"balance: {strategy.name}: acts in {hook}, which a callback cannot. Use "
                        "moka.balance.BalancedTrainerMixin."
                    )
        super().__init__(Balance(strategies, seed))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(args, "deepspeed", None) is not None:
            raise MokaError(
                "balance: under DeepSpeed a callback does not see the optimizer's step. Use moka.balance.BalancedTrainerMixin."
            )
        if state.global_step:
            self.balance.load(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self.balance.begin(
            extract_model_from_parallel(kwargs["model"]),
            state.max_steps,
            kwargs.get("optimizer"),
            step=state.global_step,
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.update()
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self.balance.ctx is not None:
            logs |= self.balance.ctx.read_figures()


class _TrainerSteps(_Steps):
    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.balance)
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        deepspeed = trainer.is_deepspeed_enabled
        validation = None if trainer.eval_dataset is None else trainer.get_eval_dataloader
        model = extract_model_from_parallel(trainer.model_wrapped)
        if deepspeed:
            check_engine(self.balance.strategies, zero_stage(args), fsdp=False)
            # accelerate's ``backward`` also takes the step, and has no hook around it.
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine
            step = engine.step

            def around(*args: Any, **kwargs: Any) -> Any:
                self.balance.update()
                self.balance.before_step()
                found = step(*args, **kwargs)
                self.balance.after_step(bool(engine.was_step_applied() is False))
                return found

            engine.step = around
        self.balance.begin(model, state.max_steps, kwargs.get("optimizer"), validation, state.global_step)
        if state.is_world_process_zero:
            for line in self.balance.estimate(model):
                print(line)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            super().on_optimizer_step(args, state, control, **kwargs)


class BalancedTrainerMixin:
    """Trains with balance strategies; put it before the Trainer's class.

        class BalancedSFTTrainer(BalancedTrainerMixin, SFTTrainer): ...

    Batches may have ``sample_ids``, a list of text, one for each row: then what is drawn for a sample does not depend on how
    samples are shared over processes.

    Args:
        balance: the strategies; none: the Trainer as it is.
    Raises:
        MokaError: strategies that contradict each other, or that the model cannot do.
    """

    balance: Balance

    def __init__(self, *args: Any, balance: Sequence[BalanceStrategy] = (), **kwargs: Any) -> None:
        self.balance = Balance(balance)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.balance.seed = trainer.args.seed
        if self.balance:
            check_model(self.balance.strategies, extract_model_from_parallel(trainer.model))
            missing = [
                s.name for s, need in zip(self.balance.strategies, self.balance.needs, strict=True) if need.validation
            ]
            if missing and trainer.eval_dataset is None:
                raise MokaError(
                    f"balance: {missing[0]}: needs validation data; set data.validation, or pass eval_dataset."
                )
            drawn = [
                s.name for s, need in zip(self.balance.strategies, self.balance.needs, strict=True) if need.sample_ids
            ]
            if drawn and isinstance(trainer.train_dataset, IterableDataset):
                raise MokaError(
                    f"balance: {drawn[0]}: draws samples by their index, and the data are streamed. Take one out."
                )
            trainer.add_callback(_TrainerSteps(self))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch, of what strategies leave visible, with the losses that they add."""
        sample_ids = inputs.pop("sample_ids", [])
        plain: Any = super().compute_loss  # type: ignore[misc]
        ctx = self.balance.ctx
        if not self.balance or not model.training or ctx is None:
            return plain(model, inputs, return_outputs, num_items_in_batch)
        with ctx.micro_batch(inputs, sample_ids, self._loss_tokens(num_items_in_batch), self._add_gradients):
            self.balance.prepare()
            given, block = ctx.visible(inputs)
            with block:
                found = plain(model, given, return_outputs, num_items_in_batch)
            loss = self.balance.loss(found[0] if return_outputs else found)
        return (loss, found[1]) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Take a micro-batch; after the last one of a step, and before clipping, strategies change gradients and rates."""
        trainer: Any = self
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.balance and trainer.accelerator.sync_gradients and not trainer.is_deepspeed_enabled:
            self.balance.update()
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        if not any(need.sample_ids for need in self.balance.needs):
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        ids = ids_of(dataset)
        weights = partial(self.balance.sampling, ids)
        return WeightedOrder(len(ids), weights, lambda: int(trainer.state.epoch or 0), trainer.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the strategies' figures to a log with the loss."""
        if "loss" in logs and self.balance.ctx is not None:
            logs |= self.balance.ctx.read_figures()
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer: Any = self
        if self.balance:
            folder = Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
            self.balance.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        if self.balance:
            self.balance.load(checkpoint)
        elif (Path(checkpoint) / FILE).is_file():
            raise MokaError(
                f"--resume: balance: {checkpoint} was written with strategies, and this run has none. Resume with those that "
                "it began with."
            )

    def _loss_tokens(self, num_items: Any) -> Any:
        """Return what the Trainer divides a sum over answer tokens by; None: the micro-batch's own tokens."""
        trainer: Any = self
        if num_items is None or not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
            return None
        processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        return num_items / processes

    def _add_gradients(self, loss: torch.Tensor) -> None:
        """Add the gradients of an additional loss, scaled as ``training_step`` scales the step's own."""
        trainer: Any = self
        if self._loss_tokens(1) is None:
            loss = loss / trainer.current_gradient_accumulation_steps
        scaler = trainer.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()


class BalancedTrainer(BalancedTrainerMixin, Trainer):
    """``transformers.Trainer`` with balance strategies."""
