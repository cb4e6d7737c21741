"""Figures of every benchmark against values computed by hand, by both protocols."""

import numpy as np
import pytest

from moka.errors import MokaError
from moka.evaluation import BENCHMARKS, score, wilson
from moka.evaluation.benchmarks.intervals import resampled


def records(*rows, **common):
    """(prediction, reference[, category[, group]]) -> records with ids 0, 1, ..."""
    names = ("prediction", "reference", "category", "group")
    return [{"id": str(i), **dict(zip(names, row, strict=False)), **common} for i, row in enumerate(rows)]


def value(result, figure, denominator="all", category=None):
    row = result["overall"] if category is None else result["categories"][category]
    return row["figures"][figure][denominator]["value"]


def clip(event="Bark", start=0, end=9):
    return {"event": event, "start": start, "end": end}


def test_ave_counts_segments_over_all_clips_and_over_parsable_ones():
    rows = records(
        ("<event>Bark</event><range>0,9</range>", clip()),  # 10 of 10
        ("<event>Bark</event><range>0,4</range>", clip(start=3, end=6)),  # 0-2 and 5-6 are wrong: 5 of 10
        ("<event>Cat</event><range>3,6</range>", clip(start=3, end=6)),  # background is right: 6 of 10
        ("no idea", clip()),  # 0 of 10
    )
    for protocol in ("strict", "paper"):
        result = score("ave", rows, protocol)
        assert value(result, "accuracy") == pytest.approx(100 * 21 / 40)
        assert value(result, "accuracy", "parsable") == pytest.approx(100 * 21 / 30)
        assert (result["n"], result["unparsable"]) == (4, 1)
        assert result["overall"]["figures"]["accuracy"]["all"]["n"] == 40
        assert result["counts"] == {"segments": 40}


def test_ave_clip_that_cannot_be_parsed_is_wrong_also_in_the_background():
    # The published script gives such a clip its own labels as prediction, and counts ten right segments.
    rows = records(("???", clip(start=0, end=0)), ("<event>Bark</event><range>0,0</range>", clip(start=0, end=0)))
    assert value(score("ave", rows, "paper"), "accuracy") == 50
    assert value(score("ave", rows), "accuracy") == 50


def test_ave_interval_resamples_clips_and_not_segments():
    good, bad = "<event>Bark</event><range>0,9</range>", "<event>Cat</event><range>0,9</range>"
    figure = score("ave", records(*[(good, clip()), (bad, clip())] * 20))["overall"]["figures"]["accuracy"]["all"]
    low, high = wilson(20, 40)
    assert figure["interval"] == pytest.approx([100 * low, 100 * high], abs=3)
    assert figure["method"].startswith("bootstrap")


def test_music_avqa_by_question_type_and_modality():
    rows = records(
        ("<answer>two</answer>", "two", "Audio/Counting"),
        ("<answer>no</answer>", "yes", "Audio/Comparative"),
        ("left", "left", "Visual/Location"),
        ("<answer>more than ten</answer>", "ten", "Audio-Visual/Counting"),
    )
    strict, paper = score("music-avqa", rows), score("music-avqa", rows, "paper")
    assert list(strict["categories"]) == [
        "Audio",
        "Audio/Counting",
        "Audio/Comparative",
        "Visual",
        "Visual/Location",
        "Audio-Visual",
        "Audio-Visual/Counting",
    ]
    assert value(strict, "accuracy", category="Audio") == 50
    assert value(strict, "accuracy", category="Visual/Location") == 100
    assert value(strict, "accuracy") == 50
    assert strict["unparsable"] == 0
    # The authors: "left" has no tag, and "ten" is a substring of "more than ten".
    assert value(paper, "accuracy") == 50
    assert value(paper, "accuracy", "parsable") == pytest.approx(100 * 2 / 3)
    assert value(paper, "accuracy", category="Audio-Visual/Counting") == 100
    assert value(paper, "accuracy", "parsable", "Visual/Location") is None
    assert paper["categories"]["Visual/Location"]["unparsable"] == 1


