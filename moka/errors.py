"""The one exception type for mistakes that a user can mend.

The command line prints the message alone and exits with code 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MokaError(ValueError):
    """Bad input. The message names the thing, what was given, what is allowed, and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``" Did you mean 'rank'?"`` for an unknown name, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def counted(number: int, one: str, many: str = "") -> str:
    """``"1 question"``, ``"3 questions"`` or, with its own plural, ``"2 processes"``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
