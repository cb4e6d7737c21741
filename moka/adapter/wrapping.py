"""``forward`` and ``generate`` of an adapted model, which build the routing of each forward.

peft adapters see one tensor, ``x``; MokA must also know which token is of which modality. So ``forward`` and ``generate``
of the adapted model are wrapped (instance attributes; nothing is patched in peft or transformers):

    forward(mm_token_type_ids=..., interaction_ids=... | question_mask=..., attention_mask=...)
        -> Routing, built once -> read by every layer while the forward runs
    generate(...)        -> the same ids stay in force for every step; position in the sequence decides
    gradient checkpoint  -> the recomputation runs under the routing of its own forward, whenever it happens

A foreign multimodal model may call the ``forward`` or ``generate`` of a language model inside it and never its own:
submodules that can generate are wrapped as well, and take over where the outer model did not route.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError
from moka.host import HostIds

from .checkpointing import route_checkpoints, unroute_checkpoints
from .config import MokaConfig
from .inputs import RoutingInputs, cache_length, check_kind, check_prompt, resolve
from .layer import MokaLayer
from .router import HOST_IDS, ROUTING_ARGUMENTS, MokaRouter
from .routing import Routing, build_routing

ROUTER_ATTRIBUTE = "moka_router"


class RoutedForward:
    """Stands in for ``model.forward``: takes the routing arguments, builds the routing, runs the forward under it."""

    def __init__(self, model: nn.Module, router: MokaRouter) -> None:
        self.model, self.router = model, router
        self.wrapped = model.__dict__.get("forward")  # e.g. accelerate's hook; usually absent
        parameters = inspect.signature(type(model).forward).parameters.values()
        self.positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        self.named = {p.name for p in parameters}
        self.foreign = frozenset((*ROUTING_ARGUMENTS, HOST_IDS)) - self.named  # what the model itself would not take

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own signature plus the routing arguments (transformers' generate and Trainer look at it)."""
        own = [p for name, p in inspect.signature(type(self.model).forward).parameters.items() if name != "self"]
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in (*ROUTING_ARGUMENTS, HOST_IDS)
            if name not in self.named
        ]
        catch_all = [p for p in own if p.kind is p.VAR_KEYWORD]
        return inspect.Signature([p for p in own if p.kind is not p.VAR_KEYWORD] + extra + catch_all)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.wrapped or self.own
        if self.router.running:
            return call(*args, **self._without_routing(kwargs))
        routing = self.router.prepared(args, kwargs)
        if routing is None:
            if HOST_IDS in self.named and kwargs.get(HOST_IDS) is None:
                kwargs = {**kwargs, HOST_IDS: HostIds()}  # the model finds there what the routing had to read
            routing, routed = self._route(args, kwargs)
            if not routed:
                return call(*args, **self._without_routing(kwargs))
        with self.router.active(routing):
            return call(*args, **self._without_routing(kwargs))

    @property
    def own(self) -> Callable:
        """The class's own ``forward``, bound to the model."""
        return type(self.model).forward.__get__(self.model)

    def _without_routing(self, kwargs: dict) -> dict:
        return {name: value for name, value in kwargs.items() if name not in self.foreign}

    @torch.compiler.disable  # how many tokens ask and answer depends on the data; the layers compile as one graph
    def _route(self, args: tuple, kwargs: dict) -> tuple[Routing | None, bool]:
        """The routing of this forward, and whether this is the model to route it."""
        router = self.router
        configs, _ = router.used()
        if not configs:
            return None, False
        bound = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        if not self.model.training:
            router.check(self.model, configs)
        tokens = bound.get("input_ids")
        tokens = tokens if tokens is not None else bound.get("inputs_embeds")
        if tokens is not None and router.decodes(bound.get("past_key_values")):
            routing = router.text_routing((tokens.shape[0], tokens.shape[1]))
            if not torch.compiler.is_compiling():
                router.stand_aside(routing.views)
            return routing, True
        router.take_part()
        given = {name: bound.get(name) for name in ROUTING_ARGUMENTS}
        if self._leave_to_inner(bound, given):
            return None, False
        training = self.model.training and torch.is_grad_enabled()
        inputs = resolve(configs, bound, given, router.scope, training, known=bound.get(HOST_IDS))
        routing = None
        if inputs is not None:
            device = router.device(tokens, *given.values())
            routing = build_routing(configs, *inputs, only=router.only, device=device)
        if self.model.training:
            route_checkpoints(self.model, router)
        return routing, True

    def _leave_to_inner(self, bound: dict, given: dict) -> bool:
        """Ids of the expanded prompt are in force, and these tokens are not expanded yet: an inner model routes."""
        scope, tokens = self.router.scope, bound.get("input_ids")
        if scope is None or scope.mm_token_type_ids is None or given["mm_token_type_ids"] is not None or tokens is None:
            return False
        if scope.start is not None or tokens.shape == scope.mm_token_type_ids.shape:
            return False
        return _holds_routed_model(self.model)


