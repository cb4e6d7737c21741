"""Counting right answers: exact match and its 95 % interval."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_Z = 1.959963984540054  # two-sided 95 %


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of ``right`` successes in ``n`` (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def normalise(text: str) -> str:
    """Lower case, punctuation at word edges and repeated spaces removed: "Seven." equals "seven"."""
    words = (re.sub(r"^\W+|\W+$", "", word) for word in text.casefold().split())
    return " ".join(word for word in words if word)


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether the full answer, normalised, is the reference."""
    return normalise(prediction) == normalise(reference)


@dataclass
class Tally:
    """Right answers of one kind of question."""

    right: int = 0
    n: int = 0
    empty: int = 0  # answers silently, counted as wrong

    def add(self, prediction: str, reference: str) -> bool:
        hit = exact_match(prediction, reference)
        self.right, self.n = self.right + hit, self.n + 1
        self.empty += not normalise(prediction)
        return hit

    def to_dict(self) -> dict:
        low, high = wilson(self.right, self.n)
        accuracy = self.right / self.n if self.n else 0.0
        return {"right": self.right, "n": self.n, "empty": self.empty, "accuracy": accuracy, "interval": [low, high]}
