"""A score as a table."""

from __future__ import annotations

from typing import Any

from moka.evaluation.tables import Table

HEADER = ("category", "figure", "all", "95 %", "parsable only", "95 %", "N", "unparsable")
OVERALL = "overall"


def score_table(result: dict[str, Any]) -> Table:
    """The result of `moka.evaluation.score`: one row for each category and figure, the overall ones last."""
    rows: list[list[str]] = []
    emphasised = set()
    for category, row in [*result["categories"].items(), (OVERALL, result["overall"])]:
        for position, (name, figures) in enumerate(row["figures"].items()):
            if category is OVERALL:
                emphasised.add(len(rows))
            first = category if position == 0 else ""
            sizes = [str(row["n"]), str(row["unparsable"])] if position == 0 else ["", ""]
            unit = result["units"][name]
            rows.append([first, f"{name}, {unit}", *_cells(figures["all"]), *_cells(figures["parsable"]), *sizes])
    protocol = result["protocol"]
    notes = [
        f"N = {result['n']} records, {result['unparsable']} unparsable: wrong in “all”, left out of “parsable only”.",
        f"Protocol {protocol['name']}, version {protocol['version']}: {protocol['parsing']}.",
        f"Intervals: {result['intervals']}.",
    ]
    if result["counts"]:
        notes.insert(1, "; ".join(f"{name}: {count}" for name, count in result["counts"].items()) + ".")
    title = f"{result['benchmark']}, {protocol['name']}"
    return Table(title, HEADER, rows, notes, left=2, emphasised=frozenset(emphasised))


def _cells(figure: dict[str, Any]) -> list[str]:
    if figure["value"] is None:
        return ["-", "-"]
    interval = figure["interval"]
    return [f"{figure['value']:.2f}", "-" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"]
