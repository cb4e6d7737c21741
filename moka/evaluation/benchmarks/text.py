"""Free text: speech recognition (WER, CER with jiwer) and captioning (CIDEr, BLEU, ROUGE-L with pycocoevalcap).

Both libraries are optional, and imported when they are needed: pip install 'moka-peft[score]'. Of pycocoevalcap only
the parts in pure Python are used; its tokenizer, METEOR and SPICE need Java.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from moka.errors import MokaError

from .base import Benchmark, Figures, Item, Protocol
from .intervals import BOOTSTRAP, bootstrap, figure, percent
from .parsing import clean, plain

BLEU_ORDERS = 4


def library(name: str, purpose: str) -> ModuleType:
    """An optional library.

    Raises:
        MokaError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MokaError(f"{purpose} needs {package}: pip install 'moka-peft[score]' ({error}).") from error


def words(text: str, record: Mapping[str, Any] | None = None) -> str | None:
    """The text as it is compared; None where no word is left.

    Special tokens are dropped; lower case; punctuation becomes space, apostrophes inside words stay.
    """
    return plain(clean(text)) or None


def _texts(given: Any) -> list[str]:
    """Return the words of each text of a list."""
    texts = [words(text) for text in given if isinstance(text, str)] if isinstance(given, list) else []
    if not texts or None in texts or len(texts) < len(given):
        raise MokaError(f"reference {given!r} is no list of one or more texts, or one of them has no word.")
    return [text or "" for text in texts]


def error_rates(items: Sequence[Item], overall: bool) -> Figures:
    """WER and CER in per cent: edits over the reference's words (characters, spaces too), summed over utterances.

    Utterances are resampled for the interval. An empty answer deletes every word.
    """
    jiwer = library("jiwer", "asr")
    units = {"WER": np.zeros((len(items), 2)), "CER": np.zeros((len(items), 2))}  # [utterances, (edits, length)]
    for i, item in enumerate(items):
        for name, process in (("WER", jiwer.process_words), ("CER", jiwer.process_characters)):
            out = process(item.reference, item.answer or "")
            kept = out.hits + out.substitutions + out.deletions
            units[name][i] = out.substitutions + out.deletions + out.insertions, kept
    return {name: bootstrap(rows, percent) for name, rows in units.items()}


def captions(items: Sequence[Item], overall: bool) -> Figures:
    """CIDEr (CIDEr-D, usually given x 100), BLEU-1 to BLEU-4 of the corpus and ROUGE-L, in per cent.

    CIDEr weighs n-grams by how few clips have them, over the clips of the same row of the table.
    """
    cider = library("pycocoevalcap.cider.cider", "captioning").Cider
    rouge = library("pycocoevalcap.rouge.rouge", "captioning").Rouge
    names = ["CIDEr", *(f"BLEU-{n + 1}" for n in range(BLEU_ORDERS)), "ROUGE-L"]
    if not items:
        return {name: figure(None, None, 0, BOOTSTRAP) for name in names}
    truth = {i: item.reference for i, item in enumerate(items)}
    given = {i: [item.answer or ""] for i, item in enumerate(items)}
    per_clip = {
        "CIDEr": cider().compute_score(truth, given)[1],
        "ROUGE-L": rouge().compute_score(truth, given)[1],
    }
    means = {
        name: bootstrap(np.stack([values, np.ones(len(items))], axis=1), percent) for name, values in per_clip.items()
    }
    return {"CIDEr": means["CIDEr"], **_bleu(items), "ROUGE-L": means["ROUGE-L"]}


def _bleu(items: Sequence[Item]) -> Figures:
    """Corpus BLEU of pycocoevalcap's n-gram counts ("closest" reference length: of two, the shorter); clips are resampled."""
    scorer = library("pycocoevalcap.bleu.bleu_scorer", "captioning").BleuScorer(n=BLEU_ORDERS)
    for item in items:
        scorer += (item.answer or "", item.reference)
    units = []
    for clip in scorer.ctest:
        length = clip["testlen"]
        closest = min((abs(reference - length), reference) for reference in clip["reflen"])[1]
        units.append([length, closest, *clip["correct"], *clip["guess"]])
    counts = np.array(units, dtype=float)
    return {
        f"BLEU-{n + 1}": bootstrap(counts, lambda sums, n=n: 100.0 * bleu_of_sums(sums)[..., n])  # type: ignore[misc]
        for n in range(BLEU_ORDERS)
    }


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 of summed counts (Papineni et al. 2002), as pycocoevalcap computes them.

    Args:
        sums: [..., 2 + 8]: lengths of the answers and of the references, n-grams right, n-grams given.

    Returns:
        [..., 4], from 0 to 1.
    """
    length, reference = sums[..., :1], sums[..., 1:2]
    right, given = sums[..., 2 : 2 + BLEU_ORDERS], sums[..., 2 + BLEU_ORDERS :]
    precisions = np.cumprod((right + 1e-15) / (given + 1e-9), axis=-1) ** (1 / np.arange(1, BLEU_ORDERS + 1))
    ratio = (length + 1e-15) / (reference + 1e-9)
    return precisions * np.exp(np.minimum(0.0, 1 - 1 / ratio))


ASR = Benchmark(
    name="asr",
    about="speech recognition, such as LibriSpeech: word and character error rates (jiwer)",
    expects="the spoken text",
    figures={"WER": "%", "CER": "%"},
    reference=lambda record: _texts([record["reference"]])[0],
    measure=error_rates,
    protocols={
        "strict": Protocol(
            "both texts: special tokens dropped, lower case, punctuation a space (apostrophes in words stay); an answer "
            "without a word is unparsable and counts as all words deleted",
            words,
        )
    },
    optional={"category": "a row each"},
    libraries=("jiwer",),
)
CAPTIONING = Benchmark(
    name="captioning",
    about="captions, such as AudioCaps: CIDEr, BLEU, ROUGE-L (pycocoevalcap)",
    expects="list of texts",
    figures={"CIDEr": "x100", **{f"BLEU-{n + 1}": "%" for n in range(BLEU_ORDERS)}, "ROUGE-L": "%"},
    reference=lambda record: _texts(record["reference"]),
    measure=captions,
    protocols={
        "strict": Protocol(
            "both texts: special tokens dropped, lower case, punctuation a space (apostrophes in words stay), split at "
            "spaces: not the Java PTB tokenizer of the COCO tools, whose figures differ a little; an answer without a "
            "word is unparsable and counts as an empty caption",
            words,
        )
    },
    optional={"category": "a row each"},
    libraries=("pycocoevalcap.cider.cider", "pycocoevalcap.rouge.rouge", "pycocoevalcap.bleu.bleu_scorer"),
)
