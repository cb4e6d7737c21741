"""From what a forward was given to the ids its routing is built of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moka.errors import MokaError

from .config import MokaConfig
from .routing import modality_rows, question_to_interaction, text_before_answer


@dataclass(frozen=True)
class RoutingInputs:
    """Ids put in force from outside a forward: by ``with moka.routing(...)`` or by ``generate``."""

    mm_token_type_ids: torch.Tensor | None  # [batch, seq]
    interaction_ids: torch.Tensor | None  # [batch, seq]
    question_mask: torch.Tensor | None  # [batch, seq]
    valid: torch.Tensor | None  # [batch, seq] bool
    whole_prompt: bool  # the ids are those of a whole prompt: what follows is decoded text


Resolved = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def resolve(
    configs: dict[str, MokaConfig], bound: dict, given: dict, scope: RoutingInputs | None, training: bool
) -> Resolved | None:
    """Type ids, interaction ids and validity [batch, seq] of the tokens of this forward; None: nothing is known.

    Args:
        configs: the active adapters.
        bound: the forward's arguments by name.
        given: the routing arguments it got (values may be None).
        scope: ids in force from outside.
        training: gradients are wanted, so a missing question is an error and not "the whole prompt".
    """
    config = next(iter(configs.values()))
    tokens = bound.get("input_ids")
    tokens = tokens if tokens is not None else bound.get("inputs_embeds")
    offset = _cache_length(bound.get("past_key_values"))
    shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])

    source = dict(given)
    by_position = scope is not None and scope.whole_prompt
    if scope is not None:
        outside = {name: getattr(scope, name) for name in source}
        # In generate the whole prompt is known and position decides; otherwise the forward's own arguments win.
        first, second = (outside, given) if by_position else (given, outside)
        source = {name: first[name] if first[name] is not None else second[name] for name in source}

    whole_types = source["mm_token_type_ids"]
    if whole_types is not None:
        shape = shape or (whole_types.shape[0], whole_types.shape[1])
        type_ids = _align("mm_token_type_ids", whole_types, shape, offset, by_position)
    elif bound.get("input_ids") is not None:
        type_ids = whole_types = _types_from_tokens(config, bound["input_ids"])
    elif source["question_mask"] is not None or source["interaction_ids"] is not None:
        raise MokaError(
            "interaction_ids or question_mask came without mm_token_type_ids, and there are no input_ids to derive "
            "them from. Pass mm_token_type_ids [batch, seq] (0 text, 1 image, 2 video, 3 audio)."
        )
    else:
        return None

    valid = _validity(bound.get("attention_mask"), scope, shape, offset)
    is_text = modality_rows(config, type_ids) == config.text_row
    if bool(is_text.all()):
        return type_ids, None, valid

    ids = source["interaction_ids"]
    if ids is None and source["question_mask"] is not None:
        question = source["question_mask"]
        if question.shape != whole_types.shape:
            raise MokaError(
                f"question_mask is {list(question.shape)}, mm_token_type_ids {list(whole_types.shape)}; they must agree."
            )
        ids = question_to_interaction(question, modality_rows(config, whole_types) == config.text_row)
    if ids is not None:
        _refuse_split_groups(configs, ids, whole_types, shape[1], offset)
        return type_ids, _align("interaction_ids", ids, shape, offset, by_position), valid
    return type_ids, _derived_interaction(configs, bound.get("labels"), is_text, valid, training), valid


def _cache_length(cache) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _types_from_tokens(config: MokaConfig, input_ids: torch.Tensor) -> torch.Tensor:
    type_ids = torch.full_like(input_ids, config.modalities["text"][0])
    for name, token_ids in (config.modality_token_ids or {}).items():
        if token_ids:
            type_ids = torch.where(
                torch.isin(input_ids, torch.tensor(token_ids, device=input_ids.device)),
                config.modalities[name][0],
                type_ids,
            )
    return type_ids


def _align(name: str, ids: torch.Tensor, shape: tuple[int, int], offset: int, by_position: bool) -> torch.Tensor:
    """Cut [batch, *] ids to the tokens of this forward, which start at position ``offset`` of the sequence.

    ``by_position``: the ids are those of a whole prompt, and what lies past their end is decoded text, 0; beams repeat
    each row. Otherwise they cover these tokens, or these and all cached ones.
    """
    batch, seq = shape
    if ids.dim() == 2 and by_position and ids.shape[0] and batch % ids.shape[0] == 0:
        part = ids.repeat_interleave(batch // ids.shape[0], dim=0)[:, offset : offset + seq]
        return torch.nn.functional.pad(part, (0, seq - part.shape[1]))
    if tuple(ids.shape) == shape:
        return ids
    if tuple(ids.shape) == (batch, offset + seq):
        return ids[:, offset:]
    allowed = f"[{batch}, {seq}]" + (f" or, with the {offset} cached tokens, [{batch}, {offset + seq}]" if offset else "")
    raise MokaError(f"{name} is {list(ids.shape)}, but the tokens are {allowed}; the shapes must agree.")


def _validity(mask, scope: RoutingInputs | None, shape: tuple[int, int], offset: int) -> torch.Tensor | None:
    by_position = scope is not None and scope.whole_prompt
    if not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        # Ready-made 4-D masks (static caches, packing) do not tell padding; the prompt's own mask does.
        if scope is None or scope.valid is None:
            return None
        mask = scope.valid
    # A mask may be longer than the sequence so far (static caches); positions past a prompt's mask are valid.
    by_position = by_position or mask.shape[1] > offset + shape[1]
    return ~_align("attention_mask", mask == 0, shape, offset, by_position)


def _derived_interaction(configs, labels, is_text, valid, training: bool) -> torch.Tensor | None:
    if all(config.interaction == "none" for config in configs.values()):
        return None
    if labels is not None:
        keys = text_before_answer(is_text, labels, valid)
    elif training:
        raise MokaError(
            "Training on media tokens needs to know the question: pass interaction_ids or question_mask (the moka "
            "processor makes them), or labels, whose first supervised token ends it. Guessing would leak the answer."
        )
    else:
        keys = is_text if valid is None else is_text & valid
    return question_to_interaction(keys, is_text)


def _refuse_split_groups(configs, ids: torch.Tensor, types: torch.Tensor, seq: int, offset: int) -> None:
    """Chunked prefill: a media token whose question lies in another chunk would silently lose it."""
    length = ids.shape[1]
    if length <= seq or length <= offset or types.shape != ids.shape:
        return
    if all(config.interaction == "none" for config in configs.values()):
        return
    config = next(iter(configs.values()))
    is_text = modality_rows(config, types) == config.text_row
    queries, keys = (is_text, ~is_text) if config.interaction == "reversed" else (~is_text, is_text)
    inside = torch.zeros_like(is_text)
    inside[:, offset : offset + seq] = True
    for row, group in enumerate(ids):
        asked = set(group[queries[row] & inside[row]].tolist()) - {0}
        split = asked & set(group[keys[row] & ~inside[row]].tolist())
        if split:
            raise MokaError(
                f"Chunked prefill: positions {offset} to {offset + seq - 1} hold media tokens whose question "
                f"(interaction id {min(split)}) lies in another chunk, so they cannot attend to it. Raise "
                f"prefill_chunk_size to at least {length}, or prefill in one go."
            )
