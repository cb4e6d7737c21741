"""What MokA takes from a model it does not know: the layers to adapt, and the ids of its media placeholder tokens."""

from __future__ import annotations

import difflib
import re

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moka.errors import MokaError

from .config import DEFAULT_TARGETS, TEXT, MokaConfig

# Their keys and values are tokens of another sequence, which the routing of this one says nothing about.
_CROSS_ATTENTION = re.compile(r"cross_?attn|cross_?attention|encoder_attn", re.IGNORECASE)
# `mm_token_type_ids` -> the names that transformers' configurations give the placeholder token of that type.
_PLACEHOLDER_FIELDS = {
    1: ("image_token_id", "image_token_index"),
    2: ("video_token_id", "video_token_index"),
    3: ("audio_token_id", "audio_token_index"),
}


def fill_targets(config: MokaConfig, model: nn.Module) -> None:
    """Set ``config.target_modules`` to the defaults for ``model``.

    Where that is a regex, ``layers_to_transform`` becomes part of it: peft heeds that field for names alone.
    """
    indices = config.layers_to_transform
    targets = default_targets(model)
    if isinstance(targets, str):
        if indices not in (None, []):
            targets = default_targets(model, [indices] if isinstance(indices, int) else indices, config.layers_pattern)
        config.layers_to_transform = config.layers_pattern = None
    config.target_modules = targets


def default_targets(
    model: nn.Module, layers: list[int] | None = None, layers_pattern: list[str] | str | None = None
) -> set[str] | str:
    """The language model's seven projections: by plain name, or by a regex where encoders use the same names.

    Args:
        model: any module. In a multimodal model, the towers, projectors and cross-attention are left alone.
        layers: indices of the blocks to take, all by default; the answer is then a regex.
        layers_pattern: name (or names) of the list of blocks, by default the first that has indices.
    Raises:
        MokaError: the model has no such layers.
    """
    # An adapter that is there already wraps its layer: the wrapper has the name, not the `base_layer` inside.
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in DEFAULT_TARGETS and hasattr(module, "weight")
    ]
    decoder = language_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    towers = _towers_inside(decoder, prefix)
    inside = [
        name
        for name in names
        if _is_under(name, prefix)
        and not any(_is_under(name, tower) for tower in towers)
        and not _CROSS_ATTENTION.search(name.removeprefix(prefix))
    ]
    if not inside:
        raise MokaError(
            f"target_modules: {type(model).__name__} has none of the default layers ({', '.join(DEFAULT_TARGETS)}); "
            f"name the linear layers to adapt, such as {linear_names(model)[:5]}."
        )
    if layers is None and len(inside) == len(names):
        return {name.rpartition(".")[2] for name in inside}
    return _regex(inside, prefix, layers, layers_pattern)


def language_decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks that reads the text: what ``get_decoder`` leads to; ``model`` itself where nothing does."""
    found = model
    while hasattr(found, "get_decoder"):
        inner = found.get_decoder()
        if inner is None or inner is found:
            break
        found = inner
    if found is not model:
        return found
    # Nothing of its own: a wrapper around the language model. Of several, a speaking model's is called `thinker`.
    generating = [m for m in model.modules() if m is not model and isinstance(m, GenerationMixin)]
    inner = getattr(model, "thinker", None) or (generating[0] if len(generating) == 1 else None)
    return model if inner is None else language_decoder(inner)


def placeholder_ids(model: nn.Module, config: MokaConfig) -> dict[str, list[int]]:
    """The model's own placeholder token ids by modality, as far as its configuration, or one inside it, names them."""
    own = getattr(model, "config", None)
    found: dict[str, list[int]] = {}
    for name, type_ids in config.modalities.items():
        ids = {value for i in type_ids for value in _named_ids(own, _PLACEHOLDER_FIELDS.get(i, ()))}
        if ids and name != TEXT:
            found[name] = sorted(ids)
    return found


def _named_ids(config, fields: tuple[str, ...]) -> set[int]:
    values = (getattr(config, field, None) for field in fields)
    ids = {value for value in values if isinstance(value, int)}
    if ids:
        return ids
    # E.g. thinker_config of a model that also speaks; what is named further out holds.
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return next((ids for ids in (_named_ids(c, fields) for c in inner if c is not None) if ids), set())


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(prefix + ".")


def _towers_inside(decoder: nn.Module, prefix: str) -> list[str]:
    """Names of whole models within the decoder that do not embed its text, such as encoders on its embeddings."""
    if not isinstance(decoder, PreTrainedModel):
        return []
    try:
        words = decoder.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return []
    inner = (name for name, m in decoder.named_modules() if name and isinstance(m, PreTrainedModel))
    towers = (name for name in inner if all(m is not words for m in decoder.get_submodule(name).modules()))
    return [f"{prefix}.{name}" if prefix else name for name in towers]


def _regex(names: list[str], prefix: str, layers: list[int] | None, layers_pattern) -> str:
    """One regex for these names in any block, or in blocks ``layers``."""
    lists = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    indexed = re.compile(rf"(.*?\.)?({'|'.join(lists) if lists else '[^.]+'})\.(\d+)(\..+)")
    leaves: dict[str, list[str]] = {}  # regex of the parent -> last parts
    seen: set[int] = set()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        start = f"{prefix}." if prefix else ""
        rest = parent.removeprefix(start) + "."
        match = indexed.fullmatch(rest)
        if layers is None:
            pattern = _any_index(rest)
        elif match is None:
            continue
        else:
            seen.add(int(match[3]))
            wanted = "|".join(str(i) for i in layers)
            pattern = f"{_any_index(match[1] or '')}{match[2]}\\.(?:{wanted}){_any_index(match[4])}"
            if int(match[3]) not in layers:
                continue
        known = leaves.setdefault(re.escape(start) + pattern, [])
        if leaf not in known:
            known.append(leaf)
    if not leaves:
        raise MokaError(
            f"layers_to_transform: {layers} names none of the language model's blocks; allowed: "
            f"{sorted(seen) or f'none, as nothing there is called {layers_pattern!r} (layers_pattern)'}."
        )
    return "|".join(f"{parent}(?:{'|'.join(last)})" for parent, last in leaves.items())


def _any_index(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(path))


def linear_names(model: nn.Module) -> list[str]:
    leaves = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    return list(dict.fromkeys(leaves))


def no_match(config: MokaConfig, model: nn.Module) -> str:
    known = linear_names(model)
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules)
    close = [n for w in wanted for n in difflib.get_close_matches(w.rpartition(".")[2], known, n=2)]
    # A name that exists may still match nothing where another field narrows the choice.
    narrowing = {name: getattr(config, name) for name in ("layers_to_transform", "exclude_modules")}
    also = "".join(f" {name} is {value}." for name, value in narrowing.items() if value is not None)
    return (
        f"target_modules: {wanted} matches no layer of {type(model).__name__}. Linear layers there: "
        f"{', '.join(dict.fromkeys(close or known[:8])) or 'none'}.{also}"
    )
