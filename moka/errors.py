"""The exception for mistakes that a user can fix, and the one for an interrupted run.

The command line prints the message of a `MokaError` and exits with code 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

# Exit code of a run that was interrupted and can be resumed (sysexits.h).
EX_TEMPFAIL = 75


class MokaError(ValueError):
    """Bad input. The message names the thing, what was given, what is allowed, and the remedy."""


class NotCachedError(MokaError):
    """A medium whose features are not in the cache, or are those of another file."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``" Did you mean 'rank'?"`` for an unknown name, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def counted(number: int, one: str, many: str = "") -> str:
    """``"1 question"``, ``"3 questions"`` or, with its own plural, ``"2 processes"``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class Interrupted(BaseException):
    """The end of a run that a signal asked for. Not an error of the run: handlers of ``Exception`` do not catch it.

    Args:
        step: optimizer steps done in this stage; None outside of training.
        checkpoint: the one of this step; None if none could be made.
        agreed: all processes end at this same step.
    """

    def __init__(self, step: int | None = None, checkpoint: Path | None = None, agreed: bool = False) -> None:
        self.step, self.checkpoint, self.agreed = step, checkpoint, agreed
        self.remedy = "start it again"
        super().__init__()

    def __str__(self) -> str:
        where = "outside of training" if self.step is None else f"at step {self.step}"
        saved = f"saved {self.checkpoint}" if self.checkpoint else "there was nothing new to save"
        return f"interrupted {where}; {saved}; {self.remedy}"
