"""Score a file of predictions on a benchmark. Needs no model.

  moka score pope runs/mine/pope.jsonl                     figures over all records and over parsable ones, 95 % intervals
  moka score ave runs/mine/ave.jsonl --protocol both       also as the authors' scripts parse answers
  moka score mme mme.jsonl --output tables/mme.tex         a LaTeX table; .md Markdown, .json everything, .txt plain
  moka score --list                                        the benchmarks, their record fields and figures

A prediction is one JSON object a line: id (unique), prediction (the generated text), reference, and what the benchmark
needs besides. An answer that cannot be parsed counts as wrong; the figure over parsable records is next to it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moka.errors import MokaError
from moka.evaluation import BENCHMARKS, read_predictions, score
from moka.evaluation.benchmarks.table import score_table
from moka.evaluation.tables import Table
from moka.io import write_output

FORMATS = {"table": ".txt", "json": ".json", "markdown": ".md", "latex": ".tex"}
PROTOCOLS = ("strict", "paper", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", nargs="?", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("predictions", nargs="?", metavar="PREDICTIONS.jsonl", help="one JSON object a line")
    parser.add_argument(
        "--protocol",
        default="strict",
        help="strict (default): an answer is a word or an option of its own; paper: the authors' parsing; both",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="what to print or write (default: by the ending of --output, else table)"
    )
    parser.add_argument("--output", metavar="FILE", help="write it there, and print the table")
    parser.add_argument("--list", action="store_true", help="show the benchmarks, their record fields and figures")


def run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        _list().show()
        return
    if arguments.benchmark is None or arguments.predictions is None:
        raise MokaError(
            "give a benchmark and a file: moka score BENCHMARK PREDICTIONS.jsonl; `moka score --list` names them."
        )
    format, output = _target(arguments.format, arguments.output)
    protocols = _protocols(arguments.benchmark, arguments.protocol)
    records, places = read_predictions(arguments.predictions)
    results = {name: score(arguments.benchmark, records, name, where=places.__getitem__) for name in protocols}
    tables = [score_table(result) for result in results.values()]
    if output is None and format != "table":
        print(_text(results, tables, format), end="")
        return
    if output is not None:
        write_output(output, _text(results, tables, format), inputs=[Path(arguments.predictions)])
    for table in tables:
        table.show()
    if output is not None:
        print(f"written: {output}")


def _target(format: str | None, output: str | None) -> tuple[str, Path | None]:
    """Return what to write, and where to; refused before any work is done."""
    if output is None:
        return format or "table", None
    if not output.strip():
        raise MokaError("--output: it is empty; name a file.")
    path = Path(output)
    endings = {ending: name for name, ending in FORMATS.items()}
    if format is None and path.suffix not in endings:
        raise MokaError(f"--output: {output!r} ends in none of {', '.join(endings)}; give one of these, or --format.")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder"
        raise MokaError(f"--output: {output} {what}. Give a file in a folder that is there.")
    return format or endings[path.suffix], path


def _protocols(benchmark: str, protocol: str) -> list[str]:
    if protocol != "both" or benchmark not in BENCHMARKS:
        return [protocol]
    return list(BENCHMARKS[benchmark].protocols)


def _text(results: dict[str, dict[str, Any]], tables: list[Table], format: str) -> str:
    """One result as it is; two as an object by protocol, or one table after the other."""
    if format == "json":
        value = results if len(results) > 1 else next(iter(results.values()))
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return "\n".join(table.text(format) for table in tables)


def _list() -> Table:
    rows = [
        [
            benchmark.name,
            ", ".join(benchmark.fields)
            + (f" (may have: {', '.join(benchmark.optional)})" if benchmark.optional else ""),
            benchmark.expects,
            ", ".join(f"{name} ({unit})" for name, unit in benchmark.figures.items()),
            ", ".join(benchmark.protocols),
        ]
        for benchmark in BENCHMARKS.values()
    ]
    header = ("benchmark", "record fields", "reference", "figures", "protocols")
    return Table("benchmarks of moka score", header, rows, left=len(header))
