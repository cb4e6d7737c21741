"""The page and the charts of a diagnosis: matplotlib's SVG inside of one HTML file that needs no network."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from moka.errors import MokaError
from moka.evaluation.tables import Table

from .summary import ALL, Diagnosis, Figures, coalition_table, contribution_table, share_table

INK = "#010203"  # of text and axes: becomes the page's own colour
COLOURS = ("#3b82c4", "#d9822b", "#3d9970", "#b0579a", "#8c7b3f", "#7a7f87")  # seen on white and on black
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a category may have dollar signs
}
WIDTH = 4.4  # inches: readable on a phone
TITLES = {
    "accuracy": "Accuracy by available modalities",
    "log_likelihood": "Log-likelihood by available modalities",
    "shapley": "Shapley values by question type",
    "shares": "Unique, redundant and synergistic shares",
    "uses": "Information use and adapter use",
    "attention_total": "Attention mass by layer, in total",
    "attention_per_token": "Attention mass by layer, per token",
    "imbalance_rate": "Attention imbalance rate by layer",
    "gradients": "Shares in the update and the Fisher information of B",
    "vulnerability": "Accuracy against noise on one modality",
}


def charts(diagnosis: Diagnosis) -> dict[str, tuple[str, Any]]:
    """Return name -> (title, matplotlib figure) of every chart that the diagnosis has figures for.

    Raises:
        MokaError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MokaError("the report needs matplotlib; pip install 'moka-peft[train]'.") from error
    found: dict[str, Any] = {}
    tables = diagnosis.contributions
    unit = "nats per answer token" if diagnosis.value == "log_likelihood" else diagnosis.value
    groups = next((found for ablate, found in tables.items() if ablate != "adapter"), next(iter(tables.values())))
    with rc_context(STYLE):
        for name, label in (("accuracy", "%"), ("log_likelihood", "nats per answer token")):
            found[name] = _bars({ablate: each[ALL][name] for ablate, each in tables.items()}, label)
        found["shapley"] = _bars(_turned({group: each["shapley"] for group, each in groups.items()}), unit)
        shares: Any = {group: next(iter(each["shares"].values()), {}) for group, each in groups.items()}
        found["shares"] = _bars(_turned(shares), unit)
        if len(tables) > 1:
            found["uses"] = _bars(
                {ablate: each[ALL]["shapley"] for ablate, each in tables.items()}, f"Shapley value, {unit}"
            )
        if diagnosis.attention is not None:
            for name, key, label in (
                ("attention_total", "total", "attention mass"),
                ("attention_per_token", "per_token", "attention mass / tokens"),
                ("imbalance_rate", "imbalance_rate", "AIR"),
            ):
                found[name] = _lines(
                    {m: (None, values, None) for m, values in diagnosis.attention[key].items()}, "layer", label
                )
        if diagnosis.gradients is not None:
            kinds = {"update": "update_shares", "Fisher": "fisher_shares"}
            shares = {kind: _percent(diagnosis.gradients[key]) for kind, key in kinds.items()}
            found["gradients"] = _bars(shares, "%")
        if diagnosis.vulnerability:
            curves = {name: _curve(levels) for name, levels in diagnosis.vulnerability.items()}
            found["vulnerability"] = _lines(curves, "noise, standard deviations of the input", "accuracy %")
    return {name: (TITLES[name], figure) for name, figure in found.items() if figure is not None}


def _percent(shares: Mapping[str, float]) -> dict[str, Figures]:
    return {name: {"value": 100 * share, "interval": None} for name, share in shares.items()}


def _curve(levels: Mapping[str, Figures]) -> tuple[list[float], list[float], list[Any]]:
    figures = [each["accuracy"] for each in levels.values()]
    return [float(level) for level in levels], [f["value"] for f in figures], [f["interval"] for f in figures]


def _turned(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {a: {b: value}} as {b: {a: value}}."""
    inner = dict.fromkeys(key for each in table.values() for key in each)
    return {key: {name: each[key] for name, each in table.items() if key in each} for key in inner}


def _bars(series: Mapping[str, Mapping[str, Figures]], label: str) -> Any:
    """Draw horizontal bars with their intervals: a group for each key of the inner mappings, a colour for each series."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for each in series.values() for name in each))
    if not names:
        return None
    figure = Figure(
        figsize=(WIDTH, 0.9 + max(0.35, 0.19 * len(series)) * len(names) + 0.2 * len(series)), layout="constrained"
    )
    axes, height = figure.subplots(), 0.8 / len(series)
    for k, (kind, values) in enumerate(series.items()):
        for place, name in enumerate(names):
            value = values.get(name, {}).get("value")
            if value is None:
                continue
            ends = values[name]["interval"] or (value, value)
            spread = [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]
            where = place + (k - (len(series) - 1) / 2) * height
            axes.barh(
                where,
                value,
                height,
                color=COLOURS[k % len(COLOURS)],
                label=kind if place == _first(values, names) else None,
            )
            axes.errorbar(value, where, xerr=spread, color=INK, linewidth=1, capsize=2)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if len(series) > 1:
        figure.legend(loc="outside lower left", frameon=False, ncols=2, fontsize=9)
    return figure


def _first(values: Mapping[str, Figures], names: Sequence[str]) -> int:
    """Return the place of the first bar that is drawn, which is the one in the legend."""
    return next(place for place, name in enumerate(names) if values.get(name, {}).get("value") is not None)


def _lines(series: Mapping[str, tuple[Any, Sequence[float], Any]], x: str, y: str) -> Any:
    """Draw a line for each series: (x values or None, y values, intervals or None)."""
    from matplotlib.figure import Figure

    if not series:
        return None
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    for (name, (places, values, ends)), colour in zip(series.items(), COLOURS * len(series), strict=False):
        places = range(len(values)) if places is None else places
        axes.plot(places, values, ".-", color=colour, label=_short(name))
        if ends:
            axes.fill_between(places, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=x, ylabel=y)
    if all(places is None for places, _, _ in series.values()):
        axes.locator_params(axis="x", integer=True)
    figure.legend(loc="outside lower left", frameon=False, ncols=2, fontsize=9)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def page(diagnosis: Diagnosis) -> str:
    """Return the report as HTML: text of samples is escaped, charts and media are inside, nothing is loaded."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MokaError("the report needs jinja2; pip install 'moka-peft[train]'.") from error
    environment = Environment(
        loader=PackageLoader("moka.diagnosis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    ablations = list(diagnosis.contributions)
    tables: list[Table | None] = [contribution_table(diagnosis, ablate) for ablate in ablations]
    tables += [*(coalition_table(diagnosis, ablate) for ablate in ablations), share_table(diagnosis)]
    return environment.get_template("report.html.j2").render(
        diagnosis=diagnosis,
        samples={sample["place"]: sample for sample in diagnosis.samples},
        first=next((ablate for ablate in ablations if ablate != "adapter"), ablations[0]),
        charts={name: (title, svg(name, figure)) for name, (title, figure) in charts(diagnosis).items()},
        tables=[table for table in tables if table is not None],
    )


def svg(name: str, figure: Any) -> Any:
    """Return a figure as markup whose ids are its own and whose ink is the page's colour of text."""
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for before in ('id="', "url(#", 'href="#'):
        text = text.replace(before, f"{before}{name}-")
    return Markup(text.replace(INK, "currentColor"))  # matplotlib escapes the text inside
