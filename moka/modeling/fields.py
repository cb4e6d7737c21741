"""Fields of encoders' and projectors' configurations: their help and bounds, and reading them with every key checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from moka.errors import MokaError, nearest


def about(
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    weightless: bool = False,
) -> dict:
    """Metadata of a configuration field: help text, and what `read_config` allows (bounds hold for each list item).

    `weightless`: no weight of the encoder depends on the field, only how much of a medium it takes and gives. Trained
    weights fit an encoder that differs in such fields only.
    """
    return {"help": help, "minimum": minimum, "maximum": maximum, "choices": tuple(choices), "weightless": weightless}


def without_weightless(config: Mapping[str, Any], known: Mapping[str, type]) -> dict[str, Any]:
    """`{"type": ..., **fields}` without the fields that no weight depends on; as it is where the type is unknown."""
    cls = known.get(str(config.get("type")))
    fields = dataclasses.fields(cls.Config) if cls is not None else ()  # type: ignore[attr-defined]
    left_out = {f.name for f in fields if f.metadata.get("weightless")}
    return {key: value for key, value in config.items() if key not in left_out}


def read_config(config: Mapping[str, Any], known: Mapping[str, type], what: str) -> tuple[Any, Any]:
    """`{"type": ..., **fields}` -> the class of that type in `known` and an instance of its `Config`.

    Raises `MokaError` for an unknown type or field and for a value of the wrong type or out of bounds. `what` names the
    part in messages ("encoder", "projector").
    """
    values = dict(config)
    name = values.pop("type", None)
    if str(name) not in known:
        raise MokaError(f"{what} type: given {name!r}; known: {', '.join(known)}.{nearest(str(name), known)}")
    cls = known[name].Config  # type: ignore[attr-defined]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise MokaError(f"{what} {name!r} has no field {key!r}. Fields: {', '.join(fields)}.{nearest(key, fields)}")
        check_value(f"{what} {name!r}: {key}", value, hints[key], fields[key])
    return known[name], cls(**values)


def check_value(where: str, value: Any, hint: Any, field: dataclasses.Field) -> None:
    """Raises `MokaError` unless `value` has the annotated type and keeps to the field's bounds or choices."""
    if not _matches(value, hint):
        expected = str(hint) if typing.get_args(hint) else hint.__name__
        raise MokaError(f"{where}: given {value!r}; expected {expected} ({field.metadata['help']}).")
    minimum, maximum, choices = (field.metadata[key] for key in ("minimum", "maximum", "choices"))
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if item is None:
            continue
        if (minimum is not None and item < minimum) or (maximum is not None and item > maximum):
            bounds = f"at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
            raise MokaError(f"{where}: given {value!r}; allowed: {bounds}.")
        if choices and item not in choices:
            raise MokaError(f"{where}: given {value!r}; allowed: {', '.join(map(repr, choices))}, or None.")


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is list:
        return isinstance(value, (list, tuple)) and all(_matches(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_args(hint):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
