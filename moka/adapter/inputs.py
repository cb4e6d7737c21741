"""From what a forward was given to the ids its routing is built of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moka.errors import MokaError
from moka.host import HostIds

from .config import TEXT, MokaConfig
from .routing import modality_rows, question_to_interaction, text_before_answer

# Type ids, interaction ids and validity of the tokens of a forward: [batch, seq] in host memory.
Resolved = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class RoutingInputs:
    """Ids put in force from outside a forward: by ``with moka.routing(...)`` or by ``generate``."""

    mm_token_type_ids: torch.Tensor | None  # [batch, seq]
    interaction_ids: torch.Tensor | None  # [batch, seq]
    question_mask: torch.Tensor | None  # [batch, seq]
    valid: torch.Tensor | None  # [batch, seq] bool
    # Set by generate: the ids are those of a whole prompt that begins at this position; what follows it is decoded.
    start: int | None = None
    device: torch.device | None = None  # where the ids lay before they were read

    @classmethod
    def of_prompt(cls, resolved: Resolved, start: int, device: torch.device | None) -> RoutingInputs:
        """What `resolve` found of a whole prompt, in force for all steps of generate."""
        types, groups, valid = (
            None if ids is None else torch.from_numpy(np.ascontiguousarray(ids)) for ids in resolved
        )
        return cls(types, groups, None, valid, start=start, device=device)

    def on_host(self) -> RoutingInputs:
        """The same, read into host memory once for all forwards inside."""
        ids = {"mm_token_type_ids": self.mm_token_type_ids, "interaction_ids": self.interaction_ids}
        read = HostIds().read({**ids, "question_mask": self.question_mask, "attention_mask": self.valid})
        device = next((i.device for i in (*ids.values(), self.question_mask) if i is not None), None)
        valid = read.pop("attention_mask")
        return RoutingInputs(**read, valid=valid, start=self.start, device=device)

    def decodes(self, offset: int) -> bool:
        """In generate: whether the tokens after ``offset`` cached ones lie past the prompt, so that all are text."""
        types = self.mm_token_type_ids
        return self.start is not None and types is not None and offset >= self.start + types.shape[1]


@dataclass(frozen=True)
class _Tokens:
    """Where the tokens of one forward lie in their sequence."""

    shape: tuple[int, int]  # batch, seq
    offset: int  # tokens before them, in the cache
    scope: RoutingInputs | None
    first: bool  # nothing of the prompt was fed before

    @property
    def by_position(self) -> bool:
        return self.scope is not None and self.scope.start is not None

    @property
    def knows_padding(self) -> bool:
        """In generate: whether the prompt's own mask is in force."""
        return self.by_position and self.scope is not None and self.scope.valid is not None


def resolve(
    configs: dict[str, MokaConfig],
    bound: dict,
    given: dict,
    scope: RoutingInputs | None,
    training: bool,
    cached: int = 0,
    known: HostIds | None = None,
) -> Resolved | None:
    """What is known of the tokens of this forward; None: nothing.

    Args:
        configs: the active adapters.
        bound: the forward's arguments by name.
        given: the routing arguments it got (values may be None).
        scope: ids in force from outside.
        training: gradients are wanted, so a missing question is an error and not "the whole prompt".
        cached: how many of these tokens the cache holds already (a second turn given whole): no keys among them.
        known: copies in host memory of what ``bound`` and ``given`` hold; what only the device knows is read back at once.
    """
    config = next(iter(configs.values()))
    tokens = bound.get("input_ids")
    tokens = tokens if tokens is not None else bound.get("inputs_embeds")
    offset = cache_length(bound.get("past_key_values"))

    source = _source(given, scope)
    shaped = tokens if tokens is not None else source["mm_token_type_ids"]
    if shaped is None:
        if all(ids is None for ids in source.values()):
            return None
        raise MokaError(_NO_TYPES)
    at = _Tokens((shaped.shape[0], shaped.shape[1]), offset, scope, _is_first(bound, offset, scope))
    held = _read(configs, bound, source, at, known)
    whole_types = held["mm_token_type_ids"]
    if whole_types is not None:
        type_ids = _align("mm_token_type_ids", whole_types, at, past_end=config.modalities[TEXT][0])
    elif bound.get("input_ids") is not None:
        type_ids = whole_types = _types_from_tokens(config, held["input_ids"], at.shape)
    elif held["interaction_ids"] is not None or held["question_mask"] is not None:
        raise MokaError(_NO_TYPES)
    else:
        return None

    valid = _validity(bound.get("attention_mask"), held["attention_mask"], at)
    is_text = modality_rows(config, type_ids) == config.text_row
    if bool(is_text.all()):
        return type_ids, None, valid

    ids, question = held["interaction_ids"], held["question_mask"]
    if ids is None and question is not None:
        if question.shape != whole_types.shape:
            raise MokaError(
                f"question_mask is {list(question.shape)}, mm_token_type_ids {list(whole_types.shape)}; "
                "they must agree."
            )
        ids = question_to_interaction(question, modality_rows(config, whole_types) == config.text_row)
    if ids is not None:
        aligned = _align("interaction_ids", ids, at)
        _refuse_split_groups(configs, ids, whole_types, at)
        return type_ids, aligned, valid
    derived = _derived_interaction(configs, held["labels"], is_text, valid, training)
    if derived is not None and cached:
        derived[:, :cached] = 0
    return type_ids, derived, valid


