"""The router: builds the routing of each forward of an adapted model and hands it to the layers.

peft adapters see one tensor, ``x``; MokA must also know which token is of which modality. The router wraps ``forward``
and ``generate`` of the adapted model (instance attributes; nothing is patched in peft or transformers):

    forward(mm_token_type_ids=..., interaction_ids=... | question_mask=..., attention_mask=...)
        -> Routing, built once -> read by every layer while the forward runs
    generate(...)        -> the same ids stay in force for every step; position in the sequence decides
    gradient checkpoint  -> the recomputation runs under the routing of its own forward, whenever it happens

A foreign multimodal model may call the ``forward`` or ``generate`` of a language model inside it and never its own:
submodules that can generate are wrapped as well, and take over where the outer model did not route.
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
from moka.host import HostIds

from .checkpointing import route_checkpoints, unroute_checkpoints
from .checks import check_finite
from .config import TEXT, MokaConfig
from .decoding import text_step
from .inputs import RoutingInputs, cache_length, check_kind, check_prompt, resolve
from .layer import MokaLayer, MokaLinear
from .routing import Routing, View, routing_of, text_view
from .shared import SharedInputs

ROUTING_ARGUMENTS = ("mm_token_type_ids", "interaction_ids", "question_mask")
HOST_IDS = "host_ids"  # a `HostIds` beside them
ROUTER_ATTRIBUTE = "moka_router"

_NO_ROUTING = (
    "A MokA layer ran without routing: every token is treated as text, also image and sound. Pass mm_token_type_ids "
    "(and interaction_ids or question_mask) to the model's forward or generate, or wrap the call in "
    "`with moka.routing(model, mm_token_type_ids=...):`."
)


class MokaRouter:
    """Shared by all MokA layers of one model; holds no parameter and no module."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root  # the model that holds the layers
        self.routing: Routing | None = None  # of the forward that is running
        self.running = False  # a forward, or its recomputation, is running; its routing may be None
        self.idle = False  # no layer has anything to add in that forward
        self.scope: RoutingInputs | None = None  # of the enclosing `with moka.routing(...)` or generate
        self.only: frozenset[str] | None = None  # of the enclosing `with active_modalities(...)`
        self.recorder: Callable | None = None  # of a diagnostic that is running: (layer, adapter, z of all rows, view)
        self.shared = SharedInputs()  # what a layer computed for those that read the same input
        self.requantize = False  # merging may fold into quantised weights
        self.tied: set[int] = set()  # ids of weights that several modules share: merging gives a layer its own
        self.fold_errors: list[tuple[float, float]] = []  # what that did to each, relative to the weight, to the update
        self.configs: dict[str, MokaConfig] = {}
        self.ready: tuple[Routing, torch.Tensor | None] | None = None  # of the enclosing block, with its mask
        self._bypassed: list[MokaLayer] = []  # layers that stand aside while generate decodes
        self._used: tuple[dict[str, MokaConfig], bool] | None = None
        self._layer: MokaLayer | None = None  # any one, to ask where the layers lie
        # Of layers that run outside any forward: what it was built for, and the routing.
        self._by_scope: tuple[RoutingInputs | None, tuple, Routing | None] | None = None
        self._past_prompt: Any = None  # a cache that holds the whole prompt of the enclosing generate
        self._unchecked: set[str] = set()  # adapters that no inference has used yet
        self._seen_routing = False
        self._warned = False

    def __getstate__(self) -> dict:
        own = {
            "routing": None,
            "running": False,
            "idle": False,
            "scope": None,
            "only": None,
            "recorder": None,
            "ready": None,
            "shared": SharedInputs(),
            "_bypassed": [],
            "_by_scope": None,
            "_past_prompt": None,
        }
        return {**self.__dict__, **own}

    def changed(self) -> None:
        """Forget which adapters are in use: one was added, removed, switched, merged or disabled."""
        self._used = self.ready = self._by_scope = self._layer = None
        self.shared.changed()
        self.take_part()

    def used(self) -> tuple[dict[str, MokaConfig], bool]:
        """The active (or merged) adapters' configurations, none while disabled; and whether text needs no layer's work."""
        if self._used is None:
            self._used = _adapters_in_use(self.root, self.configs)
        return self._used

    def stand_aside(self, views: dict[str, View]) -> None:
        """Let every layer's call go to what is left of it for text: a decode step has hundreds of such calls."""
        if self._bypassed or torch.is_grad_enabled() or self.recorder is not None:
            return
        for module in self.root.modules():
            step = text_step(module, views) if isinstance(module, MokaLinear) else None
            if step is not None:
                object.__setattr__(module, "forward", step)
                self._bypassed.append(module)

    def take_part(self) -> None:
        """Undo ``stand_aside``."""
        while self._bypassed:
            self._bypassed.pop().__dict__.pop("forward", None)

    def text_routing(self, shape: tuple[int, int]) -> Routing:
        """The routing of tokens [batch, seq] that are all text, none of them padding."""
        configs, idle = self.used()
        views = {name: text_view(config, self.only) for name, config in configs.items()}
        return Routing(shape, views, idle and self.only is None and self.recorder is None)

    def add(self, adapter_name: str, config: MokaConfig) -> None:
        """Know an adapter that is about to be injected."""
        self.configs[adapter_name] = config
        self.changed()
        self._unchecked.add(adapter_name)

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter."""
        self.configs.pop(adapter_name, None)
        self.changed()
        self._unchecked.discard(adapter_name)

    def check(self, model: nn.Module, adapter_names) -> None:
        """Look at the values of each adapter once, before its first inference."""
        for name in self._unchecked.intersection(adapter_names):
            check_finite(model, name)
            self._unchecked.discard(name)

    @contextmanager
    def active(self, routing: Routing | None) -> Iterator[None]:
        """Run a forward, or its recomputation, under ``routing``."""
        before = self.routing, self.running, self.idle
        self.routing, self.running, self.idle = routing, True, routing is not None and routing.idle
        self._seen_routing = self._seen_routing or routing is not None
        try:
            yield
        finally:
            self.routing, self.running, self.idle = before
            self.shared.clear()

    @contextmanager
    def scoped(self, scope: RoutingInputs) -> Iterator[None]:
        """Put ``scope`` in force for every forward inside."""
        before, self.scope = self.scope, scope
        self._past_prompt = None
        try:
            yield
        finally:
            self.scope, self._past_prompt = before, None
            self.take_part()

    def decodes(self, cache: Any) -> bool:
        """In generate: whether the tokens after those of ``cache`` lie past the prompt."""
        if self.scope is None or self.scope.start is None:
            return False
        if cache is not None and cache is self._past_prompt:
            return True
        decodes = self.scope.decodes(cache_length(cache))
        if decodes and cache is not None and isinstance(cache.get_seq_length(), torch.Tensor):
            # Of a static cache only the device knows the length. It is read once: in one generate it does not shrink.
            self._past_prompt = cache
        return decodes

    def device(self, *tensors: torch.Tensor | None) -> torch.device:
        """Where the layers will get their input: where the tokens lie, or else the layers."""
        found = [tensor.device for tensor in tensors if tensor is not None]
        if self.scope is not None and self.scope.device is not None:
            found.append(self.scope.device)
        away = next((device for device in found if device.type != "cpu"), None)
        if away is not None:
            return away
        if self._layer is None:
            self._layer = next((m for m in self.root.modules() if isinstance(m, MokaLayer)), None)
        weight = None if self._layer is None else next(iter(self._layer.moka_A.values()), None)
        # Weights that are offloaded tell nothing.
        return torch.device("cpu") if weight is None or weight.is_meta else weight.device

    def prepare(self, scope: RoutingInputs, mask: torch.Tensor | None) -> None:
        """Build the routing of a block now, if its ids tell all: its forwards then compile without a graph break."""
        configs, _ = self.used()
        types, groups = scope.mm_token_type_ids, scope.interaction_ids
        groups = groups if groups is not None else scope.question_mask
        if not configs or types is None or groups is None or types.dim() != 2 or groups.shape != types.shape:
            return
        if mask is not None and mask.shape != types.shape:
            return
        given = {name: getattr(scope, name) for name in ROUTING_ARGUMENTS}
        inputs = resolve(configs, {"attention_mask": mask}, given, None, training=False)
        routing = None if inputs is None else routing_of(configs, *inputs, only=self.only, device=self.device())
        self.ready = None if routing is None else (routing, mask)
        if self.root.training:
            route_checkpoints(self.root, self)
        else:
            self.check(self.root, configs)

    def prepared(self, args: tuple, kwargs: dict) -> Routing | None:
        """The routing that the enclosing block prepared, where it is that of this forward for sure."""
        if self.ready is None or len(args) > 1 or any(kwargs.get(name) is not None for name in ROUTING_ARGUMENTS):
            return None
        routing, mask = self.ready
        own_mask = kwargs.get("attention_mask")
        if kwargs.get("past_key_values") is not None or not (own_mask is None or own_mask is mask):
            return None
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
        known = isinstance(tokens, torch.Tensor) and tuple(tokens.shape[:2]) == routing.shape
        return routing if known else None

    def view(self, adapter_name: str) -> tuple[View, tuple[int, int] | None]:
        """The running forward's tokens as ``adapter_name`` sees them, and their [batch, seq].

        Where nothing is known, all is text, of no known shape.
        """
        routing = self.routing
        if not self.running:
            if self._seen_routing and _in_backward():
                raise MokaError(
                    "A MokA layer is recomputed in the backward pass without the routing of its forward. Use the "
                    "model's own gradient_checkpointing_enable(), or let your network checkpoint its blocks through "
                    "an attribute `_gradient_checkpointing_func`, as transformers' blocks do."
                )
            if self.scope is not None:
                routing = self._routing_of_scope(adapter_name)
        if routing is not None:
            return routing.views[adapter_name], routing.shape
        if not self._warned and len(self.configs[adapter_name].modalities) > 1:
            self._warned = True
            warnings.warn(_NO_ROUTING, stacklevel=2)
        return text_view(self.configs[adapter_name], self.only), None

    def _routing_of_scope(self, adapter_name: str) -> Routing | None:
        """For networks that reach their layers through a method other than ``forward``: one for all calls of a block."""
        key = adapter_name, self.only, torch.is_grad_enabled()
        if self._by_scope is None or self._by_scope[0] is not self.scope or self._by_scope[1] != key:
            configs = {adapter_name: self.configs[adapter_name]}
            given = dict.fromkeys(ROUTING_ARGUMENTS)
            inputs = resolve(configs, {}, given, self.scope, torch.is_grad_enabled())
            routing = None if inputs is None else routing_of(configs, *inputs, only=self.only, device=self.device())
            self._by_scope = self.scope, key, routing
        self._seen_routing = True
        return self._by_scope[2]


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
            routing = routing_of(configs, *inputs, only=router.only, device=device)
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


def _adapters_in_use(model: nn.Module, configs: dict[str, MokaConfig]) -> tuple[dict[str, MokaConfig], bool]:
    """The active (or merged) adapters, none while disabled; and whether every text path is in its base weight."""
    names: dict[str, None] = {}
    idle = True
    for module in model.modules():
        if isinstance(module, MokaLayer):
            if module.disable_adapters:
                return {}, False
            # Adapters may target different layers, so every layer is asked.
            for name in module.merged_adapters or module.active_adapters:
                if name in module.moka_A:
                    names[name] = None
                    idle = idle and module._folded(name) == (TEXT in configs[name].adapted)
    return {name: configs[name] for name in names}, idle


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
