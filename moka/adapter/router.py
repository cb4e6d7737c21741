"""The router: builds the routing of each forward of an adapted model and hands it to the layers.

peft adapters see one tensor, ``x``; MokA must also know which token is of which modality. The router wraps ``forward``
and ``generate`` of the adapted model (instance attributes; nothing is patched in peft or transformers):

    forward(mm_token_type_ids=..., interaction_ids=... | question_mask=..., attention_mask=...)
        -> Routing, built once -> read by every layer while the forward runs
    generate(...)        -> the same ids stay in force for every step; position in the sequence decides
    gradient checkpoint  -> the recomputation runs under the routing of its own forward, whenever it happens
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError

from .config import MokaConfig
from .inputs import RoutingInputs, resolve
from .routing import Routing, View, build_routing

ROUTING_ARGUMENTS = ("mm_token_type_ids", "interaction_ids", "question_mask")
ROUTER_ATTRIBUTE = "moka_router"

_NO_ROUTING = (
    "A MokA layer ran without routing: every token is treated as text, also image and sound. Pass mm_token_type_ids "
    "(and interaction_ids or question_mask) to the model's forward or generate, or wrap the call in "
    "`with moka.routing(model, mm_token_type_ids=...):`."
)


class MokaRouter:
    """Shared by all MokA layers of one model; holds no parameter and no module."""

    def __init__(self) -> None:
        self.routing: Routing | None = None  # of the forward that is running
        self.scope: RoutingInputs | None = None  # of the enclosing `with moka.routing(...)` or generate
        self.configs: dict[str, MokaConfig] = {}
        self._seen_routing = False
        self._warned = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "routing": None, "scope": None}

    @contextmanager
    def active(self, routing: Routing | None) -> Iterator[None]:
        """Run a forward, or its recomputation, under ``routing``."""
        before, self.routing = self.routing, routing
        self._seen_routing = self._seen_routing or routing is not None
        try:
            yield
        finally:
            self.routing = before

    @contextmanager
    def scoped(self, scope: RoutingInputs) -> Iterator[None]:
        """Put ``scope`` in force for every forward inside."""
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    def view(self, adapter_name: str) -> View | None:
        """The running forward's tokens as ``adapter_name`` sees them; None: nothing is known, all is text."""
        if self.routing is not None:
            return self.routing.views.get(adapter_name)
        if self._seen_routing and _in_backward():
            raise MokaError(
                "A MokA layer is recomputed in the backward pass without the routing of its forward. Use the model's "
                "own gradient_checkpointing_enable(), or keep `with moka.routing(...)` open until backward is done."
            )
        if not self._warned and len(self.configs[adapter_name].modalities) > 1:
            self._warned = True
            warnings.warn(_NO_ROUTING, stacklevel=2)
        return None


def _in_backward() -> bool:
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


class RoutedForward:
    """Stands in for ``model.forward``: takes the routing arguments, builds the routing, runs the forward under it."""

    def __init__(self, model: nn.Module, router: MokaRouter) -> None:
        self.model, self.router = model, router
        self.wrapped = model.__dict__.get("forward")  # e.g. accelerate's hook; usually absent
        parameters = inspect.signature(type(model).forward).parameters.values()
        self.positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        self.named = {p.name for p in parameters}

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own signature plus the routing arguments (transformers' generate and Trainer look at it)."""
        own = [p for name, p in inspect.signature(type(self.model).forward).parameters.items() if name != "self"]
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ROUTING_ARGUMENTS
            if name not in self.named
        ]
        catch_all = [p for p in own if p.kind is p.VAR_KEYWORD]
        return inspect.Signature([p for p in own if p.kind is not p.VAR_KEYWORD] + extra + catch_all)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.get(name) for name in ROUTING_ARGUMENTS}
        for name in ROUTING_ARGUMENTS:
            if name not in self.named:
                kwargs.pop(name, None)
        call = self.wrapped or type(self.model).forward.__get__(self.model)
        configs = _active_configs(self.model)
        if not configs:
            return call(*args, **kwargs)
        bound = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        inputs = resolve(configs, bound, given, self.router.scope, self.model.training and torch.is_grad_enabled())
        routing = None if inputs is None else build_routing(configs, *inputs)
        route_checkpoints(self.model, self.router)
        with self.router.active(routing):
            return call(*args, **kwargs)


