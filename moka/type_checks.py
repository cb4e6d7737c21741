"""Checks of values from JSON, or of an instance, against the type hints of the dataclass that they belong to."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import MokaError, nearest
from .io import read_json


def check_types(cls: type, values: Mapping[str, Any], where: str, remedy: str = "Correct the field.") -> None:
    """Compare ``values`` (field -> value, from JSON or an instance) with the type hints of the dataclass ``cls``.

    Args:
        where: opens the message: a file, or the prefix of a key that ends in a point.
    Raises:
        MokaError: a value of another type, or a number that is not finite. Names without a hint are passed over.
    """
    for name, hint in get_type_hints(cls).items():
        if name in values and not _fits(values[name], hint):
            value = values[name]
            allowed = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            allowed = re.sub(r"\bfloat\b", "finite float", allowed.replace("typing.", ""))
            allowed = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), allowed)
            choices = (
                choice for one in (hint, *get_args(hint)) if get_origin(one) is Literal for choice in get_args(one)
            )
            place = f"{where}{name}" if where.endswith((".", " ")) else f"{where}: {name}"
            raise MokaError(
                f"{place} is {value!r}; allowed: {allowed}.{nearest(str(value), map(str, choices))} {remedy}"
            )


T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return the dataclass ``cls`` of ``values``, whose names and types are checked.

    Raises:
        MokaError: no mapping, an unknown name, a name that is required and absent, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise MokaError(f"{where}: {values!r} is no mapping; give one with {', '.join(fields)}.")
    for key in values:
        if key not in fields:
            hint = nearest(str(key), fields)
            raise MokaError(f"{where}: unknown key {key!r}; allowed are {', '.join(fields)}.{hint}")
    unset = dataclasses.MISSING
    absent = [name for name, field in fields.items() if field.default is unset and field.default_factory is unset]
    if absent := [name for name in absent if name not in values]:
        raise MokaError(f"{where} lacks {', '.join(absent)}.")
    check_types(cls, values, where)
    return cls(**values)


def read_dataclass(cls: type[T], path: Path) -> T:
    """Return the dataclass that was written as the JSON file ``path``, whose names and types are checked.

    Args:
        cls: if it has a field ``format_version``, the default is the newest that is known.
    Raises:
        MokaError: the file cannot be read, is of a newer format, or its content is not of ``cls``.
    """
    values = read_json(path, dict)
    newest, given = getattr(cls, "format_version", None), values.get("format_version")
    if newest is not None and type(given) is int and given > newest:
        raise MokaError(
            f"{path} was written by a newer moka (format_version {given}; known: {newest}). Upgrade moka-peft."
        )
    try:
        return from_mapping(cls, values, str(path))
    except MokaError as error:
        raise MokaError(f"{error} The file is damaged: copy the folder again.") from error


def type_schema(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema of what `check_types` accepts for a type hint."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    names = {float: "number", int: "integer", str: "string", bool: "boolean", type(None): "null"}
    if kind in (Union, types.UnionType):
        return {"anyOf": [type_schema(one) for one in arguments]}
    if kind is Literal:
        return {"enum": list(arguments)}
    if kind in names:
        return {"type": names[kind]}
    if kind in (list, set, tuple):
        return {"type": "array", **({"items": type_schema(arguments[0])} if arguments else {})}
    if kind is dict:
        return {"type": "object", **({"additionalProperties": type_schema(arguments[1])} if arguments else {})}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return {}


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if kind is float:  # the comparison is false for NaN, infinity, and integers that no float can hold
        return type(value) is not bool and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    if kind is int:
        return type(value) is not bool and isinstance(value, int) and -(2**63) <= value < 2**63  # as tensors have
    if kind in (list, set, tuple):  # JSON has lists only; MokaConfig keeps its target names in a set
        return isinstance(value, (list, set, tuple)) and all(_fits(one, arguments[0]) for one in value if arguments)
    if kind is dict and arguments:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_fits(key, arguments[0]) and _fits(one, arguments[1]) for key, one in pairs)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [member.value for member in kind]
    return isinstance(value, kind)
