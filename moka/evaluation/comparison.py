"""The result of a comparison of methods: figures over seeds, tables, files. Trains nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moka.errors import MokaError
from moka.io import read_json, write_json, write_text

from .evaluate import OVERALL
from .tables import Table

RESULT, MARKDOWN, LATEX = "comparison.json", "comparison.md", "comparison.tex"
REFERENCE = "moka"  # what the others are compared with
FORMAT = 2
# Methods of results without a format -> their names now.
RENAMED = {"multiple_lora": "uni_modal_lora"}


def summarise(records: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of one method from its finished runs.

    Args:
        records: seed -> {"parameters", "n", "scores": {category: accuracy from 0 to 1}}; may be empty.

    Returns:
        {"seeds", "parameters", "n", "mean", "spread", "runs"}; mean, spread (the sample standard deviation, None of
        a single run) and runs (values in the order of the seeds) are by category.
    """
    if not records:
        return {"seeds": [], "parameters": None, "n": None, "mean": {}, "spread": {}, "runs": {}}
    first = next(iter(records.values()))
    values = {name: [record["scores"][name] for record in records.values()] for name in first["scores"]}
    return {
        "seeds": list(records),
        "parameters": first["parameters"],
        "n": first["n"],
        "mean": {name: statistics.fmean(v) for name, v in values.items()},
        "spread": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()},
        "runs": values,
    }


def comparison_table(result: Mapping[str, Any]) -> Table:
    """A row for each method, a column for each kind of question; what was not run yet is a dash, and is named."""
    methods = result["methods"]
    finished = [summary for summary in methods.values() if summary["mean"]]
    categories = list(finished[0]["mean"]) if finished else [OVERALL]
    rows = []
    for method, summary in methods.items():
        parameters = summary["parameters"]
        cells = [_cell(summary, name) for name in categories]
        rows.append([method, str(summary["adapter"]["r"]), "-" if parameters is None else f"{parameters:,}", *cells])
    notes = _paired(methods)
    if missing := result.get("missing"):
        names = ", ".join(f"{run['method']} (seed {run['seed']})" for run in missing)
        notes.append(f"Missing: {len(missing)} of {len(methods) * len(result['seeds'])} runs: {names}.")
    header = ["method", "r", "adapter parameters", *categories]
    return Table(_title(result, finished), header, rows, notes, command=result.get("command"))


def _paired(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far each method is from MokA (or else the first) overall, seed by seed: runs of one seed share data and stage 1."""
    reference = REFERENCE if REFERENCE in methods else next(iter(methods))
    overall = {m: dict(zip(s["seeds"], s["runs"].get(OVERALL, ()), strict=False)) for m, s in methods.items()}
    found = []
    for method, runs in overall.items():
        both = [seed for seed in runs if seed in overall[reference]]
        if method != reference and len(both) > 1:
            points = [100 * (runs[seed] - overall[reference][seed]) for seed in both]
            mean = round(statistics.fmean(points), 1) + 0.0  # no -0.0
            found.append(f"{method} {mean:+.1f} ± {statistics.stdev(points):.1f} ({len(both)} seeds)")
    return [f"Overall less that of {reference}, paired by seed, in points: {'; '.join(found)}."] if found else []


def _title(result: Mapping[str, Any], finished: Sequence[Mapping[str, Any]]) -> str:
    seeds = result["seeds"]
    named = ", ".join(map(str, seeds))
    spread = f"mean ± sample standard deviation over seeds {named}" if len(seeds) > 1 else f"one seed, {named}"
    n = f"N = {finished[0]['n']} questions each" if finished else "no run finished"
    matched = (
        "ranks chosen to match MokA's trainable parameters" if result["matched_parameters"] else "ranks as configured"
    )
    return f"{_name(result['data'])}: accuracy in %, {spread}; {n}; {matched}"


def _name(source: Any) -> str:
    """Data in words: a name, or the fields of its mapping."""
    if isinstance(source, list):
        return " + ".join(map(_name, source))
    return " ".join(f"{key}={value}" for key, value in source.items()) if isinstance(source, dict) else str(source)


def _cell(summary: Mapping[str, Any], category: str) -> str:
    if category not in summary["mean"]:
        return "-"
    spread = summary["spread"][category]
    return f"{100 * summary['mean'][category]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def write_comparison(root: Path, result: Mapping[str, Any]) -> list[Path]:
    """``comparison.json``, ``comparison.md`` and ``comparison.tex`` in the folder, which is made if need be."""
    root.mkdir(parents=True, exist_ok=True)
    table = comparison_table(result)
    write_json(root / RESULT, result)
    write_text(root / MARKDOWN, table.markdown())
    write_text(root / LATEX, table.latex())
    return [root / name for name in (RESULT, MARKDOWN, LATEX)]


def read_comparison(folder: str | Path) -> dict[str, Any]:
    """The result that is in a folder of `moka compare`, finished or not.

    Raises:
        MokaError: there is none, or it is damaged.
    """
    path = Path(folder) / RESULT
    result = read_json(path) if path.is_file() else {}
    keys = {"adapter", "seeds", "parameters", "n", "mean", "spread", "runs"}
    problem = ""
    if not path.is_file():
        problem = f"has no comparison (no {RESULT}); give the output.dir of a `moka compare`"
    elif isinstance(result, dict) and "settings" in result:
        problem = "is one run of a comparison; give the comparison's folder, two levels up"
    elif not isinstance(result, dict) or not {"methods", "seeds", "data", "matched_parameters"} <= set(result):
        problem = f"has a {RESULT} that is no comparison, or is damaged. Run the comparison again"
    elif not result["methods"] or not all(
        isinstance(one, dict) and keys <= {*one} for one in result["methods"].values()
    ):
        problem = f"has a {RESULT} in which methods are no comparison, or damaged. Run the comparison again"
    if problem:
        raise MokaError(f"{folder} {problem}.")
    if "format" not in result:
        result["methods"] = {RENAMED.get(name, name): summary for name, summary in result["methods"].items()}
        for missing in result.get("missing", []):
            missing["method"] = RENAMED.get(missing["method"], missing["method"])
    return result
