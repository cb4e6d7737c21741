"""The hand-over from stage 1 to stage 2: trained encoders and projectors, with what they were made for.

A folder of two files: ``connector.safetensors`` and ``connector.json`` (modalities, widths, the backbone's name and
fingerprint). A connector of another backbone, encoder or size is refused before any tensor is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moka.errors import MokaError
from moka.modeling import MokaForConditionalGeneration

from .files import read_json, write_json

WEIGHTS, METADATA = "connector.safetensors", "connector.json"
FORMAT_VERSION = 1


def trained_parts(model: MokaForConditionalGeneration) -> list[str]:
    """Names of the modules that stage 1 trains: every projector, and encoders that are trainable."""
    parts = []
    for name in model.config.modalities:
        if any(p.requires_grad for p in model.encoders[name].parameters()):
            parts.append(f"encoders.{name}")
        parts.append(f"projectors.{name}")
    return parts


def connector_state(model: MokaForConditionalGeneration, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The tensors of ``trained_parts``, from ``state_dict`` (gathered by a sharded trainer) or from the model."""
    prefixes = tuple(part + "." for part in trained_parts(model))
    state = model.state_dict() if state_dict is None else state_dict
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items() if key.startswith(prefixes)}


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
    for key, tensor in load_file(folder / WEIGHTS).items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise MokaError(
                f"{folder / WEIGHTS}: {key} was saved empty or not finite; training diverged or was sharded."
            )


def load_connector(model: MokaForConditionalGeneration, folder: str | Path) -> list[str]:
    """Copy a stage-1 result into ``model``; returns the parts it filled.

    Raises:
        MokaError: no connector there, a damaged file, or one made for another backbone, encoder or projector.
    """
    folder = Path(folder)
    if not (folder / METADATA).is_file() or not (folder / WEIGHTS).is_file():
        raise MokaError(
            f"{folder} holds no stage-1 result ({METADATA}, {WEIGHTS}); give RUN/connector of a stage-1 run."
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
        for key, theirs in spec.items():
            ours = own["modalities"].get(name, {}).get(key)
            if ours != theirs:
                raise MokaError(
                    f"{folder}: its {name} {key} is {theirs}, and this run's is {ours}. Make model.modalities agree, or "
                    "train stage 1 again."
                )
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise MokaError(f"{folder / WEIGHTS} cannot be read ({error}); it is truncated or damaged.") from error
    expected = {k: v for k, v in model.state_dict().items() if k.startswith(tuple(p + "." for p in meta["parts"]))}
    bad = sorted(set(expected) ^ set(state)) or [k for k in state if state[k].shape != expected[k].shape]
    if bad:
        raise MokaError(f"{folder / WEIGHTS}: {len(bad)} tensors missing, extra or of another shape ({bad[0]}, ...).")
    model.load_state_dict(state, strict=False)
    return meta["parts"]
