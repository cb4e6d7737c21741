"""From the arguments of a forward to the ids that its routing is built of. All arrays are in host memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationMixin

from moka.errors import MokaError

from .config import TEXT, MokaConfig
from .routing import modality_rows
from .turns import groups_from_labels, groups_from_prompt, no_marker_matched, question_groups, segments

if TYPE_CHECKING:
    from .wrapping import RoutedModel

ROUTING_ARGUMENTS = ("mm_token_type_ids", "interaction_ids", "question_mask")


@dataclass(frozen=True, eq=False)
class GivenIds:
    """Ids of a sequence of tokens, [batch, seq] each; None: not given."""

    types: np.ndarray | None = None  # mm_token_type_ids
    groups: np.ndarray | None = None  # interaction_ids
    question: np.ndarray | None = None  # question_mask
    valid: np.ndarray | None = None  # bool, False at padding
    tokens: np.ndarray | None = None  # input_ids
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None  # which packed sample a token belongs to
    # Of generate: the ids are those of a prompt that begins at this position; what follows it is decoded text.
    start: int | None = None
    cached: int = 0  # tokens of the prompt that the cache contained before: no keys among them
    device: torch.device | None = None  # of the tensors that were read

    @property
    def length(self) -> int:
        """Return the number of tokens in a row."""
        arrays = (self.types, self.tokens, self.groups, self.question)
        return next(array.shape[1] for array in arrays if array is not None)


@dataclass(frozen=True, eq=False)
class Span:
    """The tokens of one forward within a sequence whose ids are known."""

    ids: GivenIds
    shape: tuple[int, int]  # batch, seq of the forward
    begin: int | None = None  # position of its first token in ``ids``; None: the ids are those of the forward

    def cut(self, array: np.ndarray, fill: int) -> np.ndarray:
        """Return the part of [batch, length] that the forward has; ``fill`` beyond the end; rows repeated for beams."""
        if self.begin is None:
            return array
        (batch, seq), begin = self.shape, self.begin
        part = array[:, begin : begin + seq].repeat(batch // len(array), axis=0)
        return np.pad(part, ((0, 0), (0, seq - part.shape[1])), constant_values=fill)


def read(ids: torch.Tensor | None) -> np.ndarray | None:
    """Return a tensor of ids in host memory. numpy has no bfloat16: of a floating-point mask only zeros count."""
    if ids is None:
        return None
    return (ids != 0 if ids.is_floating_point() else ids).detach().cpu().numpy()


def check_kind(name: str, ids: Any) -> None:
    """Refuse ids that are no integer tensor, and a question mask that is neither bool nor integer."""
    if ids is None:
        return
    integer = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
    # An integer 0/1 question mask is as clear as a bool one; bool type ids are not.
    if not integer or (ids.dtype == torch.bool and name != "question_mask"):
        kind = "bool" if name == "question_mask" else "integer"
        given = str(ids.dtype) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise MokaError(f"{name}: needs a [batch, seq] {kind} tensor, got {given}.")


# What transformers calls the cache among the arguments and outputs of a model: since 5.24 "cache".
_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments, by either of its names."""
    cache = arguments.get("past_key_values")
    return arguments.get("cache") if cache is None else cache


def cache_length(cache: Any) -> int:
    """Return how many tokens a transformers cache has."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def given_ids(arguments: Mapping[str, Any]) -> GivenIds:
    """Read the routing arguments among a call's ``arguments``."""
    for name in ROUTING_ARGUMENTS:
        check_kind(name, arguments.get(name))
    types, groups, question = (arguments.get(name) for name in ROUTING_ARGUMENTS)
    if groups is not None and question is not None:
        raise MokaError(
            "interaction_ids and question_mask: both are given; question_mask is a shorthand, give one of them."
        )
    device = next((ids.device for ids in (types, groups, question) if ids is not None), None)
    return GivenIds(read(types), read(groups), read(question), device=device)