MME_ROWS = (
    # existence: 5 of 6 right, 2 of 3 images
    ("Yes", "yes", "existence", "a.jpg"),
    ("No", "no", "existence", "a.jpg"),
    ("Yes", "yes", "existence", "b.jpg"),
    ("Yes", "no", "existence", "b.jpg"),
    ("yes", "yes", "existence", "c.jpg"),
    ("no", "no", "existence", "c.jpg"),
    # posters: 1 of 2 right, no image; the same file name is another image here
    ("No.", "yes", "posters", "a.jpg"),
    ("No.", "no", "posters", "a.jpg"),
    # scene: all right
    ("Yes", "yes", "scene", "s.jpg"),
    ("No", "no", "scene", "s.jpg"),
)


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_mme_is_accuracy_and_accuracy_plus_summed_over_subtasks(protocol):
    result = score("mme", records(*MME_ROWS), protocol)
    assert value(result, "accuracy", category="existence") == pytest.approx(100 * 5 / 6)
    assert value(result, "accuracy+", category="existence") == pytest.approx(100 * 2 / 3)
    assert value(result, "score", category="existence") == pytest.approx(150)
    assert value(result, "score", category="posters") == pytest.approx(50)
    # The published script also writes the posters answers into the scene file.
    assert value(result, "score", category="scene") == pytest.approx(200)
    assert value(result, "perception") == pytest.approx(400)
    assert result["counts"]["images"] == 5
    assert result["counts"]["perception subtasks present, of 10"] == 3
    low, high = result["overall"]["figures"]["perception"]["all"]["interval"]
    assert low < 400 < high <= 450  # posters and scene hold one image each, so only existence varies


def test_mme_perception_leaves_cognition_out():
    rows = records(*MME_ROWS, ("yes", "yes", "code_reasoning", "x"), ("no", "no", "code_reasoning", "x"))
    result = score("mme", rows)
    assert value(result, "perception") == pytest.approx(400)
    assert value(result, "cognition") == pytest.approx(200)


def test_mme_unparsable_is_wrong_and_takes_its_image_out_of_the_parsable_ones():
    rows = records(
        ("Yes", "yes", "color", "a"),
        ("maybe", "no", "color", "a"),
        ("Yes", "yes", "color", "b"),
        ("no", "no", "color", "b"),
    )
    strict = score("mme", rows)
    assert value(strict, "accuracy", category="color") == 75
    assert value(strict, "accuracy+", category="color") == 50
    assert value(strict, "accuracy", "parsable", "color") == 100
    assert value(strict, "accuracy+", "parsable", "color") == 100
    assert strict["categories"]["color"]["figures"]["accuracy+"]["parsable"]["n"] == 1
    # The authors read "maybe" as no.
    paper = score("mme", rows, "paper")
    assert paper["unparsable"] == 0
    assert value(paper, "score", category="color") == 200


def test_mme_image_with_an_odd_number_of_questions():
    rows = records(
        ("Yes", "yes", "count", "a"),
        ("No", "no", "count", "a"),
        ("Yes", "no", "count", "a"),  # the authors drop it
        ("No", "yes", "count", "b"),  # and this image
    )
    strict, paper = score("mme", rows), score("mme", rows, "paper")
    assert strict["counts"]["images with an odd number of questions"] == 2
    assert value(strict, "accuracy", category="count") == 50
    assert value(strict, "accuracy+", category="count") == 0
    assert paper["counts"]["questions dropped (the last of an odd image)"] == 2
    assert paper["counts"]["images dropped whole (one question)"] == 1
    assert value(paper, "score", category="count") == 200
    assert (paper["n"], paper["overall"]["n"]) == (4, 2)


def test_mme_of_which_nothing_is_left_is_refused():
    with pytest.raises(MokaError, match="nothing is left"):
        score("mme", records(("Yes", "yes", "count", "a")), "paper")


def test_pope_figures_by_hand():
    rows = records(
        ("Yes", "yes", "random"),  # hit
        ("Yes, it is", "yes", "random"),  # hit
        ("No", "yes", "random"),  # miss
        ("Yes", "no", "random"),  # false alarm
        ("No", "no", "popular"),
        ("I do not know", "yes", "popular"),  # strict: unparsable; the authors: no
    )
    strict, paper = score("pope", rows), score("pope", rows, "paper")
    expected = {"accuracy": 50, "precision": 100 * 2 / 3, "recall": 50, "F1": 100 * 4 / 7, "yes-ratio": 50}
    for name, figure in expected.items():
        assert value(strict, name) == pytest.approx(figure), name
        assert value(paper, name) == pytest.approx(figure), name
    parsable = {"accuracy": 60, "precision": 100 * 2 / 3, "recall": 100 * 2 / 3, "F1": 100 * 2 / 3, "yes-ratio": 60}
    for name, figure in parsable.items():
        assert value(strict, name, "parsable") == pytest.approx(figure), name
    assert (strict["unparsable"], paper["unparsable"]) == (1, 0)
    assert value(strict, "precision", category="popular") is None
    assert value(strict, "accuracy", category="random") == 50
    low, high = strict["overall"]["figures"]["F1"]["all"]["interval"]
    assert 0 <= low < 100 * 4 / 7 < high <= 100


