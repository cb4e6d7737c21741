"""An export verifies itself: what was written is read back from disk and compared with the live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM

from moka.adapter.config import TEXT
from moka.data import check_sample
from moka.data.jsonl import JsonlDataset
from moka.data.media_io import BadMediaError
from moka.errors import MokaError
from moka.inference import LoadedModel, load
from moka.modeling.hf_model import base_info, load_mllm, model_inputs
from moka.modeling.media import Waveform

from .formats import HF_BACKBONE, LORA, TEXT_MERGED, Source, merged_copy

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MAX_SAMPLES = 32
# Text tokens before and after the media of each row: rows of a batch differ, so that there is padding.
_ROWS = ((5, 7), (3, 4), (8, 2))


class VerificationError(MokaError):
    """Raised if what was written is not what it should be."""


@dataclass(frozen=True)
class Probe:
    """A padded batch that both models answer."""

    name: str
    inputs: dict[str, torch.Tensor]
    media: bool

    @property
    def valid(self) -> torch.Tensor:
        return self.inputs["attention_mask"].bool()


@dataclass
class Checks:
    """Numbers of one verification. Differences are relative to the largest logit."""

    expected: int
    changed: int = 0
    tolerance: float = 0.0
    differences: dict[str, float] = field(default_factory=dict)  # must are within the tolerance
    losses: dict[str, float] = field(default_factory=dict)  # of a lossy format, reported and not judged
    unchanged_tensors: int = 0

    @property
    def largest(self) -> float:
        return max(self.differences.values(), default=0.0)


def make_probes(live: LoadedModel, samples: JsonlDataset | None = None) -> list[Probe]:
    """Random text, random media of each modality and of all at once, and the user's own samples."""
    base: Any = live.model.get_base_model()
    info = base_info(base)
    names = list(info.type_ids)
    generator = torch.Generator().manual_seed(0)
    wanted: list[tuple[str, list[str]]] = [("random text", []), *((f"random {name}", [name]) for name in names)]
    if len(names) > 1:
        wanted.append(("random media of all kinds", names))
    make = partial(_random_chats, live) if info.hf else partial(_random_probe, base)
    probes = [make(name, media, generator) for name, media in wanted]
    if samples is not None:
        probes += _own_probes(live, samples)
    return probes


def _random_probe(base: Any, name: str, media: list[str], generator: torch.Generator) -> Probe:
    rows: list[dict[str, list[int]]] = []
    counts = dict.fromkeys(media, 0)
    for number, (before, after) in enumerate(_ROWS):
        ids, types, groups = _words(base, before, generator), [0] * before, [1] * before
        # The last row is text only, also next to rows with media.
        for one in media if number < len(_ROWS) - 1 else []:
            tokens, type_id = base.projectors[one].num_tokens, base.config.type_ids[one][0]
            ids += [base.config.placeholder_id(type_id)] * tokens
            types += [type_id] * tokens
            groups += [1] * tokens
            counts[one] += 1
        ids += _words(base, after, generator)
        types += [0] * after
        groups += [0] * after
        rows.append({"input_ids": ids, "mm_token_type_ids": types, "interaction_ids": groups})
    longest = max(len(row["input_ids"]) for row in rows)
    inputs = {
        key: torch.tensor([[0] * (longest - len(row[key])) + row[key] for row in rows])
        for key in ("input_ids", "mm_token_type_ids", "interaction_ids")
    }
    lengths = [len(row["input_ids"]) for row in rows]
    inputs["attention_mask"] = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    for one, count in counts.items():
        encoder = base.encoders[one]
        inputs[encoder.input_name] = torch.rand(count, *encoder.input_shape, generator=generator)
    return Probe(name, inputs, bool(media))


