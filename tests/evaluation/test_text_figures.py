"""Speech recognition and captioning: figures by hand, and what is said where the libraries are not installed."""

import math
import sys

import numpy as np
import pytest

from moka.errors import MokaError
from moka.evaluation import score
from moka.evaluation.benchmarks.text import bleu_of_sums, words


def rows(*pairs, **common):
    return [
        {"id": i, "prediction": prediction, "reference": reference, **common}
        for i, (prediction, reference) in enumerate(pairs)
    ]


def value(result, figure, denominator="all"):
    return result["overall"]["figures"][figure][denominator]["value"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("HELLO, World!</s>", "hello world"),
        ("it's  o'clock", "it's o'clock"),
        ("'quoted' - text", "quoted text"),
        ("...", None),
        ("<|im_end|>", None),
    ],
)
def test_texts_are_compared_without_case_and_punctuation(text, left):
    assert words(text) == left


def test_error_rates_by_hand():
    pytest.importorskip("jiwer")
    result = score(
        "asr",
        rows(
            ("the cat sat", "The cat sat."),  # right
            ("a cat sat down", "the cat sat"),  # 1 substitution, 1 insertion of 3 words
            ("</s>", "on it"),  # 2 deletions of 2 words
        ),
    )
    assert value(result, "WER") == pytest.approx(100 * 4 / 8)
    assert value(result, "WER", "parsable") == pytest.approx(100 * 2 / 6)
    # "the" -> "a" is 3 edits, " down" 5, "on it" 5; the references have 11, 11 and 5 characters.
    assert value(result, "CER") == pytest.approx(100 * 13 / 27)
    assert result["unparsable"] == 1
    low, high = result["overall"]["figures"]["WER"]["all"]["interval"]
    assert low == 0
    assert high == pytest.approx(100)


def test_error_rate_sums_words_and_does_not_average_utterances():
    pytest.importorskip("jiwer")
    result = score("asr", rows(("wrong", "right"), ("a b c d e f g h i", "a b c d e f g h i")))
    assert value(result, "WER") == pytest.approx(10)


def test_captions_that_equal_a_reference_have_the_highest_figures():
    pytest.importorskip("pycocoevalcap.cider.cider")
    pairs = [
        ("A dog barks loudly outside.", ["a dog barks loudly outside", "barking"]),
        ("rain falls on a roof", ["rain falls on a roof", "it rains"]),
        ("a man speaks and laughs", ["a man speaks and laughs", "a man talks"]),
    ]
    result = score("captioning", rows(*pairs))
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert value(result, name) == pytest.approx(100, abs=1e-4), name
    assert value(result, "CIDEr") > 300
    worse = score("captioning", rows(*pairs[:2], ("", pairs[2][1])))
    assert worse["unparsable"] == 1
    assert value(worse, "ROUGE-L") == pytest.approx(200 / 3, abs=1e-4)
    assert value(worse, "ROUGE-L", "parsable") == pytest.approx(100, abs=1e-4)
    assert value(worse, "CIDEr") < value(result, "CIDEr")


def test_rouge_and_bleu_by_hand():
    pytest.importorskip("pycocoevalcap.rouge.rouge")
    result = score("captioning", rows(("a dog runs", ["a dog barks now"])))
    # Two of three words are right, in order; the reference has four. ROUGE-L's beta is 1.2.
    precision, recall, beta2 = 2 / 3, 2 / 4, 1.44
    assert value(result, "ROUGE-L") == pytest.approx(
        100 * (1 + beta2) * precision * recall / (recall + beta2 * precision)
    )
    brevity = math.exp(1 - 4 / 3)
    assert value(result, "BLEU-1") == pytest.approx(100 * brevity * 2 / 3)
    assert value(result, "BLEU-2") == pytest.approx(100 * brevity * math.sqrt(2 / 3 * 1 / 2))


def test_bleu_of_summed_counts_is_the_librarys():
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    pairs = [
        ("a dog runs in the park", ["a dog runs in a park"]),
        ("rain on a roof", ["the rain falls on a roof", "rain"]),
    ]
    for prediction, references in pairs:
        scorer += (prediction, references)
    clips = [[6, 6, *scorer.ctest[0]["correct"], *scorer.ctest[0]["guess"]]]
    clips += [[4, 6, *scorer.ctest[1]["correct"], *scorer.ctest[1]["guess"]]]
    assert bleu_of_sums(np.sum(clips, axis=0, dtype=float)) == pytest.approx(scorer.compute_score(option="closest")[0])


def test_bleu_of_counts_by_hand():
    # 3 words for a reference of 4; 2 of 3 words, 1 of 2 pairs, 0 of 1 triple right.
    sums = np.array([3, 4, 2, 1, 0, 0, 3, 2, 1, 0], dtype=float)
    brevity = math.exp(1 - 4 / 3)
    first, second, third, _ = bleu_of_sums(sums)
    assert first == pytest.approx(brevity * 2 / 3)
    assert second == pytest.approx(brevity * math.sqrt(2 / 3 * 1 / 2))
    assert third == pytest.approx(0, abs=1e-4)
    assert bleu_of_sums(np.array([4.0, 4, 4, 3, 2, 1, 4, 3, 2, 1])) == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "library", "reference"),
    [("asr", "jiwer", "hello"), ("captioning", "pycocoevalcap.cider.cider", ["hello"])],
)
def test_missing_library_is_one_line_with_the_remedy(monkeypatch, name, library, reference):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MokaError, match=r"pip install 'moka-peft\[score\]'"):
        score(name, rows(("hello", reference)))
