"""Checks of saved adapters: their configuration, the names and shapes in the file's header, and the values."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from moka.errors import MokaError
from moka.type_checks import check_types

from .matching import PREFIX, match_names, some

if TYPE_CHECKING:
    from .config import MokaConfig

# For a task's head peft lists every usual name in modules_to_save, and a model has one of them.
TASK_HEADS = ("classifier", "score", "qa_outputs")
_AGAIN = "Copy the adapter folder again, or save the adapter again."
_DAMAGED = "{} cannot be read ({}); it is truncated or damaged. Copy it again, or save the adapter again."

# The names of tensors in the MokA authors' two layouts, and in a LoRA adapter.
_OFFICIAL = re.compile(r"\.lora_([AB]\d|[AB]\.(text|image))(\.\w+)*$")
_LORA = re.compile(r"\.lora_[AB](\.\w+)?\.weight$")


def check_config(fields: Any, source: str) -> None:
    """Refuse the parsed content of an ``adapter_config.json`` that names no method or has fields of another type."""
    from .config import FORMAT_VERSION, MokaConfig

    if not isinstance(fields, dict):
        raise MokaError(f"{source} has a {type(fields).__name__}, not an object with the adapter's fields. {_AGAIN}")
    method, version = fields.get("peft_type"), fields.get("format_version")
    if not isinstance(method, str):
        raise MokaError(f"{source}: peft_type is {method!r}; allowed: the name of a method, such as MOKA. {_AGAIN}")
    newer = type(version) is int and version > FORMAT_VERSION  # its fields may differ; MokaConfig refuses it by version
    if method == "MOKA" and not newer:
        check_types(MokaConfig, fields, source, _AGAIN)


def check_adapter_config(folder: str | Path, subfolder: str | None = None) -> dict[str, Any] | None:
    """Return the checked fields of a local ``adapter_config.json``, or None if there is none.

    Raises:
        MokaError: the file is no JSON, names no method, or has fields of another type.
    """
    path = Path(folder) / (subfolder or "") / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MokaError(f"{path} cannot be read as JSON ({error}); it is damaged. {_AGAIN}") from error
    check_config(fields, str(path))
    return fields


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file or of a pickle, on the CPU. A pickle's code is never executed.

    Raises:
        MokaError: the file cannot be read, or has anything but named tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device="cpu")
        except (SafetensorError, OSError) as error:
            raise MokaError(_DAMAGED.format(path, error)) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises any error that its bytes lead to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, pickle.UnpicklingError) and re.search(r"Unsupported|allowed global|GLOBAL", str(error)):
            named = re.search(r"(?:GLOBAL|class|global:?) ([\w.]+\.[\w.]+)", str(error))
            raise MokaError(
                f"{path} has code or objects other than tensors{f' ({named[1]})' if named else ''}; it was not executed. "
                "Allowed are named tensors only: use a file from a source you trust, best as safetensors."
            ) from error
        raise MokaError(_DAMAGED.format(path, reason[0][:120])) from error
    if not isinstance(tensors, dict) or any(
        not isinstance(key, str) or not isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise MokaError(f"{path} has objects other than named tensors ({type(tensors).__name__}); give a state dict.")
    return dict(tensors)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name: of a safetensors file from its header only, which opening compares with the size."""
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise MokaError(_DAMAGED.format(path, error)) from error


@dataclass(frozen=True)
class SavedAdapter:
    """The weights file of a local adapter folder, and the shapes in it by name."""

    weights: Path
    shapes: dict[str, tuple[int, ...]]


def check_adapter_folder(folder: str | Path, subfolder: str | None = None) -> SavedAdapter | None:
    """Return what a local adapter folder's weights file has, without reading any value of a safetensors file.

    None for a name on the Hub, and for a folder that has only the configuration.

    Raises:
        MokaError: the configuration is damaged; the weights are absent, truncated, empty, in another layout, or lack
            modules that the configuration lists in ``modules_to_save``.
    """
    fields, path = check_adapter_config(folder, subfolder), Path(folder) / (subfolder or "")
    if fields is None:
        return None
    weights = next((path / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (path / name).exists()), None)
    if weights is None:
        if [file.name for file in path.iterdir()] == [CONFIG_NAME]:
            return None
        raise MokaError(
            f"{path} has no {SAFETENSORS_WEIGHTS_NAME}; copy the complete adapter folder, or save it again."
        )
    shapes = _read_shapes(weights)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise MokaError(
            f"{weights} has {len(empty)} empty tensors ({some(empty)}): it was saved from a sharded model without "
            "gathering (ZeRO-3, FSDP). Save through the trainer."
        )
    _check_layout(weights, sorted(shapes), fields["peft_type"])
    # peft itself raises a bare KeyError for a lost module, as it looks the tensors up before asking the tuner.
    saved = fields.get("modules_to_save") or []
    lost = [name for name in saved if not any(f".{name}." in f".{key}" for key in shapes)]
    if any(name not in lost for name in saved if name in TASK_HEADS):
        lost = [name for name in lost if name not in TASK_HEADS]
    if lost:
        raise MokaError(
            f"{weights} lacks the modules {lost}, which its configuration lists in modules_to_save. {_AGAIN}"
        )
    return SavedAdapter(weights, shapes)


