"""Multiple choice: MMBench (with CircularEval), SEED-Bench, MMAU and AIR-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moka.errors import MokaError

from .base import Benchmark, Figures, Item, Protocol, accuracy, of_complete_groups, word_reference
from .intervals import clustered_proportion, proportion
from .parsing import LETTERS, clean, letter, letter_anywhere, letters_of, one_of, plain

OPTIONS = {"options": "the options' texts, in order or by letter: strict then also takes an option's text"}
_AS_PAPER = 'the first of "a ", "b ", "c ", "d ", "e ", in this order, that occurs anywhere in the lower-cased text'


def with_circular(items: Sequence[Item], overall: bool) -> Figures:
    """Accuracy over records, and CircularEval: the share of questions right in all their rotations.

    Records that share a ``group`` are rotations of one question; one without a group is a question of its own.
    Over parsable records, CircularEval leaves out questions of which a rotation could not be parsed.
    """
    right: dict[Any, bool] = {}
    for item in of_complete_groups(items):
        right[_question(item)] = right.get(_question(item), True) and item.right
    return {
        "accuracy": clustered_proportion([item.right for item in items], [_question(item) for item in items]),
        "circular": proportion(sum(right.values()), len(right)),
    }


def _question(item: Item) -> tuple[str, str]:
    return ("alone", item.id) if item.group is None else ("group", item.group)


def _questions(items: list[Item], protocol: str) -> tuple[list[Item], dict[str, int]]:
    sizes: dict[str, int] = {}
    for item in items:
        if item.group is not None:
            sizes[item.group] = sizes.get(item.group, 0) + 1
    alone = sum(item.group is None for item in items)
    counts = {"questions": alone + len(sizes), "questions asked in rotation": sum(n > 1 for n in sizes.values())}
    return items, counts


def _options(record: Mapping[str, Any]) -> dict[str, str]:
    """The record's options by letter; empty where it has none."""
    options = record.get("options")
    if options is None:
        return {}
    texts = list(options.values()) if isinstance(options, Mapping) else options
    lettered = letters_of(options) if isinstance(options, (list, Mapping)) else {}
    letters_fit = len(lettered) > 1 and all(len(name) == 1 and "A" <= name <= "Z" for name in lettered)
    if not letters_fit or not all(isinstance(text, str) for text in texts):
        raise MokaError(
            f"field 'options' is {options!r}; a list of two or more texts, or an object of texts by letter, A to Z, is expected."
        )
    return lettered


def _protocols(letters: str) -> dict[str, Protocol]:
    def strict(prediction: str, record: Mapping[str, Any]) -> str | None:
        return letter(prediction, letters, _options(record))

    parsing = (
        'an option letter as a token of its own ("B", "(B)", "Answer: B", "It is B."; the article "a" is none), '
        "or exactly one option's text where the record has options"
    )
    return {
        "strict": Protocol(parsing, strict),
        "paper": Protocol(_AS_PAPER, lambda prediction, record: letter_anywhere(prediction)),
    }


def _benchmark(name: str, about: str, letters: str, **more: Any) -> Benchmark:
    return Benchmark(
        **{
            "name": name,
            "about": about,
            "expects": f"one letter {letters[0]}-{letters[-1]}",
            "figures": {"accuracy": "%"},
            "reference": word_reference(letters),
            "measure": accuracy,
            "protocols": _protocols(letters),
            "optional": OPTIONS,
            **more,
        }
    )


def _mmau_reference(record: Mapping[str, Any]) -> str:
    given, options = record["reference"], _options(record)
    known = list(map(plain, options.values())) if options else [plain(str(given))]
    if not isinstance(given, str) or not plain(given) or plain(given) not in known:
        expected = ", ".join(options.values()) or "the right option's text"
        raise MokaError(f"reference {given!r} is not known; expected: {expected}.")
    return plain(given)


def _mmau_strict(prediction: str, record: Mapping[str, Any]) -> str | None:
    options = _options(record)
    if not options:
        reference = record["reference"]
        return _wrong_unless(prediction, one_of(prediction, {"A": reference}) is not None, reference)
    # The prompt shows no letters: an option's own text ("Speaker A") goes before a letter in it.
    found = one_of(prediction, options) or letter(prediction, "".join(options), options)
    return None if found is None else plain(options[found])


def _mmau_paper(prediction: str, record: Mapping[str, Any]) -> str | None:
    options = _options(record)
    if not options:
        reference = record["reference"]
        return _wrong_unless(prediction, reference.casefold() in prediction.casefold(), reference)
    return next((plain(text) for text in options.values() if text.casefold() in prediction.casefold()), None)


def _wrong_unless(prediction: str, right: bool, reference: str) -> str | None:
    """Where the options are not known, an answer with words that lacks the reference is another answer."""
    if right:
        return plain(reference)
    return "another answer" if plain(clean(prediction)) else None


MMBENCH = _benchmark(
    "mmbench",
    "MMBench: multiple choice on images; CircularEval where records share a question",
    "ABCDE",
    figures={"accuracy": "%", "circular": "%"},
    measure=with_circular,
    select=_questions,
    optional={
        "group": "the question: its records, with rotated options, share it",
        "category": "a row each",
        **OPTIONS,
    },
)
SEED_BENCH = _benchmark(
    "seed-bench", "SEED-Bench: multiple choice on images, by dimension", "ABCD", required=("category",)
)
AIR_BENCH = _benchmark(
    "air-bench", "AIR-Bench foundation, speech: multiple choice, by task", LETTERS, required=("category",)
)
MMAU = Benchmark(
    name="mmau",
    about="MMAU-mini, speech: multiple choice on sounds, by task",
    expects="the right option's text",
    figures={"accuracy": "%"},
    reference=_mmau_reference,
    measure=accuracy,
    protocols={
        "strict": Protocol(
            "the only option whose text stands in the answer as whole words (one inside a longer one that stands there "
            "does not count), or its letter; without options in the record: whether the reference stands there",
            _mmau_strict,
        ),
        "paper": Protocol(
            "the first option whose text is a substring of the answer, case ignored; without options in the record: "
            "whether the reference is a substring",
            _mmau_paper,
        ),
    },
    required=("category",),
    optional=OPTIONS,
)
