"""Free-running evaluation: the model answers unseen questions, as it is and with each modality blanked; and benchmarks."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import moka
from moka.data.formats import FORMATS
from moka.data.sources import check_files, open_samples
from moka.distributed import all_gather_object, print_main, rank_and_world_size, run_on_all, run_on_main
from moka.errors import MokaError
from moka.inference import LoadedModel
from moka.io import write_json, write_text
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.media import AudioFeatures, Waveform
from moka.training import RunConfig, load_config
from moka.training.run_dir import CONFIG

from .answers import ask, generation_settings, parts
from .benchmarks import BENCHMARKS, find_benchmark, score
from .benchmarks.text import library
from .scoring import Tally
from .tables import Table

OVERALL, AS_GIVEN = "overall", "as given"
SCORE = "score.json"
PARTIAL = "evaluation.partial"


def open_questions(source: Any, split: Any, media_root: str | None = None) -> Any:
    """Open the questions of ``source``, media undecoded.

    Args:
        media_root: folder of their media; default: that of the file.
    Raises:
        MokaError: a file is missing.
    """
    samples = open_samples(source, split, media_root=media_root)
    check_files(samples)
    return samples


def evaluate(
    loaded: LoadedModel,
    samples: Any,
    folder: str | Path | None = None,
    *,
    source: Any = None,
    size: int | None = None,
    blank: bool = True,
    blank_size: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer each sample's last question and compare it with the reference, word for word. Every process has to call it.

    Args:
        loaded: from ``moka.load``.
        samples: map-style data set of samples with an assistant's answer at the end.
        folder: of the run; ``evaluation.partial`` in it has the answers until all are there, and an interrupted evaluation
            resumes from it. None: nothing is kept.
        size: questions asked (default: all); blank_size: of the repetitions with a modality blanked.
    Returns:
        {"conditions": {condition: {category: {right, n, empty, accuracy, interval}}}, "predictions": [...], and what
        the figures depend on: decoding, prompt template, hash of the questions, versions}.
    """
    n = min(size or len(samples), len(samples))
    blanked = min(blank_size or n, n)
    kept_in = Path(tempfile.mkdtemp()) if folder is None else Path(folder) / PARTIAL
    ask_all = partial(
        ask, loaded, samples, source=source, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    result: dict[str, Any] = {"conditions": {}, "predictions": []}
    plan: list[tuple[str, int, set[str]]] = [(AS_GIVEN, n, set())]
    if blank:
        kinds = {
            name: {kind for kind, type_id in MEDIA_TYPE_IDS.items() if type_id in spec["type_ids"]}
            for name, spec in loaded.processor.modalities.items()
        }
        present = run_on_all(lambda: _media_kinds(samples, n))
        plan += [(f"{name} blanked", blanked, own) for name, own in kinds.items() if present & own]
    digest = hashlib.sha256()
    for condition, count, own in plan:
        records = ask_all(
            folder=kept_in / condition.replace(" ", "-"),
            condition=condition,
            size=count,
            transform=partial(blank_media, kinds=own) if own else None,
        )
        tallies: dict[str, Tally] = {}
        overall = Tally()
        for record in records:
            category = record.get("category") or "all"
            right = tallies.setdefault(category, Tally()).add(record["prediction"], record["reference"])
            overall.add(record["prediction"], record["reference"])
            kept = {"condition": condition, "id": record["id"], "category": category}
            kept |= {"prediction": record["prediction"], "reference": record["reference"], "right": right}
            result["predictions"].append(kept)
            if condition == AS_GIVEN:
                digest.update(f"{record['id']}\n{record['question']}\n{record['reference']}\n".encode())
        result["conditions"][condition] = {**{k: t.to_dict() for k, t in tallies.items()}, OVERALL: overall.to_dict()}
    if folder is None:
        shutil.rmtree(kept_in)
    settings = generation_settings(loaded, None, max_new_tokens)
    how = ", ".join(["greedy", *map(str, loaded.settings.values())])
    result["protocol"] = {
        "scoring": "exact match of the full answer, case and outer punctuation ignored; 95 % Wilson intervals",
        "decoding": f"{how}, free-running, at most {max_new_tokens} new tokens",
        "quantization": loaded.quantization or "none",
        **{key: settings[key] for key in ("chat_template", "moka", "torch", "transformers")},
        "questions_sha256": digest.hexdigest(),
        "n": n,
        "n_blanked": blanked,
        "empty_answers": result["conditions"][AS_GIVEN][OVERALL]["empty"],
    }
    return result


def _media_kinds(samples: Any, n: int) -> set[str]:
    """Return the kinds of media that the questions have; each process looks at a share of them."""
    rank, world = rank_and_world_size()
    own = {part["type"] for i in range(rank, n, world) for message in samples[i]["messages"] for part in parts(message)}
    return set().union(*all_gather_object(own)) - {"text"}


def blank_media(messages: list[dict], kinds: set[str]) -> list[dict]:
    """Return the same chat with every medium of these types blanked: a black picture, silence."""
    return [
        {
            "role": message["role"],
            "content": [
                {**part, part["type"]: _blank(part[part["type"]])} if part["type"] in kinds else part
                for part in parts(message)
            ],
        }
        for message in messages
    ]


def _blank(medium: Any) -> Any:
    if isinstance(medium, Image.Image):
        return Image.new("L", medium.size)  # in its own mode zeros may be transparent, or white by a palette
    if isinstance(medium, Waveform):
        return Waveform(np.zeros_like(medium.samples), medium.rate)
    if isinstance(medium, AudioFeatures):
        return AudioFeatures(np.zeros_like(medium.values), medium.kind)
    return [_blank(frame) for frame in medium]


def show(result: dict[str, Any], title: str) -> None:
    """Print the result as a table: a row for each kind of question, a column for each condition."""
    conditions = result["conditions"]
    names = list(conditions[AS_GIVEN])
    rows = [[name, *(_cell(scores.get(name)) for scores in conditions.values())] for name in names]
    emphasised = frozenset([names.index(OVERALL)])
    Table(title, ["question", *conditions], rows, [result["protocol"]["scoring"]], emphasised=emphasised).show()


def _cell(score: dict | None) -> str:
    if score is None:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} %  [{100 * low:.1f}, {100 * high:.1f}]  n={score['n']}"