def tokens_of(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return ``input_ids`` [batch, seq] of a call, or else its ``inputs_embeds`` [batch, seq, width]."""
    found = arguments.get("input_ids")
    found = found if found is not None else arguments.get("inputs_embeds")
    return found if isinstance(found, torch.Tensor) and found.dim() >= 2 else None


def ids_of_call(arguments: Mapping[str, Any], outside: GivenIds | None, interacts: bool) -> Span | None:
    """Return the ids of the tokens of one forward, as it gives them itself and as ``outside`` gives them.

    Args:
        arguments: the forward's arguments by name.
        outside: ids of an enclosing ``moka.routing`` block or ``generate``.
        interacts: whether the question is needed.
    Returns:
        None: nothing is known of the tokens.
    Raises:
        MokaError: ids of another shape than the tokens.
    """
    own = given_ids(arguments)
    tokens = tokens_of(arguments)
    offset = cache_length(cache_of(arguments))
    ids, mask = (two_dimensional(arguments.get(name)) for name in ("input_ids", "attention_mask"))
    if tokens is not None:
        shape = tokens.shape[0], tokens.shape[1]
        if outside is not None and outside.start is not None and _is_prompt(outside, ids, shape, offset, arguments):
            length = outside.length
            if outside.valid is None and mask is not None and mask.shape[1] >= length and not shape[0] % len(mask):
                outside = replace(outside, valid=mask[:: shape[0] // len(mask), :length] != 0)
            return Span(outside, shape, offset - (outside.start or 0))
    block = outside if outside is not None and outside.start is None else GivenIds()
    types, groups, question = (
        b if a is None else a
        for a, b in ((own.types, block.types), (own.groups, block.groups), (own.question, block.question))
    )
    mask = block.valid if mask is None else mask
    if tokens is None:
        if types is None:
            return None
        shape = types.shape[0], types.shape[1]
    if types is None and ids is None:
        if groups is not None or question is not None:
            raise MokaError(
                "interaction_ids or question_mask came without mm_token_type_ids, and there are no input_ids to derive "
                "them from. Pass mm_token_type_ids [batch, seq] (0 text, 1 image, 2 video, 3 audio)."
            )
        return None
    device = own.device if tokens is None else tokens.device
    everything = shape[0], offset + shape[1]  # with the cached tokens
    if offset and types is not None and groups is not None and types.shape == groups.shape == everything:
        return Span(GivenIds(types, groups, device=device), shape, offset)
    if offset and types is not None and own.types is None and types.shape[1] <= offset:
        # The ids of a block end before these tokens: decoded text, which takes no part.
        return Span(GivenIds(tokens=np.full(shape, -1), device=device), shape)
    aligned = [
        None if array is None else _align(name, array, shape, offset)
        for name, array in zip((*ROUTING_ARGUMENTS, "attention_mask"), (types, groups, question, mask), strict=True)
    ]
    valid = None if aligned[3] is None else aligned[3] != 0
    found = GivenIds(aligned[0], aligned[1], aligned[2], valid, ids, device=device)
    if interacts and groups is None and question is None:
        names = () if offset else ("position_ids", "cu_seq_lens_q")
        packed = segments(shape, _all(valid, shape), *(read(arguments.get(name)) for name in names))
        found = replace(found, labels=_labels(arguments, shape), segments=packed)
    return Span(found, shape)


def two_dimensional(ids: Any) -> np.ndarray | None:
    """Return ``ids`` in host memory if they are a tensor [batch, seq]."""
    return read(ids) if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None


def _all(valid: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    return np.ones(shape, bool) if valid is None else valid


def _is_prompt(
    prompt: GivenIds, ids: np.ndarray | None, shape: tuple[int, int], offset: int, arguments: Mapping[str, Any]
) -> bool:
    """Return whether a forward inside generate is one of the prompt, and not of another sequence (as guidance has).

    Raises:
        MokaError: the model expanded media inside, so that these are more tokens than the prompt has ids.
    """
    (batch, seq), length = shape, prompt.length
    begin = offset - (prompt.start or 0)
    rows = next(len(array) for array in (prompt.types, prompt.tokens) if array is not None)
    if begin < 0 or batch % rows:
        return False
    if ids is None:
        # A step without a cache feeds the prompt again, with what was decoded.
        first = begin == 0 and (cache_of(arguments) is not None or bool(arguments.get("use_cache")))
        if first and seq > length:
            check_length("mm_token_type_ids", length, seq)
        return True
    if prompt.tokens is None:
        return True
    # The tokens of media may be replaced by others before the language model sees them.
    span = Span(prompt, shape, begin)
    tokens = span.cut(prompt.tokens, -1)
    same = (tokens == ids) | (tokens < 0)
    if prompt.types is not None:
        same |= span.cut(prompt.types, 0) != 0
    return bool(same.all())


def check_shape(name: str, ids: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse ids of another shape than the tokens."""
    if ids.shape != shape:
        raise MokaError(f"{name} is {list(ids.shape)}, but the tokens are {list(shape)}; the shapes must agree.")


def check_length(name: str, length: int, given: int) -> None:
    """Refuse ids of a prompt of another length than the one that the language model was given."""
    if length != given:
        raise MokaError(
            f"{name} covers a prompt of {length} tokens, but the language model was given {given}. If the model "
            "expands media inside, pass the ids of the expanded tokens: moka.routing(model, mm_token_type_ids=...)."
        )


def _align(name: str, ids: np.ndarray, shape: tuple[int, int], offset: int) -> np.ndarray:
    """Cut [batch, *] ids to the tokens of this forward: they cover these, or these and the cached ones.

    Those of the question may also end before these tokens, which are decoded text then.
    """
    batch, seq = shape
    if ids.ndim == 2 and offset and len(ids) and batch % len(ids) == 0:
        ids = ids.repeat(batch // len(ids), axis=0)  # beams
    if ids.shape == shape:
        return ids
    if ids.ndim == 2 and len(ids) == batch:
        length, mask, question = ids.shape[1], name == "attention_mask", name in ROUTING_ARGUMENTS[1:]
        if length == offset + seq or (mask and length > offset + seq):
            return ids[:, offset : offset + seq]  # a static cache's mask may be longer than the sequence so far
        if offset and length <= offset and question:
            return np.zeros(shape, np.int64)
    cached = f" or, with the {offset} cached tokens, [{batch}, {offset + seq}]" if offset else ""
    raise MokaError(f"{name} is {list(ids.shape)}, but the tokens are [{batch}, {seq}]{cached}; the shapes must agree.")


def _labels(arguments: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray | None:
    """Return labels [batch, seq]; those of only the last positions (``logits_to_keep``) get -100 before them."""
    labels, kept = arguments.get("labels"), arguments.get("logits_to_keep")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        return None
    array = read(labels)
    assert array is not None
    if array.shape == shape:
        return array
    if isinstance(kept, int) and array.shape == (shape[0], kept):
        return np.pad(array, ((0, 0), (shape[1] - kept, 0)), constant_values=-100)
    raise MokaError(
        f"labels is {list(array.shape)}, but the tokens are {list(shape)}; the shapes must agree, or pass interaction_ids."
    )


def resolve(model: RoutedModel, config: MokaConfig, span: Span, training: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return each token's row of ``moka_A`` and its interaction id, for one adapter: [batch, seq] each.

    Args:
        model: prints each warning once.
        config: the adapter's configuration.
        span: the tokens of the forward.
        training: gradients are wanted, so that a missing question is an error and not "the text of the prompt".
    Raises:
        MokaError: an unknown modality id; a question that cannot be found, or is in another chunk of the prompt.
    """
    rows, groups = _resolve(model, config, span.ids, training)
    if groups is not None and span.begin is not None:
        _refuse_split_groups(config, rows, groups, span.begin, span.shape[1])
        groups = span.cut(groups, 0)
    return span.cut(rows, config.text_row), groups


def _resolve(
    model: RoutedModel, config: MokaConfig, ids: GivenIds, training: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return rows of ``moka_A`` and interaction ids of all tokens of ``ids``."""
    types = ids.types
    if types is None:
        assert ids.tokens is not None
        types = np.full(ids.tokens.shape, config.modalities[TEXT][0])
        for name, token_ids in (config.modality_token_ids or {}).items():
            types[np.isin(ids.tokens, token_ids)] = config.modalities[name][0]
    valid = _all(ids.valid, types.shape)
    rows = modality_rows(config, np.where(valid, types, config.modalities[TEXT][0]))
    is_text = rows == config.text_row
    if is_text.all() or not config.interacts:
        return rows, None
    if ids.groups is not None:
        groups = ids.groups
    elif ids.question is not None:
        check_shape("question_mask", ids.question, types.shape)
        groups = (((ids.question != 0) & is_text) | ~is_text).astype(np.int64)
    else:
        groups = _derived_groups(model, config, ids, is_text, valid, training)
        if ids.cached:
            groups = np.where(np.arange(groups.shape[1]) < ids.cached, 0, groups)
    return rows, np.where(valid, groups, 0)


def _derived_groups(
    model: RoutedModel, config: MokaConfig, ids: GivenIds, is_text: np.ndarray, valid: np.ndarray, training: bool
) -> np.ndarray:
    """Find the question: by turn markers, or by labels, or, at inference, in the text of the prompt."""
    keys, media = is_text & valid, ~is_text & valid
    if config.structure_token_ids and ids.tokens is not None:
        keys &= ~np.isin(ids.tokens, config.structure_token_ids)
    samples = ids.segments if ids.segments is not None else segments(is_text.shape, valid)
    groups, open_rows = np.zeros(is_text.shape, np.int64), media.any(1)
    if config.turn_markers and ids.tokens is not None:
        groups, matched = question_groups(ids.tokens, media, keys, samples, config.turn_markers)
        if not matched[open_rows].any():
            model.warn_once("markers", no_marker_matched(ids.tokens, config.turn_markers))
        if (media & (groups == 0))[matched].any():
            model.warn_once("turnless", _NO_TURN)
        open_rows &= ~matched
    if not open_rows.any():
        return groups
    if ids.labels is not None:
        others, supervised = groups_from_labels(ids.labels, media, keys, samples)
        if (supervised & open_rows).any():
            reason = _no_question(
                "the labels supervise all of its text", int(np.flatnonzero(supervised & open_rows)[0])
            )
            if training:
                raise MokaError(reason)
            model.warn_once("supervised", reason)
    elif training:
        raise MokaError(_no_question("there are no labels", int(np.flatnonzero(open_rows)[0])))
    else:
        others = groups_from_prompt(media, keys, samples)
        if not config.turn_markers:
            model.warn_once("turns", _ONE_QUESTION)
    return np.where(open_rows[:, None], others, groups)


_ONE_QUESTION = (
    "turn_markers: not set, so that all text of a prompt counts as the question of its media. For chats with several user "
    "turns build the configuration with MokaConfig.from_processor(processor), or pass interaction_ids."
)


_NO_TURN = (
    "turn_markers: some media are in no user's turn, such as an image that an answer follows before any question. They have no "
    "question to interact with; pass interaction_ids to give them one."
)


def _no_question(reason: str, row: int) -> str:
    return (
        f"Row {row} has media tokens whose question cannot be found: {reason}, and no turn markers match. Either build the "
        "configuration with MokaConfig.from_processor(processor) (turn_markers), or set the labels of the prompt to -100, or "
        "pass interaction_ids or question_mask. Guessing would leak the answer or drop the interaction."
    )


def _refuse_split_groups(config: MokaConfig, rows: np.ndarray, groups: np.ndarray, begin: int, seq: int) -> None:
    """Refuse a chunk of a prompt whose media have their question in another chunk: they would silently lose it.

    rows, groups: [batch, length] of the complete prompt; the chunk is the ``seq`` positions from ``begin``.
    """
    length = rows.shape[1]
    if length <= seq or begin >= length:
        return
    is_text = rows == config.text_row
    queries, keys = (is_text, ~is_text) if config.interaction == "reversed" else (~is_text, is_text)
    inside = (np.arange(length) >= begin) & (np.arange(length) < begin + seq)
    for row, group in enumerate(groups):
        asked = set(group[queries[row] & inside].tolist()) - {0}
        split = asked & set(group[keys[row] & ~inside].tolist())
        if split:
            raise MokaError(
                f"Positions {begin} to {begin + seq - 1} have media tokens whose question (interaction id {min(split)}) is in "
                f"another chunk of the prompt, so they cannot attend to it. Raise prefill_chunk_size to at least {length}, or "
                "prefill at once."
            )