def _random_chats(live: LoadedModel, name: str, media: list[str], generator: torch.Generator) -> Probe:
    """Return questions of random digits; all but the last have noise as pictures or sound before them."""
    noise = np.random.default_rng(int(torch.randint(0, 2**31, (), generator=generator)))
    chats = []
    for number in range(len(_ROWS)):
        parts: list[dict[str, Any]] = []
        if "visual" in media and number < len(_ROWS) - 1:
            picture = noise.integers(0, 256, (56, 56 + 28 * number, 3), np.uint8)
            parts.append({"type": "image", "image": Image.fromarray(picture)})
        if "audio" in media and number < len(_ROWS) - 1:
            sound = noise.standard_normal(8000 + 4000 * number).astype(np.float32) / 9
            parts.append({"type": "audio", "audio": Waveform(sound, 16_000)})
        parts.append({"type": "text", "text": f"What is {noise.integers(0, 10 ** (3 * number + 1))}?"})
        chats.append([{"role": "user", "content": parts}])
    batch = live.processor.pad([live.processor.encode(chat, add_generation_prompt=True) for chat in chats])
    batch.pop("labels")
    return Probe(name, dict(batch), bool(media))


def _words(base: Any, count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, base.config.vocab_size, (count,), generator=generator).tolist()


def _own_probes(live: LoadedModel, samples: JsonlDataset) -> list[Probe]:
    probes = []
    for index in range(min(MAX_SAMPLES, len(samples))):
        sample = check_sample(samples[index], f"{samples.path}, sample {index + 1}", require_answer=False)
        try:
            messages = live.decoding.decode_sample(sample)["messages"]
        except BadMediaError as error:
            raise MokaError(f"{samples.path}: {error.file}: {error.reason}") from error
        batch = live.processor.pad([live.processor.encode(messages, max_length=live.context)])
        batch.pop("labels")
        probes.append(Probe(f"sample {sample['id']}", dict(batch), bool((batch["mm_token_type_ids"] > 0).any())))
    return probes


@torch.no_grad()
def live_logits(live: LoadedModel, probes: Sequence[Probe]) -> list[torch.Tensor]:
    """[valid tokens, vocabulary] float32 of each probe."""
    model: Any = live.model.eval()
    return [model(**model_inputs(model, probe.inputs)).logits[probe.valid].float() for probe in probes]


@torch.no_grad()
def verify(source: Source, folder: Path, probes: Sequence[Probe], expected: Sequence[torch.Tensor]) -> Checks:
    """Read ``folder`` back and compare it with the live model.

    Args:
        expected: the live model's logits, from ``live_logits``.
    Raises:
        VerificationError: a weight that did not change, or another that did; logits beyond the tolerance.
    """
    updates = {update.name: update for update in source.updates if (update.B.any() and update.A.any())}
    checks = Checks(expected=len(updates), tolerance=TOLERANCE[source.dtype])
    if source.format == TEXT_MERGED:
        back: Any = load(folder, device="cpu", dtype="float32")
        base = back.model.get_base_model()
        _compare_weights(source, base if source.info.hf else base.language_model, checks)
        _note_all(checks, probes, expected, live_logits(back, probes), strict=True)
        return checks
    if source.format == HF_BACKBONE:
        model: Any = _read_model(source, str(folder), torch.float32)
        _compare_weights(source, model, checks)
    else:
        model = _with_lora(source, folder)
        _compare_updates(source, model, checks)
    model.eval()
    answers = [_embedded_logits(source, model, probe) for probe in probes]
    if source.lossless_for_media:
        _note_all(checks, probes, expected, answers, strict=True)
        return checks
    if source.format == LORA:
        # The live adapter with every token on the exported path is what the LoRA must equal, whatever the tokens are. Models
        # of Hugging Face also make positions of the type ids, so that path is in the weights there.
        live_model = merged_copy(source.root, source.updates) if source.info.hf else source.root
        routed = [_embedded_logits(source, live_model, probe, source.modality) for probe in probes]
        _note_all(checks, probes, routed, answers, strict=True, suffix=f", all on the {source.modality} path")
    for probe, live, got in zip(probes, expected, answers, strict=True):
        exact = not probe.media and source.modality == TEXT
        _note_all(checks, [probe], [live], [got], strict=exact)
    return checks


