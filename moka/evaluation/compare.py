"""Several methods, several seeds, one table: the paper's comparisons on any configuration."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch

import moka
from moka.adapter.config import OF_MOKA, PRESETS
from moka.adapter.rivals import RIVALS
from moka.config import MOKA_ONLY, PEFT_METHODS
from moka.data.sources import describe_source
from moka.errors import MokaError, nearest
from moka.io import read_json, write_json
from moka.modeling.build import adapter_parameters, build_model
from moka.training import RunConfig, config_from_dict, load_config, run_training
from moka.training.run_dir import CONFIG, CONNECTOR, SUMMARY

from .comparison import FORMAT, RESULT, summarise, write_comparison
from .evaluate import AS_GIVEN, evaluate, open_questions, write

_SETTINGS_OF_MOKA = ("uni_modal_lora", "moka_no_interaction", "moka_reversed", "moka_mean")
_OFFICIAL = ("official-avt", "official-vt")
# Method -> what differs in the adapter section.
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in (*PEFT_METHODS, *RIVALS, "moka")},
    **{name: {"method": "moka", **PRESETS[name]} for name in _SETTINGS_OF_MOKA},
    **{
        name: {
            **{"method": "moka", "preset": name, "interaction": "question", "share_b": True},
            **{key: value for key, value in PRESETS[name].items() if key != "modalities"},
        }
        for name in _OFFICIAL
    },
}


def compare(
    config: RunConfig,
    methods: list[str],
    seeds: int,
    match_params: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Train and evaluate every method with every seed; returns and writes ``comparison.json``, ``.md`` and ``.tex``.

    Stage 1 (where the configuration has it) is trained once a seed and shared by the methods of that seed, so that they
    differ in the adapter only. With ``match_params`` each method's rank is the one whose number of trainable adapter
    parameters is nearest to MokA's; alpha / r stays as configured. The files are written again after every run, and name
    the runs that are missing.

    Args:
        command: the command line that asked for it, kept with the result.

    Raises:
        MokaError: an unknown method, or no test data.
    """
    methods = [method.strip() for method in methods]
    _check(config, methods, seeds)
    root = Path(config.output.dir)
    adapters = {method: _adapter_section(config, method) for method in methods}
    if match_params:
        _match(config, adapters)
    first = int(config.training.get("seed", 42))
    numbers = list(range(first, first + seeds))
    plan = {(m, seed): _run_config(config, adapters[m], root, m, seed) for seed in numbers for m in methods}
    records = {key: record for key, changed in plan.items() if (record := _finished(changed))}

    def result() -> dict[str, Any]:
        return {
            "format": FORMAT,
            "data": describe_source(config.data.test),
            "seeds": numbers,
            "matched_parameters": match_params,
            "command": command,
            "missing": [{"method": m, "seed": seed} for m, seed in plan if (m, seed) not in records],
            "methods": {
                m: {
                    "adapter": adapters[m],
                    **summarise({seed: records[m, seed] for seed in numbers if (m, seed) in records}),
                }
                for m in methods
            },
        }

    again = sum((Path(c.output.dir) / RESULT).exists() for key, c in plan.items() if key not in records)
    if again:
        print(f"note: {again} runs were made with other settings and are made again; another output.dir keeps both.")
    # What is wrong with the data is reported before anything is trained.
    open_questions(config.data.test, "test", config.data.media_root)
    write_comparison(root, result())
    for seed in numbers:
        _stage_one(config, root, seed)
        for method in methods:
            if (method, seed) not in records:
                records[method, seed] = _one_run(plan[method, seed], progress)
                write_comparison(root, result())
    return result()


def _check(config: RunConfig, methods: list[str], seeds: int) -> None:
    """Refuse what would fail, or compare nothing, after hours of training."""
    unknown = next((method for method in methods if method not in METHODS), "")
    problems = {
        f"--methods: name each method once; got {', '.join(methods) or 'none'}.": len({*methods})
        < max(1, len(methods)),
        f"--methods: unknown {unknown!r}; known: {', '.join(METHODS)}.{nearest(unknown, METHODS)}": unknown,
        f"--seeds: at least 1 is expected, got {seeds}.": seeds < 1,
        "data.test is not set, and a comparison is made on it.": config.data.test is None,
        f"stages: {config.stages} trains no adapter to compare; set stages: [1, 2] or [2].": 2 not in config.stages,
        f"output.dir: {config.output.dir} has a single run; choose another folder with output.dir=...": (
            Path(config.output.dir) / CONFIG
        ).exists(),
    }
    for problem, found in problems.items():
        if found:
            raise MokaError(problem)


