"""The layers of a model that an adapter takes, and the ids of the model's media tokens.

A bare name in ``target_modules`` means the decoder: its layers outside of towers, media projectors, cross-attention and
experts, and the output head. A name with a dot (a path), a pattern, or ``adapt_towers=True`` reaches anywhere.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedConfig

from moka.errors import MokaError

from .config import DEFAULT_TARGETS, TEXT, MokaConfig
from .text_decoder import (
    CROSS_ATTENTION,
    contains_any,
    coverage,
    decoder_blocks,
    decoder_scope,
    is_linear,
    language_decoder,
    linear_names,
    named_modules,
    owners_of,
)

__all__ = [
    "check_supported",
    "coverage",
    "decoder_scope",
    "fill_targets",
    "language_decoder",
    "matches",
    "no_match",
    "placeholder_ids",
    "structure_ids",
    "tower_modality",
]

# The families' own names of the projections in a decoder block; a model's default targets are those that it has.
FAMILY_TARGETS = (
    *DEFAULT_TARGETS,
    # Phi, GLM, LFM2, InternLM2
    *("qkv_proj", "gate_up_proj", "out_proj", "w1", "w2", "w3", "wqkv", "wo"),
    # Linear attention, short convolutions and Mamba
    *("in_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    # MLA: DeepSeek, Kimi
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    # GPT, Falcon, MPT, OPT, GPT-J, BERT
    *("c_attn", "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "Wqkv"),
    *("fc1", "fc2", "fc_in", "fc_out", "query", "key", "value"),
)
# Linear layers that choose among experts; never a default.
_CHOOSERS = ("gate", "router", "shared_expert_gate")

# `mm_token_type_ids` -> the names that configurations and processors give the placeholder token of that type.
_PLACEHOLDER_FIELDS = {
    # The last two: Kimi-VL's and InternVL's own code.
    1: ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id"),
    2: ("video_token_id", "video_token_index"),
    3: ("audio_token_id", "audio_token_index", "sound_context_token_id"),
}
# `main_input_name` or `input_modalities` of an encoder -> the type of all of its tokens.
_ENCODER_INPUTS = {"pixel_values": 1, "image": 1, "pixel_values_videos": 2, "video": 2}
_ENCODER_INPUTS |= {"input_features": 3, "input_values": 3, "audio_values": 3, "audio": 3}
# Within the name of a forward's parameter.
_MEDIA_INPUTS = ("pixel_values", "input_features", "input_values", "audio_values", "image_patches", "flattened_patches")
_MEDIA_WORDS = {"image", "img", "vision", "visual", "video", "frame", "tile", "slice", "audio", "sound"}
_MEDIA_WORDS |= {"boi", "eoi", "bov", "eov", "boa", "eoa"}


def matches(
    config: MokaConfig, key: str, scope: set[str] | None, given: Iterable[str] | None = None
) -> bool | re.Match[str] | None:
    """Return peft's ``check_target_module_exists``, except that a bare name finds nothing outside of ``scope``.

    Args:
        given: ``target_modules`` before peft's injection, which shortens 20 paths and more, also to bare names.
    """
    found = check_target_module_exists(config, key)
    if not found or scope is None or key in scope or getattr(config, "adapt_towers", False):
        return found
    if isinstance(config.target_modules, str):
        return found
    return any("." in name and f".{key}".endswith(f".{name}") for name in given or config.target_modules or ())


def fill_targets(config: MokaConfig, model: nn.Module) -> None:
    """Replace ``target_modules`` None or "all-linear" by the bare names of such layers in the decoder's blocks.

    "all-linear" on a model that is not of transformers means all of its linear layers, by full name.

    Raises:
        MokaError: the model has no such layers.
    """
    targets, scope = config.target_modules, decoder_scope(model)
    everything = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if targets is not None and not everything:
        return
    if everything and scope is None:
        config.target_modules = {name for name, module in named_modules(model) if is_linear(module)}
        return
    prefix, blocks = ("", model) if scope is None else decoder_blocks(model)
    taken: set[str] = set()
    for name, module in named_modules(blocks, prefix):
        leaf, parts = name.rpartition(".")[2], name.removeprefix(prefix).split(".")
        within = scope is None or name in scope
        chooses = any(part in _CHOOSERS or "router" in part for part in parts)
        if within and is_linear(module) and not chooses and (everything or leaf in FAMILY_TARGETS):
            # The number of a layer in a list is the number of a block as well.
            taken.add(name if leaf.isdigit() else leaf)
    if not taken:
        raise MokaError(
            f"target_modules: {type(model).__name__} has none of the default layers ({', '.join(FAMILY_TARGETS)}); "
            f"name the linear layers to adapt, such as {linear_names(model)[:5]}."
        )
    config.target_modules = taken


def placeholder_ids(model: nn.Module, config: MokaConfig) -> dict[str, list[int]]:
    """Return the placeholder token ids by modality that the model's configuration, or one inside it, names."""
    own: Any = getattr(model, "config", None)
    found: dict[str, list[int]] = {}
    for name, type_ids in config.modalities.items():
        if hasattr(own, "placeholder_id"):  # moka's composed model has one for every type
            ids = {own.placeholder_id(i) for i in type_ids if i > 0}
        else:
            ids = {value for i in type_ids for value in _named_ids(own, _PLACEHOLDER_FIELDS.get(i, ()))}
        if ids and name != TEXT:
            found[name] = sorted(ids)
    return found


