"""Fields of encoders' and projectors' configurations: their help and bounds, and reading them with every key checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moka.errors import MokaError, nearest
from moka.type_checks import check_types


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
    if not isinstance(config, Mapping):
        raise MokaError(f"{what}: {config!r} is no mapping; give one with a 'type': {', '.join(known)}.")
    values = dict(config)
    name = values.pop("type", None)
    if str(name) not in known:
        raise MokaError(f"{what} type: given {name!r}; known: {', '.join(known)}.{nearest(str(name), known)}")
    cls = known[name].Config  # type: ignore[attr-defined]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := next((key for key in values if key not in fields), ""):
        raise MokaError(
            f"{what} {name!r} has no field {unknown!r}. Fields: {', '.join(fields)}.{nearest(unknown, fields)}"
        )
    check_types(cls, values, f"{what} {name!r}")
    for key, value in values.items():
        minimum, maximum, choices = (fields[key].metadata[bound] for bound in ("minimum", "maximum", "choices"))
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is None:
                continue
            if (minimum is not None and item < minimum) or (maximum is not None and item > maximum):
                allowed = f"at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
            elif choices and item not in choices:
                allowed = f"{', '.join(map(repr, choices))}, or None"
            else:
                continue
            raise MokaError(f"{what} {name!r}: {key}: given {value!r}; allowed: {allowed}.")
    return known[name], cls(**values)