def test_circular_eval_wants_every_rotation_right():
    rows = records(
        ("A", "A", "x", 1),
        ("B", "B", "x", 1),
        ("A", "A", "x", 2),
        ("C", "B", "x", 2),
        ("A", "A", "x", 3),
        ("it barks", "B", "x", 3),
        ("D", "D", "x", 4),
    )
    result = score("mmbench", rows)
    assert value(result, "accuracy") == pytest.approx(100 * 5 / 7)
    assert value(result, "circular") == 50  # questions 1 and 4 of four
    assert value(result, "accuracy", "parsable") == pytest.approx(100 * 5 / 6)
    assert value(result, "circular", "parsable") == pytest.approx(100 * 2 / 3)  # question 3 is left out
    assert result["counts"] == {"questions": 4, "questions asked in rotation": 3}
    assert result["overall"]["figures"]["circular"]["all"]["method"] == "Wilson"
    assert result["overall"]["figures"]["accuracy"]["all"]["method"].startswith("bootstrap")


def test_mmbench_without_groups_has_one_question_a_record():
    result = score("mmbench", records(("A", "A"), ("B", "A")))
    assert value(result, "accuracy") == value(result, "circular") == 50
    assert result["overall"]["figures"]["accuracy"]["all"]["method"] == "Wilson"
    assert result["categories"] == {}


@pytest.mark.parametrize("name", ["seed-bench", "air-bench"])
def test_lettered_choice_by_category(name):
    rows = records(("B", "B", "x"), ("The answer is C ", "C", "x"), ("A dog", "D", "y"), ("(D)", "d", "y"))
    strict, paper = score(name, rows), score(name, rows, "paper")
    assert value(strict, "accuracy") == 75
    assert value(strict, "accuracy", "parsable") == 100
    assert value(strict, "accuracy", category="y") == 50
    # The authors: "B" and "(D)" hold no letter before a space; "c " and "a " do.
    assert (paper["unparsable"], value(paper, "accuracy"), value(paper, "accuracy", "parsable")) == (2, 25, 50)


def test_option_texts_are_read_where_a_record_has_them():
    row = {"id": 1, "prediction": "It is a dog.", "reference": "B", "category": "x"}
    assert score("seed-bench", [row])["unparsable"] == 1
    for options in (["a cat", "a dog"], {"A": "a cat", "b": "a dog"}):
        assert value(score("seed-bench", [{**row, "options": options}]), "accuracy") == 100


def test_mmau_takes_the_option_that_the_answer_has():
    options = {"options": ["man", "woman", "a child"]}
    rows = records(
        ("A woman speaks.", "woman", "x"),  # the authors find "man" in it first
        ("(C)", "a child", "x"),
        ("man and woman", "man", "y"),
        ("someone", "man", "y"),
        **options,
    )
    strict, paper = score("mmau", rows), score("mmau", rows, "paper")
    assert (value(strict, "accuracy"), strict["unparsable"]) == (50, 2)
    assert value(strict, "accuracy", "parsable") == 100
    assert (value(paper, "accuracy"), paper["unparsable"]) == (25, 2)


def test_mmau_prefers_an_options_own_text_to_a_letter_in_it():
    rows = records(
        ("It is Speaker A.", "Speaker A", "x"), ("Speaker B", "Speaker B", "x"), options=["Speaker B", "Speaker A"]
    )
    assert value(score("mmau", rows), "accuracy") == 100


def test_mmau_without_options_looks_for_the_reference_only():
    rows = records(("A woman speaks.", "man", "x"), ("The man.", "man", "x"), ("</s>", "man", "x"))
    strict, paper = score("mmau", rows), score("mmau", rows, "paper")
    assert (value(strict, "accuracy"), strict["unparsable"]) == (pytest.approx(100 / 3), 1)
    assert value(paper, "accuracy") == pytest.approx(200 / 3)


def test_results_say_what_they_are():
    result = score("pope", records(("Yes", "yes", "random")))
    assert result["benchmark"] == "pope"
    assert result["protocol"]["name"] == "strict"
    assert result["protocol"]["version"] == "1"
    assert "whole word" in result["protocol"]["parsing"]
    assert set(result["overall"]["figures"]) == set(result["units"])
    assert "95 %" in result["intervals"]


