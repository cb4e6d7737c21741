"""Matching of the tensor names in an adapter file with those of a model: formats, adapter names, moved paths."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from moka.errors import MokaError

Shapes = Mapping[str, tuple[int, ...]]

PREFIX = "base_model.model."  # peft's, before every name in an adapter file

# A parameter in a file or a model, of format 1 (no .weight) or 2; peft's path to a trained copy of a module; what names
# the adapters in a parameter's name.
_PARAMETER = re.compile(r"\.(moka_(?:[AB]|gate))(?:\.[^.]+)?(?:\.weight)?$")
_TRAINED_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_ADAPTER_NAMES = re.compile(r"\.moka_(?:[AB]|gate)((?:\.[^.]+)*?)(?:\.weight)?$")
_OTHER_MODEL = "It was made for another backbone or other target_modules; use the model it was trained on."


def match_names(expected: Shapes, given: Shapes) -> dict[str, str]:
    """Return, for each name in ``given``, the name of the same tensor in ``expected``.

    Names may be those of a file or of a model, of format 1 or 2, with or without peft's prefix and an adapter's name. Where
    paths moved between versions of transformers, names are matched by their common ending. A name in ``given`` that has
    no place and is none of MokA's, such as a resized embedding, keeps its name. Those of other adapters are left out.

    Raises:
        MokaError: tensors missing, extra, of another shape, or with more than one possible place.
    """
    places, names = _by_file_name(expected), _by_file_name(without_others(given))
    pairs = {name: name for name in names if name in places}
    pairs |= _match_moved(names.keys() - pairs.keys(), places.keys() - pairs.keys())
    missing = sorted(places[name] for name in places.keys() - set(pairs.values()))
    if missing:
        raise MokaError(
            f"The adapter lacks {len(missing)} of {len(expected)} tensors of this model ({some(missing)}). It was made for "
            "another backbone or other target_modules, or the file lost them; use the model it was trained on."
        )
    extra = sorted(names[name] for name in names.keys() - pairs.keys() if ".moka_" in name)
    if extra:
        raise MokaError(
            f"The adapter has {len(extra)} tensors that this model has no place for ({some(extra)}). {_OTHER_MODEL}"
        )
    matched = {names[name]: places[pairs[name]] if name in pairs else names[name] for name in names}
    for name, place in matched.items():
        if place in expected and tuple(given[name]) != tuple(expected[place]):
            raise MokaError(
                f"{name} is {list(given[name])} in the adapter and {list(expected[place])} in this model: another backbone, "
                "rank or number of modalities. Use the model and configuration it was trained with."
            )
    return matched


def match_layers(saved: Iterable[str], candidates: Iterable[str]) -> set[str] | None:
    """Return the modules among ``candidates`` that the tensors ``saved`` belong to; None: not all of them have one."""
    given = _by_file_name(name for name in without_others(saved) if ".moka_A" in name)
    layers = {f"{name}.moka_A.weight": name for name in candidates}
    exact = {name: name for name in given if name in layers}
    pairs = exact | _match_moved(given.keys() - exact.keys(), layers.keys() - exact.keys())
    return {layers[place] for place in pairs.values()} if len(pairs) == len(given) else None


def without_others(names: Iterable[str]) -> list[str]:
    """Return ``names`` less those of other adapters, of which peft 0.19 writes the tensors into every adapter's folder.

    There they keep their adapter's name, ``moka_A.other.weight`` next to ``moka_A.weight``, also when peft inserts another.
    """
    names = list(names)
    depth = {name: len(found[1].split(".")) for name in names if (found := _ADAPTER_NAMES.search(name))}
    own = min(depth.values(), default=0)
    return [name for name in names if depth.get(name, own) == own]


def _by_file_name(names: Iterable[str]) -> dict[str, str]:
    """Return name in a file of format 2, without peft's prefix -> the name as given."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _TRAINED_COPY.search(name) is not None):
        full = _PARAMETER.sub(r".\1.weight", name.removeprefix(PREFIX))
        short = _TRAINED_COPY.sub("", full)
        if short in found and short != full:
            short = (
                full  # with bias="all" peft writes the biases of a trained copy a second time, under the model's names
            )
        if short in found:
            raise MokaError(
                f"{found[short]} and {name} name the same tensor of an adapter. Give the tensors of one adapter, in one format."
            )
        found[short] = name
    return found


def _match_moved(given: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Pair names by the longest ending that they share: with two towers, each takes what only it can."""
    parts = [{name: name.split(".") for name in sorted(side)} for side in (given, expected)]
    moved: dict[str, str] = {}
    for length in range(max(map(len, parts[0].values()), default=0), 1, -1):
        endings = defaultdict[tuple[str, ...], tuple[list[str], list[str]]](lambda: ([], []))
        for side, taken in enumerate((moved.keys(), set(moved.values()))):
            for name, split in parts[side].items():
                if name not in taken and _shortest(split) <= length <= len(split):
                    endings[tuple(split[-length:])][side].append(name)
        for ending, (sources, places) in endings.items():
            if sources and places and len(sources) + len(places) > 2:
                raise MokaError(
                    f"The adapter's {some(sources)} could be {some(places)} of this model: the names have only "
                    f"{'.'.join(ending)!r} in common. {_OTHER_MODEL}"
                )
            if sources and places:
                moved[sources[0]] = places[0]
    return moved


def _shortest(parts: list[str]) -> int:
    """Return how many last components identify a tensor: from its block's index on, or its module's own name and its."""
    own = 3 if "moka_" in "".join(parts[-2:-1]) else 2  # q_proj.moka_A.weight, lm_head.weight
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return own if index is None else max(own + 1, len(parts) - index)


def some(names: list[str]) -> str:
    """Return the first names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
