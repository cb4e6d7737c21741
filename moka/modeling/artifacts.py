"""The folders in which what was trained is stored: the connector of stage 1, and the self-contained adapter folder.

A connector is two files: ``connector.safetensors`` and ``connector.json`` (modalities, widths, the backbone's name and
fingerprint). A connector of another backbone, encoder or size is refused before any tensor is copied.

Or a file that others published: the MokA authors' ``visual_pretrain.bin`` and ``audio_pretrain.bin``, LLaVA's
``mm_projector.bin``, or their tensors as safetensors. Those have no more than names and shapes to compare.

An adapter folder has what peft writes (with projectors and trainable encoders among the weights), the processor's files and
``moka_model.json``, which describes the composed model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import moka
from moka.adapter.checks import check_finite, read_tensors
from moka.errors import MokaError
from moka.io import atomic_dir, write_json
from moka.modeling import ENCODERS, MokaForConditionalGeneration
from moka.modeling.fields import without_weightless
from moka.modeling.projectors import import_llava, import_official
from moka.type_checks import read_dataclass

from .hf_model import backbone_fingerprint, base_info
from .processing import Interaction
from .quantization import Quantization
from .sharding import full_state_dict, without_wrappers

WEIGHTS, METADATA = "connector.safetensors", "connector.json"
ADAPTER, MODEL_CONFIG, ADAPTER_WEIGHTS = "adapter", "moka_model.json", "adapter_model.safetensors"
# Of an adapter folder: files whose loss is an error of its own, and a text for people.
_NOT_LISTED = (MODEL_CONFIG, ADAPTER_WEIGHTS, "README.md")
# What names of weights in published files tell: whose they are, and of which medium.
PUBLISHED = (
    (re.compile(r"(model\.)?(vl_projector\.|visual_)"), "official", "image"),
    (re.compile(r"(model\.)?(al_projector\.|audio_)"), "official", "audio"),
    (re.compile(r"(model\.)?mm_projector\."), "llava", "image"),
)
# Settings -> the weight and the axis that show them; widths are those of the encoder's features and of the language model.
SIZES = {
    "qformer": {
        "encoder width": ("norm.weight", 0),
        "backbone width": ("output.weight", 0),
        "projector.queries": ("queries", 1),
        "projector.hidden_size": ("queries", 2),
        "projector.intermediate_size": ("qformer.encoder.layer.0.intermediate_query.dense.weight", 0),
    },
    "mlp": {"encoder width": ("hidden.weight", 1), "backbone width": ("output.weight", 0)},
    "linear": {"encoder width": ("output.weight", 1), "backbone width": ("output.weight", 0)},
}


@dataclass
class ConnectorDescription:
    """The content of ``connector.json``.

    Args:
        backbone: name of the language model that it was trained for.
        backbone_fingerprint: of that model's weights.
        hidden_size: width of its embeddings.
        modalities: name -> {"encoder": {...}, "projector": {...}}.
        parts: `trained_parts`, whose tensors the file of weights has.
    """

    backbone: str | None
    backbone_fingerprint: str
    hidden_size: int
    modalities: dict[str, dict[str, Any]]
    parts: list[str]
    format_version: int = 1


@dataclass
class AdapterDescription:
    """The content of ``moka_model.json``: the composed model that an adapter folder belongs to.

    Args:
        backbone: name or folder of the language model.
        backbone_fingerprint: of its weights.
        modalities, fill_token_id: as in `MokaModelConfig`.
        parts: `trained_parts`, whose tensors are among the adapter's.
        quantization: of the language model in training.
        files: what else was written into the folder.
        kind: "hf": the base is a Hugging Face multimodal LLM as it is, with its own encoders (``modalities`` is empty).
        decoding, interaction: of the processor.
        backbone_relative: ``backbone`` is relative to the folder (an export, whose two folders move together).
    """

    backbone: str
    backbone_fingerprint: str
    modalities: dict[str, dict[str, Any]]
    fill_token_id: int
    parts: list[str]
    quantization: Quantization | None = None
    kind: Literal["composed", "hf"] = "composed"
    decoding: dict[str, Any] = field(default_factory=dict)
    interaction: Interaction = "own_turn"
    files: list[str] = field(default_factory=list)
    backbone_relative: bool = False
    format_version: int = 1
    moka_version: str = moka.__version__

    @classmethod
    def read(cls, folder: Path) -> AdapterDescription:
        """Read the description in an adapter folder.

        Raises:
            MokaError: it is absent, damaged or of a newer format, or files that were written with it are absent.
        """
        path = folder / MODEL_CONFIG
        if not path.is_file():
            raise MokaError(
                f"{folder} has no {MODEL_CONFIG}, which names the encoders and projectors. If `moka train` wrote it, copy "
                "the full folder; else build the base model yourself and use PeftModel.from_pretrained."
            )
        found = read_dataclass(cls, path)
        if absent := [name for name in found.files if not (folder / name).is_file()]:
            raise MokaError(f"{folder} lacks {', '.join(absent)}, which was written with it. Copy the folder again.")
        return found


def trained_parts(model: Any) -> list[str]:
    """Names of the modules that stage 1 trains: every projector with weights, and encoders that are trainable."""
    parts: list[str] = []
    if not isinstance(model, MokaForConditionalGeneration):
        return parts  # a Hugging Face multimodal LLM, of which the adapter is trained only
    for name in model.config.modalities:
        if any(p.requires_grad for p in model.encoders[name].parameters()):
            parts.append(f"encoders.{name}")
        if any(True for _ in model.projectors[name].parameters()):
            parts.append(f"projectors.{name}")
    return parts


def connector_state(model: MokaForConditionalGeneration, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The tensors of ``trained_parts``, from ``state_dict`` or from the model; of a partitioned model on all processes."""
    prefixes = tuple(part + "." for part in trained_parts(model))
    if state_dict is None:
        return full_state_dict(model, lambda key, _: key.startswith(prefixes))
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items() if key.startswith(prefixes)}


