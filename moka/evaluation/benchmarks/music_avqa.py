"""MUSIC-AVQA: questions about musical performances, answered with one of 42 words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moka.data.vocabulary import music_avqa_answers

from .base import Benchmark, Protocol, accuracy, word_reference
from .parsing import answer_text, one_of, tagged

TYPES = {
    "Audio": ("Counting", "Comparative"),
    "Visual": ("Counting", "Location"),
    "Audio-Visual": ("Existential", "Counting", "Location", "Comparative", "Temporal"),
}


def parse_strict(text: str, record: Mapping[str, Any] | None = None) -> str | None:
    """The only answer word that is in full in the last answer tag, or in the text where there is no tag."""
    return one_of(answer_text(text), {word: word for word in music_avqa_answers()})


def parse_paper(text: str, record: Mapping[str, Any] | None = None) -> str | None:
    """The authors' rule: exactly one answer tag, which has an answer word and nothing else."""
    tags = tagged(text, "answer")
    return tags[0] if len(tags) == 1 and tags[0] in music_avqa_answers() else None


MUSIC_AVQA = Benchmark(
    name="music-avqa",
    about="MUSIC-AVQA: one of 42 answer words, by question type",
    expects="one of the 42 answer words",
    figures={"accuracy": "%"},
    reference=lambda record: word_reference(music_avqa_answers(), "the 42 answer words")(record),
    measure=accuracy,
    protocols={
        "strict": Protocol(
            "exactly one of the 42 answer words as a whole in the last <answer> tag, or in the text where there is none "
            '("more than ten" is not "ten"; "_" is a space); right if it is the reference',
            parse_strict,
        ),
        "paper": Protocol(
            "exactly one <answer>w</answer>, w in the answer vocabulary; right if the reference is a substring of w",
            parse_paper,
            lambda answer, reference: reference in answer,
        ),
    },
    required=("category",),
    categories=tuple(f"{modality}/{kind}" for modality, kinds in TYPES.items() for kind in kinds),
    rollup=lambda category: (category.partition("/")[0],),
)
