"""One loop that asks a trained model questions: for `moka eval`, for benchmarks and for `moka compare`.

    samples -> transform (blank a modality) -> decode -> generate, greedily -> a record a question

Several processes share the questions, batch by batch, so that the batches are those of one process. Each appends its answers
to a file of its own as they come; a run that was interrupted resumes, with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import moka
from moka.data.media_io import BadMediaError
from moka.distributed import all_gather_object, broadcast_from_main, collective_errors, is_main, rank_and_world_size
from moka.errors import MokaError
from moka.inference import LoadedModel

from .records import KeptRecords

PREDICTIONS = "predictions.jsonl"
# Of a sample, in addition to its answer, what scorers read.
_CARRIED = ("category", "group", "options")


def ask(
    loaded: LoadedModel,
    samples: Any,
    folder: str | Path,
    *,
    source: Any,
    condition: str = "",
    transform: Callable[[list[dict]], list[dict]] | None = None,
    size: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    tolerate_bad_media: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Return the model's answer to the last question of every sample, greedily decoded. Every process has to call it.

    Samples are read one by one, and their media are decoded batch by batch.

    Args:
        samples: map-style data set of checked samples, with the truth under ``reference`` or as the assistant's last message.
        folder: gets ``predictions.jsonl`` and ``settings.json``. Answers that are there already, to the same questions by the
            same model with the same settings, are kept; others are moved to ``predictions.previous.jsonl``.
        source: what the samples are, for the settings.
        condition: name of the repetition, such as "audio blanked"; one of the settings.
        transform: changes the decoded messages before they are asked.
        size: ask that many, from the first.
        tolerate_bad_media: a question whose media cannot be used gets an empty answer and an ``error``, and counts as wrong;
            without it, it ends the evaluation. A later call asks it again.
    Returns:
        records {id, question, prediction, reference, category?, group?, options?, error?} in the order of the samples, the
        same on every process.

    Raises:
        MokaError: a sample without a truth, and without ``tolerate_bad_media`` a file that cannot be used.
    """
    store = KeptRecords(folder, PREDICTIONS)
    n = min(size or len(samples), len(samples))
    with collective_errors():
        # Before anything is moved: a question without a truth is an error.
        keys = [_key(unanswered(samples[index])) for index in range(n)]
    settings = generation_settings(loaded, source, max_new_tokens) | ({"condition": condition} if condition else {})
    known = broadcast_from_main(lambda: _kept(store, settings))
    found = {index: known[key] for index, key in enumerate(keys) if key in known}
    if found and is_main():
        print(f"note: {len(found)} of {n} answers are in {store.path} already; resuming from there.")
    pending = [index for index in range(n) if index not in found]
    batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
    rank, world = rank_and_world_size()
    label = condition or "asking"
    with tqdm(total=n, initial=len(found), desc=label, unit="question", disable=not (progress and is_main())) as bar:
        for start in range(0, len(batches), world):
            together = batches[start : start + world]
            with collective_errors():
                for indices in together[rank : rank + 1]:
                    batch = [samples[index] for index in indices]
                    records = answer(loaded, batch, max_new_tokens, tolerate_bad_media, transform)
                    found |= zip(indices, records, strict=True)
                    for record in records:
                        store.append(record)
            bar.update(sum(map(len, together)))
    for other in all_gather_object({index: found[index] for indices in batches[rank::world] for index in indices}):
        found |= other
    records = [found[index] for index in range(n)]
    with collective_errors():
        if is_main():
            asked = dict(zip(keys, records, strict=True))
            store.write([*asked.values(), *(record for key, record in known.items() if key not in asked)])
    return records


def generation_settings(loaded: LoadedModel, source: Any, max_new_tokens: int) -> dict[str, Any]:
    """Return all that an answer depends on."""
    return {
        "source": source,
        "decoding": f"greedy, at most {max_new_tokens} new tokens",
        **({"generation": loaded.settings} if loaded.settings else {}),
        "media": loaded.processor.decoding,
        "chat_template": loaded.processor.chat_template or "the tokenizer's own",
        "weights_sha256": loaded.weights_sha256,
        **({"quantization": loaded.quantization} if loaded.quantization else {}),
        "moka": moka.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _kept(store: KeptRecords, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the answers with the same settings by key, of a finished file and of the parts of an interrupted run."""
    kept: dict[str, dict[str, Any]] = {}
    for record in store.read(settings):
        if {"id", "question", "reference"} <= record.keys() and "error" not in record:
            kept[_key(record)] = record
    store.write(kept.values())
    return kept


def _key(record: dict[str, Any]) -> str:
    """Return a hash of what a kept answer must have in common with a question to be its answer."""
    question = json.dumps([record["id"], record["question"], record["reference"]])
    return hashlib.sha256(question.encode()).hexdigest()


def answer(
    loaded: LoadedModel,
    samples: list[dict[str, Any]],
    max_new_tokens: int,
    tolerate_bad_media: bool = False,
    transform: Callable[[list[dict]], list[dict]] | None = None,
) -> list[dict[str, Any]]:
    """Return the records of one batch, in the order of the samples."""
    records, decodable, chats = [], [], []
    for sample in samples:
        record = unanswered(sample)
        records.append(record)
        try:
            decoded = loaded.decoding.decode_sample(sample)
        except BadMediaError as error:
            if not tolerate_bad_media:
                raise
            record["error"] = str(error)
            continue
        decodable.append(record)
        messages = before_answer(decoded["messages"])
        chats.append(messages if transform is None else transform(messages))
    if chats:
        names = [f"sample {record['id']!r}" for record in decodable]
        predictions = loaded.generate_batch(chats, max_new_tokens=max_new_tokens, names=names)
        for record, prediction in zip(decodable, predictions, strict=True):
            record["prediction"] = prediction
    return records


def before_answer(messages: list[dict]) -> list[dict]:
    """Return the messages without an assistant's answer at the end."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def unanswered(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a question before it is asked: id, text of the chat before the answer, truth, and what scorers read.

    Raises:
        MokaError: the sample has no truth.
    """
    messages = sample["messages"]
    if "reference" not in sample and messages[-1]["role"] != "assistant":
        raise MokaError(
            f"sample {sample['id']!r} has no 'reference', and no assistant's answer at its end: nothing to score against."
        )
    question = "\n".join(words([message]) for message in before_answer(messages))
    reference = sample["reference"] if "reference" in sample else words(messages[-1:])
    record = {"id": sample["id"], "question": question, "prediction": "", "reference": reference}
    return record | {key: sample[key] for key in _CARRIED if key in sample}


def parts(message: dict) -> list[dict]:
    """Return the content of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def words(messages: list[dict]) -> str:
    """Return the text of messages."""
    return " ".join(part["text"] for message in messages for part in parts(message) if part["type"] == "text")
