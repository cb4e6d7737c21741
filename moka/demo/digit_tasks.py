"""The three embedded tasks: questions about handwritten and spoken digits.

    item i --> category (i mod n) --> digits and question --> a drawing or recording of each digit --> chat messages

The same media have several answers, so the question decides what matters; half of the categories need both media.
Only items of the split are shown. All 6 speakers are in every split, for want of speaker ids.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from moka.errors import MokaError, nearest
from moka.modeling.media import AudioFeatures

from .embedded import PREFIX, SPLITS, Drawings, Recordings, Split, split_indices
from .knobs import OFF, Knobs

# fmt: off
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)
# fmt: on

Digits = tuple[int, ...]
# A maker turns the two digits dealt into (digits to show, question, answer). The coin is true in exactly every second
# question of a category, so that what it decides ("yes" or "no") is balanced.
Maker = Callable[[Digits, np.random.RandomState, bool], tuple[Digits, str, str]]


def _as_dealt(dealt: Digits, rng: np.random.RandomState, coin: bool) -> Digits:
    return dealt


def _different(dealt: Digits, rng: np.random.RandomState, coin: bool) -> Digits:
    return dealt[0], (dealt[0] + 1 + rng.randint(9)) % 10


def _same_by_coin(dealt: Digits, rng: np.random.RandomState, coin: bool) -> Digits:
    return (dealt[0], dealt[0]) if coin else _different(dealt, rng, coin)


def _ask(question: str, answer: Callable[[int, int], str], pair: Callable[..., Digits] = _as_dealt) -> Maker:
    def make(dealt: Digits, rng: np.random.RandomState, coin: bool) -> tuple[Digits, str, str]:
        first, second = pair(dealt, rng, coin)
        return (first, second), question, answer(first, second)

    return make


def _plus(sides: tuple[str, str]) -> Maker:
    def make(dealt: Digits, rng: np.random.RandomState, coin: bool) -> tuple[Digits, str, str]:
        k = 1 + rng.randint(9)
        return dealt, f"What is the {sides[coin]} digit plus {WORDS[k]}?", WORDS[dealt[coin] + k]

    return make


def _caption(dealt: Digits, rng: np.random.RandomState, coin: bool) -> tuple[Digits, str, str]:
    return dealt[:1], "", WORDS[dealt[0]]


def _first(a: int, b: int) -> str:
    return WORDS[a]


def _second(a: int, b: int) -> str:
    return WORDS[b]


def _both(a: int, b: int) -> str:
    return f"{WORDS[a]} {WORDS[b]}"


# Task -> its two media, and the maker of each category. "Larger" is asked of two drawings only: next to a sound, one
# medium only would already answer 78 % of it.
TASKS: dict[str, tuple[tuple[str, str], dict[str, Maker]]] = {
    "audio-visual-text": (
        ("drawing", "recording"),
        {
            "written": _ask("Which digit is written?", _first),
            "spoken": _ask("Which digit is spoken?", _second),
            "same": _ask(
                "Do image and sound show the same digit?", lambda a, b: "yes" if a == b else "no", _same_by_coin
            ),
            "sum": _ask("What is the sum of both digits?", lambda a, b: WORDS[a + b]),
        },
    ),
    "visual-text": (
        ("drawing", "drawing"),
        {
            "left": _ask("Which digit is on the left?", _first),
            "right": _ask("Which digit is on the right?", _second),
            "plus": _plus(("left", "right")),
            "both": _ask("Which digits are written?", _both),
            "larger": _ask("Which digit is larger?", lambda a, b: WORDS[max(a, b)], _different),
        },
    ),
    "speech-text": (
        ("recording", "recording"),
        {
            "first": _ask("Which digit is spoken first?", _first),
            "second": _ask("Which digit is spoken second?", _second),
            "plus": _plus(("first", "second")),
            "transcribe": _ask("Transcribe both digits.", _both),
        },
    ),
}
_MODALITY = {"drawing": "visual", "recording": "audio"}
DEFAULT_SIZES = {"train": 20000, "validation": 400, "test": 1000}
# Validation and test are drawn from these only, whatever the seed.
_FIXED_SEEDS = {"validation": 31, "test": 32}


class EmbeddedTask:
    """A map-style data set of chat samples, the format of ``moka.data.schema``.

    A sample is ``{"id": str, "category": str, "messages": [user, assistant]}``. The user's content has the media,
    ``{"type": "image", "image": PIL image, mode "L", 28 x 28}`` or ``{"type": "audio", "audio": AudioFeatures [frames,
    13] of kind "mfcc"}``, and then the question; the assistant's content is the answer, in words.

    Args:
        name: ``"audio-visual-text"`` (one drawing, one recording), ``"visual-text"`` (two drawings) or
            ``"speech-text"`` (two recordings).
        split: ``"train"``, ``"validation"`` or ``"test"``. Each item of train depends on (seed, index) only; the
            other two are fixed lists, of which a smaller ``size`` takes the beginning.
        size: number of samples; 20000, 400 and 1000 when left out. Categories take turns, so any beginning is balanced.
        seed: of the training questions.
        stage: 2 asks questions. 1 pairs a single medium with its digit's word and no question, to align encoders;
            the categories are then ``"drawing"`` and ``"recording"``.
        augment: vary training media a little (drawings: turn, size, place; recordings: loudness, tempo). The questions
            and the items shown stay the same.
        knobs: noise, leaks, missing and corrupted media. Everything else stays as it is without; ``sample["knobs"]``, absent
            if all knobs are off, says what was changed.

    Raises:
        MokaError: an unknown name, split or stage, a negative seed, a size below 1 or beyond a fixed list, or what
            ``Knobs.check`` raises.
    """

    def __init__(
        self,
        name: str = "audio-visual-text",
        split: Split = "train",
        size: int | None = None,
        seed: int = 0,
        stage: int = 2,
        augment: bool = True,
        knobs: Knobs = OFF,
    ):
        check_task(tuple(TASKS), DEFAULT_SIZES, name, split, size, seed, stage)
        self.name, self.split, self.stage = name, split, stage
        self.size = DEFAULT_SIZES[split] if size is None else size
        self.augment = augment and split == "train"
        self._seed = _FIXED_SEEDS.get(split, seed)
        media, makers = TASKS[name]
        knobs.check(PREFIX + name, tuple(dict.fromkeys(_MODALITY[medium] for medium in media)), stage)
        self.knobs = knobs
        self.categories = tuple(makers) if stage == 2 else tuple(dict.fromkeys(media))
        self._items: dict[str, Any] = {}
        self._by_digit: dict[str, list[np.ndarray]] = {}
        if "drawing" in media:
            drawings = Drawings.load()
            self._add("drawing", drawings.images, drawings.labels, split_indices("drawings", split))
        if "recording" in media:
            recordings = Recordings.load()
            self._add("recording", recordings.features, recordings.labels, split_indices("recordings", split))

    def _add(self, medium: str, items: Any, labels: np.ndarray, indices: np.ndarray) -> None:
        self._items[medium] = items
        self._by_digit[medium] = [indices[labels[indices] == digit] for digit in range(10)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.size)[operator.index(index)]  # negative positions, and IndexError beyond the end
        turn, place = divmod(index, len(self.categories))
        category = self.categories[place]
        # RandomState and not default_rng: numpy promises that its stream never changes, so the questions never do.
        rng = np.random.RandomState([self._seed, index])
        media: tuple[str, ...] = TASKS[self.name][0] if self.stage == 2 else (category,)
        make = TASKS[self.name][1][category] if self.stage == 2 else _caption
        digits, question, answer = make(self._deal(turn, place), rng, turn % 2 == 0)
        # All items are chosen before any is augmented, which so does not change the choice.
        chosen = [rng.choice(self._by_digit[medium][digit]) for medium, digit in zip(media, digits, strict=True)]
        draw = self.knobs.draw(self._seed, index)
        chosen = [
            self._other(medium, digit, draw.other(position)) if _MODALITY[medium] in draw.corrupt else item
            for position, (medium, digit, item) in enumerate(zip(media, digits, chosen, strict=True))
        ]
        content = [self._part(medium, item, rng) for medium, item in zip(media, chosen, strict=True)]
        if question:
            content.append({"type": "text", "text": question})
        sample = {
            "id": f"{self.name}-{self.stage}-{self.split}-{self._seed}-{index}",
            "category": category,
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }
        return self.knobs.apply(sample, draw) if self.knobs else sample

    def _other(self, medium: str, digit: int, rng: np.random.RandomState) -> int:
        """Return an item of another digit."""
        return rng.choice(self._by_digit[medium][(digit + 1 + rng.randint(9)) % 10])

    def _deal(self, turn: int, place: int) -> Digits:
        """Two random digits for a category's question number ``turn``; ten in a row hold each digit once per medium.

        Left to chance, one digit was the answer to 19 % of a list of 250, nearly twice the chance of guessing.
        """
        block, position = divmod(turn, 10)
        rng = np.random.RandomState([self._seed, block, place])
        return tuple(int(rng.permutation(10)[position]) for _ in range(2))

    def _part(self, medium: str, item: int, rng: np.random.RandomState) -> dict[str, Any]:
        stored = self._items[medium][item]
        if medium == "drawing":
            image = Image.fromarray(stored)
            return {"type": "image", "image": augment_drawing(image, rng) if self.augment else image}
        values = augment_recording(stored, rng) if self.augment else stored.copy()
        return {"type": "audio", "audio": AudioFeatures(values, "mfcc")}


def augment_drawing(image: Image.Image, rng: np.random.RandomState) -> Image.Image:
    """Turned by up to 10 degrees, 10 % larger or smaller, and moved by up to 2 pixels."""
    turn, zoom = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    shift = rng.uniform(-2, 2, size=2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / zoom
    centre = np.array(image.size) / 2
    offset = centre - matrix @ (centre + shift)
    # PIL wants the map from a pixel of the result to one of the source.
    rows = np.column_stack([matrix, offset])  # [2, 3]
    return image.transform(image.size, Image.Transform.AFFINE, rows.ravel().tolist(), Image.Resampling.BILINEAR)


def augment_recording(values: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Louder or softer by up to 4 dB, and up to 10 % faster or slower: float32 [other number of frames, 13]."""
    gain, tempo = rng.uniform(-4, 4), rng.uniform(0.9, 1.1)
    frames = max(2, round(len(values) * tempo))
    position = np.linspace(0, len(values) - 1, frames)
    before = np.floor(position).astype(int)
    after = np.minimum(before + 1, len(values) - 1)
    weight = (position - before)[:, None]
    stretched = (1 - weight) * values[before] + weight * values[after]
    # A gain adds the same number of decibels to all 128 mel bands, which the orthonormal DCT gathers in the first.
    stretched[:, 0] += gain * np.sqrt(128)
    return stretched.astype(np.float32)


def check_task(
    known: Sequence[str], sizes: Mapping[str, int], name: str, split: str, size: int | None, seed: int, stage: int
) -> None:
    """Raise ``MokaError`` for what no embedded task is: an unknown name, split or stage, a bad seed or size.

    Args:
        known: names that are allowed.
        sizes: split -> number of samples; those of validation and test are the lengths of fixed lists.
    """
    if name not in known:
        every = [*TASKS, "photographs", "scenes"]  # the last two are in moka.demo.stamp_tasks and scene_tasks
        raise MokaError(f"unknown embedded task {name!r}; there are {', '.join(every)}.{nearest(name, every)}")
    if split not in SPLITS:
        raise MokaError(f"unknown split {split!r}; there are {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    if stage not in (1, 2):
        raise MokaError(f"stage is {stage!r}; it must be 1 (one medium and its words) or 2 (questions)")
    if not 0 <= seed < 2**32:
        raise MokaError(f"seed is {seed}; it must be 0 ... {2**32 - 1}")
    if size is not None and size < 1:
        raise MokaError(f"size is {size}; it must be 1 or more")
    if size is not None and split != "train" and size > sizes[split]:
        raise MokaError(f"size is {size}, but the fixed {split} list has {sizes[split]} questions")
