"""From generated text to an answer: what counts as one, by both protocols."""

import pytest

from moka.evaluation.benchmarks.ave import labels
from moka.evaluation.benchmarks.ave import parse_paper as ave_paper
from moka.evaluation.benchmarks.ave import parse_strict as ave_strict
from moka.evaluation.benchmarks.music_avqa import parse_paper as music_paper
from moka.evaluation.benchmarks.music_avqa import parse_strict as music_strict
from moka.evaluation.benchmarks.parsing import (
    clean,
    letter,
    letter_anywhere,
    one_of,
    plain,
    yes_else_no,
    yes_no,
    yes_then_no,
)

OPTIONS = {"A": "a cat", "B": "a dog", "C": "a black cat", "D": "vitamin B"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Yes</s>", "Yes"),
        ("<s> yes<|im_end|>\n", "yes"),
        ("B<|eot_id|>", "B"),
        ("<bos>no<end_of_turn><pad><pad>", "no"),
        ("yes[PAD][PAD]", "yes"),
        ("<event>Bark</event><range>0,3</range>", "<event>Bark</event><range>0,3</range>"),
        ("<answer>two</answer></s>", "<answer>two</answer>"),
        ("a < b and c > d", "a < b and c > d"),
    ],
)
def test_special_tokens_go_and_answer_tags_stay(text, left):
    assert clean(text) == left


def test_words_are_compared_without_case_punctuation_and_underscores():
    assert plain("  The 'Electric_Bass', isn't it?\n") == "the electric bass isn't it"


@pytest.mark.parametrize(
    ("text", "strict", "mme", "pope"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("yes.", "yes", "yes", "yes"),
        ("No, there is no dog.", "no", "no", "no"),
        ("Yes</s>", "yes", "yes", "yes"),
        ("<answer>No</answer>", "no", "no", "no"),
        ("yes or no? <answer>Yes</answer>", "yes", "yes", "yes"),
        # Substrings are no words.
        ("It was yesterday", None, "yes", "yes"),
        ("I do not know", None, "no", "no"),
        ("no-one is there", None, "no", "no"),
        ("Nothing", None, "no", "no"),
        # Both words are no answer; the authors take yes.
        ("yes and no", None, "yes", "yes"),
        ("No... yes!", None, "yes", "yes"),
        ("maybe", None, "no", None),
        ("", None, "no", None),
        ("</s>", None, "no", None),
    ],
)
def test_yes_and_no(text, strict, mme, pope):
    assert (yes_no(text), yes_else_no(text), yes_then_no(text)) == (strict, mme, pope)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The full answer.
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(b)", "B"),
        ("B)", "B"),
        (" a \n", "A"),
        ("B</s>", "B"),
        ("**C**", "C"),
        ("<answer>C</answer>", "C"),
        ("A or B? <answer>D</answer>", "D"),
        # Announced.
        ("Answer: B", "B"),
        ("The answer is B", "B"),
        ("the answer is (b).", "B"),
        ("The correct option is A", "A"),
        ("The answer is A because it barks", "A"),
        ("Options A and C are wrong, so the answer is D.", "D"),
        ("A and C are wrong, so the answer is D.", "D"),
        ("Answer: a", "A"),
        # A capital letter of its own.
        ("It is B.", "B"),
        ("B. A dog sits there", "B"),
        ("b) a dog", "B"),
        ("A. cat", "A"),
        ("I choose (b)", "B"),
        ("A is right", "A"),
        ("C, since it is black", "C"),
        # The article is none.
        ("a dog", None),
        ("A dog runs", None),
        ("It is a dog", None),
        ("The answer is a dog", None),
        ("Answer: A dog", None),
        # Parts of words are none.
        ("Banana", None),
        ("U.S.A.", None),
        ("C-shaped", None),
        ("E.g. this one", None),
        ("A's", None),
        # Not one.
        ("A and B", None),
        ("A, B", None),
        ("", None),
        ("Z", None),
        ("None of them", None),
    ],
)
def test_option_letter_is_a_token_of_its_own(text, expected):
    assert letter(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "B"),
        ("A dog.", "B"),
        ("It is a dog, I think", "B"),
        ("It is a black cat", "C"),  # "black cat" has no "a cat" of its own
        ("the cat", None),
        ("a dog or a cat", None),
        ("B. a dog", "B"),
        ("vitamin B", "D"),
        ("Answer: a dog", "B"),
        ("C", "C"),
        ("hotdog", None),
    ],
)
def test_text_of_exactly_one_option_is_an_answer(text, expected):
    assert letter(text, "ABCD", OPTIONS) == expected


