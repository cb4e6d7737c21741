"""POPE: is this object in the image? Accuracy, precision, recall, F1 and yes-ratio, of "yes"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Benchmark, Figures, Item, Protocol, word_reference
from .intervals import bootstrap, proportion
from .parsing import yes_no, yes_then_no


def measure(items: Sequence[Item], overall: bool) -> Figures:
    """The figures over these records, in per cent.

    An unparsable answer is wrong and says neither word: it counts in the accuracy's and the yes-ratio's denominator,
    where the truth is yes as a miss of the recall, and not in the precision, which is over answers of "yes".
    """
    said = np.array([item.answer == "yes" for item in items], dtype=bool)
    true = np.array([item.reference == "yes" for item in items], dtype=bool)
    hits, n = int((said & true).sum()), len(items)
    units = np.stack([said & true, said, true], axis=1).astype(float)  # [records, (hits, said yes, true yes)]
    return {
        "accuracy": proportion(sum(item.right for item in items), n),
        "precision": proportion(hits, int(said.sum())),
        "recall": proportion(hits, int(true.sum())),
        "F1": bootstrap(units, _f1),
        "yes-ratio": proportion(int(said.sum()), n),
    }


def _f1(sums: np.ndarray) -> np.ndarray:
    """[..., (hits, said yes, true yes)] -> F1 in per cent, [...]."""
    return 200.0 * sums[..., 0] / (sums[..., 1] + sums[..., 2])


POPE = Benchmark(
    name="pope",
    about="POPE: whether an object is in the image (yes / no), by split",
    expects="yes or no",
    figures=dict.fromkeys(("accuracy", "precision", "recall", "F1", "yes-ratio"), "%"),
    reference=word_reference(("yes", "no")),
    measure=measure,
    protocols={
        "strict": Protocol('"yes" or "no" as a whole word, and not both', lambda text, record: yes_no(text)),
        "paper": Protocol(
            '"yes" anywhere in the lower-cased text is yes, else "no" anywhere is no',
            lambda text, record: yes_then_no(text),
        ),
    },
    optional={"category": "a row for each split"},
    categories=("random", "popular", "adversarial"),
)