def structure_ids(source: Any, placeholders: Iterable[int] | None = None) -> list[int]:
    """Return the ids of tokens around and inside media that are text, but no part of a question.

    Begin and end marks, row breaks, tile and frame marks.

    Args:
        source: a model, its configuration, a processor or a tokenizer.
        placeholders: ids to leave out; default: those that ``source`` names. Of a processor give the model's: some
            processors (Gemma 3, Llama 4) call the token of the prompt ``image_token``, which is not what they expand it to.
    """
    tokenizer = getattr(source, "tokenizer", source)
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        holders: list[Any] = [tokenizer, source]
        endings: tuple[str, ...] = ("_token", "_tag", "_token_id", "_token_ids")
        # The public `special_tokens_map` leaves the tokens out that only this model has.
        named = [*getattr(tokenizer, "_special_tokens_map", {}).items(), *vars(source).items()]
        # Idefics and LFM2-VL mark a picture's tiles with tokens that no attribute names.
        named += [("tile_token", t) for t in tokenizer.get_added_vocab() if "row_" in t and "col_" in t]
    else:
        holders = list(_configs(getattr(source, "config", source)))
        endings = ("_token_id", "_token_index", "_token_ids")
        named = [item for c in holders for item in vars(c).items()]
    ids: set[int] = set()
    for key, value in named:
        if key.endswith(endings) and _MEDIA_WORDS.intersection(key.split("_")):
            values = value if isinstance(value, (list, tuple)) else [value]
            if not key.endswith(("_id", "_ids", "_index")):
                values = [one for one in values if not isinstance(one, int)]  # Gemma 4's audio_ms_per_token is no token
            ids |= {i for v in values if (i := _token_id(v, tokenizer)) is not None}
    if placeholders is None:
        found = ([_own_ids(c, fields) for c in holders] for fields in _PLACEHOLDER_FIELDS.values())
        of_type = [next(filter(None, each), set()) if tokenizer in holders else set().union(*each) for each in found]
        placeholders = set().union(*of_type)
    return sorted(ids - set(placeholders))


def check_supported(model: nn.Module, config: MokaConfig) -> None:
    """Refuse a model whose media are no tokens of the sequence that the decoder reads, or unknown ones.

    Raises:
        MokaError: an encoder-decoder, media by cross-attention, or media inputs without known placeholder ids.
    """
    owners, kind = owners_of(model), type(model).__name__
    if any(getattr(owner.config, "is_encoder_decoder", False) for owner in owners):
        raise MokaError(
            f"{kind} is an encoder-decoder: its media and its question are not in one sequence, which MokA's interaction "
            "needs. Use a decoder-only model, or LoRA."
        )
    inputs = [
        p for o in owners for p in inspect.signature(type(o).forward).parameters if contains_any(p, _MEDIA_INPUTS)
    ]
    media = [name for name in config.modalities if name != TEXT]
    if not inputs or not media:
        return
    layers = [name for name, _ in language_decoder(model).named_modules() if contains_any(name, CROSS_ATTENTION)]
    if layers or any(getattr(c, "cross_attention_layers", None) for owner in owners for c in _configs(owner.config)):
        raise MokaError(
            f"{kind}: its media enter by cross-attention ({', '.join(layers[:1]) or 'cross_attention_layers'}), so no "
            "token of the sequence is theirs and MokA has nothing to route. Use a model with placeholder tokens, or LoRA."
        )
    if not any((config.modality_token_ids or {}).values()):
        raise MokaError(
            f"modality_token_ids: {kind} takes {', '.join(dict.fromkeys(inputs))}, but its configuration names no "
            f"placeholder token for {', '.join(media)}. Give their ids, such as modality_token_ids="
            f'{{"{media[0]}": [ID]}}, or modalities={{"text": [0]}} for text only.'
        )


