"""Free-running evaluation: the model answers unseen questions, as it is and with each modality blanked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import moka
from moka.errors import MokaError
from moka.inference import LoadedModel
from moka.modeling.media import AudioFeatures, Waveform

from .scoring import Tally

OVERALL, AS_GIVEN = "overall", "as given"
_KINDS = {"visual": ("image", "video"), "audio": ("audio",)}


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
    conditions: dict[str, tuple[int, Callable]] = {AS_GIVEN: (n, lambda sample: sample)}
    if blank:
        present = {part["type"] for part in samples[0]["messages"][0]["content"] if isinstance(part, dict)}
        for name, kinds in _KINDS.items():
            if present & set(kinds):
                conditions[f"{name} blanked"] = (min(blank_size or n, n), _blanker(kinds))
    result: dict[str, Any] = {"conditions": {}, "predictions": []}
    digest = hashlib.sha256()
    for condition, (count, change) in conditions.items():
        tallies: dict[str, Tally] = {}
        bar = tqdm(total=count, desc=condition, unit="question", disable=not progress)
        for start in range(0, count, batch_size):
            batch = [samples[i] for i in range(start, min(start + batch_size, count))]
            questions, references = zip(*(_split(sample) for sample in batch), strict=True)
            changed = [change({"messages": q})["messages"] for q in questions]
            answers = loaded.generate_batch(changed, max_new_tokens=max_new_tokens)
            for sample, question, answer, reference in zip(batch, questions, answers, references, strict=True):
                category = sample.get("category") or "all"
                hit = _add(tallies, category, answer, reference)
                result["predictions"].append(
                    {
                        "condition": condition,
                        "id": sample["id"],
                        "category": category,
                        "prediction": answer,
                        "reference": reference,
                        "right": hit,
                    }
                )
                if condition == AS_GIVEN:
                    digest.update(f"{sample['id']}\n{_words(question)}\n{reference}\n".encode())
            bar.update(len(batch))
        bar.close()
        result["conditions"][condition] = {name: tally.to_dict() for name, tally in tallies.items()}
    result["protocol"] = {
        "scoring": "exact match of the whole answer, case and outer punctuation ignored; 95 % Wilson intervals",
        "decoding": f"greedy, free-running, at most {max_new_tokens} new tokens",
        "chat_template": loaded.processor.chat_template or "the tokenizer's own",
        "questions_sha256": digest.hexdigest(),
        "n": n,
        "moka": moka.__version__,
        "torch": torch.__version__,
    }
    return result


def _add(tallies: dict[str, Tally], category: str, answer: str, reference: str) -> bool:
    hit = tallies.setdefault(category, Tally()).add(answer, reference)
    # The overall row stays last.
    overall = tallies.pop(OVERALL, Tally())
    overall.add(answer, reference)
    tallies[OVERALL] = overall
    return hit


def _split(sample: dict) -> tuple[list[dict], str]:
    """The chat up to the last question, and its reference answer."""
    *before, last = sample["messages"]
    if last["role"] != "assistant":
        raise MokaError(f"sample {sample['id']!r}: evaluation needs an assistant's answer at the end of the messages.")
    return before, _words([last])


def _words(messages: list[dict]) -> str:
    parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
    return " ".join(p if isinstance(p, str) else p["text"] for p in parts if isinstance(p, str) or p["type"] == "text")


def _blanker(kinds: tuple[str, ...]) -> Callable[[dict], dict]:
    def change(sample: dict) -> dict:
        messages = []
        for message in sample["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                content = [{**p, p["type"]: _blank(p[p["type"]])} if p["type"] in kinds else p for p in content]
            messages.append({**message, "content": content})
        return {**sample, "messages": messages}

    return change


def _blank(medium: Any) -> Any:
    """The same medium without content: a black picture, silence."""
    if isinstance(medium, Image.Image):
        return Image.new(medium.mode, medium.size)
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
    with open(run / "predictions.jsonl", "w", encoding="utf-8") as file:
        for record in result["predictions"]:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    path = run / "evaluation.json"
    figures = {key: value for key, value in result.items() if key != "predictions"}
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return path