def _adapter_section(config: RunConfig, method: str) -> dict[str, Any]:
    own = config.to_dict()["adapter"]
    section = {**own, **METHODS[method]}
    if section["method"] in PEFT_METHODS:
        return {key: value for key, value in section.items() if key not in MOKA_ONLY}
    if section["method"] != own["method"]:
        section.pop("method_options")
    if section["method"] in RIVALS:
        section = {**{key: value for key, value in section.items() if key not in OF_MOKA}, "preset": "paper"}
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
    """Set each method's rank so that its adapter has about as many parameters as MokA's.

    Raises:
        MokaError: a method has more than MokA with rank 1.
    """
    model, _ = build_model(config.model)

    def parameters(section: dict[str, Any]) -> int:
        return adapter_parameters(model, _with(config, adapter=section).adapter)

    wanted = parameters(_adapter_section(config, "moka"))
    for method, section in adapters.items():
        ratio = section["alpha"] / section["r"]
        # The count is a line in the rank: gates, and DoRA's magnitudes, have none.
        first, second = (parameters({**section, "r": r}) for r in (1, 2))
        rank = round(1 + (wanted - first) / (second - first))
        if rank < 1:
            raise MokaError(
                f"--match-params: {method} has {first:,} parameters with rank 1, and moka {wanted:,} with adapter.r "
                f"{config.adapter['r']}. Raise adapter.r, or leave {method} or --match-params out."
            )
        section["r"] = rank
        section["alpha"] = ratio * section["r"]


def _stage_one_folder(root: Path, seed: int) -> Path:
    return root / f"seed{seed}" / "stage1"


def _stage_one(config: RunConfig, root: Path, seed: int) -> None:
    """Train the connectors of one seed, unless they are there already."""
    if 1 not in config.stages:
        return
    folder = _stage_one_folder(root, seed)
    changed = _with(config, stages=[1], training__seed=seed, output__dir=str(folder), data__validation=None)
    # What stage 1 does not read may have changed since.
    for section in ("adapter", "evaluation"):
        setattr(changed, section, getattr(RunConfig(), section))
    changed.training = {"seed": seed}
    if not (folder / SUMMARY).exists() or load_config(folder / CONFIG).to_dict() != changed.to_dict():
        run_training(changed, overwrite=True)


def _run_config(config: RunConfig, section: dict[str, Any], root: Path, method: str, seed: int) -> RunConfig:
    """Return what one method trains with one seed; the alignment settings tell which connectors it starts from."""
    connectors = [str(_stage_one_folder(root, seed) / CONNECTOR)] if 1 in config.stages else config.model.connectors
    return _with(
        config,
        stages=[2],
        adapter=section,
        training__seed=seed,
        output__dir=str(root / f"seed{seed}" / method),
        model__connectors=connectors,
    )


def _settings(changed: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(changed.to_dict()))


def _finished(changed: RunConfig) -> dict[str, Any] | None:
    """Return the record of a run that was made before, with the same settings."""
    done = Path(changed.output.dir) / RESULT
    record = read_json(done, dict) if done.exists() else {}
    return record if record.get("settings") == _settings(changed) else None


def _one_run(changed: RunConfig, progress: bool) -> dict[str, Any]:
    """Train and evaluate one method with one seed."""
    folder, evaluation = Path(changed.output.dir), changed.evaluation
    run_training(changed, overwrite=True)
    gc.collect()
    result = evaluate(
        moka.load(folder),
        open_questions(changed.data.test, "test", changed.data.media_root),
        folder,
        size=evaluation.size,
        blank=False,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        progress=progress,
    )
    write(result, folder)
    summary = read_json(folder / SUMMARY)
    record = {
        "settings": _settings(changed),
        "parameters": summary["trainable parameters, adapter"],
        "scores": {name: s["accuracy"] for name, s in result["conditions"][AS_GIVEN].items()},
        "n": result["protocol"]["n"],
        "torch": torch.__version__,
    }
    write_json(folder / RESULT, record)
    return record
