"""SIGTERM and SIGUSR1 (preemption, a time limit near): save a checkpoint and end with exit code 75.

While a stage trains, the signal is noted; at the end of the optimizer step all processes agree, save and end. During an
evaluation they save at once, and its result is lost. Elsewhere (loading, writing results) there is nothing new to save, and
the process ends at once. A second signal ends it without saving.

torchrun and accelerate forward their own SIGTERM to all processes, and kill them 30 seconds later
(TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes that). Ctrl-C ends a run without saving, as usual.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moka.distributed import all_reduce_any, is_main
from moka.errors import Interrupted

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# A cluster signals launcher and processes equally, and the launcher sends its own on: that is one signal.
_SAME_WITHIN_S = 3.0
_OUTLIVE_S = 60


class Interruption:
    """The handlers of a run: ``with Interruption() as interruption``. Only a main thread can have any."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is not None:
            if now - self._first > _SAME_WITHIN_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._first = now
        if not self._deferred:
            raise Interrupted
        if is_main():
            # print() may be what was interrupted.
            text = f"\n{signal.Signals(number).name}: the run saves and ends\n"
            os.write(2, text.encode())

    def defer(self) -> None:
        """From here to ``check`` a signal is only noted, for ``agreed``."""
        self._deferred = True

    def check(self) -> None:
        """Leave now where a signal was noted; from here on one is followed at once."""
        self._deferred = False
        if self.agreed():
            raise Interrupted(agreed=True)

    def agreed(self) -> bool:
        """Return whether any process of the run was signalled: every process asks at the same place, and gets one answer.

        The hosts ask each other, so that no device is waited for.
        """
        return all_reduce_any(self._first is not None)


def outlive(then: Callable[[int], None] | None, worker: int) -> None:
    """For a data loader's worker: live on at a signal for as long as saving may take.

    A cluster signals workers too, and torch ends a run one of whose workers is gone.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda *_: signal.alarm(_OUTLIVE_S))
    if then is not None:
        then(worker)


class SaveAndLeave(TrainerCallback):
    """Saves and ends the training at a signal, on all processes at the same step."""

    def __init__(self, interruption: Interruption, trainer: Any) -> None:
        self.interruption, self.trainer = interruption, trainer
        self._began: int | None = None
        self._leaving = self._put_off = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Loading and going forward to where the run was may have taken long.
        if state.global_step == self._began and self.interruption.agreed():
            raise Interrupted(state.global_step, agreed=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What the last step of an epoch saves continues after what the epoch's end logs and evaluates.
        if state.epoch != int(state.epoch):
            self._leave(control)
        elif control.should_save:
            control.should_save, self._put_off = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save, self._put_off = control.should_save or self._put_off, False
        self._leave(control)

    def _leave(self, control: Any) -> None:
        if self.interruption.agreed():
            self._leaving = control.should_save = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interruption.agreed():
            # The evaluation of this step is lost; its training is not.
            self.trainer._save_checkpoint(self.trainer.model, None)
            self._leaving = True
            self.on_save(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._leaving:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            raise Interrupted(state.global_step, folder, agreed=True)
