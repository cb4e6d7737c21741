"""The ids of a prompt, kept in force for all steps of ``generate``: position in the sequence decides."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from .context import Block, current, entered, ids_block
from .inputs import (
    ROUTING_ARGUMENTS,
    GivenIds,
    cache_length,
    cache_of,
    check_length,
    check_shape,
    given_ids,
    read,
    tokens_of,
    two_dimensional,
)
from .wrapping import RoutedModel, embedded_ids, expands_inside


@contextmanager
def prompt_ids(model: RoutedModel, arguments: dict) -> Iterator[dict]:
    """Keep the ids of a prompt in force for all steps of ``generate``; yield the arguments that the model takes.

    Args:
        model: with adapters.
        arguments: those of ``generate`` by name.
    """
    foreign = set(ROUTING_ARGUMENTS) - set(inspect.signature(type(model.root).forward).parameters)
    passed = {name: value for name, value in arguments.items() if name not in foreign}
    ids = _ids_of_prompt(model, arguments) if model.configs() else None
    if ids is None:
        yield passed
        return
    cache = cache_of(arguments)
    with entered(Block(model, current.block, ids, caches=[] if cache is None else [cache])):
        yield passed


def _ids_of_prompt(model: RoutedModel, arguments: dict) -> GivenIds | None:
    """Return the ids of the prompt, as far as the call or an enclosing block gives them; None: nothing to keep."""
    block, tokens, mask = ids_block(model), tokens_of(arguments), arguments.get("attention_mask")
    outside = GivenIds() if block is None or block.ids is None else block.ids
    if outside.start is not None:  # generate inside generate: the outer one knows the prompt
        if tokens is not None:
            check_length("mm_token_type_ids", outside.length, tokens.shape[1])
        return None
    own = given_ids(arguments)
    if tokens is None:
        return None
    batch, seq = shape = tuple(tokens.shape[:2])
    valid = two_dimensional(mask)
    valid = None if valid is None else valid != 0
    ids = arguments.get("input_ids")
    ids = read(embedded_ids(model, tokens) if ids is None else ids)
    if own.types is None and outside.types is not None and (outside.types.shape == shape or expands_inside(model)):
        # The ids of a block may be those of the expanded prompt, which a model makes of these tokens only later.
        valid = valid if valid is not None and valid.shape == outside.types.shape else outside.valid
        groups = outside.groups if own.groups is None else own.groups
        question = outside.question if own.question is None else own.question
        if outside.types.shape == shape:
            check_shape("interaction_ids", groups if groups is not None else outside.types, shape)
        else:
            ids = None
        return GivenIds(outside.types, groups, question, valid, ids, start=0, device=outside.device)
    cached = cache_length(cache_of(arguments))
    # As transformers tells them apart: a mask longer than the tokens means that these are only the new ones.
    start = valid.shape[1] - seq if cached and valid is not None else 0
    arrays = {}
    named = zip(ROUTING_ARGUMENTS, ("types", "groups", "question"), strict=True)
    for argument, name in named:
        array = getattr(own if getattr(own, name) is not None else outside, name)
        if array is not None:
            array = array[:, start:] if array.shape == (batch, start + seq) else array
            check_shape(argument, array, shape)
        arrays[name] = array
    if arrays["types"] is None and ids is None:
        return None
    valid = None if valid is None else valid[:, start : start + seq]
    return GivenIds(**arrays, valid=valid, tokens=ids, start=start, cached=0 if start else cached, device=tokens.device)