def _source(given: dict, scope: RoutingInputs | None) -> dict[str, torch.Tensor | None]:
    """The routing arguments that count: the forward's own, or those in force from outside."""
    source = dict(given)
    if scope is not None:
        outside = {name: getattr(scope, name) for name in source}
        # In generate the whole prompt is known and position decides; otherwise the forward's own arguments win.
        first, second = (outside, given) if scope.start is not None else (given, outside)
        source = {name: first[name] if first[name] is not None else second[name] for name in source}
    for name, ids in source.items():
        check_kind(name, ids)
    return source


def _read(
    configs: dict[str, MokaConfig], bound: dict, source: dict, at: _Tokens, known: HostIds | None
) -> dict[str, np.ndarray | None]:
    """What the routing depends on, in host memory."""
    config = next(iter(configs.values()))
    wanted: dict[str, torch.Tensor | None] = dict.fromkeys(("input_ids", "attention_mask", "labels"))
    wanted |= source
    if source["mm_token_type_ids"] is None and any((config.modality_token_ids or {}).values()):
        wanted["input_ids"] = bound.get("input_ids")
    if not at.knows_padding and _is_2d(bound.get("attention_mask")):
        wanted["attention_mask"] = bound["attention_mask"]
    asks = source["interaction_ids"] is not None or source["question_mask"] is not None
    if not asks and any(one.interacts for one in configs.values()):
        wanted["labels"] = bound.get("labels")
    if known is not None and at.offset == 0:
        # For the model, in the same read-back.
        wanted |= {name: bound.get(name) for name in ("position_ids", "labels")}
    wanted = {name: ids if isinstance(ids, torch.Tensor) else None for name, ids in wanted.items()}
    held = (known or HostIds()).read(wanted)
    # Of a mask of floating point, which numpy may not know the type of, it matters alone what is 0.
    held = {name: ids != 0 if ids is not None and ids.is_floating_point() else ids for name, ids in held.items()}
    return {name: None if ids is None else ids.numpy() for name, ids in held.items()}


_NO_TYPES = (
    "interaction_ids or question_mask came without mm_token_type_ids, and there are no input_ids to derive them from. "
    "Pass mm_token_type_ids [batch, seq] (0 text, 1 image, 2 video, 3 audio)."
)


def check_kind(name: str, ids) -> None:
    """Refuse ids that are no integer tensor, and a question mask that is neither bool nor integer."""
    if ids is None:
        return
    integer = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
    # An integer 0/1 question mask is as clear as a bool one; bool type ids are not.
    if not integer or (ids.dtype == torch.bool and name != "question_mask"):
        kind = "bool" if name == "question_mask" else "integer"
        given = str(ids.dtype) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise MokaError(f"{name}: needs a [batch, seq] {kind} tensor, got {given}.")


def _is_first(bound: dict, offset: int, scope: RoutingInputs | None) -> bool:
    """Whether a step of generate feeds the prompt's first tokens; without a cache every step feeds them again."""
    if scope is None or scope.start is None or offset != scope.start:
        return False
    return bound.get("past_key_values") is not None or bool(bound.get("use_cache"))


def check_prompt(name: str, ids: torch.Tensor | np.ndarray, length: int) -> None:
    """Refuse ids of a prompt of another length than the one that the language model was given."""
    if length != ids.shape[1]:
        raise MokaError(
            f"{name} covers a prompt of {ids.shape[1]} tokens, but the language model was given {length}. If the model "
            "expands media inside, pass the ids of the expanded tokens: moka.routing(model, mm_token_type_ids=...)."
        )


