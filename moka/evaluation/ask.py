"""Ask a benchmark's questions and write the raw answers, one JSON record a line, for ``moka score``.

Answers are written as they come. An interrupted run goes on where it was, as long as nothing that the answers depend on
has changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import moka
from moka.data.formats import FORMATS
from moka.data.media import BadMediaError, decode_sample
from moka.data.sources import open_samples
from moka.errors import MokaError, nearest
from moka.inference import LoadedModel
from moka.io import read_json, write_json, write_text
from moka.training import RunConfig, load_config
from moka.training.run_dir import CONFIG

from .benchmarks import BENCHMARKS, score
from .benchmarks.text import library
from .evaluate import words

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
        print(f"note: {failed} of {len(records)} questions had media that cannot be used, and count as wrong.")
    results = {protocol: score(name, records, protocol) for protocol in BENCHMARKS[name].protocols}
    write_json(folder / SCORE, results)
    return results


def open_benchmark(config: RunConfig, name: str, source: Any) -> Any:
    """The questions of a benchmark, media undecoded. What its figures need that is not installed is told now, and missing
    files too, unless the run puts up with them.
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


def ask(
    loaded: LoadedModel,
    samples: Any,
    folder: str | Path,
    *,
    source: Any,
    size: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    tolerate_bad_media: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The model's answer to the last question of every sample, greedily decoded.

    Args:
        samples: map-style data set of checked samples, media undecoded, with the truth under ``reference`` or as the
            assistant's last message.
        folder: gets ``predictions.jsonl`` and ``settings.json``. Answers that are there already, to the same questions
            by the same model with the same settings, are kept; others are moved to ``predictions.previous.jsonl``.
        source: what the samples are, for the settings.
        size: ask that many, from the first.
        tolerate_bad_media: a question whose media cannot be used gets an empty answer and an ``error``, and counts as
            wrong; without it, it ends the evaluation. A later call asks it again.
    Returns:
        records {id, prediction, reference, category?, group?, options?, error?} in the order of the samples.

    Raises:
        MokaError: a sample without a truth, and under ``tolerate_bad_media=False`` a file that cannot be used.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "source": source,
        "decoding": f"greedy, at most {max_new_tokens} new tokens",
        "media": loaded.processor.decoding,
        "chat_template": loaded.processor.chat_template or "the tokenizer's own",
        "weights_sha256": loaded.weights_sha256,
        **({"quantization": loaded.quantization} if loaded.quantization else {}),
        "moka": moka.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    n = min(size or len(samples), len(samples))
    questions = [samples[index] for index in range(n)]
    keys = [_key(sample) for sample in questions]  # a question without a truth is told before anything is moved
    known = _already(folder, json.loads(json.dumps(settings)))
    records = {place: known[key] for place, key in enumerate(keys) if key in known}
    if records:
        print(f"note: {len(records)} of {n} answers are in {folder / PREDICTIONS} already; going on from there.")
    write_json(folder / SETTINGS, settings)
    pending = [place for place in range(n) if place not in records]
    with (
        open(folder / PREDICTIONS, "a", encoding="utf-8") as file,
        tqdm(total=n, initial=len(records), desc="asking", unit="question", disable=not progress) as bar,
    ):
        for start in range(0, len(pending), batch_size):
            places = pending[start : start + batch_size]
            answered = _answer(loaded, [questions[place] for place in places], max_new_tokens, tolerate_bad_media)
            records |= dict(zip(places, answered, strict=True))
            file.writelines(_line(record) for record in answered)
            file.flush()
            bar.update(len(places))
    return [records[place] for place in range(n)]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _key(sample: dict[str, Any]) -> str:
    """What a kept answer must agree on with a question to be its answer."""
    return json.dumps([sample["id"], _asked(sample), _truth(sample)])


def _already(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Key of the question -> record, of earlier answers with the same settings; the file holds these alone afterwards."""
    path = folder / PREDICTIONS
    if not path.exists():
        return {}
    if not (folder / SETTINGS).exists() or read_json(folder / SETTINGS) != settings:
        before = path.with_name("predictions.previous.jsonl")
        path.replace(before)
        print(f"note: earlier answers, of another model or with other settings, were moved to {before}.")
        return {}
    kept = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
            if "error" not in record:
                kept[json.dumps([record["id"], record["question"], record["reference"]])] = record
        except (ValueError, KeyError, TypeError):
            continue  # the end of the file, or a line that was being written when the run was ended
    write_text(path, "".join(map(_line, kept.values())))
    return kept


def _answer(
    loaded: LoadedModel, samples: list[dict[str, Any]], max_new_tokens: int, tolerate: bool
) -> list[dict[str, Any]]:
    """The records of a few samples, in their order."""
    records, asked, chats = [], [], []
    for sample in samples:
        record = {"id": sample["id"], "question": _asked(sample), "prediction": "", "reference": _truth(sample)}
        record |= {key: sample[key] for key in _CARRIED if key in sample}
        records.append(record)
        try:
            decoded = decode_sample(sample, **loaded.decoding)
        except BadMediaError as error:
            if not tolerate:
                raise
            record["error"] = str(error)
            continue
        asked.append(record)
        chats.append(_before_answer(decoded["messages"]))
    if chats:
        names = [f"sample {record['id']!r}" for record in asked]
        answers = loaded.generate_batch(chats, max_new_tokens=max_new_tokens, names=names)
        for record, answer in zip(asked, answers, strict=True):
            record["prediction"] = answer
    return records


def _before_answer(messages: list[dict]) -> list[dict]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _asked(sample: dict[str, Any]) -> str:
    """The text of the chat before the answer."""
    return "\n".join(words([message]) for message in _before_answer(sample["messages"]))


def _truth(sample: dict[str, Any]) -> Any:
    if "reference" in sample:
        return sample["reference"]
    last = sample["messages"][-1]
    if last["role"] != "assistant":
        raise MokaError(
            f"sample {sample['id']!r} has no 'reference', and no assistant's answer at its end: nothing to score against."
        )
    return words([last])
