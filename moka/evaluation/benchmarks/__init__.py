"""Scoring benchmarks from prediction records: one call, two denominators, no model.

score("pope", [{"id": "1", "prediction": "Yes.", "reference": "yes", "category": "random"}, ...])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moka.errors import MokaError

from . import ave, choice, mme, music_avqa, pope, text
from .base import Benchmark, Item, Protocol, by_category, known_name, read_items
from .intervals import RESAMPLES, SEED

__all__ = ["BENCHMARKS", "Benchmark", "Protocol", "find_benchmark", "score"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        ave.AVE,
        music_avqa.MUSIC_AVQA,
        mme.MME,
        pope.POPE,
        choice.MMBENCH,
        choice.SEED_BENCH,
        choice.MMAU,
        choice.AIR_BENCH,
        text.ASR,
        text.CAPTIONING,
    )
}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name, or raise a `MokaError` with the nearest."""
    return BENCHMARKS[known_name("benchmark", name, BENCHMARKS)]


def score(
    name: str,
    records: Iterable[Mapping[str, Any]],
    protocol: str = "strict",
    *,
    where: Callable[[int], str] = lambda position: f"record {position + 1}",
) -> dict[str, Any]:
    """The figures of a benchmark from prediction records.

    Args:
        name: a key of `BENCHMARKS`.
        records: objects with id (unique), prediction (raw generated text), reference, and what else the benchmark
            needs; see ``moka score --list``.
        protocol: "strict", an answer is a word or an option of its own; or "paper", the authors' parsing.
        where: position from 0 -> what opens an error about a record.

    Returns:
        {"benchmark", "protocol": {name, version, parsing}, "n", "unparsable", "counts": {what was left out or odd: how
        many}, "units": {figure: unit}, "intervals": how they are made, "overall": row, "categories": {name: row}}. A
        row is {"n", "unparsable", "figures": {figure: {"all": f, "parsable": f}}}: over all records, where unparsable
        is wrong, and over the parsable ones. f is {"value", "interval": [low, high], "n", "method"}, in the unit of
        the figure; value and interval are None where undefined.

    Raises:
        MokaError: an unknown benchmark or protocol, no records, or a bad record, named by ``where``.
    """
    benchmark = find_benchmark(name)
    for module in benchmark.libraries:
        text.library(module, name)
    known_name(f"protocol of {name}", protocol, benchmark.protocols)
    rules = benchmark.protocols[protocol]
    given = read_items(benchmark, rules, records, where)
    items, counts = benchmark.select(given, protocol)
    if not items:
        raise MokaError(f"{name}: nothing is left to score under {protocol}: {counts}. Use --protocol strict.")
    return {
        "benchmark": name,
        "protocol": {"name": protocol, "version": rules.version, "parsing": rules.parsing},
        "n": len(given),
        "unparsable": sum(item.answer is None for item in given),
        "counts": counts,
        "units": dict(benchmark.figures),
        "intervals": f"95 %: Wilson for independent proportions, else percentile bootstrap ({RESAMPLES} resamples, seed {SEED})",
        "overall": _row(benchmark, items, True),
        "categories": {key: _row(benchmark, part, False) for key, part in by_category(benchmark, items).items()},
    }


def _row(benchmark: Benchmark, items: list[Item], overall: bool) -> dict[str, Any]:
    parsable = [item for item in items if item.answer is not None]
    over_all = benchmark.measure(items, overall)
    over_parsable = benchmark.measure(parsable, overall)
    return {
        "n": len(items),
        "unparsable": len(items) - len(parsable),
        "figures": {key: {"all": over_all[key], "parsable": over_parsable[key]} for key in over_all},
    }
