"""The ids of a prompt, kept for all steps of ``generate``: position in the sequence decides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
from .routing import modality_rows
from .wrapping import RoutedModel, embedded_ids, expands_inside


class RoutedGenerate:
    """A module's ``generate``, with the ids of the prompt kept for all of its steps.

    An instance attribute, as transformers offers no hook around ``generate``; one that was there before is called.
    """

    def __init__(self, model: RoutedModel, module: nn.Module) -> None:
        self.model, self.module = model, module
        self.wrapped = module.__dict__.get("generate")
        self.depth = model.modules.index(module)

    @property
    def own(self) -> Callable:
        """Return what is wrapped, bound to the module."""
        return self.wrapped or type(self.module).generate.__get__(self.module)  # type: ignore[attr-defined]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and kwargs.get("input_ids") is None and isinstance(args[0], torch.Tensor):
            kwargs, args = {**kwargs, "input_ids": args[0]}, args[1:]
        known = inspect.signature(type(self.module).forward).parameters
        passed = {name: value for name, value in kwargs.items() if name in known or name not in ROUTING_ARGUMENTS}
        ids = _ids_of_prompt(self.model, self.depth, kwargs) if self.model.configs() else None
        cache, before = cache_of(kwargs), current.call
        block = Block(self.model, current.block, ids, caches=[] if cache is None else [cache])
        try:
            with entered(block):
                return self.own(*args, **passed)
        finally:
            current.call = before  # a keyboard interrupt runs no hook


def wrap_generate(model: RoutedModel) -> None:
    """Wrap ``generate`` of every module with hooks that has one and is not wrapped yet."""
    for module in model.modules:
        if hasattr(type(module), "generate") and not isinstance(module.__dict__.get("generate"), RoutedGenerate):
            object.__setattr__(module, "generate", RoutedGenerate(model, module))


def unwrap_generate(model: RoutedModel) -> None:
    """Put back what was there before; what others wrapped around since stays."""
    for module in model.modules:
        own = module.__dict__.get("generate")
        if isinstance(own, RoutedGenerate):
            del module.__dict__["generate"]
            if own.wrapped is not None:
                object.__setattr__(module, "generate", own.wrapped)


def _ids_of_prompt(model: RoutedModel, depth: int, arguments: dict) -> GivenIds | None:
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
    if own.types is not None:
        for config in model.configs().values():
            modality_rows(config, own.types)  # before the model meets an id that is of no use
    cached = cache_length(cache_of(arguments))
    given = own if own.types is not None else outside
    types = given.types
    # An assistant model gets the ids of the prompt with the prompt and what was decoded after it.
    drafts = getattr(arguments.get("generation_config"), "is_assistant", False) or (cached and given is outside)
    expands = given is outside and expands_inside(model, depth)  # makes more tokens of these later
    if types is not None and types.shape != shape and (expands or (drafts and types.shape[1] < seq)):
        valid = outside.valid if expands or valid is None else valid[:, : types.shape[1]]
        groups, question = (
            b if a is None else a for a, b in ((own.groups, outside.groups), (own.question, outside.question))
        )
        return GivenIds(types, groups, question, valid, start=0, device=given.device)
    # As transformers distinguishes them: a mask longer than the tokens means that these are only the new ones.
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
    valid = outside.valid if valid is None else valid[:, start : start + seq]
    return GivenIds(**arrays, valid=valid, tokens=ids, start=start, cached=0 if start else cached, device=tokens.device)
