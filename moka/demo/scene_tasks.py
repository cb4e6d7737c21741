"""Questions about scenes: a grid of coloured handwritten digits and a sequence of spoken ones.

    item i --> category (i mod n) --> scene, question and answer --> a picture and a recording --> chat messages

A scene has more facts (a digit and a colour for each drawing, a digit for each word) than an encoder has tokens, and
each question asks for one or two of them: the question decides what matters. A question is a wording of its category; two
wordings of each are never in training.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from moka.modeling.media import AudioFeatures

from .digit_tasks import WORDS, augment_drawing, augment_recording, check_task
from .embedded import PREFIX, Drawings, Recordings, Split, split_indices
from .knobs import SCENE_WORDINGS, Draw, SceneKnobs

# Each has a channel of 255, so that the brightest channel of a coloured drawing is the drawing.
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 64, 255),
    "yellow": (255, 255, 0),
    "purple": (144, 0, 255),
    "cyan": (0, 255, 255),
    "orange": (255, 128, 0),
    "pink": (255, 144, 192),
    "white": (255, 255, 255),
}
ORDER = ("first", "second", "third", "fourth")
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "centre", "right")}
LONGEST = 30  # frames of 25 ms; the 3 % of the recordings that are longer (up to 92) are left out
# Between two words: 0.1 s of all 128 mel bands at -65 dB, which the orthonormal DCT gathers in the first coefficient.
PAUSE = np.zeros((4, 13), np.float32)
PAUSE[:, 0] = -65 * math.sqrt(128)


@dataclass(frozen=True)
class Scene:
    """Facts: the digits drawn in reading order, all different, with their colours, all different; the digits spoken."""

    drawn: tuple[int, ...]
    colours: tuple[str, ...]
    spoken: tuple[int, ...]


def grid_columns(drawings: int) -> int:
    """Return the number of columns of a grid: two for four drawings, else three."""
    return 2 if drawings == 4 else 3


def positions(drawings: int) -> list[str]:
    """Return the names of the places of a grid in reading order: "top left", ..."""
    columns = COLUMNS[grid_columns(drawings)]
    rows = ROWS[math.ceil(drawings / len(columns))]
    return [f"{row} {column}" for row in rows for column in columns][:drawings]


class Deal:
    """Chance for one question: the drawing and the word asked about, and numbers that are even over many questions.

    Args:
        knobs: numbers of drawings and of spoken digits.
        rng: of this question.
        turn: number of the question in its category.
        key: of the category's own streams.
    """

    def __init__(self, knobs: SceneKnobs, rng: np.random.RandomState, turn: int, key: tuple[int, int]):
        self.knobs, self.rng, self._turn, self._key = knobs, rng, turn, key
        self.cell, self.word = int(rng.randint(knobs.drawings)), int(rng.randint(knobs.digits))
        self.coin = turn % 2 == 0

    def even(self, n: int, stream: int = 0) -> int:
        """Return a number below n; a block of n questions gets each number once, each stream in an order of its own."""
        block, position = divmod(self._turn, n)
        return int(np.random.RandomState([*self._key, block, stream]).permutation(n)[position])

    def scene(self, drawn: int | None = None, colour: int | None = None, spoken: int | None = None) -> Scene:
        """Return a random scene with the given digit and colour at the cell, and the given word, that are asked about."""
        digits, colours = self.rng.permutation(10).tolist(), self.rng.permutation(len(COLOURS)).tolist()
        words = self.rng.randint(10, size=self.knobs.digits).tolist()
        for values, value in ((digits, drawn), (colours, colour)):
            if value is not None:
                other = values.index(value)
                values[self.cell], values[other] = value, values[self.cell]
        if spoken is not None:
            words[self.word] = spoken
        n, names = self.knobs.drawings, tuple(COLOURS)
        return Scene(tuple(digits[:n]), tuple(names[i] for i in colours[:n]), tuple(words))

    def scene_of_drawn_words(self, colour: int | None = None) -> Scene:
        """Return a scene in which each spoken digit is drawn too; the word asked about is at the cell asked about."""
        scene = self.scene(colour=colour)
        others = [digit for cell, digit in enumerate(scene.drawn) if cell != self.cell]
        words = self.rng.permutation(others)[: self.knobs.digits - 1].tolist()
        words.insert(self.word, scene.drawn[self.cell])
        return Scene(scene.drawn, scene.colours, tuple(words))


def _drawn(deal: Deal) -> tuple[Scene, str]:
    digit = deal.even(10)
    return deal.scene(drawn=digit), WORDS[digit]


def _order(deal: Deal) -> tuple[Scene, str]:
    digit = deal.even(10)
    return deal.scene(spoken=digit), WORDS[digit]


def _ink(deal: Deal) -> tuple[Scene, str]:
    colour = deal.even(len(COLOURS))
    return deal.scene(colour=colour), tuple(COLOURS)[colour]


def _find_ink(deal: Deal) -> tuple[Scene, str]:
    colour = deal.even(len(COLOURS))
    return deal.scene_of_drawn_words(colour), tuple(COLOURS)[colour]


def _find_position(deal: Deal) -> tuple[Scene, str]:
    deal.cell = deal.even(deal.knobs.drawings)
    return deal.scene_of_drawn_words(), positions(deal.knobs.drawings)[deal.cell]


def _larger(deal: Deal) -> tuple[Scene, str]:
    """Compare two neighbours: other pairs can be told better than 5 times of 9 by one medium only."""
    low = deal.even(9)
    return deal.scene(drawn=low + deal.coin, spoken=low + (not deal.coin)), "yes" if deal.coin else "no"


def _same(deal: Deal) -> tuple[Scene, str]:
    digit = deal.even(10)
    spoken = digit if deal.coin else (digit + 1 + deal.rng.randint(9)) % 10
    return deal.scene(drawn=digit, spoken=spoken), "yes" if deal.coin else "no"


def _sum(deal: Deal) -> tuple[Scene, str]:
    drawn, spoken = deal.even(10, 0), deal.even(10, 1)
    return deal.scene(drawn=drawn, spoken=spoken), WORDS[drawn + spoken]


def _wordings(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for line in text.strip().splitlines() for one in line.split(" | "))


# Category -> what makes scene and answer, and its wordings; the last two of each are for tests only. {drawing} is the
# drawing asked about, by position or colour ("the red digit"), and {spoken} the word ("the first spoken digit").
HELD_OUT = 2
Maker = Callable[[Deal], tuple[Scene, str]]
CATEGORIES: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "position": (
        _drawn,
        _wordings("""
            Which digit is at the {position}? | What is written at the {position}?
            Name the digit at the {position}. | Which number do you see at the {position}?
            Read the {position} digit. | At the {position}, which digit is there?
            What does the {position} drawing show? | Tell me the number drawn at the {position}.
        """),
    ),
    "colour": (
        _drawn,
        _wordings("""
            Which digit is {colour}? | What is written in {colour}?
            Name the {colour} digit. | Which number do you see in {colour}?
            Read the {colour} digit. | In {colour}, which digit is there?
            What does the {colour} drawing show? | Tell me the number drawn in {colour}.
        """),
    ),
    "order": (
        _order,
        _wordings("""
            Which digit is spoken {order}? | What is said {order}?
            Name the {order} spoken digit. | Which number do you hear {order}?
            Repeat the {order} word. | In the recording, which digit comes {order}?
            What does the voice say {order}? | Tell me the number that is heard {order}.
        """),
    ),
    "ink": (
        _ink,
        _wordings("""
            What colour is the digit at the {position}? | Which colour is at the {position}?
            Name the colour of the {position} digit. | Which colour do you see at the {position}?
            The {position} digit has which colour? | At the {position}, which colour is used?
            In what colour is the {position} drawing? | Tell me the colour found at the {position}.
        """),
    ),
    "find ink": (
        _find_ink,
        _wordings("""
            What colour is the digit that is spoken {order}? | Which colour has {spoken} in the picture?
            Name the colour of {spoken}. | Find {spoken} in the picture: which colour is it?
            In which colour is {spoken} written? | The digit said {order} is drawn in which colour?
            Look for {spoken}; what is its colour? | Tell me the colour in which {spoken} appears.
        """),
    ),
    "find position": (
        _find_position,
        _wordings("""
            Where is the digit that is spoken {order}? | Which place has {spoken} in the picture?
            Name the place of {spoken}. | Find {spoken} in the picture: where is it?
            At which place is {spoken} written? | The digit said {order} is drawn where?
            Look for {spoken}; what is its place? | Tell me the place at which {spoken} appears.
        """),
    ),
    "larger": (
        _larger,
        _wordings("""
            Is {drawing} larger than {spoken}? | Is {spoken} smaller than {drawing}?
            Does {drawing} exceed {spoken}? | Compare: is {drawing} greater than {spoken}?
            Is {spoken} less than {drawing}? | Is {drawing} more than {spoken}?
            Is {drawing} above {spoken} in value? | Does {spoken} fall below {drawing}?
        """),
    ),
    "same": (
        _same,
        _wordings("""
            Is {drawing} the same as {spoken}? | Are {drawing} and {spoken} equal?
            Does {drawing} match {spoken}? | Does {spoken} equal {drawing}?
            Compare: is {drawing} equal to {spoken}? | Do {drawing} and {spoken} agree?
            Is {drawing} identical to {spoken}? | Does {spoken} have the value of {drawing}?
        """),
    ),
    "sum": (
        _sum,
        _wordings("""
            What is {drawing} plus {spoken}? | Add {drawing} and {spoken}.
            What is the sum of {drawing} and {spoken}? | How much are {drawing} and {spoken} together?
            What do {drawing} and {spoken} add up to? | Give the total of {drawing} and {spoken}.
            What results from adding {spoken} to {drawing}? | Combine {drawing} with {spoken}: how much is it?
        """),
    ),
}
UNSEEN = "unseen wording"
ALIGNMENT = ("drawings", "recording")
TASKS = ("scenes",)
DEFAULT_SIZES = {"train": 20000, "validation": 400, "test": 1000}
# Validation and test are drawn from these only, whatever the seed.
_FIXED_SEEDS = {"validation": 51, "test": 52}


class ScenesTask:
    """A map-style data set of chat samples, the format of ``moka.data.schema``.

    The user's content has ``{"type": "image", "image": PIL image, mode "RGB", a grid of cells of 28 x 28}``, ``{"type":
    "audio", "audio": AudioFeatures [frames, 13] of kind "mfcc"}`` and the question; the assistant's content is the answer.
    The grid has two columns for 4 drawings, else three. Nine categories take turns:

        category        the question selects          answer                     always the same answer
        position        a drawing by its place        its digit                  1/10
        colour          a drawing by its colour       its digit                  1/10
        order           a word by its order           its digit                  1/10
        ink             a drawing by its place        its colour                 1/9
        find ink        a word by its order           the colour of that digit   1/9
        find position   a word by its order           the place of that digit    1/drawings
        larger          a drawing and a word          yes, no                    1/2 (one medium only: 5/9)
        same            a drawing and a word          yes, no                    1/2
        sum             a drawing and a word          their sum                  1/10

    In the test split there is a tenth, "unseen wording": the nine in turn, in wordings that are never in training.

    Args:
        name: ``"scenes"``.
        split: ``"train"``, ``"validation"`` or ``"test"``. Each item of train depends on (seed, index) only; the
            other two are fixed lists, of which a smaller ``size`` takes the beginning.
        size: number of samples; 20000, 400 and 1000 when left out.
        seed: of the training questions.
        stage: 2 asks questions. 1 pairs a single medium with its facts and no question, to align encoders:
            "red three, blue zero, ..." and "three zero ...".
        augment: vary training media a little, as ``EmbeddedTask``. The questions and the items shown stay the same.
        knobs: as of ``EmbeddedTask``, and the numbers of drawings, of spoken digits and of wordings.

    Raises:
        MokaError: an unknown name, split or stage, a negative seed, a size below 1 or beyond a fixed list, or what
            ``SceneKnobs.check`` raises.
    """

    def __init__(
        self,
        name: str = "scenes",
        split: Split = "train",
        size: int | None = None,
        seed: int = 0,
        stage: int = 2,
        augment: bool = True,
        knobs: SceneKnobs | None = None,
    ):
        check_task(TASKS, DEFAULT_SIZES, name, split, size, seed, stage)
        self.knobs = SceneKnobs() if knobs is None else knobs
        self.knobs.check(PREFIX + name, ("visual", "audio"), stage)
        self.name, self.split, self.stage = name, split, stage
        self.size = DEFAULT_SIZES[split] if size is None else size
        self.augment = augment and split == "train"
        self._seed = _FIXED_SEEDS.get(split, seed)
        asked = (*CATEGORIES, UNSEEN) if split == "test" else tuple(CATEGORIES)
        self.categories = asked if stage == 2 else ALIGNMENT
        drawings, recordings = Drawings.load(), Recordings.load()
        self._images, self._features = drawings.images, recordings.features
        short = [i for i in split_indices("recordings", split) if len(recordings.features[i]) <= LONGEST]
        self._drawn = _by_digit(split_indices("drawings", split), drawings.labels)
        self._spoken = _by_digit(np.array(short), recordings.labels)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.size)[operator.index(index)]  # negative positions, and IndexError beyond the end
        turn, place = divmod(index, len(self.categories))
        # RandomState and not default_rng: numpy promises that its stream never changes, so the questions never do.
        rng = np.random.RandomState([self._seed, index])
        draw = self.knobs.draw(self._seed, index)
        make = self._ask if self.stage == 2 else self._align
        content, answer = make(turn, place, rng, draw)
        sample = {
            "id": f"{self.name}-{self.stage}-{self.split}-{self._seed}-{index}",
            "category": self.categories[place],
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }
        return self.knobs.apply(sample, draw) if self.knobs else sample

    def _ask(self, turn: int, place: int, rng: np.random.RandomState, draw: Draw) -> tuple[list[dict[str, Any]], str]:
        category = self.categories[place]
        unseen = category == UNSEEN
        if unseen:
            turn, kind = divmod(turn, len(CATEGORIES))
            category = tuple(CATEGORIES)[kind]
            place += kind
        make, wordings = CATEGORIES[category]
        deal = Deal(self.knobs, rng, turn, (self._seed, place))
        scene, answer = make(deal)
        number = SCENE_WORDINGS + rng.randint(HELD_OUT) if unseen else rng.randint(self.knobs.templates)
        question = wordings[number].format(**_selectors(deal, scene))
        return [*self._media(scene, rng, draw), {"type": "text", "text": question}], answer

    def _align(self, turn: int, place: int, rng: np.random.RandomState, draw: Draw) -> tuple[list[dict[str, Any]], str]:
        scene = Deal(self.knobs, rng, turn, (self._seed, place)).scene()
        image, audio = self._media(scene, rng, draw)
        if self.categories[place] == "recording":
            return [audio], " ".join(WORDS[digit] for digit in scene.spoken)
        pairs = zip(scene.colours, scene.drawn, strict=True)
        return [image], ", ".join(f"{colour} {WORDS[digit]}" for colour, digit in pairs)

    def _media(self, scene: Scene, rng: np.random.RandomState, draw: Draw) -> list[dict[str, Any]]:
        # All items are chosen before any is augmented, which so does not change the choice.
        drawn = [int(rng.choice(self._drawn[digit])) for digit in scene.drawn]
        spoken = [int(rng.choice(self._spoken[digit])) for digit in scene.spoken]
        colours = scene.colours
        if "visual" in draw.corrupt:  # other digits, and the colours of other cells
            other = draw.other(0)
            by, turned = 1 + other.randint(9), 1 + other.randint(len(colours) - 1)
            drawn = [int(other.choice(self._drawn[(digit + by) % 10])) for digit in scene.drawn]
            colours = colours[turned:] + colours[:turned]
        if "audio" in draw.corrupt:
            other = draw.other(1)
            by = 1 + other.randint(9)
            spoken = [int(other.choice(self._spoken[(digit + by) % 10])) for digit in scene.spoken]
        return [self._image(drawn, colours, rng), self._audio(spoken, rng)]

    def _image(self, items: list[int], colours: tuple[str, ...], rng: np.random.RandomState) -> dict[str, Any]:
        columns = grid_columns(len(items))
        rows = math.ceil(len(items) / columns)
        grid = np.zeros((rows, 28, columns, 28, 3), np.uint8)
        for cell, (item, colour) in enumerate(zip(items, colours, strict=True)):
            image = Image.fromarray(self._images[item])
            ink = np.asarray(augment_drawing(image, rng) if self.augment else image).astype(int)
            grid[cell // columns, :, cell % columns] = (ink[:, :, None] * np.array(COLOURS[colour]) + 127) // 255
        return {"type": "image", "image": Image.fromarray(grid.reshape(rows * 28, columns * 28, 3))}

    def _audio(self, items: list[int], rng: np.random.RandomState) -> dict[str, Any]:
        parts: list[np.ndarray] = []
        for item in items:
            values = self._features[item]
            parts += [PAUSE, augment_recording(values, rng) if self.augment else values]
        return {"type": "audio", "audio": AudioFeatures(np.concatenate(parts[1:]), "mfcc")}


def _selectors(deal: Deal, scene: Scene) -> dict[str, str]:
    """Return the words that select the drawing and the spoken digit that are asked about."""
    position, colour = positions(len(scene.drawn))[deal.cell], scene.colours[deal.cell]
    is_last = deal.word == len(scene.spoken) - 1
    order = "last" if deal.rng.randint(2) and is_last else ORDER[deal.word]
    return {
        "position": position,
        "colour": colour,
        "order": order,
        "drawing": f"the {(position, colour)[deal.rng.randint(2)]} digit",
        "spoken": f"the {order} spoken digit",
    }


def _by_digit(indices: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    return [indices[labels[indices] == digit] for digit in range(10)]