def cache_length(cache) -> int:
    """How many tokens a transformers cache holds."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _types_from_tokens(config: MokaConfig, input_ids: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """[batch, seq]; ``input_ids`` None: no token stands for a medium."""
    type_ids = np.full(shape, config.modalities[TEXT][0])
    for name, token_ids in (config.modality_token_ids or {}).items():
        if token_ids and input_ids is not None:
            type_ids[np.isin(input_ids, token_ids)] = config.modalities[name][0]
    return type_ids


def _align(name: str, ids: np.ndarray, at: _Tokens, past_end: int = 0) -> np.ndarray:
    """Cut [batch, *] ids to the tokens of this forward.

    In generate position decides: what lies past the prompt is decoded text, and beams repeat each row. Otherwise the
    ids cover these tokens, or these and all cached ones; ids of a ``moka.routing`` block may end before them.
    """
    (batch, seq), offset = at.shape, at.offset
    if ids.ndim == 2 and at.by_position and ids.shape[0] and batch % ids.shape[0] == 0:
        begin = offset - at.scope.start
        if at.first and seq > ids.shape[1]:
            check_prompt(name, ids, seq)
        return _cut(ids.repeat(batch // ids.shape[0], axis=0), begin, seq, past_end)
    if tuple(ids.shape) == at.shape:
        return ids
    if tuple(ids.shape) == (batch, offset + seq):
        return ids[:, offset:]
    if at.scope is not None and ids.ndim == 2 and ids.shape[0] == batch and ids.shape[1] <= offset:
        return _cut(ids, offset, seq, past_end)
    cached = f" or, with the {offset} cached tokens, [{batch}, {offset + seq}]" if offset else ""
    allowed = f"[{batch}, {seq}]{cached}"
    raise MokaError(f"{name} is {list(ids.shape)}, but the tokens are {allowed}; the shapes must agree.")


def _cut(ids: np.ndarray, begin: int, seq: int, past_end: int) -> np.ndarray:
    part = ids[:, begin : begin + seq]
    return np.pad(part, ((0, 0), (0, seq - part.shape[1])), constant_values=past_end)


def _is_2d(mask) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def _validity(given, mask: np.ndarray | None, at: _Tokens) -> np.ndarray | None:
    """[batch, seq] bool, False at padding; None: no padding is known of. ``mask``: the given one as read."""
    (batch, seq), end = at.shape, at.offset + at.shape[1]
    if mask is not None:
        if mask.shape == at.shape:
            return mask != 0
        if mask.shape[0] == batch and mask.shape[1] >= end:
            return mask[:, at.offset : end] != 0  # a static cache's mask may be longer than the sequence so far
        raise MokaError(
            f"attention_mask is {list(mask.shape)}, but the tokens are [{batch}, {seq}] after {at.offset} cached ones; "
            "the shapes must agree."
        )
    # Ready-made 4-D masks (static caches, packing) do not tell padding; the prompt's own mask does.
    if at.scope is None or at.scope.valid is None:
        return None
    return ~_align("attention_mask", at.scope.valid.numpy() == 0, at)


def _derived_interaction(configs, labels, is_text, valid, training: bool) -> np.ndarray | None:
    if not any(config.interacts for config in configs.values()):
        return None
    if labels is not None:
        if labels.shape != is_text.shape:
            raise MokaError(
                f"labels is {list(labels.shape)}, but the tokens are {list(is_text.shape)}; the shapes must agree, or "
                "pass interaction_ids."
            )
        keys = text_before_answer(is_text, labels, valid)
    elif training:
        raise MokaError(
            "Training on media tokens needs to know the question: pass interaction_ids or question_mask (the moka "
            "processor makes them), or labels, whose first supervised token ends it. Guessing would leak the answer."
        )
    else:
        keys = is_text if valid is None else is_text & valid
    return question_to_interaction(keys, is_text)


def _refuse_split_groups(configs, ids: np.ndarray, types: np.ndarray, at: _Tokens) -> None:
    """Chunked prefill: a media token whose question lies in another chunk would silently lose it."""
    (_, seq), length = at.shape, ids.shape[1]
    begin = at.offset - at.scope.start if at.by_position else at.offset
    if length <= seq or length <= begin or types.shape != ids.shape:
        return
    config = next((config for config in configs.values() if config.interacts), None)
    if config is None:
        return
    is_text = modality_rows(config, types) == config.text_row
    queries, keys = (is_text, ~is_text) if config.interaction == "reversed" else (~is_text, is_text)
    inside = np.zeros_like(is_text)
    inside[:, begin : begin + seq] = True
    for row, group in enumerate(ids):
        asked = set(group[queries[row] & inside[row]].tolist()) - {0}
        split = asked & set(group[keys[row] & ~inside[row]].tolist())
        if split:
            raise MokaError(
                f"Positions {at.offset} to {at.offset + seq - 1} hold media tokens whose question (interaction id "
                f"{min(split)}) lies in another chunk of the prompt, so they cannot attend to it. Raise "
                f"prefill_chunk_size to at least {length}, or prefill in one go."
            )