def describe_connector(model: MokaForConditionalGeneration) -> ConnectorDescription:
    """Return the metadata that stage 2 compares."""
    return ConnectorDescription(
        backbone=model.config.backbone,
        backbone_fingerprint=model.backbone_fingerprint(),
        hidden_size=model.config.text_config.hidden_size,
        modalities={
            name: {key: spec[key] for key in ("encoder", "projector")} for name, spec in model.config.modalities.items()
        },
        parts=trained_parts(model),
    )


def save_connector(model: MokaForConditionalGeneration, folder: str | Path, state_dict: dict | None = None) -> None:
    """Write the connector and read it back: a file with empty or non-finite tensors is an error, not a result."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = connector_state(model, state_dict)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / METADATA, asdict(describe_connector(model)))
    written = read_tensors(folder / WEIGHTS)
    check_finite(written, f"{folder / WEIGHTS}, as saved,")
    if empty := [key for key, tensor in written.items() if not tensor.numel()]:
        raise MokaError(
            f"{folder / WEIGHTS}: {empty[0]} was saved empty; the model was sharded. Save it on all processes."
        )


def load_connector(model: MokaForConditionalGeneration, path: str | Path) -> list[str]:
    """Copy a stage-1 result, or the projector of a published file, into ``model``; returns the parts it filled.

    Raises:
        MokaError: no connector there, a damaged file, or one made for another backbone, encoder or projector.
    """
    path = Path(path)
    return _load_published(model, path) if path.is_file() else _load_folder(model, path)


def _load_folder(model: MokaForConditionalGeneration, folder: Path) -> list[str]:
    if not folder.exists():
        raise MokaError(
            f"{folder} does not exist; train stage 1 first and name its RUN/connector, or a published projector file."
        )
    if not (folder / METADATA).is_file() or not (folder / WEIGHTS).is_file():
        raise MokaError(
            f"{folder} has no stage-1 result ({METADATA}, {WEIGHTS}); give RUN/connector of a stage-1 run, or a "
            "published projector file."
        )
    meta, own = read_dataclass(ConnectorDescription, folder / METADATA), describe_connector(model)
    for key in ("hidden_size", "backbone_fingerprint"):
        theirs, ours = getattr(meta, key), getattr(own, key)
        if theirs != ours:
            raise MokaError(
                f"{folder} was trained for backbone {meta.backbone!r} ({key} {theirs}); this model has "
                f"{own.backbone!r} ({key} {ours}). Train stage 1 again for it, or use that backbone."
            )
    for name, spec in meta.modalities.items():
        ours = own.modalities.get(name, {})
        for key, theirs in spec.items():
            changed = _differences(model, name, key, theirs, ours.get(key))
            if changed:
                raise MokaError(
                    f"{folder}: its {name} {key} has {_shown(theirs, changed)}, and this run's has "
                    f"{_shown(ours.get(key), changed)}. Make model.modalities agree, or train stage 1 again."
                )
    take_connector(model, read_tensors(folder / WEIGHTS), meta.parts, str(folder / WEIGHTS))
    return meta.parts


def take_connector(
    model: MokaForConditionalGeneration,
    state: dict[str, torch.Tensor],
    parts: list[str] | None = None,
    where: str = "what stage 1 trained",
) -> None:
    """Copy the tensors of ``parts`` into the model: all of them, and no others.

    Args:
        parts: default: those that the model trains.
        where: the tensors come from, for the message.
    Raises:
        MokaError: tensors missing, extra or of another shape.
    """
    prefixes = tuple(f"{part}." for part in (trained_parts(model) if parts is None else parts))
    expected = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefixes)}
    bad = sorted(set(expected) ^ set(state)) or [k for k in state if state[k].shape != expected[k].shape]
    if bad:
        raise MokaError(f"{where}: {len(bad)} tensors missing, extra or of another shape ({bad[0]}, ...).")
    model.load_state_dict(state, strict=False)


def _differences(model: MokaForConditionalGeneration, name: str, key: str, theirs: Any, ours: Any) -> list[str]:
    """The fields of an encoder's or projector's configuration that keep trained weights from fitting this run's.

    Where the projector takes any number of features, an encoder may take longer clips than in stage 1, for example.
    """
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return [] if theirs == ours else ["type"]
    if key == "encoder" and name in model.projectors and model.projectors[name].takes_any_number:
        theirs, ours = without_weightless(theirs, ENCODERS), without_weightless(ours, ENCODERS)
    theirs, ours = plain(theirs), plain(ours)
    return sorted(field for field in {*theirs, *ours} if theirs.get(field) != ours.get(field))


# What transformers notes in a configuration next to the architecture; it changes with its version.
_NOTES = ("transformers_version", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type")


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back, the fields of ``model_config`` next to the others, notes left out."""
    flat = json.loads(json.dumps(config))
    inner = flat.pop("model_config", None) or {}
    return {**{f"model_config.{field}": value for field, value in inner.items() if field not in _NOTES}, **flat}


