"""Questions about a real photograph and a recording of someone speaking.

    item i --> category (i mod n) --> kind, language and question --> a photograph and a recording --> chat messages

The photograph and the recording need not belong together: whether the sound names what is shown cannot be learnt from so
few items. To say the language is also to say the speaker: there is about one volunteer for each, heard in every split.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from moka.modeling.media import Waveform

from .digit_tasks import check_task
from .embedded import PREFIX, Split
from .knobs import OFF, Draw, Knobs
from .stamps import KINDS, LANGUAGES, RATE, Stamps

NAMES = tuple(LANGUAGES.values())
_CODES = {name: code for code, name in LANGUAGES.items()}

Dealt = tuple[str, str]  # a kind and a language, such as ("animal", "French")
# A maker turns a pair dealt into (pair to show, question, answer). `turn` counts the questions of its category.
Maker = Callable[[Dealt, np.random.RandomState, int], tuple[Dealt, str, str]]


def _kind(dealt: Dealt, rng: np.random.RandomState, turn: int) -> tuple[Dealt, str, str]:
    return dealt, "What kind of thing is shown?", dealt[0]


def _language(dealt: Dealt, rng: np.random.RandomState, turn: int) -> tuple[Dealt, str, str]:
    return dealt, "Which language is spoken?", dealt[1]


def _pair(dealt: Dealt, rng: np.random.RandomState, turn: int) -> tuple[Dealt, str, str]:
    return dealt, "What kind of thing, and which language?", f"{dealt[0]}, {dealt[1]}"


def _both(dealt: Dealt, rng: np.random.RandomState, turn: int) -> tuple[Dealt, str, str]:
    """Of four questions two are true; one has the kind with another language, one the language with another kind."""
    kind, language = dealt
    question = f"Is {_with_article(kind)} shown and is {language} spoken?"
    if turn % 4 == 1:
        return (kind, _other(language, NAMES, rng)), question, "no"
    if turn % 4 == 3:
        return (_other(kind, tuple(KINDS), rng), language), question, "no"
    return dealt, question, "yes"


CATEGORIES: dict[str, Maker] = {"kind": _kind, "language": _language, "both": _both, "pair": _pair}
ALIGNMENT = ("photograph", "recording")
TASKS = ("photographs",)
DEFAULT_SIZES = {"train": 20000, "validation": 240, "test": 720}
# Validation and test are drawn from these only, whatever the seed.
_FIXED_SEEDS = {"validation": 41, "test": 42}


class PhotographsTask:
    """A map-style data set of chat samples, the format of ``moka.data.schema``; in use as ``moka.data.EmbeddedTask``.

    The user's content has ``{"type": "image", "image": PIL image, mode "RGB", at most 256 x 256}``, ``{"type": "audio",
    "audio": Waveform at 16 kHz}`` and the question; the assistant's content is the answer. Four categories take turns:

        category   question                                    always the same answer   one medium only
        kind       What kind of thing is shown?                1/6                      (image) all
        language   Which language is spoken?                   1/6                      (sound) all
        both       Is an animal shown and is French spoken?    1/2                      3/4
        pair       What kind of thing, and which language?     about 1/36               about 1/6

    Six kinds and six languages are dealt evenly; the last two columns are the accuracy that can be reached so. In "both",
    the kind shown is the one asked for in three questions of four, two of which are true; likewise the language.

    Args:
        name: ``"photographs"``.
        split: ``"train"``, ``"validation"`` or ``"test"``. Each item of train depends on (seed, index) only; the
            other two are fixed lists, of which a smaller ``size`` takes the beginning.
        size: number of samples; 20000, 240 and 720 when left out.
        seed: of the training questions.
        stage: 2 asks questions. 1 pairs a single medium with its words and no question, to align encoders: a photograph
            with its kind (three times of four) or its English caption ("A duck."), and a recording with its language.
        augment: vary training media a little (photographs: mirrored, cropped; recordings: loudness). The questions and
            the items shown stay the same.
        knobs: as of ``EmbeddedTask``.

    Raises:
        MokaError: an unknown name, split or stage, a negative seed, a size below 1 or beyond a fixed list, or what
            ``Knobs.check`` and ``Stamps.load`` raise.
    """

    def __init__(
        self,
        name: str = "photographs",
        split: Split = "train",
        size: int | None = None,
        seed: int = 0,
        stage: int = 2,
        augment: bool = True,
        knobs: Knobs = OFF,
    ):
        check_task(TASKS, DEFAULT_SIZES, name, split, size, seed, stage)
        knobs.check(PREFIX + name, ("visual", "audio"), stage)
        self.knobs = knobs
        self.name, self.split, self.stage = name, split, stage
        self.size = DEFAULT_SIZES[split] if size is None else size
        self.augment = augment and split == "train"
        self.categories = tuple(CATEGORIES) if stage == 2 else ALIGNMENT
        self._seed = _FIXED_SEEDS.get(split, seed)
        self._stamps = Stamps.load()
        self._indices = self._stamps.split_indices(split)
        items = {int(index): self._stamps.items[index] for index in self._indices}
        self._of_kind = {kind: [i for i, item in items.items() if item.kind == kind] for kind in KINDS}
        self._spoken = {name: [i for i, item in items.items() if _CODES[name] in item.sounds] for name in NAMES}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.size)[operator.index(index)]  # negative positions, and IndexError beyond the end
        turn, place = divmod(index, len(self.categories))
        # RandomState and not default_rng: numpy promises that its stream never changes, so the questions never do.
        rng = np.random.RandomState([self._seed, index])
        dealt, draw = self._deal(turn, place), self.knobs.draw(self._seed, index)
        content, answer = (
            self._ask(dealt, rng, turn, place, draw) if self.stage == 2 else self._align(dealt, rng, turn, place)
        )
        sample = {
            "id": f"{self.name}-{self.stage}-{self.split}-{self._seed}-{index}",
            "category": self.categories[place],
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }
        return self.knobs.apply(sample, draw) if self.knobs else sample

    def _ask(
        self, dealt: Dealt, rng: np.random.RandomState, turn: int, place: int, draw: Draw
    ) -> tuple[list[dict[str, Any]], str]:
        make = CATEGORIES[self.categories[place]]
        (kind, language), question, answer = make(dealt, rng, turn)
        # Both items are chosen before any is augmented, which so does not change the choice.
        shown, spoken = int(rng.choice(self._of_kind[kind])), int(rng.choice(self._spoken[language]))
        if "visual" in draw.corrupt:
            other = draw.other(0)
            shown = int(other.choice(self._of_kind[_other(kind, tuple(KINDS), other)]))
        if "audio" in draw.corrupt:
            other = draw.other(1)
            language = _other(language, NAMES, other)
            spoken = int(other.choice(self._spoken[language]))
        content = [self._image(shown, rng), self._audio(spoken, language, rng), {"type": "text", "text": question}]
        return content, answer

    def _align(
        self, dealt: Dealt, rng: np.random.RandomState, turn: int, place: int
    ) -> tuple[list[dict[str, Any]], str]:
        kind, language = dealt
        if self.categories[place] == "recording":
            return [self._audio(int(rng.choice(self._spoken[language])), language, rng)], language
        if turn % 4:
            return [self._image(int(rng.choice(self._of_kind[kind])), rng)], kind
        item = int(rng.choice(self._indices))
        return [self._image(item, rng)], self._stamps.items[item].caption

    def _deal(self, turn: int, place: int) -> Dealt:
        """A kind and a language for a category's question number ``turn``.

        In a block of as many questions as there are kinds (and languages), each comes up once. Every fourth question of
        "both" must not meet the same kinds again and again, hence a new order for each block.
        """
        block, position = divmod(turn, len(KINDS))
        rng = np.random.RandomState([self._seed, block, place])
        kind = tuple(KINDS)[rng.permutation(len(KINDS))[position]]
        return kind, NAMES[rng.permutation(len(NAMES))[position]]

    def _image(self, index: int, rng: np.random.RandomState) -> dict[str, Any]:
        picture = self._stamps.picture(index)
        may_mirror = self._stamps.items[index].kind != "sign"
        return {"type": "image", "image": _augment_picture(picture, rng, may_mirror) if self.augment else picture}

    def _audio(self, index: int, language: str, rng: np.random.RandomState) -> dict[str, Any]:
        samples = self._stamps.recording(index, _CODES[language])
        return {"type": "audio", "audio": Waveform(_augment_sound(samples, rng) if self.augment else samples, RATE)}


def _with_article(noun: str) -> str:
    """ "an animal", "a plant", but "food" and "a household item"."""
    return {"animal": "an animal", "food": "food", "household": "a household item"}.get(noun, f"a {noun}")


def _other(value: str, values: tuple[str, ...], rng: np.random.RandomState) -> str:
    return values[(values.index(value) + 1 + rng.randint(len(values) - 1)) % len(values)]


def _augment_picture(image: Image.Image, rng: np.random.RandomState, may_mirror: bool) -> Image.Image:
    """Mirrored by chance where writing does not forbid it, and up to a tenth cut off at each side."""
    cuts, mirror = rng.uniform(0, 0.1, size=4), rng.randint(2)
    width, height = image.size
    left, top = int(cuts[0] * width), int(cuts[1] * height)
    image = image.crop((left, top, width - int(cuts[2] * width), height - int(cuts[3] * height)))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if may_mirror and mirror else image


def _augment_sound(samples: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Louder or softer by up to 6 dB: volunteers differ in loudness, which should not give them away."""
    gain = 10 ** (rng.uniform(-6, 6) / 20)
    return np.clip(samples * gain, -1, 1).astype(np.float32)
