"""Tables for the screen and for Markdown, and the JSON file of a level."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine import describe
from .measure import Point, Quartiles, quartiles
from .profiling import GROUPS, Profile, as_json, top

SPEED = ("decode",)  # levels that compare tokens/s; the others compare times


def figures(point: Point, level: str) -> dict[str, dict[str, Any]]:
    """Return what is reported of each variant: quartiles [low, median, high], bytes, FLOPs.

    ``of_bare`` and ``of_lora``: ratios of times, and of tokens/s where the level compares these.
    """
    found = {}
    for name, seconds in point.seconds.items():
        own: dict[str, Any] = {
            "ms": quartiles([1000 * s for s in seconds]),
            "tokens_per_second": quartiles([point.tokens / s for s in seconds]),
        }
        for base in ("bare", "lora"):
            if base in point.seconds:
                ratios = point.ratios(name, base)
                own[f"of_{base}"] = quartiles([1 / r for r in ratios] if level in SPEED else ratios)
        own |= {
            "share_beyond_bare": quartiles(point.shares(name)),
            "peak_bytes": point.peak.get(name),
            "peak_bytes_beyond_bare": point.beyond(name) if name in point.peak else None,
            "flops": point.flops.get(name),
            "flops_of_bare": point.flops[name] / point.flops["bare"] if point.flops.get("bare") else None,
        }
        found[name] = own
    return found


def table(points: list[Point], level: str, form: str) -> str:
    """One table over all points of a level."""
    compared = "tokens/s of" if level in SPEED else "time of"
    header = ["variant", "ms", "tokens/s", f"{compared} bare", f"{compared} LoRA"]
    header += ["peak MB", "beyond bare, MB", "GFLOP", "FLOPs of bare"]
    told = list(dict.fromkeys(key for point in points for key in point.settings))
    rows = []
    for point in points:
        place = [_plain(point.settings.get(key)) for key in told]
        if point.missing:
            rows.append([*place, point.missing, *[""] * (len(header) - 1)])
        for name, own in figures(point, level).items():
            cells = [name, spread(own["ms"], ".1f"), spread(own["tokens_per_second"], ",.1f")]
            cells += [spread(own[key], ".3f") if key in own else "" for key in ("of_bare", "of_lora")]
            cells += [_megabytes(own["peak_bytes"]), _megabytes(own["peak_bytes_beyond_bare"])]
            cells += [
                f"{own['flops'] / 1e9:,.2f}",
                "" if own["flops_of_bare"] is None else f"{own['flops_of_bare']:.4f}",
            ]
            rows.append([*place, *cells])
    return lay_out([*told, *header], rows, form)


def profile_tables(found: dict[str, Profile], form: str, operators: int = 15) -> str:
    """The groups of all variants side by side, then each variant's operators by self time."""
    rows = []
    for group in (*GROUPS, "all"):
        values = {
            name: own.groups[group] if group in own.groups else sum(own.groups.values()) for name, own in found.items()
        }
        rows.append([group, *(f"{v:.1f} ({v - values['bare']:+.1f})" for v in values.values())])
    parts = ["Self time in ms a step (beyond the bare backbone)\n\n" + lay_out(["", *found], rows, form)]
    for name, own in found.items():
        lines = [[operator, f"{spent:.1f}", f"{own.calls[operator]:.0f}"] for operator, spent in top(own, operators)]
        parts.append(f"{name}\n\n" + lay_out(["operator", "self ms", "calls"], lines, form))
    return "\n\n".join(parts)


def spread(values: Quartiles, form: str) -> str:
    low, middle, high = values
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> str:
    """``form``: "text", columns in line, or "markdown"."""
    if form == "markdown":
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.2f}"


def as_record(arguments: Namespace, points: list[Point] | None = None, **more: Any) -> dict[str, Any]:
    """All that was measured, with machine, versions, commit and settings; times in seconds, memory in bytes."""
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "format", "level")}
    record = {"level": arguments.level, "command": arguments.command, **describe(), "settings": settings}
    if points is not None:
        record["points"] = [
            {
                "settings": point.settings,
                **({"missing": point.missing} if point.missing else {}),
                "tokens": point.tokens,
                "rounds": max(map(len, point.seconds.values()), default=0),
                "seconds": point.seconds,
                "variants": figures(point, arguments.level),
            }
            for point in points
        ]
    return {**record, **more}


def profile_record(arguments: Namespace, found: dict[str, Profile]) -> dict[str, Any]:
    return as_record(arguments, profile=as_json(found))


def write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