def write(result: dict[str, Any], run: str | Path) -> Path:
    """Write RUN/evaluation.json (figures) and RUN/predictions.jsonl (every answer); return the path of the figures."""
    run = Path(run)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result["predictions"]]
    write_text(run / "predictions.jsonl", "".join(lines))
    path = run / "evaluation.json"
    write_json(path, {key: value for key, value in result.items() if key != "predictions"})
    shutil.rmtree(run / PARTIAL, ignore_errors=True)
    return path


def evaluate_benchmark(
    run: str | Path,
    name: str,
    *,
    root: str | None = None,
    split: str | None = None,
    format: str | None = None,
    size: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    backbone: str | None = None,
    loaded: LoadedModel | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask a trained run a benchmark's questions, and score them by every protocol of the benchmark. Every process has to call it.

    Writes ``RUN/benchmarks/NAME/predictions.jsonl`` (every raw answer), ``settings.json`` and ``score.json``.

    Args:
        name: a key of ``moka.evaluation.BENCHMARKS``; the run's ``evaluation.benchmarks`` says where its data are.
        root: folder with the data instead, in the benchmark's published layout; split and format of them, if they
            are not the benchmark's own.
        loaded: the run's model, if it is loaded already; device and backbone: as for ``moka.load``, if not.
    Returns:
        protocol -> result, as ``moka.evaluation.score`` gives it.

    Raises:
        MokaError: an unknown benchmark, or one whose data the run does not name; media that cannot be used, unless
            ``data.on_bad_media`` of the run allows for them.
    """
    config = load_config(Path(run) / CONFIG)
    settings = config.evaluation
    source = benchmark_source(config, name, root, split, format)
    tolerate = config.data.on_bad_media != "error"
    samples = open_benchmark(config, name, source)
    loaded = loaded or moka.load(run, device=device, backbone=backbone)
    folder = Path(run) / "benchmarks" / name
    records = ask(
        loaded,
        samples,
        folder,
        source=source,
        size=size or settings.size,
        batch_size=batch_size or settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        tolerate_bad_media=tolerate,
        progress=progress,
    )
    failed = sum("error" in record for record in records)
    if failed:
        print_main(f"note: {failed} of {len(records)} questions had media that cannot be used, and count as wrong.")
    results = {protocol: score(name, records, protocol) for protocol in BENCHMARKS[name].protocols}
    run_on_main(lambda: write_json(folder / SCORE, results))
    return results


def open_benchmark(config: RunConfig, name: str, source: Any) -> Any:
    """Open the questions of a benchmark, media undecoded.

    Raises:
        MokaError: a library that its figures need is missing, or files are, unless the run tolerates bad media.
    """
    for module in BENCHMARKS[name].libraries:
        library(module, name)
    samples = open_samples(source, "test", media_root=config.data.media_root, require_answer=False)
    missing = [] if config.data.on_bad_media != "error" else samples.missing_media(limit=1)
    if missing:
        raise MokaError(
            f"{'; '.join(missing)}. Put the files there, or set data.on_bad_media: skip in the run's config.yaml to have "
            "such questions count as wrong."
        )
    return samples


def benchmark_source(
    config: RunConfig, name: str, root: str | None = None, split: str | None = None, format: str | None = None
) -> Any:
    """Return where a benchmark's data are: under ``root``, or as the run's configuration says.

    Raises:
        MokaError: an unknown benchmark, or one whose data neither names.
    """
    find_benchmark(name)
    if root is None:
        source = config.evaluation.benchmarks.get(name)
        if source is None:
            there = ", ".join(config.evaluation.benchmarks) or "none"
            raise MokaError(f"benchmark {name}: this run's evaluation.benchmarks names {there}; give --root FOLDER.")
        if format is not None or (split is not None and not isinstance(source, dict)):
            raise MokaError(
                f"benchmark {name}: --format and --split belong to a --root FOLDER; give it, or leave them out."
            )
        return {**source, "split": split} if split else source
    if format is None:
        serving = [one.name for one in FORMATS.values() if one.benchmark == name]
        if name not in serving and len(serving) != 1:
            raise MokaError(f"benchmark {name}: several formats hold its data; give --format: {', '.join(serving)}.")
        format = name if name in serving else serving[0]
    return {"format": format, "root": root, **({"split": split} if split else {})}
