"""Exact match and its interval."""

import pytest

from moka.evaluation import exact_match, normalise, wilson
from moka.evaluation.scoring import Tally


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Values of R's binom::binom.confint(..., methods = "wilson").
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (5, 10, 0.2365931, 0.7634069),
        (81, 263, 0.2552706, 0.3662153),
    ],
)
def test_wilson_interval_has_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-5)


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "expected"), [(" Seven. ", "seven"), ("one  two!", "one two"), ("it's", "it's"), ("...", ""), ("", "")]
)
def test_case_spaces_and_outer_punctuation_do_not_count(given, expected):
    assert normalise(given) == expected


def test_only_the_full_answer_matches():
    assert exact_match("Seven.", "seven")
    assert not exact_match("seven eight", "seven")
    assert not exact_match("", "seven")
    assert not exact_match("seventeen", "seven")


def test_tally_counts_empty_answers_as_wrong():
    tally = Tally()
    assert [tally.add(*pair) for pair in (("one", "One."), ("...", "one"), ("two", "one"))] == [True, False, False]
    assert tally.to_dict() | {"interval": None} == {
        "right": 1,
        "n": 3,
        "empty": 1,
        "accuracy": pytest.approx(1 / 3),
        "interval": None,
    }
