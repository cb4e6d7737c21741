"""Questions about scenes: their answers are those of the media, and neither text nor a constant answers them."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from moka.data.schema import check_sample
from moka.data.sources import describe_source, is_embedded, open_samples, open_source
from moka.demo.digit_tasks import WORDS
from moka.demo.embedded import SPLITS, Drawings, Recordings, split_indices
from moka.demo.knobs import SceneKnobs
from moka.demo.scene_tasks import CATEGORIES, COLOURS, HELD_OUT, ORDER, PAUSE, UNSEEN, ScenesTask
from moka.errors import MokaError

SOURCE = "embedded:scenes"
CHANCE = {"ink": 1 / 9, "find ink": 1 / 9, "find position": 1 / 6, "larger": 1 / 2, "same": 1 / 2}
SEEN = {name: wordings[:-HELD_OUT] for name, (_, wordings) in CATEGORIES.items()}


def content(sample):
    return {part["type"]: part[part["type"]] for part in sample["messages"][0]["content"]}


def answer(sample):
    return sample["messages"][1]["content"][0]["text"]


def as_bytes(sample):
    parts = content(sample)
    media = [np.asarray(parts["image"]).tobytes(), parts["audio"].values.tobytes()]
    return sample["id"], sample["category"], parts["text"], answer(sample), *media


@pytest.fixture(scope="module")
def stored():
    """Bytes of each drawing and recording -> (its number, its digit)."""
    drawings, recordings = Drawings.load(), Recordings.load()
    known = {}
    for items, labels in ((drawings.images, drawings.labels), (recordings.features, recordings.labels)):
        known |= {items[i].tobytes(): (i, int(labels[i])) for i in range(len(labels))}
    return known


def cells(image):
    """A picture -> {place: (the drawing's bytes, the colour's name)}, from its pixels only."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // 28, pixels.shape[1] // 28
    vertical = {2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}[rows]
    horizontal = {2: ["left", "right"], 3: ["left", "centre", "right"]}[columns]
    found = {}
    for row in range(rows):
        for column in range(columns):
            cell = pixels[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            if cell.any():
                brightest = cell.reshape(-1, 3)[cell.max(2).argmax()].astype(float)
                hue = 255 * brightest / brightest.max()
                colour = min(COLOURS, key=lambda name: np.abs(hue - COLOURS[name]).sum())
                found[f"{vertical[row]} {horizontal[column]}"] = cell.max(2).tobytes(), colour
    return found


def words(audio):
    """A recording -> the bytes of its parts between pauses."""
    values = audio.values
    pauses = [i for i in range(len(values) - 3) if np.array_equal(values[i : i + 4], PAUSE)]
    starts, ends = [0, *(i + 4 for i in pauses)], [*pauses, len(values)]
    return [values[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]


def facts(sample, stored):
    """A sample -> {place: (digit, colour)} and the digits spoken."""
    parts = content(sample)
    grid = {place: (stored[ink][1], colour) for place, (ink, colour) in cells(parts["image"]).items()}
    return grid, [stored[word][1] for word in words(parts["audio"])]


def kind_of(sample):
    """The category, also of an unseen wording: told by the wording that fits."""
    if sample["category"] != UNSEEN:
        return sample["category"]
    text = content(sample)["text"]
    for name, (_, wordings) in CATEGORIES.items():
        for wording in wordings[-HELD_OUT:]:
            if re.fullmatch(re.sub(r"\\{.*?\\}", ".*", re.escape(wording)), text) and not (
                name in ("position", "colour") and (("top" in text or "bottom" in text) != (name == "position"))
            ):
                return name
    raise AssertionError(text)


def solve(kind, text, grid, spoken):
    """The answer by the facts of the scene."""
    place = next((name for name in grid if name in text), None)
    colour = next((name for name in COLOURS if re.search(rf"\b{name}\b", text)), None)
    drawn = next(((d, c) for p, (d, c) in grid.items() if p == place or (place is None and c == colour)), (None, None))
    order = next((i for i, name in enumerate(ORDER) if name in text), len(spoken) - 1)
    said = spoken[order]
    found = next(((p, c) for p, (d, c) in grid.items() if d == said), (None, None))
    yes = {True: "yes", False: "no"}
    return {
        "position": lambda: WORDS[drawn[0]],
        "colour": lambda: WORDS[drawn[0]],
        "order": lambda: WORDS[said],
        "ink": lambda: drawn[1],
        "find ink": lambda: found[1],
        "find position": lambda: found[0],
        "larger": lambda: yes[drawn[0] > said],
        "same": lambda: yes[drawn[0] == said],
        "sum": lambda: WORDS[drawn[0] + said],
    }[kind]()


@pytest.mark.parametrize(("drawings", "digits"), [(6, 3), (4, 2), (5, 4), (7, 3), (9, 4)])
def test_answers_are_those_of_the_media(drawings, digits, stored):
    task = ScenesTask(split="test", size=200, knobs=SceneKnobs(drawings=drawings, digits=digits))
    for sample in task:
        check_sample(sample, "here")
        grid, spoken = facts(sample, stored)
        assert (len(grid), len(spoken)) == (drawings, digits)
        assert len({digit for digit, _ in grid.values()}) == len({colour for _, colour in grid.values()}) == drawings
        assert solve(kind_of(sample), content(sample)["text"], grid, spoken) == answer(sample), sample


def test_samples_depend_on_seed_and_index_only():
    one, other = ScenesTask(size=60), ScenesTask(size=4000)
    backwards = {index: as_bytes(other[index]) for index in reversed(range(60))}
    assert [as_bytes(one[index]) for index in range(60)] == [backwards[index] for index in range(60)]
    assert as_bytes(ScenesTask(seed=1)[0]) != as_bytes(one[0])
    assert as_bytes(ScenesTask(split="test", seed=1)[7])[2:] == as_bytes(ScenesTask(split="test")[7])[2:]
    plain = ScenesTask(size=60, augment=False)
    for index in range(60):
        assert as_bytes(plain[index])[:4] == as_bytes(one[index])[:4]


def test_no_item_is_in_two_splits(stored):
    drawn, spoken = {}, {}
    for split in SPLITS:
        drawn[split], spoken[split] = set(), set()
        for sample in ScenesTask(split=split, size=300, augment=False):
            parts = content(sample)
            drawn[split] |= {stored[ink][0] for ink, _ in cells(parts["image"]).values()}
            spoken[split] |= {stored[word][0] for word in words(parts["audio"])}
        assert drawn[split] <= set(split_indices("drawings", split).tolist())
        assert spoken[split] <= set(split_indices("recordings", split).tolist())


@pytest.mark.parametrize("split", SPLITS)
def test_no_constant_answer_is_above_chance(split):
    counts = defaultdict(Counter)
    for sample in _questions(split, 900):
        counts[sample["category"]][answer(sample)] += 1
    assert set(counts) == {*CATEGORIES, *([UNSEEN] if split == "test" else [])}
    for category, answers in counts.items():
        most = answers.most_common(1)[0][1] / answers.total()
        # The sum of two even digits is nine in 10 % on average: it is not dealt evenly itself.
        assert most <= CHANCE.get(category, 0.1) + (0.1 if category == "sum" else 0.05), (category, answers)


def _questions(split, size, **knobs):
    sizes = {"validation": 400, "test": 1000}
    return ScenesTask(split=split, size=min(size, sizes.get(split, size)), knobs=SceneKnobs(**knobs))


def test_test_questions_have_wordings_that_training_has_not():
    unseen = pattern([wording for _, wordings in CATEGORIES.values() for wording in wordings[-HELD_OUT:]])
    for split in SPLITS:
        for sample in _questions(split, 1000):
            assert bool(unseen.fullmatch(content(sample)["text"])) == (sample["category"] == UNSEEN)
    told = Counter(kind_of(sample) for sample in _questions("test", 1000) if sample["category"] == UNSEEN)
    assert set(told) == set(CATEGORIES)
    assert max(told.values()) - min(told.values()) <= 1


def _accuracy_by_text(**knobs):
    """Share of test questions answered by the commonest training answer to the same words, category by category."""
    seen = defaultdict(Counter)
    for sample in _questions("train", 2700, **knobs):
        for key in (content(sample)["text"], sample["category"]):
            seen[key][answer(sample)] += 1
    right = defaultdict(list)
    for sample in _questions("test", 1000, **knobs):
        text = content(sample)["text"]
        if told := re.search(r"The answer is (.*)\.$", text):
            guess = told[1]
        else:
            guess = seen[text if text in seen else sample["category"]].most_common(1)
            guess = guess[0][0] if guess else ""
        right[sample["category"]].append(guess == answer(sample))
    return {category: np.mean(values) for category, values in right.items()}


def test_text_only_does_not_answer_unless_it_leaks():
    for category, share in _accuracy_by_text().items():
        chance = CHANCE.get(category, 0.1)
        assert share <= chance + 3 * (chance * (1 - chance) / 100) ** 0.5, category
    assert set(_accuracy_by_text(leak=1.0).values()) == {1.0}


def test_one_medium_only_does_not_tell_a_comparison(stored):
    """The best guess by the drawing asked about, and by the word: 5 of 9, and an even chance."""
    for category, most in (("larger", 5 / 9), ("same", 1 / 2)):
        told = [defaultdict(Counter), defaultdict(Counter)]
        samples = [s for s in ScenesTask(size=5400, augment=False) if s["category"] == category]
        for sample in samples:
            grid, spoken = facts(sample, stored)
            text = content(sample)["text"]
            digit = next(d for p, (d, c) in grid.items() if p in text or re.search(rf"\b{c}\b", text))
            said = spoken[next((i for i, name in enumerate(ORDER) if name in text), -1)]
            for medium, known in enumerate((digit, said)):
                told[medium][known][answer(sample)] += 1
        for by in told:
            right = sum(counts.most_common(1)[0][1] for counts in by.values()) / len(samples)
            assert right <= most + 0.06, category


def pattern(wordings):
    return re.compile("|".join(re.sub(r"\\{.*?\\}", "[a-z ]+", re.escape(one)) for one in wordings))


@pytest.mark.parametrize("templates", [1, 3, 6])
def test_training_has_as_many_wordings_as_the_knob_says(templates):
    used = defaultdict(set)
    for sample in ScenesTask(size=900, knobs=SceneKnobs(templates=templates)):
        fits = [w for w in SEEN[sample["category"]] if pattern([w]).fullmatch(content(sample)["text"])]
        used[sample["category"]].update(fits[:1])
    for category, wordings in used.items():
        assert wordings == set(SEEN[category][:templates])


def test_size_follows_its_knobs():
    assert ScenesTask(knobs=SceneKnobs(drawings=4))[0]["messages"][0]["content"][0]["image"].size == (56, 56)
    sample = open_samples({"source": SOURCE, "drawings": 9, "digits": 4}, "train", stage=1)
    assert len(answer(sample[0]).split(", ")) == 9
    assert len(answer(sample[1]).split()) == 4


def test_shared_knobs_change_what_they_name(stored):
    plain = ScenesTask(split="test", size=60)
    noisy = open_samples({"source": SOURCE, "noise": {"audio": 0.5}}, "test", size=60)
    corrupt = open_samples({"source": SOURCE, "corrupt": {"visual": 1.0}}, "test", size=60)
    silent = open_samples({"source": SOURCE, "missing": {"audio": 1.0}}, "test", size=60)
    for index in range(60):
        one = as_bytes(plain[index])
        noised, changed = as_bytes(noisy[index]), as_bytes(corrupt[index])
        assert noised[:5] == one[:5]
        assert noised[5] != one[5]
        assert changed[:4] == one[:4]
        assert changed[5] == one[5]
        grid, other = facts(plain[index], stored)[0], facts(corrupt[index], stored)[0]
        assert all(grid[place][0] != other[place][0] and grid[place][1] != other[place][1] for place in grid)
        assert "audio" not in content(silent[index])
    assert corrupt[0]["knobs"]["corrupt"] == ["visual"]
    assert "knobs" not in plain[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drawings": 3}, ["drawings", "3", "4 to 9"]),
        ({"drawings": 10}, ["drawings", "10", "4 to 9"]),
        ({"drawings": 4.0}, ["drawings", "4.0"]),
        ({"digits": True}, ["digits", "True", "2 to 4"]),
        ({"digits": "two"}, ["digits", "two"]),
        ({"templates": 0}, ["templates", "0", "1 to 6"]),
        ({"template": 2}, ["template", "templates"]),
        ({"noise": {"video": 1}}, ["noise", "video"]),
    ],
)
def test_bad_knobs_are_refused_in_one_line(options, said):
    with pytest.raises(MokaError) as error:
        open_samples({"source": SOURCE, **options}, "train")
    assert all(word in str(error.value) for word in said), error.value
    assert "\n" not in str(error.value)


def test_knobs_of_scenes_belong_to_scenes():
    with pytest.raises(MokaError, match="drawings"):
        open_samples({"source": "embedded:visual-text", "drawings": 4}, "train")
    with pytest.raises(MokaError, match=r"templates.*stage 1"):
        open_samples({"source": SOURCE, "templates": 2}, "train", stage=1)
    with pytest.raises(MokaError, match="scenes"):
        open_samples("embedded:scene", "train")
    source = {"source": SOURCE, "drawings": 9, "noise": {"visual": 1.0}}
    assert is_embedded(source)
    assert "drawings 9" in describe_source(source)
    mixed = open_source([{**source, "weight": 1}, "embedded:audio-visual-text"], "train", size=20)
    assert {content(mixed[index])["image"].size for index in range(20)} == {(84, 84), (28, 28)}