def test_letters_beyond_the_options_are_no_answer():
    assert letter("E", "ABCD") is None
    assert letter("The answer is E", "ABCDE") == "E"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", None),  # no "b " in it
        ("B ", "B"),
        ("B. a dog", "A"),
        ("The answer is b ", "B"),
        ("Banana split", "A"),
        ("C or B or so", "B"),  # in the order of the letters, not of the text
        ("the dog", "E"),
        ("", None),
    ],
)
def test_authors_take_the_first_letter_before_a_space(text, expected):
    assert letter_anywhere(text) == expected


def test_longer_option_hides_the_shorter_one_inside_it():
    options = {"ten": "ten", "more": "more than ten"}
    assert one_of("More than ten!", options) == "more"
    assert one_of("ten", options) == "ten"
    assert one_of("ten, or more than ten", options) is None
    assert one_of("more than ten, more than ten", options) == "more"
    assert one_of("often", options) is None


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        ("<answer>two</answer>", "two", "two"),
        ("two", "two", None),
        ("There are two instruments.", "two", None),
        ("<answer>one</answer> no: <answer>two</answer>", "two", None),
        ("<answer>Two.</answer>", "two", None),
        ("<answer> two </answer>", "two", None),
        ("<answer>more than ten</answer>", "more than ten", "more than ten"),
        ("acoustic guitar", "acoustic_guitar", None),
        ("<answer>acoustic_guitar</answer>", "acoustic_guitar", "acoustic_guitar"),
        ("No, the left one", None, None),
        ("<answer>twelve</answer>", None, None),
        ("", None, None),
    ],
)
def test_music_answer_is_one_of_the_words(text, strict, paper):
    assert (music_strict(text), music_paper(text)) == (strict, paper)


BARK = labels("Bark", [(2, 4)])


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        ("<event>Bark</event><range>2,4</range>", BARK, BARK),
        ("It is <event>bark</event>, heard at <range>2, 4</range>.</s>", BARK, BARK),
        ("<event>Bark, (2 4)</event>", BARK, BARK),
        ("<event>bark</event><range>2,2</range><range>3,4</range>", BARK, BARK),
        ("<event>Bark, (2 2) (3 4)</event>", BARK, BARK),
        ("<event> Bark </event><range>2,4</range>", BARK, BARK),
        # Several events: the last, with its own ranges; the authors take none.
        ("<event>Cat</event><range>0,1</range> no, <event>Bark</event><range>2,4</range>", BARK, None),
        # A range after the clip or turned round is silent; the authors' rule only wants two numbers.
        ("<event>Bark</event><range>4,2</range>", None, ("background",) * 10),
        ("<event>Bark</event><range>2,4</range><range>12,14</range>", BARK, BARK),
        ("<event>Bark</event>", None, None),
        ("<range>2,4</range>", None, None),
        ("<event>Dragon</event><range>2,4</range>", None, None),
        ("<event>Bark</event><range>two,four</range>", None, None),
        ("Bark from 2 to 4", None, None),
        ("<event>Dragon, (2 4)</event>", None, None),
        ("", None, None),
    ],
)
def test_event_and_its_seconds(text, strict, paper):
    assert (ave_strict(text), ave_paper(text)) == (strict, paper)


def test_event_names_with_commas_are_one_name():
    expected = labels("Baby cry, infant cry", [(0, 9)])
    for text in ("<event>Baby cry, infant cry</event><range>0,9</range>", "<event>Baby cry, infant cry, (0 9)</event>"):
        assert ave_strict(text) == ave_paper(text) == expected


def test_both_ends_of_a_range_are_inside():
    assert labels("Bark", [(8, 10)]) == ("background",) * 8 + ("Bark", "Bark")
    assert labels("Bark", [(0, 0)]) == ("Bark",) + ("background",) * 9
