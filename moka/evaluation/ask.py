"""Ask a benchmark's questions and write the raw answers, one JSON record a line, for ``moka score``.

Answers are written as they come. An interrupted run goes on where it was, as long as nothing that the answers depend on
has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import moka
from moka.data.formats import FORMATS
from moka.data.media import AudioWindows, BadMediaError, DecodedDataset
from moka.data.sources import describe_source, open_samples
from moka.errors import MokaError, nearest
from moka.inference import LoadedModel
from moka.training import RunConfig, load_config
from moka.training.files import read_json, write_json
from moka.training.folder import CONFIG

from .benchmarks import BENCHMARKS, score

PREDICTIONS, SETTINGS, SCORE = "predictions.jsonl", "settings.json", "score.json"
# Of a sample, beside its answer, what scorers read.
_CARRIED = ("category", "group", "options")


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
    """Ask a trained run a benchmark's questions, and score them by every protocol of the benchmark.

    Writes ``RUN/benchmarks/NAME/predictions.jsonl`` (every raw answer), ``settings.json`` and ``score.json``.

    Args:
        name: a key of ``moka.evaluation.BENCHMARKS``; the run's ``evaluation.benchmarks`` tells where its data lie.
        root: folder with the data instead, in the benchmark's published layout; split and format of them, where they
            are not the benchmark's own.
        loaded: the run's model, where it is loaded already; device and backbone: as for ``moka.load``, where not.
    Returns:
        protocol -> result, as ``moka.evaluation.score`` gives it.

    Raises:
        MokaError: an unknown benchmark, or one whose data the run does not name; media that cannot be used, unless
            ``data.on_bad_media`` of the run allows for them.
    """
    if name not in BENCHMARKS:
        raise MokaError(
            f"benchmark {name!r} is not known; allowed are {', '.join(BENCHMARKS)}.{nearest(name, BENCHMARKS)}"
        )
    config = load_config(Path(run) / CONFIG)
    data, settings = config.data, config.evaluation
    source = benchmark_source(config, name, root, split, format)
    tolerate = data.on_bad_media != "error"
    opened = open_samples(source, "test", media_root=data.media_root, require_answer=False)
    missing = [] if tolerate else opened.missing_media(limit=1)
    if missing:
        raise MokaError(
            f"{'; '.join(missing)}. Put the files there, or set data.on_bad_media in the run's config.yaml."
        )
    windows = None if data.audio_windows is None else AudioWindows.from_dict(data.audio_windows)
    samples = DecodedDataset(opened, video_frames=data.video_frames, audio_windows=windows)
    folder = Path(run) / "benchmarks" / name
    records = ask(
        loaded or moka.load(run, device=device, backbone=backbone),
        samples,
        folder,
        source=describe_source(source),
        size=size or settings.size,
        batch_size=batch_size or settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        tolerate_bad_media=tolerate,
        progress=progress,
    )
    failed = [record for record in records if "error" in record]
    if failed:
        print(f"note: {len(failed)} of {len(records)} questions had media that cannot be used, and count as wrong.")
    results = {protocol: score(name, records, protocol) for protocol in BENCHMARKS[name].protocols}
    write_json(folder / SCORE, results)
    return results


def benchmark_source(
    config: RunConfig, name: str, root: str | None = None, split: str | None = None, format: str | None = None
) -> Any:
    """Where a benchmark's data are: under ``root``, or as the run's configuration says.

    Raises:
        MokaError: an unknown benchmark, or one whose data neither tells.
    """
    if name not in BENCHMARKS:
        raise MokaError(
            f"benchmark {name!r} is not known; allowed are {', '.join(BENCHMARKS)}.{nearest(name, BENCHMARKS)}"
        )
    if root is None:
        source = config.evaluation.benchmarks.get(name)
        if source is None:
            there = ", ".join(config.evaluation.benchmarks) or "none"
            raise MokaError(f"benchmark {name}: this run's evaluation.benchmarks names {there}; give --root FOLDER.")
        return {**source, "split": split} if split and isinstance(source, dict) else source
    if format is None:
        serving = [one.name for one in FORMATS.values() if one.benchmark == name]
        if name not in serving and len(serving) != 1:
            raise MokaError(f"benchmark {name}: several formats hold its data; give --format: {', '.join(serving)}.")
        format = name if name in serving else serving[0]
    return {"format": format, "root": root, **({"split": split} if split else {})}


def ask(
    loaded: LoadedModel,
    samples: Any,
    folder: str | Path,
    *,
    source: str,
    size: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    tolerate_bad_media: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The model's answer to the last question of every sample, greedily decoded.

    Args:
        samples: map-style data set of samples with decoded media, with the truth under ``reference`` or as the
            assistant's last message.
        folder: gets ``predictions.jsonl`` and ``settings.json``.
        source: what the samples are, for the settings.
        size: ask that many, from the first.
        tolerate_bad_media: a question whose media cannot be used gets an empty answer, which counts as wrong, and an
            ``error``; without it, it ends the evaluation.
    Returns:
        records {id, prediction, reference, category?, group?, options?, error?} in the order of the samples.

    Raises:
        MokaError: a sample without a truth, and under ``tolerate_bad_media=False`` a file that cannot be used.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n = min(size or len(samples), len(samples))
    settings = {
        "source": source,
        "n": n,
        "decoding": f"greedy, at most {max_new_tokens} new tokens",
        "chat_template": loaded.processor.chat_template or "the tokenizer's own",
        "adapter": str(loaded.folder),
        "moka": moka.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    records = _already(folder, settings)
    write_json(folder / SETTINGS, settings)
    with (
        open(folder / PREDICTIONS, "a", encoding="utf-8") as file,
        tqdm(total=n, initial=len(records), desc="asking", unit="question", disable=not progress) as bar,
    ):
        for start in range(len(records), n, batch_size):
            batch = list(_read(samples, range(start, min(start + batch_size, n)), tolerate_bad_media))
            asked = [(record, question) for record, question in batch if question is not None]
            answers = _answers(loaded, asked, max_new_tokens)
            for (record, _), answer in zip(asked, answers, strict=True):
                record["prediction"] = answer
            records += [record for record, _ in batch]
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record, _ in batch)
            file.flush()
            bar.update(len(batch))
    return records


def _answers(loaded: LoadedModel, asked: list[tuple[dict[str, Any], list[dict]]], max_new_tokens: int) -> list[str]:
    if not asked:
        return []
    names = [f"sample {record['id']!r}" for record, _ in asked]
    return loaded.generate_batch([question for _, question in asked], max_new_tokens=max_new_tokens, names=names)


def _already(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of an interrupted evaluation with the same settings; others are begun anew."""
    path = folder / PREDICTIONS
    same = path.exists() and (folder / SETTINGS).exists() and read_json(folder / SETTINGS) == settings
    kept = []
    for line in path.read_text("utf-8").splitlines() if same else []:
        try:
            kept.append(json.loads(line))
        except ValueError:
            break  # it was ended while it wrote this line
    if kept:
        print(f"note: {len(kept)} of {settings['n']} answers are in {path} already; going on from there.")
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
    return kept


def _read(samples: Any, indices: range, tolerate: bool) -> Iterator[tuple[dict[str, Any], list[dict] | None]]:
    """Each sample as its record, with an empty prediction for now, and the chat up to the question."""
    for index in indices:
        try:
            sample = samples[index]
        except BadMediaError as error:
            if not tolerate:
                raise
            sample = {**samples.dataset[index], "error": str(error)}
        record = {"id": sample["id"], "prediction": "", "reference": _truth(sample)}
        record |= {key: sample[key] for key in (*_CARRIED, "error") if key in sample}
        yield record, None if "error" in sample else _question(sample)


def _question(sample: dict[str, Any]) -> list[dict]:
    """The chat before the assistant's last message."""
    messages = sample["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _truth(sample: dict[str, Any]) -> Any:
    if "reference" in sample:
        return sample["reference"]
    last = sample["messages"][-1]
    if last["role"] != "assistant":
        raise MokaError(
            f"sample {sample['id']!r} has no 'reference', and no assistant's answer at its end: nothing to score against."
        )
    return " ".join(part["text"] for part in last["content"] if part["type"] == "text")
