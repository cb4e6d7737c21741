"""Several methods, several seeds, one table: the paper's comparisons on any configuration."""

from __future__ import annotations

import copy
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import moka
from moka.data import open_source
from moka.errors import MokaError, nearest
from moka.training import RunConfig, config_from_dict, load_config, run_training
from moka.training.arguments import LORA_HAS_NOT
from moka.training.build import adapter_parameters, build_model
from moka.training.files import read_json, write_json, write_text
from moka.training.folder import CONFIG, CONNECTOR, SUMMARY

from .evaluate import AS_GIVEN, OVERALL, evaluate, write

# Method -> what differs in the adapter section.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "multiple_lora": {"method": "moka", "share_b": False, "interaction": "none"},
    "moka": {"method": "moka"},
    "moka_no_interaction": {"method": "moka", "interaction": "none"},
    "moka_reversed": {"method": "moka", "interaction": "reversed"},
    "moka_mean": {"method": "moka", "interaction": "mean"},
}


def compare(
    config: RunConfig, methods: list[str], seeds: int, match_params: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train and evaluate every method with every seed; returns and writes ``comparison.json`` and ``comparison.md``.

    Stage 1 (where the configuration has it) is trained once a seed and shared by the methods of that seed, so that they
    differ in the adapter alone. With ``match_params`` each method's rank is the one whose number of trainable adapter
    parameters is nearest to MokA's; alpha / r stays as configured.

    Raises:
        MokaError: an unknown method, or no test data.
    """
    methods = [method.strip() for method in methods]
    if not methods or len(set(methods)) < len(methods):
        raise MokaError(f"--methods: name each method once; got {', '.join(methods) or 'none'}.")
    for method in methods:
        if method not in METHODS:
            raise MokaError(f"--methods: unknown {method!r}; known: {', '.join(METHODS)}.{nearest(method, METHODS)}")
    if seeds < 1:
        raise MokaError(f"--seeds: at least 1 is due, got {seeds}.")
    if config.data.test is None:
        raise MokaError("data.test is not set, and a comparison is made on it.")
    if 2 not in config.stages:
        raise MokaError(f"stages: {config.stages} trains no adapter to compare; set stages: [1, 2] or [2].")
    root = Path(config.output.dir)
    if (root / CONFIG).exists():
        raise MokaError(f"output.dir: {root} holds a single run; choose another folder with output.dir=...")
    adapters = {method: _adapter_section(config, method) for method in methods}
    if match_params:
        _match(config, adapters)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    first = int(config.training.get("seed", 42))
    for seed in range(first, first + seeds):
        connectors = _stage_one(config, root / f"seed{seed}" / "stage1", seed)
        for method in methods:
            folder = root / f"seed{seed}" / method
            runs[method].append(_one_run(config, adapters[method], folder, seed, connectors, progress))
    result = {
        "data": config.data.test,
        "seeds": list(range(first, first + seeds)),
        "matched_parameters": match_params,
        "methods": {m: {"adapter": adapters[m], **_summary(runs[m])} for m in methods},
    }
    write_json(root / "comparison.json", result)
    write_text(root / "comparison.md", markdown(result))
    _show(result)
    print(f"written: {root / 'comparison.json'}, {root / 'comparison.md'}")
    return result


def _adapter_section(config: RunConfig, method: str) -> dict[str, Any]:
    section = {**config.to_dict()["adapter"], **METHODS[method]}
    if section["method"] == "lora":
        section |= {**dict.fromkeys(LORA_HAS_NOT), "share_b": True}
    return section


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy of the configuration with dotted keys (written with __) changed."""
    raw = copy.deepcopy(config.to_dict())
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = raw
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config_from_dict(raw, "compare")


def _match(config: RunConfig, adapters: dict[str, dict[str, Any]]) -> None:
    """Set each method's rank so that its adapter has about as many parameters as MokA's."""
    model, _ = build_model(config.model)

    def parameters(section: dict[str, Any]) -> int:
        return adapter_parameters(model, _with(config, adapter=section).adapter)

    wanted = parameters(_adapter_section(config, "moka"))
    for section in adapters.values():
        ratio = section["alpha"] / section["r"]
        # The count is proportional to the rank.
        section["r"] = max(1, round(wanted / parameters({**section, "r": 1})))
        section["alpha"] = ratio * section["r"]


def _stage_one(config: RunConfig, folder: Path, seed: int) -> list[str]:
    """The connectors of one seed, trained unless they lie there already."""
    if 1 not in config.stages:
        return config.model.connectors
    changed = _with(config, stages=[1], training__seed=seed, output__dir=str(folder), data__validation=None)
    # What stage 1 does not read may have changed since.
    for section in ("adapter", "evaluation"):
        setattr(changed, section, getattr(RunConfig(), section))
    changed.training = {"seed": seed}
    if not (folder / SUMMARY).exists() or load_config(folder / CONFIG).to_dict() != changed.to_dict():
        run_training(changed, overwrite=True)
    return [str(folder / CONNECTOR)]


def _one_run(
    config: RunConfig, section: dict[str, Any], folder: Path, seed: int, connectors: list[str], progress: bool
) -> dict[str, Any]:
    """Train and evaluate one method with one seed, unless that was done already."""
    done = folder / "comparison.json"
    changed = _with(
        config,
        stages=[2],
        adapter=section,
        training__seed=seed,
        output__dir=str(folder),
        model__connectors=connectors,
    )
    # The alignment settings tell which connectors they are.
    settings = json.loads(json.dumps(changed.to_dict()))
    if done.exists():
        record = read_json(done)
        if record["settings"] == settings:
            return record
    run_training(changed, overwrite=True)
    gc.collect()
    evaluation = config.evaluation
    result = evaluate(
        moka.load(folder),
        open_source(
            config.data.test or "", "test", media_root=config.data.media_root, video_frames=config.data.video_frames
        ),
        size=evaluation.size,
        blank=False,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        progress=progress,
    )
    write(result, folder)
    summary = read_json(folder / SUMMARY)
    record = {
        "settings": settings,
        "parameters": int(summary["trainable parameters, adapter"].replace(",", "")),
        "scores": {name: s["accuracy"] for name, s in result["conditions"][AS_GIVEN].items()},
        "n": result["protocol"]["n"],
        "torch": torch.__version__,
    }
    write_json(done, record)
    return record


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    categories = runs[0]["scores"]
    values = {name: [run["scores"][name] for run in runs] for name in categories}
    return {
        "parameters": runs[0]["parameters"],
        "n": runs[0]["n"],
        "mean": {name: statistics.fmean(v) for name, v in values.items()},
        "spread": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()},
        "runs": values,
    }


def _rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    categories = list(next(iter(result["methods"].values()))["mean"])
    rows = []
    for method, summary in result["methods"].items():
        cells = [method, str(summary["adapter"]["r"]), f"{summary['parameters']:,}"]
        for name in categories:
            spread = summary["spread"][name]
            cells.append(f"{100 * summary['mean'][name]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}"))
        rows.append(cells)
    return ["method", "r", "adapter parameters", *categories], rows


def markdown(result: dict[str, Any]) -> str:
    """The table in Markdown, with what it was made from."""
    header, rows = _rows(result)
    n = next(iter(result["methods"].values()))["n"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    matched = "ranks chosen to match MokA's parameters" if result["matched_parameters"] else "the same rank"
    note = f"Accuracy in %, mean ± standard deviation over seeds {result['seeds']}; N = {n} questions each; {matched}."
    return "\n".join([*lines, "", note, ""])


def _show(result: dict[str, Any]) -> None:
    header, rows = _rows(result)
    table = Table(title=f"{result['data']}, {len(result['seeds'])} seeds", caption="accuracy in %, mean ± deviation")
    for column in header:
        table.add_column(
            column, justify="left" if column == "method" else "right", style="bold" if column == OVERALL else None
        )
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 120).print(table)
