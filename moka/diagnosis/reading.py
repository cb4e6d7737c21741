"""Samples for a diagnosis: what the model's processor makes of chats, batch by batch, or batches that are made already.

chats -> decode media once -> encode each -> usable? -> one padded batch, and its repetitions with a modality blanked
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn

import moka
from moka.analysis.coalitions import Coalition
from moka.analysis.contribution import media_modalities, modality_index, unwrapped
from moka.data.media import MediaDecoding
from moka.data.schema import check_sample, media_parts
from moka.distributed import default_device
from moka.errors import MokaError
from moka.evaluation.answers import before_answer, words
from moka.evaluation.evaluate import blank_media, open_questions
from moka.inference import LoadedModel
from moka.io import read_json
from moka.modeling.artifacts import ADAPTER, MODEL_CONFIG
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.hf_processing import ChatProcessor
from moka.modeling.processing import IGNORE, MokaProcessor
from moka.training.run_dir import CONFIG


@dataclass
class Batch:
    """Samples that can be used, encoded together; the others with the reason why not."""

    places: list[int] = field(default_factory=list)  # of the samples, a row each
    inputs: dict[str, Any] = field(default_factory=dict)
    blank: Callable[[Coalition], dict[str, Any]] | None = None
    failed: dict[int, str] = field(default_factory=dict)


def open_model(source: str | Path, device: str | None = None, backbone: str | None = None) -> tuple[nn.Module, Any]:
    """Load a run of `moka train`, or a Hugging Face multimodal LLM or an adapter of one, with its processor.

    Returns:
        the model, and the `LoadedModel` of a run or else the processor.
    Raises:
        MokaError: nothing that can be loaded.
    """
    path = Path(source)
    adapter = next((f for f in (path / ADAPTER, path) if (f / "adapter_config.json").is_file()), None)
    if (adapter is not None and (adapter / MODEL_CONFIG).is_file()) or (path / CONFIG).is_file():
        loaded = moka.load(path, device=device, backbone=backbone)
        return loaded.model, loaded
    base = str(source)
    if adapter is not None:
        base = backbone or read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or base
    try:
        model: Any = transformers.AutoModelForMultimodalLM.from_pretrained(base, dtype="auto")
        processor = transformers.AutoProcessor.from_pretrained(base)
    except (OSError, ValueError, ImportError) as error:
        raise MokaError(
            f"{base!r} cannot be loaded ({' '.join(str(error).split())[:300]}). Give a run of `moka train`, or the folder or "
            "name of a multimodal LLM with its processor."
        ) from error
    model = getattr(model, "thinker", model)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.to(device or default_device()).eval(), processor


def open_reader(model: nn.Module, data: Any, processor: Any, split: Any = "test", media_root: str | None = None) -> Any:
    """Return a reader of samples.

    Args:
        data: a source of `moka.data.open_samples`, a data set or list of samples, or a list of batches.
        processor: a `LoadedModel` or `MokaProcessor`, or any processor of transformers; batches need none.
    Raises:
        MokaError: no samples; chats without a processor.
    """
    named: Any = [data] if isinstance(data, (str, Path, dict)) else data
    if not len(named):
        raise MokaError("data: it is empty; give samples with answers.")
    first = named[0]
    if isinstance(first, Mapping) and "labels" in first:
        return BatchReader(model, named)
    if isinstance(first, (str, Path)) or (isinstance(first, Mapping) and "messages" not in first):
        data = open_questions(str(data) if isinstance(data, Path) else data, split, media_root)
    elif isinstance(data, (list, tuple)):
        data = [check_sample(sample, f"data[{i}]", require_answer=False) for i, sample in enumerate(data)]
    if processor is None:
        raise MokaError("processor: chats need the model's own; give processor=, or batches with labels as data.")
    if isinstance(processor, LoadedModel):
        return ChatReader(model, data, processor.processor, processor.context, processor.decoding)
    text_config = unwrapped(model).config.get_text_config()  # type: ignore[union-attr, operator]
    context = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(processor, MokaProcessor):
        processor = ChatProcessor(processor)
    return ChatReader(model, data, processor, context, MediaDecoding())


def digest(value: Any) -> str:
    """Return a short name for a value that JSON can write."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