class RoutedGenerate:
    """Stands in for ``model.generate``: the ids of the prompt stay in force for every step."""

    def __init__(self, model: nn.Module, router: MokaRouter) -> None:
        self.model, self.router = model, router
        self.named = set(inspect.signature(type(model).forward).parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate.__get__(self.model))

    def __call__(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        bound = {**kwargs, "input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
        given = {name: kwargs.get(name) for name in ROUTING_ARGUMENTS}
        for name in (*ROUTING_ARGUMENTS, HOST_IDS):
            if name not in self.named:
                kwargs.pop(name, None)
        if HOST_IDS in self.named:
            bound[HOST_IDS] = kwargs[HOST_IDS] = kwargs.get(HOST_IDS) or HostIds()
        if inputs is not None:
            args = (inputs, *args)
        generate = type(self.model).generate.__get__(self.model)
        configs, _ = self.router.used()
        scope = self._scope_of_prompt(configs, bound, given) if configs else None
        if scope is None:
            return generate(*args, **kwargs)
        with self.router.scoped(scope):
            return generate(*args, **kwargs)

    def _scope_of_prompt(self, configs: dict[str, MokaConfig], bound: dict, given: dict) -> RoutingInputs | None:
        outer = self.router.scope
        tokens = bound["input_ids"] if bound["input_ids"] is not None else bound.get("inputs_embeds")
        if outer is not None and outer.start is not None:  # generate inside generate: the outer one knows the prompt
            if tokens is not None:
                check_prompt("mm_token_type_ids", outer.mm_token_type_ids, tokens.shape[1])
            return outer
        cached = cache_length(bound.get("past_key_values"))
        mask = bound.get("attention_mask")
        # As transformers tells them apart: a mask longer than the tokens means that these are the new ones alone.
        new_only = cached > 0 and mask is not None and tokens is not None and mask.shape[1] != tokens.shape[1]
        if not new_only:
            bound = {**bound, "past_key_values": None}
        in_block = outer is not None and outer.mm_token_type_ids is not None and given["mm_token_type_ids"] is None
        if in_block and _holds_routed_model(self.model):
            # The block's ids are those of the expanded prompt, which a foreign model makes of these tokens only later.
            own_mask = mask is not None and mask.shape == outer.mm_token_type_ids.shape
            bound = {"attention_mask": mask if own_mask else None, HOST_IDS: bound.get(HOST_IDS)}
        cached = 0 if new_only else cached
        resolved = resolve(configs, bound, given, outer, training=False, cached=cached, known=bound.get(HOST_IDS))
        if resolved is None:
            return None
        start = mask.shape[1] - resolved[0].shape[1] if new_only else 0
        return RoutingInputs.of_prompt(resolved, start, None if outer is None else outer.device)


def _holds_routed_model(model: nn.Module) -> bool:
    """Whether another model inside routes as well: a foreign model may expand media before it calls that one."""
    inner = (module for module in model.modules() if module is not model)
    return any(isinstance(module.__dict__.get("forward"), RoutedForward) for module in inner)


def attach_router(model: nn.Module) -> MokaRouter:
    """Give ``model`` a router, once; returns the one it has."""
    router = model.__dict__.get(ROUTER_ATTRIBUTE)
    if router is None:
        router = MokaRouter(model)
        object.__setattr__(model, ROUTER_ATTRIBUTE, router)
        for module in model.modules():
            generates = hasattr(type(module), "generate")
            if module is model or (generates and ROUTER_ATTRIBUTE not in module.__dict__):
                object.__setattr__(module, "forward", RoutedForward(module, router))
                if generates:
                    object.__setattr__(module, "generate", RoutedGenerate(module, router))
    return router


def detach_router(model: nn.Module) -> None:
    """Take the router off again: the model is as it was before the first adapter."""
    if model.__dict__.pop(ROUTER_ATTRIBUTE, None) is None:
        return
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, RoutedForward):
            del module.__dict__["forward"]
            if forward.wrapped is not None:
                object.__setattr__(module, "forward", forward.wrapped)
        if isinstance(module.__dict__.get("generate"), RoutedGenerate):
            del module.__dict__["generate"]
    unroute_checkpoints(model)


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

    The ids are read once, here; they may lie in host memory while the model lies on a GPU.

    Args:
        model: an adapted model, or any module that holds one.
        mm_token_type_ids: [batch, seq] int: 0 text, 1 image, 2 video, 3 audio. Tokens decoded past them are text.
        interaction_ids: [batch, seq] int: 0 takes no part; media tokens with k attend to text tokens with k.
        question_mask: [batch, seq] bool: shorthand for one question.
        attention_mask: [batch, seq]: 0 marks padding.
    Raises:
        MokaError: no MokA adapter in ``model``; ids that are not integer tensors.
    """
    routers = {id(m.moka_router): m.moka_router for m in model.modules() if isinstance(m, MokaLayer)}
    if not routers:
        raise MokaError(f"moka.routing: {type(model).__name__} holds no MokA adapter; attach one with get_peft_model.")
    given = {"mm_token_type_ids": mm_token_type_ids, "interaction_ids": interaction_ids, "question_mask": question_mask}
    for name, ids in given.items():
        check_kind(name, ids)
    valid = None if attention_mask is None else attention_mask.bool()
    scope = RoutingInputs(mm_token_type_ids, interaction_ids, question_mask, valid).on_host()
    before = [(router, router.scope) for router in routers.values()]
    try:
        for router, _ in before:
            router.scope = scope
            router.prepare(scope, attention_mask)
        yield
    finally:
        for router, old in before:
            router.scope, router.ready, router._by_scope = old, None, None
