"""Knobs of the embedded tasks change what they name, in the samples that they note, and nothing else."""

import numpy as np
import pytest

from moka.data.sources import open_samples, open_source
from moka.demo.digit_tasks import TASKS, EmbeddedTask
from moka.demo.embedded import Drawings, Recordings
from moka.demo.knobs import Knobs
from moka.errors import MokaError
from moka.modeling.media import AudioFeatures

N = 400
SOURCE = "embedded:audio-visual-text"


def parts(sample, kind):
    return [part[kind] for part in sample["messages"][0]["content"] if part["type"] == kind]


def values(medium):
    return medium.values if isinstance(medium, AudioFeatures) else np.asarray(medium)


def rest_of(sample, *left_out):
    """All of a sample but its noted knobs and the parts of some types, as comparable values."""
    content = [p for p in sample["messages"][0]["content"] if p["type"] not in left_out]
    shown = [(p["type"], p["text"] if p["type"] == "text" else values(p[p["type"]]).tobytes()) for p in content]
    return sample["id"], sample["category"], shown, sample["messages"][1]


@pytest.fixture(scope="module")
def plain():
    return EmbeddedTask(size=N)


def test_off_is_what_it_was(plain):
    off = open_samples({"source": SOURCE, "leak": 0.0, "noise": {}}, "train", size=N)
    for index in range(0, N, 37):
        assert rest_of(off[index]) == rest_of(plain[index])
        assert off[index].keys() == plain[index].keys()
    assert "knobs" not in plain[0]


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_noise_has_the_given_strength_and_leaves_the_rest(plain, kind):
    name = {"image": "visual", "audio": "audio"}[kind]
    noisy = open_samples({"source": SOURCE, "noise": {name: 0.5}}, "train", size=N)
    ratios = []
    for index in range(40):
        one, other = plain[index], noisy[index]
        assert rest_of(one, kind) == rest_of(other, kind)
        (clean,), (dirty,) = parts(one, kind), parts(other, kind)
        added = values(dirty).astype(float) - values(clean)
        if kind == "audio":  # pixels are cut at black
            ratios.append(added.std(0) / values(clean).std(0))
        assert np.abs(added).max() > 0
        assert other["knobs"]["noise"] == {name: 0.5}
        assert values(parts(noisy[index], kind)[0]).tobytes() == values(dirty).tobytes()
    if ratios:
        assert np.mean(ratios) == pytest.approx(0.5, rel=0.1)


def test_leaked_questions_tell_the_answer_and_are_noted(plain):
    leaky = open_samples({"source": SOURCE, "leak": 0.3}, "train", size=N)
    leaked = 0
    for index in range(N):
        one, other = plain[index], leaky[index]
        answer = one["messages"][1]["content"][0]["text"]
        said = f"{parts(one, 'text')[0]} The answer is {answer}."
        assert parts(other, "text") == [said if other["knobs"]["leak"] else parts(one, "text")[0]]
        assert rest_of(one, "text") == rest_of(other, "text")
        leaked += other["knobs"]["leak"]
    assert leaked == pytest.approx(0.3 * N, abs=4 * (N * 0.21) ** 0.5)


def test_missing_media_are_gone_and_noted(plain):
    some = open_samples({"source": SOURCE, "missing": {"visual": 0.4}}, "train", size=N)
    for index in range(N):
        gone = some[index]["knobs"]["missing"] == ["visual"]
        assert len(parts(some[index], "image")) == (not gone)
        assert rest_of(some[index], "image") == rest_of(plain[index], "image")


@pytest.mark.parametrize(
    ("task", "kind"), [("audio-visual-text", "image"), ("audio-visual-text", "audio"), ("visual-text", "image")]
)
def test_corrupted_media_show_another_digit_and_the_rest_stays(task, kind):
    name = {"image": "visual", "audio": "audio"}[kind]
    clean = EmbeddedTask(task, "validation", size=200)
    some = open_samples({"source": f"embedded:{task}", "corrupt": {name: 0.3}}, "validation", size=200)
    stored = {"image": Drawings.load, "audio": Recordings.load}[kind]()
    items = stored.images if kind == "image" else stored.features
    digit_of = {item.tobytes(): int(label) for item, label in zip(items, stored.labels, strict=True)}
    corrupted = 0
    for index in range(200):
        one, other = clean[index], some[index]
        assert rest_of(one, kind) == rest_of(other, kind)
        before, after = ([digit_of[values(m).tobytes()] for m in parts(s, kind)] for s in (one, other))
        noted = other["knobs"]["corrupt"] == [name]
        assert all((a != b) == noted for a, b in zip(before, after, strict=True))
        corrupted += noted
    assert 35 <= corrupted <= 85


def test_a_smaller_share_is_within_a_larger_one_and_seeds_differ():
    def corrupted(share, seed=0, **others):
        task = open_samples({"source": SOURCE, "corrupt": {"audio": share}, **others}, "train", size=N, seed=seed)
        return {index for index in range(N) if task[index]["knobs"]["corrupt"]}

    assert corrupted(0.1) < corrupted(0.3)
    assert corrupted(0.3) == corrupted(0.3, leak=0.5, missing={"visual": 0.5})
    assert corrupted(0.3) != corrupted(0.3, seed=1)


def test_a_mixture_may_have_an_entry_with_knobs():
    mixed = open_source([{"source": SOURCE, "leak": 1.0, "weight": 3}, SOURCE], "train", size=200)
    leaked = sum("The answer is" in parts(mixed[index], "text")[0] for index in range(200))
    assert leaked == pytest.approx(150, abs=30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leak": 1.5}, ["leak", "1.5", "0 to 1"]),
        ({"leak": True}, ["leak", "True"]),
        ({"noise": {"visual": -1}}, ["noise.visual", "-1", "at least 0"]),
        ({"noise": {"visual": float("nan")}}, ["noise.visual", "nan"]),
        ({"noise": 0.5}, ["noise", "0.5", "visual"]),
        ({"noise": {"image": 0.5}}, ["noise", "image", "visual, audio"]),
        ({"missing": {"visual": "much"}}, ["missing.visual", "much"]),
        ({"corrupt": {"audio": 2}}, ["corrupt.audio", "2"]),
        ({"nois": {"visual": 1}}, ["nois", "noise"]),
    ],
)
def test_bad_knobs_are_refused_by_name(options, words):
    with pytest.raises(MokaError) as error:
        open_samples({"source": SOURCE, **options}, "train")
    assert all(word in str(error.value) for word in words), error.value


def test_knobs_that_cannot_apply_are_refused():
    with pytest.raises(MokaError, match=r"audio.*visual"):
        EmbeddedTask("visual-text", knobs=Knobs(noise={"audio": 1.0}))
    with pytest.raises(MokaError, match=r"leak.*stage 1"):
        EmbeddedTask(stage=1, knobs=Knobs(leak=0.5))
    with pytest.raises(MokaError, match="'noise'"):
        open_samples({"source": "train.jsonl", "noise": {"visual": 1.0}}, "train")
    noisy = EmbeddedTask(stage=1, knobs=Knobs(noise={"visual": 1.0, "audio": 1.0}))
    assert rest_of(noisy[0], "image")[3] == EmbeddedTask(stage=1)[0]["messages"][1]
    assert set(TASKS) == {"audio-visual-text", "visual-text", "speech-text"}