def test_every_benchmark_has_a_strict_protocol_and_its_name():
    assert set(BENCHMARKS) == {
        *("ave", "music-avqa", "mme", "pope", "mmbench", "seed-bench", "mmau", "air-bench", "asr", "captioning")
    }
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert "strict" in benchmark.protocols


GOOD = {"id": "1", "prediction": "Yes", "reference": "yes", "category": "random"}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("pope", {"reference": "maybe"}, ["record 1", "'maybe'", "yes, no"]),
        ("pope", {"reference": ["yes"]}, ["record 1", "reference"]),
        ("pope", {"reference": None}, ["record 1", "'reference'", "missing"]),
        ("pope", {"category": "randon"}, ["'randon'", "random, popular, adversarial", "Did you mean 'random'?"]),
        ("pope", {"prediction": 3}, ["record 1", "'prediction'", "text"]),
        ("pope", {"id": ["1"]}, ["record 1", "'id'"]),
        ("mme", {"category": "color"}, ["'group'", "missing"]),
        ("mmbench", {"reference": "F"}, ["'F'", "A, B, C, D, E"]),
        ("seed-bench", {"reference": "A", "options": "a cat"}, ["'options'", "list"]),
        ("seed-bench", {"reference": "A", "options": ["a cat"]}, ["'options'", "two"]),
        ("mmau", {"reference": "dog", "options": ["cat", "bird"]}, ["'dog'", "cat, bird"]),
        ("music-avqa", {"reference": "pian", "category": "Audio/Counting"}, ["'pian'", "Did you mean 'piano'?"]),
        (
            "music-avqa",
            {"reference": "two", "category": "Audio/Existential"},
            ["'Audio/Existential'", "Audio/Counting"],
        ),
        ("ave", {"reference": "Bark"}, ["'Bark'", '"event"']),
        ("ave", {"reference": clip("Barc")}, ["'Barc'", "Did you mean 'Bark'?"]),
        ("ave", {"reference": clip(start=5, end=3)}, ["5 to 3"]),
        ("ave", {"reference": clip(end=2.5)}, ["2.5", "integer"]),
        ("asr", {"reference": "..."}, ["'...'", "no word"]),
        ("captioning", {"reference": "a dog"}, ["'a dog'", "list"]),
    ],
)
def test_bad_record_is_named_with_what_is_allowed(name, changes, words):
    record = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(MokaError) as error:
        score(name, [record])
    for word in words:
        assert word in str(error.value), error.value


def test_duplicate_id_names_both_places():
    with pytest.raises(MokaError, match=r"record 3: id '1'.*record 1"):
        score("pope", [GOOD, {**GOOD, "id": "2"}, GOOD])
    # 1 and "1" are the same line of a table.
    with pytest.raises(MokaError, match="given before"):
        score("pope", [GOOD, {**GOOD, "id": 1}])


@pytest.mark.parametrize(
    ("name", "protocol", "words"),
    [
        ("popes", "strict", "Did you mean 'pope'?"),
        ("pope", "papers", "Did you mean 'paper'?"),
        ("asr", "paper", "'paper' is not known; allowed are strict"),
    ],
)
def test_unknown_names_get_the_nearest(name, protocol, words):
    with pytest.raises(MokaError) as error:
        score(name, [GOOD], protocol)
    assert words in str(error.value)


def test_no_records_and_no_objects_are_refused():
    with pytest.raises(MokaError, match="no records"):
        score("pope", [])
    with pytest.raises(MokaError, match="record 1: is list"):
        score("pope", [[]])


def test_pope_without_splits_has_the_overall_figures():
    """The authors' own released file has none."""
    rows = [{"id": i, "prediction": "yes" if i % 3 else "no", "reference": "yes" if i % 2 else "no"} for i in range(12)]
    result = score("pope", rows)
    assert result["overall"]["n"] == 12
    with_splits = score("pope", [{**row, "category": "random"} for row in rows])
    assert result["overall"] == with_splits["overall"]


def test_resamples_of_counts_are_those_of_single_draws():
    """Mean and spread of a bootstrap of few kinds of units, against drawing them one by one."""
    units = np.repeat([[1.0, 1.0], [0.0, 1.0], [1.0, 2.0]], [30, 50, 20], axis=0)
    fast = resampled(units)
    generator = np.random.default_rng(1)
    slow = np.stack([units[generator.integers(0, 100, 100)].sum(0) for _ in range(4000)])
    assert fast.mean(0) == pytest.approx(slow.mean(0), rel=0.02)
    assert np.cov(fast.T).ravel() == pytest.approx(np.cov(slow.T).ravel(), rel=0.2)
