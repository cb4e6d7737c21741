"""Checks of saved adapters: a damaged folder is refused whole, never half-loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from moka.errors import MokaError

_LISTED = 3


def check_adapter_folder(folder: str, subfolder: str | None = None) -> None:
    """Refuse a local adapter folder whose weights are absent, empty, truncated or not finite.

    Names on the Hub pass, and so does a folder with nothing but the configuration, which needs no weights to be read.
    """
    path = Path(folder) / (subfolder or "")
    if not (path / CONFIG_NAME).is_file():
        return
    weights = path / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        config_alone = [file.name for file in path.iterdir()] == [CONFIG_NAME]
        if not config_alone and not (path / WEIGHTS_NAME).exists():
            raise MokaError(
                f"{path} has no {SAFETENSORS_WEIGHTS_NAME}; copy the whole adapter folder, or save it again."
            )
        return
    try:
        with safe_open(weights, "pt") as file:
            keys = list(file.keys())
            empty = [key for key in keys if 0 in file.get_slice(key).get_shape()]
            damaged = [key for key in keys if not torch.isfinite(file.get_tensor(key)).all()]
    except (SafetensorError, OSError) as error:
        raise MokaError(
            f"{weights} cannot be read ({error}); it is truncated or damaged. Copy it again, or save the adapter again."
        ) from error
    if empty:
        raise MokaError(
            f"{weights} holds {len(empty)} empty tensors ({_some(empty)}): it was saved from a sharded model without "
            "gathering (ZeRO-3, FSDP). Save through the trainer."
        )
    if damaged:
        raise MokaError(
            f"{weights} holds values that are not finite ({_some(damaged)}); the adapter is damaged or its training "
            "diverged. Take an earlier checkpoint."
        )
    _check_saved_modules(path, weights, keys)


def _check_saved_modules(path: Path, weights: Path, keys: list[str]) -> None:
    # peft itself answers a lost module with a bare KeyError, as it looks the tensors up before asking the tuner.
    names = json.loads((path / CONFIG_NAME).read_text()).get("modules_to_save") or []
    lost = [name for name in names if not any(f".{name}." in f".{key}" for key in keys)]
    if lost:
        raise MokaError(
            f"{weights} lacks the modules {lost}, which its configuration lists in modules_to_save: it lost them. "
            "Copy it again, or save the adapter again."
        )


def check_adapter_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Compare tensors about to be loaded with the adapter ``adapter_name`` of ``model``.

    Raises:
        MokaError: tensors missing, extra, of another shape, or not finite.
    """
    own = _adapter_tensors(model, adapter_name)
    # Keys carry peft's prefix when the model is a PeftModel and none when it was injected into directly.
    given = {key.removeprefix("base_model.model."): tensor for key, tensor in state_dict.items()}
    expected = {key.removeprefix("base_model.model."): shape for key, shape in own.items()}
    missing = sorted(set(expected) - set(given))
    if missing:
        raise MokaError(
            f"The adapter lacks {len(missing)} of {len(expected)} tensors of this model ({_some(missing)}). It was "
            "made for another backbone or other target_modules, or the file lost them; use the model it was trained on."
        )
    extra = sorted(key for key in given if ".moka_" in key and key not in expected)
    if extra:
        raise MokaError(
            f"The adapter holds {len(extra)} tensors that this model has no place for ({_some(extra)}). It was made "
            "for another backbone or other target_modules; use the model it was trained on."
        )
    for key, shape in expected.items():
        if tuple(given[key].shape) != shape:
            raise MokaError(
                f"{key} is {list(given[key].shape)} in the adapter and {list(shape)} in this model: another backbone, "
                "rank or number of modalities. Use the model and configuration it was trained with."
            )
        if not torch.isfinite(given[key]).all():
            raise MokaError(f"{key} holds values that are not finite; the adapter is damaged or its training diverged.")


def check_finite(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that reached the model by a loader which asks nobody, such as transformers' own."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for group in module.adapter_layer_names:
                tensors = getattr(module, group)
                if adapter_name in tensors and not torch.isfinite(tensors[adapter_name]).all():
                    raise MokaError(
                        f"{name}.{group} of adapter {adapter_name!r} holds values that are not finite; the adapter is "
                        "damaged or its training diverged. Take an earlier checkpoint."
                    )


def _adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    wanted = {}
    for name, module in model.named_modules():
        inside = ""
        if isinstance(module, BaseTunerLayer):
            for group in module.adapter_layer_names:
                if adapter_name in getattr(module, group):
                    wanted[f"{name}.{group}.{adapter_name}"] = tuple(getattr(module, group)[adapter_name].shape)
        elif isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "modules_to_save"):
            inside = f"{name}.modules_to_save.{adapter_name}."
            if adapter_name in module.modules_to_save:
                saved = module.modules_to_save[adapter_name].state_dict()
                wanted |= {inside + key: tuple(tensor.shape) for key, tensor in saved.items()}
    return wanted


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (", ..." if len(keys) > _LISTED else "")