class RoutedGenerate:
    """Stands in for ``model.generate``: the ids of the prompt stay in force for every step."""

    def __init__(self, model: nn.Module, router: MokaRouter) -> None:
        self.model, self.router = model, router
        self.named = set(inspect.signature(type(model).forward).parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate.__get__(self.model))

    def __call__(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.get(name) for name in ROUTING_ARGUMENTS}
        for name in ROUTING_ARGUMENTS:
            if name not in self.named:
                kwargs.pop(name, None)
        configs = _active_configs(self.model)
        bound = {**kwargs, "input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
        # The prompt's ids decide, not those of the tokens fed in one step: drop the cache while resolving them.
        bound.pop("past_key_values", None)
        resolved = resolve(configs, bound, given, self.router.scope, training=False) if configs else None
        if inputs is not None:
            args = (inputs, *args)
        generate = type(self.model).generate.__get__(self.model)
        if resolved is None:
            return generate(*args, **kwargs)
        type_ids, interaction_ids, valid = resolved
        with self.router.scoped(RoutingInputs(type_ids, interaction_ids, None, valid, whole_prompt=True)):
            return generate(*args, **kwargs)


class RoutedCheckpoint:
    """Stands in for a block's ``_gradient_checkpointing_func``: the recomputation gets the routing of its forward.

    Whatever the checkpoint captures is safe under any order of forwards and backwards; module state and hooks are
    not (peft#2826, #2860).
    """

    def __init__(self, checkpoint: Callable, router: MokaRouter) -> None:
        self.checkpoint, self.router = checkpoint, router

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_UnderRouting(function, self.router, self.router.routing), *args, **kwargs)


class _UnderRouting:
    def __init__(self, function: Callable, router: MokaRouter, routing: Routing | None) -> None:
        self.function, self.router, self.routing = function, router, routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.router.active(self.routing):
            return self.function(*args, **kwargs)


def route_checkpoints(model: nn.Module, router: MokaRouter) -> None:
    """Wrap the checkpointing function of every block that has one and is not wrapped yet."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, RoutedCheckpoint):
            module._gradient_checkpointing_func = RoutedCheckpoint(function, router)


def _active_configs(model: nn.Module) -> dict[str, MokaConfig]:
    """The active adapters and their configurations, as the first MokA layer knows them."""
    from .layer import MokaLayer

    for module in model.modules():
        if isinstance(module, MokaLayer):
            if module.disable_adapters:
                return {}
            names = dict.fromkeys([*module.active_adapters, *module.merged_adapters])
            return {name: module.moka_config[name] for name in names if name in module.moka_config}
    return {}


def attach_router(model: nn.Module) -> MokaRouter:
    """Give ``model`` a router, once; returns the one it has."""
    router = model.__dict__.get(ROUTER_ATTRIBUTE)
    if router is None:
        router = MokaRouter()
        object.__setattr__(model, ROUTER_ATTRIBUTE, router)
        object.__setattr__(model, "forward", RoutedForward(model, router))
        if hasattr(type(model), "generate"):
            object.__setattr__(model, "generate", RoutedGenerate(model, router))
    return router


def detach_router(model: nn.Module) -> None:
    """Take the router off again: the model is as it was before the first adapter."""
    if model.__dict__.pop(ROUTER_ATTRIBUTE, None) is None:
        return
    forward = model.__dict__.pop("forward")
    if isinstance(forward, RoutedForward) and forward.wrapped is not None:
        object.__setattr__(model, "forward", forward.wrapped)
    model.__dict__.pop("generate", None)
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, RoutedCheckpoint):
            module._gradient_checkpointing_func = function.checkpoint


@contextmanager
def routing(
    model: nn.Module,
    *,
    mm_token_type_ids: torch.Tensor | None = None,
    interaction_ids: torch.Tensor | None = None,
    question_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Iterator[None]:
    """Route every forward of ``model`` inside the block, for modules whose ``forward`` cannot take the ids.

    Args:
        model: an adapted model, or any module that holds one.
        mm_token_type_ids: [batch, seq] int: 0 text, 1 image, 2 video, 3 audio.
        interaction_ids: [batch, seq] int: 0 takes no part; media tokens with k attend to text tokens with k.
        question_mask: [batch, seq] bool: shorthand for one question.
        attention_mask: [batch, seq]: 0 marks padding.
    Raises:
        MokaError: no MokA adapter in ``model``.

    With torch's own ``checkpoint`` inside, keep the block open until backward is done.
    """
    routers = [m.__dict__[ROUTER_ATTRIBUTE] for m in model.modules() if ROUTER_ATTRIBUTE in m.__dict__]
    if not routers:
        raise MokaError(f"moka.routing: {type(model).__name__} holds no MokA adapter; attach one with get_peft_model.")
    valid = None if attention_mask is None else attention_mask.bool()
    scope = RoutingInputs(mm_token_type_ids, interaction_ids, question_mask, valid, whole_prompt=False)
    before = [(router, router.scope) for router in routers]
    for router in routers:
        router.scope = scope
    try:
        yield
    finally:
        for router, old in before:
            router.scope = old