def _shown(config: Any, fields: list[str]) -> str:
    values = plain(config) if isinstance(config, dict) else {}
    return ", ".join(f"{field} {values.get(field)!r}" for field in fields)


def _load_published(model: MokaForConditionalGeneration, path: Path) -> list[str]:
    tensors = read_tensors(path)
    check_finite(tensors, str(path))
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = next(((whose, kind) for pattern, whose, kind in PUBLISHED if pattern.match(key)), None)
        if found is None:
            raise MokaError(
                f"{path}: {key!r} is no weight of a projector. Give RUN/connector of a stage-1 run, the MokA authors' "
                "visual_pretrain.bin or audio_pretrain.bin, or LLaVA's mm_projector.bin."
            )
        groups.setdefault(found, {})[key] = tensor
    filled: dict[str, dict[str, torch.Tensor]] = {}
    for (whose, kind), group in groups.items():
        name = next((n for n, encoder in model.encoders.items() if encoder.kind == kind), None)
        if name is None or name in filled:
            why = f"has no modality of that medium, only {', '.join(model.encoders)}" if name is None else "takes one"
            raise MokaError(f"{path} has a projector of {kind} features; this model {why}. Leave the file out.")
        try:
            state, projector = import_llava(group) if whose == "llava" else (import_official(group)[0], "qformer")
        except MokaError as error:
            raise MokaError(f"{path}: {error}") from error
        _check_published(model, name, projector, state, path)
        filled[name] = state
    for name, state in filled.items():
        model.projectors[name].load_state_dict(state)
    return [f"projectors.{name}" for name in filled]


