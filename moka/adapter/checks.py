"""Checks of saved adapters: a damaged folder is refused whole, never half-loaded."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from moka.errors import MokaError

# For a task's head peft lists every usual name in modules_to_save, and a model has one of them.
TASK_HEADS = ("classifier", "score", "qa_outputs")
_LISTED = 3
PREFIX = "base_model.model."  # peft's, before every name in an adapter file

# The names of tensors in the MokA authors' two layouts, and in a LoRA adapter.
_OFFICIAL = re.compile(r"\.lora_([AB]\d|[AB]\.(text|image))(\.\w+)*$")
_LORA = re.compile(r"\.lora_[AB](\.\w+)?\.weight$")

_NUMBER, _NAMES = (int, float), (list, str, type(None))
# What json may give for the fields of a MokaConfig that its own checks would stumble over.
_FIELDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "alpha": _NUMBER,
    "dropout": _NUMBER,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modalities": (dict,),
    "modality_token_ids": (dict, type(None)),
    "interaction": (str,),
    "interaction_weight": (int, float, dict),
    "scale_position": (str,),
    "share_b": (bool,),
    "adapt": (list, type(None)),
    "use_rslora": (bool,),
    "init_weights": (bool,),
    "bias": (str,),
    "modules_to_save": (list, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": _NAMES,
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "text_merged": (bool,),
    "format_version": (int,),
    "inference_mode": (bool,),
}


def check_adapter_config(folder: str, subfolder: str | None = None) -> None:
    """Refuse a local ``adapter_config.json`` that is no JSON, names no method, or has fields of another type."""
    path = Path(folder) / (subfolder or "") / CONFIG_NAME
    if path.is_file():
        _read_config(path)


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "Copy the adapter folder again, or save the adapter again."
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MokaError(f"{path} cannot be read as JSON ({error}); it is damaged. {remedy}") from error
    if not isinstance(config, dict):
        raise MokaError(f"{path} holds a {type(config).__name__}, not an object with the adapter's fields. {remedy}")
    if not isinstance(config.get("peft_type"), str):
        raise MokaError(
            f"{path}: peft_type is {config.get('peft_type')!r}; the name of a method is due, such as MOKA. {remedy}"
        )
    if config["peft_type"] == "MOKA":
        for name, types in _FIELDS.items():
            value = config.get(name)
            fits = bool in types if isinstance(value, bool) else isinstance(value, types)
            if name in config and not fits:
                allowed = " or ".join({"NoneType": "null", "dict": "object"}.get(t.__name__, t.__name__) for t in types)
                raise MokaError(f"{path}: {name} is {value!r}; allowed: {allowed}. {remedy}")
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or of a pickle, on the CPU. A pickle's code is never executed.

    Raises:
        MokaError: the file cannot be read, or holds anything but named tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device="cpu")
        except (SafetensorError, OSError) as error:
            raise MokaError(
                f"{path} cannot be read ({error}); it is truncated or damaged. Copy it again, or save the adapter again."
            ) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, pickle.UnpicklingError) and re.search(r"Unsupported|allowed global|GLOBAL", str(error)):
            named = re.search(r"(?:GLOBAL|class|global:?) ([\w.]+\.[\w.]+)", str(error))
            raise MokaError(
                f"{path} holds code / objects other than tensors{f' ({named[1]})' if named else ''}; it was not executed. "
                "Allowed are named tensors alone: use a file from a source you trust, best as safetensors."
            ) from error
        raise MokaError(
            f"{path} cannot be read ({reason[0][:120]}); it is truncated or damaged. Copy it again, or save the adapter again."
        ) from error
    if not isinstance(tensors, dict) or any(
        not isinstance(key, str) or not isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise MokaError(f"{path} holds objects other than named tensors ({type(tensors).__name__}); give a state dict.")
    return dict(tensors)


def check_adapter_folder(folder: str, subfolder: str | None = None) -> None:
    """Refuse a local adapter folder whose weights are absent, empty, truncated, not finite, or in another layout.

    Names on the Hub pass, and so does a folder with nothing but the configuration, which needs no weights to be read.
    """
    path = Path(folder) / (subfolder or "")
    if not (path / CONFIG_NAME).is_file():
        return
    config = _read_config(path / CONFIG_NAME)
    weights = path / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        weights = path / WEIGHTS_NAME
    if not weights.exists():
        config_alone = [file.name for file in path.iterdir()] == [CONFIG_NAME]
        if not config_alone:
            raise MokaError(
                f"{path} has no {SAFETENSORS_WEIGHTS_NAME}; copy the whole adapter folder, or save it again."
            )
        return
    tensors = read_tensors(weights)
    keys = list(tensors)
    empty = [key for key in keys if 0 in tensors[key].shape]
    damaged = [key for key in keys if not torch.isfinite(tensors[key]).all()]
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
    _check_layout(path, weights, keys, config["peft_type"])
    _check_saved_modules(weights, keys, config.get("modules_to_save") or [])


def _check_layout(path: Path, weights: Path, keys: list[str], method: str) -> None:
    # peft loads what fits and passes over the rest: names of another layout would leave an adapter that does nothing.
    official = sorted(key for key in keys if _OFFICIAL.search(key))
    if official:
        raise MokaError(
            f"{weights} is in the layout of the MokA authors ({_some(official)}). Convert it: "
            f"`moka convert {path} --output DIR`."
        )
    if method != "MOKA":
        return
    if not any(".moka_A" in key for key in keys):
        if any(_LORA.search(key) for key in keys):
            raise MokaError(
                f"{weights} holds a LoRA adapter ({_some(sorted(keys))}), and {CONFIG_NAME} says MOKA. Use the configuration "
                "that belongs to it (peft_type LORA), or copy the folder again."
            )
        raise MokaError(
            f"{weights} holds no MokA tensors (their names end in moka_A and moka_B); found: {_some(sorted(keys)) or 'none'}. "
            "Copy the folder again, or save the adapter again."
        )
    wrong = sorted(key for key in keys if not key.startswith(PREFIX) or key.startswith(2 * PREFIX))
    if wrong:
        raise MokaError(
            f"{weights}: {len(wrong)} of {len(keys)} names lack the prefix {PREFIX!r} or have it twice ({_some(wrong)}). Rename "
            "them, or save the adapter with save_pretrained."
        )


def _check_saved_modules(weights: Path, keys: list[str], names: list[str]) -> None:
    # peft itself answers a lost module with a bare KeyError, as it looks the tensors up before asking the tuner.
    lost = [name for name in names if not any(f".{name}." in f".{key}" for key in keys)]
    if any(name not in lost for name in names if name in TASK_HEADS):
        lost = [name for name in lost if name not in TASK_HEADS]
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
    expected = _adapter_tensors(model, adapter_name)
    # Names carry peft's prefix when the model is a PeftModel. peft takes it off only where a model has none.
    bare = not any(key.startswith(PREFIX) for key in expected)
    given = {key.removeprefix(PREFIX) if bare else key: tensor for key, tensor in state_dict.items()}
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
