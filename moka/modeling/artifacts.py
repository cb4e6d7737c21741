"""The hand-over from stage 1 to stage 2: trained encoders and projectors, with what they were made for.

A folder of two files: ``connector.safetensors`` and ``connector.json`` (modalities, widths, the backbone's name and
fingerprint). A connector of another backbone, encoder or size is refused before any tensor is copied.

Or a file that others published: the MokA authors' ``visual_pretrain.bin`` and ``audio_pretrain.bin``, LLaVA's
``mm_projector.bin``, or their tensors as safetensors. Those hold no more than names and shapes to compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moka.adapter.checks import check_finite, read_tensors
from moka.errors import MokaError
from moka.io import read_json, write_json
from moka.modeling import ENCODERS, MokaForConditionalGeneration
from moka.modeling.fields import without_weightless
from moka.modeling.projectors import import_llava, import_official

from .sharding import full_state_dict

WEIGHTS, METADATA = "connector.safetensors", "connector.json"
FORMAT_VERSION = 1
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


def trained_parts(model: MokaForConditionalGeneration) -> list[str]:
    """Names of the modules that stage 1 trains: every projector with weights, and encoders that are trainable."""
    parts = []
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


def describe_connector(model: MokaForConditionalGeneration) -> dict[str, Any]:
    """The metadata that stage 2 compares."""
    return {
        "format_version": FORMAT_VERSION,
        "backbone": model.config.backbone,
        "backbone_fingerprint": model.backbone_fingerprint(),
        "hidden_size": model.config.text_config.hidden_size,
        "modalities": {
            name: {key: model.config.modalities[name][key] for key in ("encoder", "projector")}
            for name in model.config.modalities
        },
        "parts": trained_parts(model),
    }


def save_connector(model: MokaForConditionalGeneration, folder: str | Path, state_dict: dict | None = None) -> None:
    """Write the connector and read it back: a file with empty or non-finite tensors is an error, not a result."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = connector_state(model, state_dict)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / METADATA, describe_connector(model))
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
    meta = read_json(folder / METADATA)
    own = describe_connector(model)
    lost = sorted({*own} - {*meta}) if isinstance(meta, dict) else ["every key"]
    if lost:
        raise MokaError(f"{folder / METADATA} lacks {', '.join(lost)}; it is damaged. Copy the folder again.")
    if meta["format_version"] > FORMAT_VERSION:
        raise MokaError(f"{folder} was written by a newer moka (format {meta['format_version']}); upgrade moka-peft.")
    for key in ("hidden_size", "backbone_fingerprint"):
        if meta[key] != own[key]:
            raise MokaError(
                f"{folder} was trained for backbone {meta['backbone']!r} ({key} {meta[key]}); this model has "
                f"{own['backbone']!r} ({key} {own[key]}). Train stage 1 again for it, or use that backbone."
            )
    for name, spec in meta["modalities"].items():
        ours = own["modalities"].get(name, {})
        for key, theirs in spec.items():
            changed = _differences(model, name, key, theirs, ours.get(key))
            if changed:
                raise MokaError(
                    f"{folder}: its {name} {key} has {_shown(theirs, changed)}, and this run's has "
                    f"{_shown(ours.get(key), changed)}. Make model.modalities agree, or train stage 1 again."
                )
    take_connector(model, read_tensors(folder / WEIGHTS), meta["parts"], str(folder / WEIGHTS))
    return meta["parts"]


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
