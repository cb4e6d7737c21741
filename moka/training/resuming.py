"""The part of the trainer that saves, stops and goes on: whole checkpoints, exact resume, an end at a signal.

What transformers keeps in a checkpoint, and beside it here: the loss since the last logging step, and an evaluation that
was broken off.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import nested_gather, safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moka.distributed import all_gather_object, is_main, run_on_all, run_on_main
from moka.errors import Interrupted
from moka.io import disk_full_errors

from .checkpointing import UNFINISHED, Seal, begin, finish, listing, read_seal, recover, rotate
from .distributed_backend import describe
from .loaders import dismiss, prepared
from .preemption import BrokenOff


class ResumableTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints are sealed (`checkpoints`) and whose resumed runs are exact."""

    _unfinished: Path | None = None
    _failed: Exception | None = None
    _from: Seal | None = None
    _owes_evaluation = False
    _began_at = 0
    _loaders: tuple[Any, ...] = ()  # whose workers stay from one pass to the next

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._from = read_seal(resume_from_checkpoint) if resume_from_checkpoint else None
        self._began_at = self._from.step if self._from is not None else 0
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for loader in self._loaders:
                dismiss(loader)

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes checkpoint-STEP: beside its place until it is whole."""
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _final(self) -> Path:
        return Path(self.args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in transformers, but whole or not at all; where one process fails, all end.

        Raises:
            MokaError: the disk is full.
        """
        final = self._final()
        seal = Seal(
            step=self.state.global_step,
            world_size=self.args.world_size,
            zero_stage=describe(self)["zero_stage"],
            unlogged_loss=float(nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()),
            last_logged=self._globalstep_last_logged,
            owes_evaluation=self._owes_evaluation,
        )
        try:
            run_on_main(_on_full_disk(final, lambda: begin(final)))
            self._unfinished, self._failed = final.parent / UNFINISHED, None
            part = self._unfinished / final.name
            self._write(final, model, trial)
            # Again: transformers took the best checkpoint to be where it wrote it.
            run_on_main(_on_full_disk(final, lambda: self.state.save_to_json(str(part / TRAINER_STATE_NAME))))
            written = all_gather_object(listing(part))
            run_on_main(_on_full_disk(final, lambda: finish(part, final, seal, written)))
        except BaseException:
            if is_main():
                recover(final.parent)
            raise
        finally:
            self._unfinished = None
        run_on_main(lambda: rotate(final.parent, self.args.save_total_limit, final, self.state.best_model_checkpoint))

    def _write(self, final: Path, model: Any, trial: Any) -> None:
        def write() -> None:
            super(ResumableTrainer, self)._save_checkpoint(model, trial)
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if self.state.best_global_step and (best == final or best.is_dir()):
                self.state.best_model_checkpoint = str(best)

        def fail() -> None:
            if self._failed is not None:
                raise self._failed

        def both() -> None:
            write()
            fail()

        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # These write together: one that fails in the middle cannot tell the others but by ending.
            _on_full_disk(final, write)()
            run_on_all(_on_full_disk(final, fail))
        else:
            run_on_all(_on_full_disk(final, both))

    @contextmanager
    def failing_later(self) -> Iterator[None]:
        """Around what one process writes of a checkpoint before all meet: it fails after they have met."""
        try:
            yield
        except Exception as error:
            if self._unfinished is None:
                raise
            self._failed = self._failed or error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last thing that transformers restores, right before the first step."""
        if checkpoint is None or self._from is None:
            return super()._load_rng_state(checkpoint)
        with _random_states_for(self.args, Path(checkpoint), self._from.world_size) as folder:
            super()._load_rng_state(str(folder))
        self._tr_loss += self._from.unlogged_loss
        self._globalstep_last_logged = self._from.last_logged
        self._make_up_evaluation()

    def _make_up_evaluation(self) -> None:
        seal, self._from = self._from, None
        if seal is not None and seal.owes_evaluation and self.eval_dataset is not None:
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._make_up_evaluation()  # of the very last step: there was no step to go on with
        return super()._finalize_training(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        if self.state.global_step >= self.state.max_steps:
            # transformers would train one step more after the checkpoint of the last one.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        before = _random_states()
        try:
            return super().evaluate(*args, **kwargs)
        except BrokenOff:
            _set_random_states(before)
        step, final = self.state.global_step, self._final()
        if step > self._began_at:  # else the checkpoint that this went on from owes it still
            self._owes_evaluation = True
            self._save_checkpoint(self.model, None)
        raise Interrupted(step, final if step else None, agreed=True)

    def get_train_dataloader(self) -> Any:
        return self._kept(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._kept(super().get_eval_dataloader(*args, **kwargs))

    def _kept(self, loader: Any) -> Any:
        if prepared(loader).persistent_workers and all(loader is not one for one in self._loaders):
            self._loaders = (*self._loaders, loader)
        return loader


def _on_full_disk(final: Path, action: Any) -> Any:
    def run() -> None:
        with disk_full_errors(final):
            action()

    return run


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])


@contextmanager
def _random_states_for(arguments: Any, checkpoint: Path, saved: int) -> Iterator[Path]:
    """A folder with this process's random states under the name that transformers looks for.

    Where the number of processes has changed, one that was not there takes those of the first process, as all processes
    of a run begin with the same.
    """
    if saved == arguments.world_size:
        yield checkpoint
        return
    rank = arguments.process_index
    theirs = checkpoint / ("rng_state.pth" if saved == 1 else f"rng_state_{rank if rank < saved else 0}.pth")
    ours = "rng_state.pth" if arguments.world_size == 1 else f"rng_state_{rank}.pth"
    with tempfile.TemporaryDirectory() as folder:
        if theirs.is_file():
            with safe_globals():
                states = torch.load(theirs, weights_only=True)
            if "cuda" in states:  # of all GPUs that the process saw, or of its own
                one = states["cuda"]
                if saved > 1:
                    one = one[min(arguments.local_process_index, len(one) - 1)]
                states["cuda"] = one if arguments.world_size == 1 else [one] * torch.cuda.device_count()
            torch.save(states, Path(folder) / ours)
        yield Path(folder)