def _check_layout(weights: Path, names: list[str], method: str) -> None:
    # peft loads what fits and ignores the rest: names of another layout would leave an adapter that does nothing.
    problem = ""
    wrong = [name for name in names if not name.startswith(PREFIX) or name.startswith(2 * PREFIX)]
    if official := [name for name in names if _OFFICIAL.search(name)]:
        remedy = f"Convert it: `moka convert {weights.parent} --output DIR`."
        problem = f"is in the layout of the MokA authors ({some(official)}). {remedy}"
    elif method != "MOKA":
        return
    elif not any(".moka_A" in name for name in names) and any(_LORA.search(name) for name in names):
        problem = (
            f"has a LoRA adapter ({some(names)}), and peft_type in {CONFIG_NAME} is MOKA. Use the configuration that "
            "belongs to it (peft_type LORA), or copy the folder again."
        )
    elif not any(".moka_A" in name for name in names):
        problem = f"has no MokA tensors (named moka_A and moka_B); found: {some(names) or 'none'}. {_AGAIN}"
    elif wrong:
        problem = (
            f"has {len(wrong)} of {len(names)} names that lack the prefix {PREFIX!r} or have it twice ({some(wrong)}). "
            "Rename them, or save the adapter with save_pretrained."
        )
    if problem:
        raise MokaError(f"{weights} {problem}")


def planned_tensors(layers: Mapping[str, tuple[int, int]], config: MokaConfig) -> dict[str, tuple[int, ...]]:
    """Return the names in an adapter file, and the shapes, that ``config`` leads to.

    Args:
        layers: full name in the backbone -> (in_features, out_features) of the layers to adapt.
    """
    planned: dict[str, tuple[int, ...]] = {}
    for name, (in_features, out_features) in layers.items():
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        for tensor, shape in config.tensor_shapes(r, in_features, out_features).items():
            planned[f"{PREFIX}{name}.{tensor}.weight"] = shape
    return planned


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter in ``model`` by their names there: A, B, trained biases, modules_to_save."""
    biased = getattr(getattr(model, "peft_config", {}).get(adapter_name), "bias", "none") != "none"
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        groups: tuple[str, ...] = ("modules_to_save",) if isinstance(module, AuxiliaryTrainingWrapper) else ()
        if isinstance(module, BaseTunerLayer):
            groups = tuple(module.adapter_layer_names)
            bias = getattr(module.get_base_layer(), "bias", None)
            if biased and bias is not None and adapter_name in getattr(module, groups[0]):
                found[f"{name}.base_layer.bias"] = bias
        for group in groups:
            entry, path = getattr(module, group, {}), f"{name}.{group}.{adapter_name}"
            if adapter_name in entry and isinstance(entry[adapter_name], nn.Module):
                found |= {f"{path}.{key}": part for key, part in _saved_tensors(entry[adapter_name])}
            elif adapter_name in entry:
                found[path] = entry[adapter_name]
    return found


def _saved_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what ``state_dict`` has, without calling it: under FSDP2 that shards the parameters again, within a forward."""
    for name, part in module.named_modules(remove_duplicate=False):
        buffers = {key: b for key, b in part._buffers.items() if key not in part._non_persistent_buffers_set}
        for key, tensor in {**part._parameters, **buffers}.items():
            if tensor is not None:
                yield f"{name}.{key}" if name else key, tensor


def expected_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Return the names in ``model`` and the shapes that a file for its adapter ``adapter_name`` must bring."""
    return {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model, adapter_name).items()}


def check_finite(tensors: Mapping[str, torch.Tensor], source: str = "The adapter") -> None:
    """Refuse values that are not finite, and a moka_A or moka_B of integers. Tensors on the meta device are skipped."""
    real = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    integers = [name for name, tensor in real.items() if ".moka_" in name and not tensor.is_floating_point()]
    if integers:
        dtype = real[integers[0]].dtype
        raise MokaError(f"{source} has {dtype} in {some(integers)}; allowed: floating-point numbers. {_AGAIN}")
    wide = ((name, t.float() if t.element_size() == 1 else t) for name, t in real.items())  # float8 has no isfinite
    damaged = [name for name, tensor in wide if not torch.isfinite(tensor).all()]
    if damaged:
        raise MokaError(
            f"{source} has values that are not finite ({some(damaged)}); it is damaged or its training diverged. Take "
            "an earlier checkpoint."
        )


def check_adapter_tensors(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return ``tensors`` under the names that they have in ``model``, in which adapter ``adapter_name`` was injected.

    Those of other adapters in a folder that peft 0.19 wrote are left out.

    Raises:
        MokaError: tensors missing, extra, of another shape, or not finite.
    """
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = match_names(expected_tensors(model, adapter_name), given)
    check_finite(tensors)
    return {names[name]: tensor for name, tensor in tensors.items() if name in names}
