"""The router: holds the routing of the forward that runs, and hands it to the layers. `wrapping` builds it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError

from .checkpointing import route_checkpoints
from .checks import check_finite
from .config import TEXT, MokaConfig
from .decoding import text_step
from .inputs import RoutingInputs, cache_length, resolve
from .kernels import fused
from .layer import MokaLayer, MokaLinear
from .routing import Routing, View, build_routing, text_view
from .shared import SharedInputs

ROUTING_ARGUMENTS = ("mm_token_type_ids", "interaction_ids", "question_mask")
HOST_IDS = "host_ids"  # a `HostIds` beside them

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
        if torch.is_grad_enabled() or self.recorder is not None or not fused():
            self.take_part()
            return
        if self._bypassed:
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
        routing = None if inputs is None else build_routing(configs, *inputs, only=self.only, device=self.device())
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
            routing = None if inputs is None else build_routing(configs, *inputs, only=self.only, device=self.device())
            self._by_scope = self.scope, key, routing
        self._seen_routing = True
        return self._by_scope[2]


def _in_backward() -> bool:
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


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