def tower_modality(model: nn.Module, name: str, config: MokaConfig) -> str:
    """Return the modality that all tokens of the layer ``name``, which is outside of the decoder, have.

    That of the nearest encoder around it; else a modality that its path names (``projectors.audio``); else the only one
    with placeholder ids; else text.
    """
    by_type = {i: modality for modality, ids in config.modalities.items() for i in ids}
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        takes = getattr(module, "input_modalities", ())
        takes = (takes,) if isinstance(takes, str) else takes
        for key in (getattr(module, "main_input_name", None), *(() if TEXT in takes else takes)):
            if isinstance(key, str) and _ENCODER_INPUTS.get(key) in by_type:
                return by_type[_ENCODER_INPUTS[key]]
    known = [modality for modality, ids in (config.modality_token_ids or {}).items() if ids and modality != TEXT]
    named = [part for part in parts if part in config.modalities and part != TEXT]
    return named[0] if named else known[0] if len(known) == 1 else TEXT


def no_match(config: MokaConfig, model: nn.Module) -> str:
    """Return the message for targets that match no layer: the nearest names, and what else narrows the choice."""
    targets, scope = config.target_modules, decoder_scope(model)
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    leaves = [name.rpartition(".")[2] for name in wanted]
    known = linear_names(model)
    close = [n for leaf in leaves for n in difflib.get_close_matches(leaf, known, n=2)]
    blocks = {"layers_to_transform": f" (of {len(list(decoder_blocks(model)[1].children()))} blocks)"}
    # A name that exists may still match nothing if another field narrows the choice.
    narrowing = {name: getattr(config, name, None) for name in ("layers_to_transform", "exclude_modules")}
    also = "".join(f" {name} is {v}{blocks.get(name, '')}." for name, v in narrowing.items() if v not in (None, []))
    linear = [name for name, m in named_modules(model) if scope is not None and is_linear(m)]
    named = [name for name in linear if name.rpartition(".")[2] in wanted]
    if named and scope is not None and not scope.intersection(named):
        also += f" A bare name means the decoder: give a path, such as {named[0]!r}, or adapt_towers=True."
    return (
        f"target_modules: {wanted} matches no layer of {type(model).__name__}. Linear layers there: "
        f"{', '.join(dict.fromkeys(close or known[:8])) or 'none'}.{also}"
    )


def _configs(config: Any) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and those inside it, outer ones first."""
    level = [config] if isinstance(config, PreTrainedConfig) else []
    while level:
        yield from level
        level = [inner for c in level for inner in vars(c).values() if isinstance(inner, PreTrainedConfig)]


def _named_ids(config: Any, fields: tuple[str, ...]) -> set[int]:
    return next((ids for c in _configs(config) if (ids := _own_ids(c, fields))), set())


def _token_id(token: Any, tokenizer: Any) -> int | None:
    """Return the id of a token (its text or id) that the tokenizer knows, else None."""
    if token is None or isinstance(token, (bool, int)):
        return token if type(token) is int and token >= 0 else None
    found = tokenizer.convert_tokens_to_ids(str(token))
    return None if found == tokenizer.unk_token_id else found


def _own_ids(source: Any, fields: tuple[str, ...]) -> set[int]:
    return {v for v in (getattr(source, f, None) for f in fields) if isinstance(v, int) and not isinstance(v, bool)}