def _compare_weights(source: Source, back: Any, checks: Checks) -> None:
    """Every tensor read back is the live one, and those of the adapted maps have the text path on top."""
    updates = {f"{update.name}.weight": update for update in source.updates}
    live, read = _backbone_tensors(source.root), _backbone_tensors(back)
    if set(live) != set(read):
        raise VerificationError(f"tensors missing or extra: {', '.join(sorted(set(live) ^ set(read))[:3])}")
    for name, tensor in live.items():
        got, update = read[name], updates.get(name)
        if update is None:
            if not torch.equal(got, tensor):
                raise VerificationError(f"{name} is no adapted weight, and differs from the backbone's")
            checks.unchanged_tensors += 1
            continue
        want = tensor.float() + update.delta()
        # Two roundings apart at most.
        room = 2 * torch.finfo(source.dtype).eps * want.abs().clamp(min=float(want.abs().max()) * 1e-3)
        changed = not torch.equal(got, tensor)
        # A change too small for the dtype is none.
        due = not torch.equal(want.to(source.dtype).float(), tensor)
        checks.changed += changed
        if due and not changed:
            raise VerificationError(f"{name} was to change, and still has the weight from before")
        if not bool(((got.float() - want).abs() <= room).all()):
            raise VerificationError(f"{name} is not the backbone's weight plus the {source.modality} path")
    if checks.changed == 0:
        raise VerificationError("no weight changed: the text path is too small for this dtype; use --dtype float32")
    if _tied(back) != _tied(source.root):
        raise VerificationError("input and output embeddings are tied in one of the models, and not in the other")


def _backbone_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A language model's own tensors by their names without an adapter."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".moka_" not in name and ".lora_" not in name
    }


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _with_lora(source: Source, folder: Path) -> Any:
    """The bare backbone from where it is, under the LoRA that was written."""
    model = _read_model(source, source.backbone_place, source.dtype)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=source.dtype)
    return PeftModel.from_pretrained(model.float(), str(folder))


def _read_model(source: Source, place: str, dtype: torch.dtype) -> Any:
    """Read the model that an export is, or that it belongs to, as others do."""
    if source.info.hf:
        return load_mllm(place, dtype)[0]
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=False)


def _compare_updates(source: Source, model: Any, checks: Checks) -> None:
    """The deltas of the layers that peft made of the folder are the adapter's."""
    bare = model.get_base_model()
    layers = {name: module for name, module in bare.named_modules() if hasattr(module, "get_delta_weight")}
    names = {update.name for update in source.updates}
    if names != set(layers):
        raise VerificationError(f"layers missing or extra: {', '.join(sorted(names ^ set(layers))[:3])}")
    for update in source.updates:
        got, want = layers[update.name].get_delta_weight("default").float(), update.delta()
        checks.changed += bool(got.any())
        if not torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max())):
            raise VerificationError(f"the LoRA of {update.name} is not the {source.modality} path of the adapter")


def _embedded_logits(source: Source, model: Any, probe: Probe, modality: str | None = None) -> torch.Tensor:
    """Logits of a bare language model for embeddings with the live model's media in them."""
    inputs, base = probe.inputs, source.base
    if source.info.hf:
        return model(**model_inputs(model, inputs)).logits[probe.valid].float()
    media = {key: inputs[key] for key in ("pixel_values", "input_features") if key in inputs}
    embeds = base.merge_embeddings(inputs["input_ids"], inputs["mm_token_type_ids"], **media)
    mask = inputs["attention_mask"]
    extra = {}
    if modality is not None:
        extra["mm_token_type_ids"] = torch.full_like(mask, source.config.modalities[modality][0])
        extra["interaction_ids"] = torch.zeros_like(mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **extra)
    return outputs.logits[probe.valid].float()


def _note_all(
    checks: Checks,
    probes: Sequence[Probe],
    expected: Sequence[torch.Tensor],
    answers: Sequence[torch.Tensor],
    strict: bool,
    suffix: str = "",
) -> None:
    for probe, live, got in zip(probes, expected, answers, strict=True):
        # A maximum passes over no NaN.
        difference = float((live - got).abs().max() / live.abs().max().clamp(min=1e-12))
        name = probe.name + suffix
        (checks.differences if strict else checks.losses)[name] = difference
        if strict and not difference <= checks.tolerance:
            raise VerificationError(
                f"logits for {name} differ by {difference:.2g} of the largest one; {checks.tolerance:g} is allowed"
            )
