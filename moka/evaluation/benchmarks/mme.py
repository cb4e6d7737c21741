"""MME: two yes/no questions an image; 100 x accuracy + 100 x accuracy+, summed over the subtasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moka.data.vocabulary import MME_TASKS

from .base import Benchmark, Figures, Item, Protocol, of_complete_groups, word_reference
from .intervals import BOOTSTRAP, clustered_proportion, figure, percentiles, proportion, resampled
from .parsing import yes_else_no, yes_no

PERCEPTION, COGNITION = MME_TASKS["perception"], MME_TASKS["cognition"]


def measure(items: Sequence[Item], overall: bool) -> Figures:
    """Of one subtask: accuracy, accuracy+ (all questions of an image right) and score; of all: sums of scores."""
    if not overall:
        images = [right for right, _ in _images(of_complete_groups(items)).values()]
        return {
            "accuracy": clustered_proportion([item.right for item in items], [item.group for item in items]),
            "accuracy+": proportion(sum(images), len(images)),
            "score": _sum_of_scores(items, {item.category for item in items}),
        }
    parts = {"perception": PERCEPTION, "cognition": COGNITION}
    present = {item.category for item in items}
    return {
        name: _sum_of_scores(items, set(subtasks) & present)
        for name, subtasks in parts.items()
        if name == "perception" or set(subtasks) & present
    }


def _images(items: Sequence[Item]) -> dict[str | None, tuple[bool, int]]:
    """Image -> whether all its questions are right, and how many there are."""
    images: dict[str | None, tuple[bool, int]] = {}
    for item in items:
        right, n = images.get(item.group, (True, 0))
        images[item.group] = (right and item.right, n + 1)
    return images


def _sum_of_scores(items: Sequence[Item], subtasks: Iterable[str | None]) -> dict:
    """The sum of the subtasks' scores, 0 to 200 each; the interval resamples the images of each subtask."""
    value, drawn, n = 0.0, np.zeros(1), 0
    for subtask in sorted(subtasks, key=str):
        part = [item for item in items if item.category == subtask]
        units = _units(part)
        n += len(units)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = value + float(_score(units.sum(axis=0)))
            drawn = drawn + _score(resampled(units))
    return figure(value, percentiles(drawn), n, f"{BOOTSTRAP}, of images") if n else figure(None, None, 0, BOOTSTRAP)


def _units(items: Sequence[Item]) -> np.ndarray:
    """Counts of every image: [images, (right answers, questions, image right, image counts for accuracy+)]."""
    counts: dict[str | None, list[int]] = {}
    for item in items:
        row = counts.setdefault(item.group, [0, 0, 0, 0])
        row[0] += item.right
        row[1] += 1
    for group, (right, _) in _images(of_complete_groups(items)).items():
        counts[group][2:] = [int(right), 1]
    return np.array(list(counts.values()), dtype=float).reshape(-1, 4)


def _score(sums: np.ndarray) -> np.ndarray:
    return 100.0 * sums[..., 0] / sums[..., 1] + 100.0 * sums[..., 2] / sums[..., 3]


def select(items: list[Item], protocol: str) -> tuple[list[Item], dict[str, int]]:
    """``paper`` drops the last question of an image with an odd number of them; ``strict`` keeps and reports it."""
    questions: dict[tuple[str | None, str | None], list[Item]] = {}
    for item in items:
        questions.setdefault((item.category, item.group), []).append(item)
    odd = [asked for asked in questions.values() if len(asked) % 2]
    counts = {
        "images": len(questions),
        "images with an odd number of questions": len(odd),
        "perception subtasks present, of 10": len({item.category for item in items} & set(PERCEPTION)),
    }
    if protocol != "paper":
        return items, counts
    dropped = {asked[-1].id for asked in odd}
    counts["questions dropped (the last of an odd image)"] = len(dropped)
    counts["images dropped whole (one question)"] = sum(len(asked) == 1 for asked in odd)
    return [item for item in items if item.id not in dropped], counts


MME = Benchmark(
    name="mme",
    about="MME: yes / no questions, two an image, by subtask; perception is the sum over its 10 subtasks",
    expects="yes or no",
    figures={"accuracy": "%", "accuracy+": "%", "score": "points", "perception": "points", "cognition": "points"},
    reference=word_reference(("yes", "no")),
    measure=measure,
    protocols={
        "strict": Protocol(
            '"yes" or "no" as a whole word, and not both; every question counts',
            lambda text, record: yes_no(text),
        ),
        "paper": Protocol(
            '"yes" anywhere in the lower-cased text is yes, all else is no; an image with an odd number of questions '
            "drops its last one. The published script also writes the posters results into the scene file; this does not",
            lambda text, record: yes_else_no(text),
        ),
    },
    required=("category", "group"),
    categories=(*PERCEPTION, *COGNITION),
    select=select,
)
