"""Figures of a diagnosis: means with intervals over the records of the samples, by question type.

records -> v(S) [n] for each coalition S -> lift, Shapley values, shares -> means with bootstrap intervals
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moka.adapter.config import TEXT
from moka.analysis.coalitions import Coalition, all_coalitions, dominance_ratios, interaction_shares, shapley_values
from moka.errors import MokaError
from moka.evaluation.benchmarks.intervals import BOOTSTRAP, figure, percentiles, proportion, resampled
from moka.evaluation.tables import Table
from moka.io import disk_full_errors, write_output

ALL, NOTHING = "all", "none"
Figures = dict[str, Any]


@dataclass
class Diagnosis:
    """Which modality a model uses for its answers to a data set. A figure is {value, interval, n, method}, intervals are 95 %."""

    value: str  # the value function of Shapley values and shares
    modalities: list[str]  # that samples have, text left out
    samples: list[dict[str, Any]]  # a record each: values by coalition, lift, Shapley values, shares
    groups: list[str]  # question types; "all" first
    # ablation -> question type -> {n, accuracy, log_likelihood, lift: {coalition: figure}, shapley: {player: figure},
    #   shares: {"a, b": {share: figure}}, dominance: {player: figure}}
    contributions: dict[str, dict[str, Figures]]
    tokens: dict[str, int]
    seconds: float  # of computing, summed over processes and resumed runs
    extremes: dict[str, dict[str, list[int]]]  # modality -> {"most", "least"} -> places of samples
    model: str = ""
    adapter: str = "none"
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)  # {id, error} of samples that cannot be used
    attention: Figures | None = None
    gradients: Figures | None = None
    interaction: Figures | None = None
    vulnerability: dict[str, dict[str, Figures]] = field(
        default_factory=dict
    )  # modality -> level -> {accuracy, log_likelihood}
    left_out: dict[str, str] = field(default_factory=dict)  # section -> why
    media: dict[int, list[dict[str, str]]] = field(default_factory=dict, repr=False)  # place -> {kind, uri or text}
    maps: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def n(self) -> int:
        """Return the number of samples that were used."""
        return len(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, fit for JSON; the samples are lines of their own (`to_jsonl`)."""
        left = ("samples", "media", "maps")
        return {"n": self.n, **{f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in left}}

    def to_json(self, path: str | Path) -> None:
        """Write all numbers as JSON."""
        _write(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_jsonl(self, path: str | Path) -> None:
        """Write a line of JSON for each sample."""
        _write(path, "".join(json.dumps(_plain(sample)) + "\n" for sample in self.samples))

    def to_html(self, path: str | Path) -> None:
        """Write the report as one page that needs no network."""
        from .report import page

        _write(path, page(self))

    def plot(self, folder: str | Path) -> list[Path]:
        """Write every chart as a PNG file; return their paths."""
        from .report import charts

        made = []
        for name, (_, chart) in charts(self).items():
            path = Path(folder) / f"{name}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with disk_full_errors(path):
                    chart.savefig(path, dpi=150)
            except OSError as error:
                raise MokaError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from error
            made.append(path)
        return made

    def table(self) -> Table:
        """Return the contributions by question type, for the screen, Markdown or LaTeX."""
        return contribution_table(self, next(iter(self.contributions)))


def _plain(value: Any) -> Any:
    """Return a value that JSON can write: NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write(path: str | Path, text: str) -> None:
    """Write a file that a user named.

    Raises:
        MokaError: it cannot be written.
    """
    try:
        write_output(Path(path), text)
    except OSError as error:
        raise MokaError(
            f"{path} cannot be written: {error.strerror}. Give a file in a folder that can be written."
        ) from error


def coalition_name(coalition: Collection[str], players: Sequence[str]) -> str:
    """Return such as "visual+audio", in the order of the players; "none" for the empty coalition."""
    return "+".join(player for player in players if player in coalition) or NOTHING


def figures_of(
    records: Sequence[dict[str, Any]], value: str, ablations: Sequence[str], examples: int = 10
) -> Diagnosis:
    """Return the figures of samples by ablation and question type.

    Args:
        records: from `moka.diagnosis.diagnose.measure`, with id, place and category.
        examples: samples that are listed for each modality and end.
    """
    modalities = list(dict.fromkeys(name for record in records for name in record["modalities"]))
    samples = [dict(record) for record in records]
    categories = np.array([record["category"] for record in records])
    kinds = [name for name in dict.fromkeys(categories.tolist()) if name != ALL]
    groups = {ALL: np.ones(len(records), bool), **({name: categories == name for name in kinds} if len(kinds) else {})}
    contributions: dict[str, dict[str, Figures]] = {}
    left_out: dict[str, str] = {}
    for ablate in ablations:
        players = [TEXT, *modalities] if ablate == "adapter" else modalities
        columns = columns_of(records, value, ablate, players)
        for name, columns_by_key in columns.items():
            if name in ("lift", "shapley", "shares"):
                for k, sample in enumerate(samples):
                    sample.setdefault(name, {})[ablate] = _nested(
                        {key: c[k].item() for key, c in columns_by_key.items()}
                    )
        contributions[ablate] = {name: _group(columns, here) for name, here in groups.items()}
        if len(players) < 2:
            left_out["shares and dominance"] = f"the samples have one modality only: {', '.join(players)}"
    first = next((ablate for ablate in ablations if ablate != "adapter"), ablations[0])
    tokens: dict[str, int] = {}
    for record in records:
        for name, count in record["tokens"].items():
            tokens[name] = tokens.get(name, 0) + count
    return Diagnosis(
        value=value,
        modalities=modalities,
        samples=samples,
        groups=list(groups),
        contributions=contributions,
        tokens=tokens,
        seconds=sum(record["seconds"] for record in records),
        extremes={name: _extremes(samples, name, first, examples) for name in modalities},
        vulnerability=_vulnerability(records),
        left_out=left_out,
    )


def columns_of(
    records: Sequence[dict[str, Any]], value: str, ablate: str, players: Sequence[str]
) -> dict[str, dict[Any, np.ndarray]]:
    """Return the values [n] of one ablation: {"correct" | "log_likelihood" | "lift": {coalition}, "shapley": {player}, ...}."""

    def column(table: str, coalition: Coalition) -> torch.Tensor:
        name = coalition_name(coalition, players)
        return torch.tensor([record[table][ablate][name] for record in records], dtype=torch.float64)

    def worth(coalition: Coalition) -> torch.Tensor:
        if value == "log_likelihood":
            return column("log_likelihood", coalition)
        return column("correct", coalition) * (len(coalition) if value == "weighted_correct" else 1)

    names = {coalition: coalition_name(coalition, players) for coalition in all_coalitions(players)}
    found: dict[str, dict[Any, Any]] = {
        table: {name: column(table, coalition) for coalition, name in names.items()}
        for table in ("correct", "log_likelihood")
    }
    empty = found["log_likelihood"][NOTHING]
    found["lift"] = {name: each - empty for name, each in found["log_likelihood"].items() if name != NOTHING}
    found["shapley"] = shapley_values(worth, players).values
    found["shares"], found["dominance"] = {}, {}
    if len(players) > 1:
        for k, a in enumerate(players):
            for b in players[k + 1 :]:
                shares = interaction_shares(worth, a, b)
                found["shares"] |= {(f"{a}, {b}", f"unique {m}"): each for m, each in shares.unique.items()}
                found["shares"][f"{a}, {b}", "redundant"] = shares.redundant
                found["shares"][f"{a}, {b}", "synergistic"] = shares.synergistic
        ratios = dominance_ratios(lambda s: column("log_likelihood", s), players)
        found["dominance"] = {name: ratio.log() for name, ratio in ratios.items()}
    return {table: {key: each.numpy() for key, each in columns.items()} for table, columns in found.items()}


def means(columns: Mapping[Any, np.ndarray]) -> dict[Any, Figures]:
    """Return the mean of each column [n] with its bootstrap interval; rows are resampled together."""
    if not columns:
        return {}
    units = np.stack([*columns.values()], axis=1)  # [n, columns]
    if not len(units):
        return {key: figure(None, None, 0, BOOTSTRAP) for key in columns}
    drawn = resampled(np.concatenate([units, np.ones((len(units), 1))], axis=1))
    drawn = drawn[:, :-1] / drawn[:, -1:]
    return {
        key: figure(units[:, k].mean(), percentiles(drawn[:, k]), len(units), BOOTSTRAP)
        for k, key in enumerate(columns)
    }


def _group(columns: Mapping[str, Mapping[Any, np.ndarray]], here: np.ndarray) -> Figures:
    """Return the figures of one question type, whose samples are ``here`` [n] bool."""
    n = int(here.sum())
    found: Figures = {"n": n}
    found["accuracy"] = {name: proportion(int(each[here].sum()), n) for name, each in columns["correct"].items()}
    for table in ("log_likelihood", "lift", "shapley", "shares", "dominance"):
        found[table] = means({key: each[here] for key, each in columns[table].items()})
    found["shares"] = _nested(found["shares"])
    for each in found["dominance"].values():  # the geometric mean of the ratios
        each["value"] = None if each["value"] is None else float(np.exp(each["value"]))
        each["interval"] = each["interval"] and [float(np.exp(end)) for end in each["interval"]]
    return found


def _nested(flat: Mapping[Any, Any]) -> dict[str, Any]:
    """Return {(a, b): value} as {a: {b: value}}; other keys as they are."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(key, tuple):
            found.setdefault(key[0], {})[key[1]] = value
        else:
            found[key] = value
    return found


def _extremes(samples: Sequence[dict[str, Any]], modality: str, ablate: str, examples: int) -> dict[str, list[int]]:
    """Return the places of the samples with this modality in which its Shapley value is largest, and smallest."""
    mine = [sample for sample in samples if modality in sample["modalities"]]
    mine.sort(key=lambda sample: (-sample["shapley"][ablate][modality], sample["place"]))
    taken = min(examples, (len(mine) + 1) // 2)
    places = [sample["place"] for sample in mine]
    return {"most": places[:taken], "least": places[::-1][: min(taken, len(mine) - taken)]}


def _vulnerability(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Figures]]:
    """Return accuracy and log-likelihood by modality and level of noise, of the samples that have the modality; "0" is none."""
    found: dict[str, dict[str, Figures]] = {}
    for name in records[0].get("noise", {}):
        mine = [record for record in records if name in record["modalities"]]
        clean = [_as_given(record) for record in mine]
        levels = {"0": clean, **{level: [r["noise"][name][level] for r in mine] for level in records[0]["noise"][name]}}
        found[name] = {
            level: {
                "accuracy": proportion(int(sum(one["correct"] for one in values)), len(values)),
                **means({"log_likelihood": np.array([one["log_likelihood"] for one in values])}),
            }
            for level, values in levels.items()
        }
    return found


def _as_given(record: dict[str, Any]) -> dict[str, float]:
    """Return log-likelihood and correctness of a sample with everything available: its last coalition."""
    ablate = next(iter(record["log_likelihood"]))
    return {name: list(record[name][ablate].values())[-1] for name in ("log_likelihood", "correct")}


# --- tables


def number(figure: Figures | None, digits: int = 2) -> str:
    """Return such as "0.41 [0.30, 0.52]"; "-" for a figure that is not defined."""
    if figure is None or figure["value"] is None:
        return "-"
    ends = figure["interval"]
    between = "" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{figure['value']:.{digits}f}{between}"


def contribution_table(diagnosis: Diagnosis, ablate: str) -> Table:
    """Return one line a question type: accuracy, Shapley values, and the shares of the first two modalities."""
    groups = diagnosis.contributions[ablate]
    overall = groups[ALL]
    players, pair = list(overall["shapley"]), next(iter(overall["shares"]), None)
    shares = [] if pair is None else list(overall["shares"][pair])
    full = list(overall["accuracy"])[-1]
    rows = []
    for name, figures in groups.items():
        cells = [number(figures["shapley"][player], 3) for player in players]
        cells += [number(figures["shares"][pair][share], 3) for share in shares]
        rows.append([name, str(figures["n"]), number(figures["accuracy"][full], 1), *cells])
    unit = "nats per answer token" if diagnosis.value == "log_likelihood" else diagnosis.value
    return Table(
        f"{ablate}: what each modality adds ({unit})",
        ["question", "n", "accuracy %", *(f"Shapley {player}" for player in players), *shares],
        rows,
        notes=[f"95 % intervals in brackets ({BOOTSTRAP}; accuracy: Wilson)"],
        emphasised=frozenset({0}),
    )


def coalition_table(diagnosis: Diagnosis, ablate: str) -> Table:
    """Return one line a coalition over all samples: accuracy, log-likelihood, lift."""
    overall = diagnosis.contributions[ablate][ALL]
    rows = [
        [name, number(overall["accuracy"][name], 1), number(each, 3), number(overall["lift"].get(name), 3)]
        for name, each in overall["log_likelihood"].items()
    ]
    return Table(f"{ablate}: available modalities", ["available", "accuracy %", "log-likelihood", "lift"], rows)


def share_table(diagnosis: Diagnosis) -> Table | None:
    """Return the shares of update and Fisher information by modality; None without a MokA adapter."""
    found = diagnosis.gradients
    if found is None:
        return None
    rows = [
        [name, f"{100 * share:.1f}", f"{100 * found['fisher_shares'].get(name, 0.0):.1f}"]
        for name, share in found["update_shares"].items()
    ]
    rate = f"IMoD's non-text dominance rate: {100 * found['non_text_dominance_rate']:.1f} %"
    return Table("gradient of B by modality", ["modality", "update %", "Fisher %"], rows, notes=[rate])
