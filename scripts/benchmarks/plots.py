"""A picture next to the JSON of a level; none where matplotlib is missing."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .measure import Point
from .profiling import GROUPS, Profile
from .report import figures


def plot(points: list[Point], level: str, path: Path) -> Path | None:
    """Ratios with quartiles and memory, one panel a point; for growth one panel a curve."""
    measured = [point for point in points if not point.missing]
    figure = _figure((5 * (4 if level == "growth" else 2), 3.5 * (1 if level == "growth" else max(1, len(measured)))))
    if figure is None or not measured:
        return None
    if level == "growth":
        _curves(figure, measured, level)
    else:
        for axes, point in zip(figure.subplots(len(measured), 2, squeeze=False), measured, strict=True):
            _bars(axes, point, level)
    return _save(figure, path)


def _bars(axes: Any, point: Point, level: str) -> None:
    found = figures(point, level)
    base = "of_lora" if "lora" in found else "of_bare"
    names = list(found)
    low, middle, high = zip(*(found[name][base] for name in names), strict=True)
    error = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    what = "tokens/s" if level == "decode" else "time"
    axes[0].barh(names, middle, xerr=error, color="tab:blue", alpha=0.7, capsize=3)
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].set(xlabel=f"{what} {'of LoRA' if base == 'of_lora' else 'of bare'} in the same round")
    axes[1].barh(names, [found[name]["peak_bytes_beyond_bare"] / 1e6 for name in names], color="tab:orange", alpha=0.7)
    axes[1].set(xlabel="peak memory beyond the bare backbone, MB")
    title = ", ".join(f"{key} {value}" for key, value in point.settings.items())
    axes[0].set_title(f"{level}: {title}" if title else level, fontsize="medium")
    for axis in axes:
        axis.invert_yaxis()


def _curves(figure: Any, points: list[Point], level: str) -> None:
    by_curve: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_curve[point.settings["curve"]].append(point)
    for axis, (curve, own) in zip(figure.subplots(1, len(by_curve), squeeze=False)[0], by_curve.items(), strict=True):
        for name in own[0].seconds:
            if name != "bare":
                low, middle, high = zip(*(figures(p, level)[name]["share_beyond_bare"] for p in own), strict=True)
                places = [p.settings["value"] for p in own]
                axis.plot(places, middle, ".-", label=name)
                axis.fill_between(places, low, high, alpha=0.2)
        axis.set(xlabel=curve, ylabel="share of the step beyond bare")
        if curve in ("seq", "batch"):
            axis.set_xscale("log", base=2)
        axis.legend()


def plot_profile(found: dict[str, Profile], path: Path) -> Path | None:
    """Stacked groups by variant."""
    figure = _figure((9, 4))
    if figure is None:
        return None
    axis = figure.subplots()
    left = [0.0] * len(found)
    for group in GROUPS:
        widths = [own.groups[group] for own in found.values()]
        axis.barh(list(found), widths, left=left, label=group)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="self time of a training step, ms")
    axis.legend(ncols=3, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return _save(figure, path)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
