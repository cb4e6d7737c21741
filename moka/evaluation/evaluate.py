"""Free-running evaluation: the model answers unseen questions, as it is and with each modality blanked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import moka
from moka.data import open_source
from moka.errors import MokaError
from moka.inference import LoadedModel
from moka.io import write_json, write_text
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.media import AudioFeatures, Waveform
from moka.training import RunConfig

from .scoring import Tally

OVERALL, AS_GIVEN = "overall", "as given"


def open_questions(config: RunConfig, source: Any, split: Any) -> Any:
    """The samples of ``source``, decoded as the run of ``config`` decodes its own."""
    data = config.data
    return open_source(
        source,
        split,
        media_root=data.media_root,
        video_frames=data.video_frames,
        audio_windows=data.audio_windows,
    )


def evaluate(
    loaded: LoadedModel,
    samples: Any,
    *,
    size: int | None = None,
    blank: bool = True,
    blank_size: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate an answer to each sample's last question and compare it with the reference, word for word.

    Args:
        loaded: from ``moka.load``.
        samples: map-style data set of samples with decoded media and an assistant's answer at the end.
        size: questions asked (default: all); blank_size: of the repetitions with a modality blanked.
    Returns:
        {"conditions": {condition: {category: {right, n, empty, accuracy, interval}}}, "predictions": [...], and what
        the figures depend on: decoding, prompt template, hash of the questions, versions}.
    """
    n = min(size or len(samples), len(samples))
    blanked = min(blank_size or n, n)
    result: dict[str, Any] = {"conditions": {}, "predictions": []}
    digest = hashlib.sha256()
    present: set[str] = set()
    # Which media there are is known when all questions were asked once.
    waiting: list[tuple[str, int, tuple[str, ...]]] = [(AS_GIVEN, n, ())]
    while waiting:
        condition, count, kinds = waiting.pop(0)
        tallies: dict[str, Tally] = {}
        overall = Tally()
        bar = tqdm(total=count, desc=condition, unit="question", disable=not progress)
        for start in range(0, count, batch_size):
            batch = [samples[i] for i in range(start, min(start + batch_size, count))]
            questions, references = zip(*(_split(sample) for sample in batch), strict=True)
            answers = loaded.generate_batch(
                [_blanked(question, kinds) for question in questions],
                max_new_tokens=max_new_tokens,
                names=[f"sample {sample['id']!r}" for sample in batch],
            )
            for sample, question, answer, reference in zip(batch, questions, answers, references, strict=True):
                category = sample.get("category") or "all"
                hit = tallies.setdefault(category, Tally()).add(answer, reference)
                overall.add(answer, reference)
                record = {"condition": condition, "id": sample["id"], "category": category}
                result["predictions"].append({**record, "prediction": answer, "reference": reference, "right": hit})
                if condition == AS_GIVEN:
                    present |= {part["type"] for message in question for part in _parts(message)}
                    digest.update(f"{sample['id']}\n{words(question)}\n{reference}\n".encode())
            bar.update(len(batch))
        bar.close()
        result["conditions"][condition] = {**{k: t.to_dict() for k, t in tallies.items()}, OVERALL: overall.to_dict()}
        if condition == AS_GIVEN and blank:
            waiting += [
                (f"{name} blanked", blanked, tuple(kinds)) for name, kinds in _kinds(loaded).items() if present & kinds
            ]
    result["protocol"] = {
        "scoring": "exact match of the whole answer, case and outer punctuation ignored; 95 % Wilson intervals",
        "decoding": f"greedy, free-running, at most {max_new_tokens} new tokens",
        "quantization": loaded.quantization or "none",
        "chat_template": loaded.processor.chat_template or "the tokenizer's own",
        "questions_sha256": digest.hexdigest(),
        "n": n,
        "n_blanked": blanked,
        "empty_answers": result["conditions"][AS_GIVEN][OVERALL]["empty"],
        "moka": moka.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return result


def _kinds(loaded: LoadedModel) -> dict[str, set[str]]:
    """Modality of the model -> the types of content parts that go to its encoder."""
    return {
        name: {kind for kind, type_id in MEDIA_TYPE_IDS.items() if type_id in spec["type_ids"]}
        for name, spec in loaded.processor.modalities.items()
    }


def _split(sample: dict) -> tuple[list[dict], str]:
    """The chat up to the last question, and its reference answer."""
    *before, last = sample["messages"]
    if last["role"] != "assistant":
        raise MokaError(f"sample {sample['id']!r}: evaluation needs an assistant's answer at the end of the messages.")
    return before, words([last])


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def words(messages: list[dict]) -> str:
    return " ".join(part["text"] for message in messages for part in _parts(message) if part["type"] == "text")


def _blanked(messages: list[dict], kinds: tuple[str, ...]) -> list[dict]:
    """The same chat with every medium of these types blanked."""
    return [
        {
            "role": message["role"],
            "content": [
                {**part, part["type"]: _blank(part[part["type"]])} if part["type"] in kinds else part
                for part in _parts(message)
            ],
        }
        for message in messages
    ]


def _blank(medium: Any) -> Any:
    """The same medium without content: a black picture, silence."""
    if isinstance(medium, Image.Image):
        return Image.new("L", medium.size)  # in its own mode zeros may be transparent, or white by a palette
    if isinstance(medium, Waveform):
        return Waveform(np.zeros_like(medium.samples), medium.rate)
    if isinstance(medium, AudioFeatures):
        return AudioFeatures(np.zeros_like(medium.values), medium.kind)
    return [_blank(frame) for frame in medium]


def show(result: dict[str, Any], title: str) -> None:
    """Print the result as a table: a row for each kind of question, a column for each condition."""
    table = Table(title=title, caption=result["protocol"]["scoring"])
    table.add_column("question")
    conditions = result["conditions"]
    for condition in conditions:
        table.add_column(condition, justify="right")
    for category in conditions[AS_GIVEN]:
        cells = [_cell(scores.get(category)) for scores in conditions.values()]
        table.add_row(category, *cells, style="bold" if category == OVERALL else None)
    Console(width=None if Console().is_terminal else 120).print(table)


def _cell(score: dict | None) -> str:
    if score is None:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} %  [{100 * low:.1f}, {100 * high:.1f}]  n={score['n']}"


def write(result: dict[str, Any], run: str | Path) -> Path:
    """RUN/evaluation.json (figures) and RUN/predictions.jsonl (every answer)."""
    run = Path(run)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result["predictions"]]
    write_text(run / "predictions.jsonl", "".join(lines))
    path = run / "evaluation.json"
    write_json(path, {key: value for key, value in result.items() if key != "predictions"})
    return path