def _sizes(projector: str, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the sizes that the weights of a projector show, by the settings that they come from."""
    known = ((name, state.get(key), axis) for name, (key, axis) in SIZES[projector].items())
    sizes = {name: tensor.shape[axis] for name, tensor, axis in known if tensor is not None}
    layers = {match[1] for key in state if (match := re.search(r"layer\.(\d+)\.", key))}
    return {**sizes, "projector.layers": len(layers)} if layers else sizes


def _check_published(
    model: MokaForConditionalGeneration, name: str, projector: str, state: dict[str, torch.Tensor], path: Path
) -> None:
    """Raise a `MokaError` unless the tensors, under our names, are all of those of the modality's projector."""
    ours: Any = model.projectors[name]
    where = f"model.modalities.{name}"
    if ours.name != projector or (projector == "linear" and ours.config.tokens):
        raise MokaError(
            f"{path} has a projector of type {projector!r}, and this run's {name} projector is {ours.to_dict()}. Set "
            f"{where}.projector: {{type: {projector}}}."
        )
    expected = ours.state_dict()
    own, given = _sizes(projector, expected), _sizes(projector, state)
    wrong = [f"{size} {given[size]} (this run: {own.get(size)})" for size in given if given[size] != own.get(size)]
    shapes = [{key: tensor.shape for key, tensor in one.items()} for one in (state, expected)]
    if not wrong and shapes[0] != shapes[1]:
        wrong = sorted(key for key in {*state, *expected} if shapes[0].get(key) != shapes[1].get(key))[:1]
    if wrong:
        raise MokaError(
            f"{path}: the projector in it has {', '.join(wrong)}. Set these fields of {where}.projector (and "
            f"cross_attention_frequency: 1), or choose {where}.encoder and model.backbone of these widths."
        )


def save_adapter(model: PeftModel, processor: Any, folder: str | Path, state_dict: dict | None = None) -> None:
    """Write a self-contained adapter folder and read it back.

    Args:
        state_dict: all that was trained, full, by its names in ``model``; default: the model's own tensors.
    Raises:
        MokaError: a tensor was left out, or came out empty or not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would look the backbone's name up on the hub, which an embedded one is not on.
    with without_wrappers(model):
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    processor.save_pretrained(folder)
    base: Any = model.get_base_model()
    info = base_info(base)
    description = AdapterDescription(
        kind="hf" if info.hf else "composed",
        backbone=info.name,
        backbone_fingerprint=backbone_fingerprint(base),
        quantization=info.quantization,  # type: ignore[arg-type]
        modalities={} if info.hf else base.config.modalities,
        fill_token_id=0 if info.hf else base.config.fill_token_id,
        parts=trained_parts(base),
        decoding=processor.decoding,
        interaction=processor.interaction,
        # A lost tokenizer or chat template would go unnoticed.
        files=sorted(path.name for path in folder.iterdir() if path.name not in _NOT_LISTED),
    )
    write_json(folder / MODEL_CONFIG, asdict(description))
    saved = load_file(folder / ADAPTER_WEIGHTS)
    if state_dict is not None and len(saved) < len(state_dict):
        raise MokaError(
            f"{folder}: {len(saved)} of {len(state_dict)} trained tensors were saved; something wraps the model's layers "
            "and hides them from peft. Train without it."
        )
    for key, tensor in saved.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise MokaError(
                f"{folder}: {key} was saved empty or not finite; training diverged, or shards were not gathered."
            )


def save_result(model: PeftModel, processor: Any, folder: Path, state_dict: dict | None = None) -> list[str]:
    """Write the adapter folder of a finished run; return what a person should know before using it."""
    with atomic_dir(folder) as part:
        save_adapter(model, processor, part, state_dict)
        tensors = load_file(part / ADAPTER_WEIGHTS)
    ups = [tensor for key, tensor in tensors.items() if ".moka_B" in key or ".lora_B." in key]
    if ups and all(not tensor.any() for tensor in ups):
        return [f"every B of {folder} is still zero: no gradient reached the adapter, and it has learned nothing."]
    return []