class ChatReader:
    """Checked samples of chats, which a processor encodes."""

    def __init__(
        self, model: nn.Module, samples: Any, processor: Any, context: int | None, decoding: MediaDecoding
    ) -> None:
        self.model, self.samples, self.processor, self.context = model, samples, processor, context
        self.decoding = decoding

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, n: int, batch_size: int) -> list[list[int]]:
        """Return the places of the first ``n`` samples in batches."""
        return [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]

    def about(self, place: int) -> dict[str, str]:
        """Return id, category, question and answer of a sample."""
        sample = self.samples[place]
        last = sample["messages"][-1:]
        answer = words(last) if last[0]["role"] == "assistant" else ""
        question = "\n".join(words([message]) for message in before_answer(sample["messages"]))
        found = {"id": str(sample.get("id", place)), "category": sample.get("category") or "all"}
        return {**found, "question": question, "answer": answer}

    def key(self, place: int) -> str:
        """Return what a kept record must have in common with a sample to be of it."""
        sample = self.samples[place]
        media = [medium if isinstance(medium, str) else kind for kind, medium in media_parts(sample)]
        return digest([place, self.about(place), media])

    def decoded(self, place: int) -> list[dict]:
        """Return the messages of a sample with decoded media."""
        return self.decoding.decode_sample(self.samples[place])["messages"]

    def load(self, places: Sequence[int]) -> Batch:
        """Decode and encode samples, each once; what one of them cannot be used for is told, not raised."""
        batch, chats, encoded = Batch(), [], []
        for place in places:
            try:
                chat = self.decoded(place)
                row = self._encode(chat)
                (problem,) = problems(self.model, self.processor.pad([row]))
            except Exception as error:  # media, templates, tokenizers and processors raise all kinds
                problem = " ".join(str(error).split()) or type(error).__name__
            if problem:
                batch.failed[place] = problem
                continue
            batch.places.append(place)
            chats.append(chat)
            encoded.append(row)
        if encoded:
            batch.inputs = on_device(self.processor.pad(encoded), self.model)
            batch.blank = lambda coalition: self._blanked(chats, coalition)
        return batch

    def _encode(self, chat: list[dict]) -> dict[str, Any]:
        return self.processor.encode(chat, max_length=self.context)

    def _blanked(self, chats: list[list[dict]], coalition: Coalition) -> dict[str, Any]:
        absent = {i for name, ids in media_modalities(self.model).items() if name not in coalition for i in ids}
        kinds = {kind for kind, type_id in MEDIA_TYPE_IDS.items() if type_id in absent}
        rows = [self._encode(blank_media(chat, kinds)) for chat in chats]
        return on_device(self.processor.pad(rows), self.model)


class BatchReader:
    """Batches that are made already: what ``forward`` takes, with ``labels``; ``sample_ids`` and ``categories`` name the rows."""

    def __init__(self, model: nn.Module, given: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.given = model, list(given)
        for number, one in enumerate(self.given):
            if not isinstance(one.get("labels"), torch.Tensor):
                raise MokaError(
                    f"data[{number}].labels is missing; a batch needs labels [batch, seq], -100 outside of answers."
                )
        self._rows = [(b, row) for b, one in enumerate(self.given) for row in range(len(one["labels"]))]

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, n: int, batch_size: int) -> list[list[int]]:
        """Return the places of the first ``n`` rows in the batches that were given."""
        found: list[list[int]] = [[] for _ in self.given]
        for place, (b, _) in enumerate(self._rows[:n]):
            found[b].append(place)
        return [places for places in found if places]

    def about(self, place: int) -> dict[str, str]:
        """Return id and category of a row; question and answer are not known as text."""
        b, row = self._rows[place]
        ids, categories = (self.given[b].get(name) for name in ("sample_ids", "categories"))
        found = {"id": str(ids[row]) if ids else str(place), "category": str(categories[row]) if categories else "all"}
        return {**found, "question": "", "answer": ""}

    def key(self, place: int) -> str:
        """Return what a kept record must have in common with a row to be of it."""
        b, row = self._rows[place]
        tokens = [self.given[b][name][row].tolist() for name in ("input_ids", "labels") if name in self.given[b]]
        return digest([place, self.about(place), tokens])

    def decoded(self, place: int) -> list[dict]:
        """Return nothing: a batch has no media to show."""
        return []

    def load(self, places: Sequence[int]) -> Batch:
        """Return the batch, in full, that these rows are of."""
        b, row = self._rows[places[0]]
        inputs = {name: value for name, value in self.given[b].items() if name not in ("sample_ids", "categories")}
        batch = Batch(inputs=on_device(inputs, self.model))
        for place, problem in enumerate(problems(self.model, inputs), start=places[0] - row):
            batch.places.append(place)
            if problem:
                batch.failed[place] = problem
        return batch


def problems(model: nn.Module, inputs: Mapping[str, Any]) -> list[str | None]:
    """Return why each row of a batch cannot be explained; None if it can."""
    answered = (inputs["labels"][:, 1:] != IGNORE).any(1)
    has_medium = torch.stack(list(modality_index(model, inputs).values())).any(0).any(1)
    found: list[str | None] = []
    for answer, medium in zip(answered.tolist(), has_medium.tolist(), strict=True):
        reason = None if medium else "no medium: none of its tokens belongs to a picture, video or sound"
        found.append(reason if answer else "no answer: none of its tokens is supervised (labels)")
    return found


def on_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the inputs with their tensors on the device of the model."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
