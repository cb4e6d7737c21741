"""Values of a configuration as the types they must have, each mistake with its key and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from moka.errors import MokaError, nearest

OBJECTIVES = ("language_modeling", "embedding")
# transformers has one more, "batch_rebalance", which would read every sample for its length.
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")

# Keys of `training` and `alignment` that transformers does not have.
OWN_TRAINING_KEYS = {
    "global_batch_size": "Samples per optimizer step over all processes; accumulation follows, a device takes no more.",
    "encoder_learning_rate": "Learning rate of trainable encoders (default: learning_rate).",
    "projector_learning_rate": "Learning rate of projectors (default: learning_rate).",
    "objective": "Stage 1: language_modeling, or embedding (no pass through the language model).",
    "packing": "Fill rows of model.max_length tokens with several samples; batch sizes then count rows.",
}
_OWN_TYPES = {
    "global_batch_size": int,
    "encoder_learning_rate": float,
    "projector_learning_rate": float,
    "objective": str,
    "packing": bool,
    "fsdp": bool | str,  # annotated as text for the command line alone
}

_ALWAYS = "moka sets it as its batches need it"
_RESERVED = {
    "output_dir": "it is set by output.dir",
    "resume_from_checkpoint": "it is set by `moka train --resume`",
    "enable_jit_checkpoint": "moka saves and ends on SIGTERM by itself",
    "remove_unused_columns": _ALWAYS,
    "label_names": _ALWAYS,
    "prediction_loss_only": _ALWAYS,
    "save_only_model": "a checkpoint without the optimizer could not be resumed from",
    "ignore_data_skip": "a resumed run would train on the same samples again",
    "auto_find_batch_size": "it would change the global batch, and on several processes stop them; lower the batch size",
    "average_tokens_across_devices": "moka always averages over the tokens of the whole batch",
    "label_smoothing_factor": "moka computes the loss at the answer's positions alone, which cannot be smoothed",
}
# What would otherwise fail late, or mean something else: max_steps: 0 trains for three epochs.
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "global_batch_size": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "encoder_learning_rate": 0,
    "projector_learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_NOT_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")


def one_of(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MokaError(f"{where}: {value!r} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def at_least(where: str, value: Any, minimum: float, zero: bool = True) -> None:
    """Refuse numbers below ``minimum`` (and zero itself without ``zero``), NaN too; what is no number passes."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= minimum:
        raise MokaError(f"{where}: {value!r} is too small; at least {minimum} is due.")
    if not zero and value == 0:
        raise MokaError(f"{where}: {value!r} is too small; a number above 0 is due.")


def convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the annotated type; YAML reads 1e-4 as text, which is a number here."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _as(value, option)
        if fits:
            return converted
    due = " or ".join(dict.fromkeys(_type_name(option) for option in options))
    hint = " Quote it." if "text" in due and isinstance(value, (int, float)) else ""
    raise MokaError(f"{where}: {value!r} is {_type_name(type(value))}; {due} is due.{hint}")


def _as(value: Any, option: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(option) or option
    if origin is Any:
        return True, value
    if origin is type(None):
        return value is None, value
    if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return True, float(value)
        except ValueError:
            return False, value
    if isinstance(origin, type) and issubclass(origin, Enum):
        return isinstance(value, str), value
    if origin in (list, dict) and type(value) is origin:
        inner = typing.get_args(option)
        if not inner:
            return True, value
        pairs = [_as(item, inner[-1]) for item in (value if origin is list else value.values())]
        fits = all(fit for fit, _ in pairs) and (origin is list or all(isinstance(key, str) for key in value))
        items = [item for _, item in pairs]
        return fits, items if origin is list else dict(zip(value, items, strict=True))
    return origin in (int, bool, str) and type(value) is origin, value


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}


def _type_name(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if isinstance(origin, type) and issubclass(origin, Enum):
        return "text"
    inner = typing.get_args(option)
    if origin is list and inner and inner[0] in _NAMES:
        return f"a list of {_NAMES[inner[0]].removeprefix('a ').replace('number', 'numbers').replace('text', 'texts')}"
    return _NAMES.get(origin, getattr(origin, "__name__", str(option)))


def training_section(raw: dict[str, Any], where: str, section: str) -> dict[str, Any]:
    """The checked keys of ``training`` or ``alignment``: ours, and those of ``transformers.TrainingArguments``."""
    hints = typing.get_type_hints(TrainingArguments)
    known = [name for name in training_keys() if name not in _RESERVED]
    checked = {}
    for key, value in raw.items():
        at = f"{where}: {section}.{key}"
        if key in _RESERVED:
            raise MokaError(f"{at} cannot be chosen: {_RESERVED[key]}; take it out.")
        if key not in known:
            raise MokaError(
                f"{where}: unknown key {f'{section}.{key}'!r}; known: the fields of transformers.TrainingArguments and "
                f"{', '.join(OWN_TRAINING_KEYS)}.{nearest(str(key), known)}"
            )
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare `no` as false
        checked[key] = convert(value, _OWN_TYPES.get(key) or hints[key], at)
        if key in _AT_LEAST:
            at_least(at, checked[key], _AT_LEAST[key], zero=key not in _NOT_ZERO)
        if isinstance(checked[key], float) and not math.isfinite(checked[key]):
            raise MokaError(f"{at}: {value!r} is not a finite number.")
    if "max_steps" in checked and checked["max_steps"] != -1:
        at_least(f"{where}: {section}.max_steps", checked["max_steps"], 1)
    if "objective" in checked:
        one_of(f"{where}: {section}.objective", checked["objective"], OBJECTIVES)
    if "train_sampling_strategy" in checked:
        one_of(f"{where}: {section}.train_sampling_strategy", checked["train_sampling_strategy"], SAMPLING_STRATEGIES)
    return checked


def training_keys() -> list[str]:
    """All keys of ``training`` and ``alignment``: ours first."""
    return [*OWN_TRAINING_KEYS, *(f.name for f in dataclasses.fields(TrainingArguments) if f.init)]


def describe_training() -> list[str]:
    """One line for each key with its help, for `moka train --help-config`."""
    lines = [f"{name}:  # {text}" for name, text in OWN_TRAINING_KEYS.items()]
    for f in dataclasses.fields(TrainingArguments):
        if f.init and f.name not in _RESERVED:
            text = " ".join(str(f.metadata.get("help", "")).split()).split(". ")[0].rstrip(".")
            lines.append(f"{f.name}:" + (f"  # {text}." if text else ""))
    return lines
