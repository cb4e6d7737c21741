"""Hooks around the calls of an adapted model, which build the routing of each forward.

A peft adapter sees one tensor, ``x``; MokA must also know which token is of which modality. So a hook before each call of
the adapted model takes the routing arguments, builds the routing, and puts it in force until the hook after the call:

    model(mm_token_type_ids=..., interaction_ids=... | question_mask=..., attention_mask=...)
        -> Routing, built once -> read by every layer while the forward runs

Nothing depends on ``model.forward``, which trainers and accelerate replace. Modules inside that are models themselves have
the hooks too: a trainer may call the decoder and never the outer model. The outermost one that knows its tokens decides.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moka.errors import MokaError

from .checkpointing import route_checkpoints, unroute_checkpoints
from .checks import adapter_tensors, check_finite
from .config import MokaConfig
from .context import Block, Call, active_only, current, entered, ids_block, running_call
from .inputs import (
    ROUTING_ARGUMENTS,
    GivenIds,
    Span,
    cache_length,
    cache_of,
    check_length,
    check_shape,
    given_ids,
    ids_of_call,
    read,
    resolve,
    tokens_of,
)
from .layer import MokaLayer
from .routing import Routing, View, build_view, uniform_view, view_key

_NO_ROUTING = (
    "A MokA layer ran without routing: every token is treated as text, also image and sound. Pass mm_token_type_ids "
    "(and interaction_ids or question_mask) to the model's forward or generate, or wrap the call in "
    "`with moka.routing(model, mm_token_type_ids=...):`."
)


class RoutedModel:
    """The model that holds adapters, its adapted layers, and the hooks on it. Shared by all of them."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.layers: list[MokaLayer] = []
        self.warned: set[str] = set()
        self.has_routed = False  # some forward was routed: a recomputation without routing has lost it
        self.unchecked: set[str] = set()  # adapters that came through a loader of which we see nothing
        self.generating: list[int] = []  # depths of the modules with hooks that can generate
        self._handles: list = []

    @classmethod
    def of(cls, root: nn.Module) -> RoutedModel:
        """Return that of ``root``, made on first use."""
        found = root.__dict__.get("moka_model")
        if found is None:
            found = cls(root)
            object.__setattr__(root, "moka_model", found)  # no module: nothing of it reaches the state dict
        return found

    def attach(self) -> None:
        """Put the hooks on the root and on the models inside that contain adapted layers of the decoder."""
        self.detach()
        self.generating = []
        self.layers = [module for module in self.root.modules() if isinstance(module, MokaLayer)]
        decoder = {id(layer) for layer in self.layers if not layer.moka_tower}
        depth, embeds = 0, None
        for module in self.root.modules():
            inner = isinstance(module, PreTrainedModel)
            if module is self.root or (inner and any(id(m) in decoder for m in module.modules())):
                hook = CallHook(self, module, depth)
                self._handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(hook.after, always_call=True))
                self.generating += [depth] if hasattr(type(module), "generate") else []
                depth += 1
                embeds = embeds or (_embeddings(module) if inner else None)
        if embeds is not None:
            self._handles.append(embeds.register_forward_hook(self.remember_embedded))

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """Leave the model as it was before its first adapter."""
        self.detach()
        self.root.__dict__.pop("moka_model", None)
        unroute_checkpoints(self.root)

    def remember_embedded(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Keep the ids that are embedded outside of any forward: frameworks call the model with ``inputs_embeds`` then."""
        if torch.compiler.is_compiling() or not args or running_call(self) is not None:
            return
        if isinstance(args[0], torch.Tensor) and args[0].dim() == 2 and not args[0].is_floating_point():
            current.embedded = self, args[0]

    def configs(self) -> dict[str, MokaConfig]:
        """Return the configurations of the adapters that some layer uses now."""
        found: dict[str, MokaConfig] = {}
        for layer in self.layers:
            if not layer._disable_adapters:
                for name in layer.adapters_in_use():
                    found[name] = layer.moka_config[name]
        return found

    def warn_once(self, key: str, message: str) -> None:
        """Print a warning the first time."""
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, stacklevel=2)

    def check(self, names: Mapping[str, Any]) -> None:
        """Look once at the values of adapters that were loaded by others, before their first inference."""
        for name in self.unchecked.intersection(names):
            self.unchecked.discard(name)
            check_finite(adapter_tensors(self.root, name), f"Adapter {name!r}")

    def device(self, span: Span) -> torch.device:
        """Return where the layers' inputs will be: where the tokens are, or else the layers."""
        if span.ids.device is not None and span.ids.device.type != "cpu":
            return span.ids.device
        weights = (part.local() for layer in self.layers for part in layer.moka_A.values())
        weight = next(weights, None)
        # Weights that are offloaded tell nothing.
        return torch.device("cpu") if weight is None or weight.is_meta else weight.device

    def build(self, configs: dict[str, MokaConfig], span: Span, training: bool, kept: Any = None) -> Routing:
        """Build the routing of a forward for ``configs``."""
        only, device = active_only(self), self.device(span)
        made: dict[tuple, View] = {}
        with torch.inference_mode(False):  # it may outlive an inference
            for config in configs.values():
                key = view_key(config)
                if key not in made:
                    made[key] = build_view(config, *resolve(self, config, span, training), only, device)
        self.has_routed = True
        kept = kept if isinstance(kept, torch.Tensor) and kept.dim() == 1 else None
        return Routing(span.shape, {name: made[view_key(c)] for name, c in configs.items()}, device, kept, only)

    def routing_outside(self, layer: MokaLayer, call: Call | None) -> Routing | None:
        """Return the routing of a layer that runs in no forward, or in one that knows nothing of its tokens.

        None: all is text.

        Raises:
            MokaError: a recomputation in backward that lost its routing; training of a model whose media are known.
        """
        if not torch.compiler.is_compiling() and call is None and self.has_routed and _in_backward():
            raise MokaError(
                "A MokA layer is recomputed in the backward pass without the routing of its forward. Use the "
                "model's own gradient_checkpointing_enable(), or let your network checkpoint its blocks through "
                "an attribute `_gradient_checkpointing_func`, as transformers' blocks do."
            )
        block = ids_block(self)
        if block is not None and block.ids is not None:
            if block.routing is not None and block.routing.only == active_only(self):
                return block.routing
            return self._routing_of_block(block)
        if torch.compiler.is_compiling():
            return None
        configs = [config for config in layer.moka_config.values() if len(config.modalities) > 1]
        if configs and layer.training and torch.is_grad_enabled() and any(c.modality_token_ids for c in configs):
            raise MokaError(_NO_ROUTING.replace("every token is treated", "every token would be treated"))
        if configs:
            self.warn_once("routing", _NO_ROUTING)
        return None

    @torch.compiler.disable
    def _routing_of_block(self, block: Block) -> Routing | None:
        key = active_only(self), torch.is_grad_enabled()
        if key not in block.outside:
            configs = self.configs()
            span = ids_of_call({}, block.ids, any(config.interacts for config in configs.values()))
            training = self.root.training and torch.is_grad_enabled()
            block.outside[key] = None if span is None else self.build(configs, span, training)
        return block.outside[key]


class CallHook:
    """The hooks around the calls of one module."""

    def __init__(self, model: RoutedModel, module: nn.Module, depth: int) -> None:
        self.model, self.depth = model, depth
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        # What the module itself does not take.
        self.foreign = tuple(name for name in ROUTING_ARGUMENTS if name not in {p.name for p in parameters})

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Put the routing of this call in force, if no call around it has."""
        call = running_call(self.model)
        inside = call is not None and call.routing is not None and call.hook.depth < self.depth
        if not inside and not (torch.compiler.is_compiling() and self._prebuilt(args, kwargs) is not None):
            self._begin(module, args, kwargs)
        if any(name in kwargs for name in self.foreign):
            kwargs = {name: value for name, value in kwargs.items() if name not in self.foreign}
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """End the call that ``before`` began."""
        call = current.call
        if call is not None and call.hook is self:
            current.call = call.parent

    @torch.compiler.disable  # how many tokens ask and answer depends on the data; the layers compile as one graph
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        parent = current.call
        current.call = Call(self.model, self, None, parent)  # also when what follows raises
        routing = self._prebuilt(args, kwargs)
        if routing is None:
            routing = self._routing({**dict(zip(self.positional, args, strict=False)), **kwargs})
        current.call = Call(self.model, self, routing, parent)
        if self.model.root.training:
            route_checkpoints(self.model.root)

    def _routing(self, arguments: dict) -> Routing | None:
        model, root = self.model, self.model.root
        configs = model.configs()
        if not configs:
            return None
        if not root.training:
            model.check(configs)
        block, tokens = ids_block(model), tokens_of(arguments)
        outside = None if block is None else block.ids
        if block is not None and tokens is not None and _decodes(block, cache_of(arguments)):
            only = active_only(model)
            views = {name: uniform_view(config, only=only) for name, config in configs.items()}
            steps = None
            if not (torch.is_grad_enabled() or root.training or torch.compiler.is_compiling()):
                steps = block.text_steps
            return Routing((tokens.shape[0], tokens.shape[1]), views, tokens.device, text_steps=steps)
        if self._is_left_to_inner(arguments, outside):
            return None
        if tokens is not None and arguments.get("input_ids") is None:
            arguments["input_ids"] = _embedded_ids(model, tokens)
        span = ids_of_call(arguments, outside, any(config.interacts for config in configs.values()))
        if span is None:
            return None
        training = root.training and torch.is_grad_enabled()
        return model.build(configs, span, training, arguments.get("logits_to_keep"))

    def _is_left_to_inner(self, arguments: dict, outside: GivenIds | None) -> bool:
        """Return whether ids of the expanded prompt are in force, and these tokens are not expanded yet."""
        tokens = arguments.get("input_ids")
        if outside is None or outside.types is None or tokens is None or arguments.get("mm_token_type_ids") is not None:
            return False
        if outside.start is not None or tuple(tokens.shape) == outside.types.shape or cache_length(cache_of(arguments)):
            return False
        return _holds_model(self.model, self.depth)

    def _prebuilt(self, args: tuple, kwargs: dict) -> Routing | None:
        """Return the routing that the enclosing block built, if it is that of this forward for sure."""
        block = ids_block(self.model)
        if block is None or block.routing is None or len(args) > 1 or block.routing.only != active_only(self.model):
            return None
        if any(kwargs.get(name) is not None for name in (*ROUTING_ARGUMENTS, "past_key_values", "cache")):
            return None
        mask = kwargs.get("attention_mask")
        if not (mask is None or mask is block.mask):
            return None
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
        known = isinstance(tokens, torch.Tensor) and tuple(tokens.shape[:2]) == block.routing.shape
        return block.routing if known else None


def _holds_model(model: RoutedModel, depth: int = 0) -> bool:
    """Return whether the module with hooks at ``depth`` contains a language model of its own, which generates.

    Such a module may expand media before it calls the language model.
    """
    return any(inner > depth for inner in model.generating)


def _embeddings(module: PreTrainedModel) -> nn.Module | None:
    try:
        return module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _embedded_ids(model: RoutedModel, embeds: torch.Tensor) -> torch.Tensor | None:
    """Return the ids of ``embeds`` if they were embedded just before this forward, as frameworks do in a hook."""
    found, current.embedded = current.embedded, None
    if found is None or found[0] is not model or found[1].shape != embeds.shape[:2]:
        return None
    return found[1]


def _decodes(block: Block, cache: Any) -> bool:
    """Return whether, inside generate, the tokens after those of ``cache`` come after the prompt."""
    if block.ids is None or block.ids.start is None or cache is None:
        return False
    if cache is block.decoding:
        return True
    if cache_length(cache) < block.ids.start + block.ids.length:
        return False
    # Of a static cache only the device knows the length. It is read once: in one generate it does not get shorter.
    block.decoding = cache
    return True


def _in_backward() -> bool:
    graph_task = getattr(torch._C, "_current_graph_task_id", None)
    return graph_task is not None and graph_task() != -1


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
    with entered(Block(model, current.block, ids)):
        yield passed


def _ids_of_prompt(model: RoutedModel, arguments: dict) -> GivenIds | None:
    block, tokens, mask = ids_block(model), tokens_of(arguments), arguments.get("attention_mask")
    outside = None if block is None else block.ids
    if outside is not None and outside.start is not None:  # generate inside generate: the outer one knows the prompt
        if tokens is not None:
            check_length("mm_token_type_ids", outside.length, tokens.shape[1])
        return None
    own = given_ids(arguments)
    cached = cache_length(cache_of(arguments))
    # As transformers tells them apart: a mask longer than the tokens means that these are only the new ones.
    new_only = cached > 0 and mask is not None and tokens is not None and mask.shape[1] != tokens.shape[1]
    start = mask.shape[1] - tokens.shape[1] if new_only else 0
    valid = None if mask is None or mask.dim() != 2 else read(mask) != 0
    if own.types is None and outside is not None:
        # The ids of a block may be those of the expanded prompt, which a model makes of these tokens only later.
        same = tokens is not None and outside.types is not None and outside.types.shape == tuple(tokens.shape[:2])
        if not same and tokens is not None and outside.types is not None and not _holds_model(model):
            check_shape("mm_token_type_ids", outside.types, tuple(tokens.shape[:2]))
        groups = outside.groups if own.groups is None else own.groups
        if same and groups is not None:
            check_shape("interaction_ids", groups, outside.types.shape)  # type: ignore[union-attr]
        ids = arguments.get("input_ids")
        fits = valid is not None and outside.types is not None and valid.shape == outside.types.shape
        return GivenIds(
            outside.types,
            groups,
            outside.question if own.question is None else own.question,
            outside.valid if not fits else valid,
            read(ids) if same else None,
            start=0,
            device=outside.device,
        )
    ids = arguments.get("input_ids")
    if ids is None and tokens is not None:
        ids = _embedded_ids(model, tokens)
    if own.types is None and ids is None:
        return None
    if tokens is not None:
        start, own = _new_tokens(own, tokens, start)
    length = own.types.shape[1] if own.types is not None else tokens.shape[1]
    valid = None if valid is None else valid[:, start : start + length]
    return GivenIds(
        own.types, own.groups, own.question, valid, None if ids is None else read(ids), start=start,
        cached=0 if new_only else cached, device=None if tokens is None else tokens.device,
    )


def _new_tokens(own: GivenIds, tokens: torch.Tensor, start: int) -> tuple[int, GivenIds]:
    """Cut ids of the whole chat to its new tokens, and refuse those of another length."""
    batch, seq = tokens.shape[:2]
    cut = {}
    for name, argument in zip(("types", "groups", "question"), ROUTING_ARGUMENTS, strict=True):
        array = getattr(own, name)
        if array is not None and array.shape == (batch, start + seq):
            array = array[:, start:]
        if array is not None:
            check_shape(argument, array, (batch, seq))
        cut[name] = array
    return start, GivenIds(**cut)


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

    The ids are read once, here; they may be in host memory while the model is on a GPU.

    Args:
        model: an adapted model, or any module that contains one.
        mm_token_type_ids: [batch, seq] int: 0 text, 1 image, 2 video, 3 audio. Tokens decoded after them are text.
        interaction_ids: [batch, seq] int: 0 takes no part; media tokens with k attend to text tokens with k.
        question_mask: [batch, seq] bool: shorthand for one question.
        attention_mask: [batch, seq]: 0 marks padding.
    Raises:
        MokaError: no MokA adapter in ``model``; ids that are not integer tensors.
    """
    ids = given_ids(
        {"mm_token_type_ids": mm_token_type_ids, "interaction_ids": interaction_ids, "question_mask": question_mask}
    )
    valid = read(attention_mask)
    ids = GivenIds(ids.types, ids.groups, ids.question, None if valid is None else valid != 0, device=ids.device)
    with ExitStack() as blocks:
        for routed in routed_models(model, "moka.routing"):
            block = blocks.enter_context(entered(Block(routed, current.block, ids, mask=attention_mask)))
            block.routing = _complete_routing(routed, block, ids)
        yield


def _complete_routing(model: RoutedModel, block: Block, ids: GivenIds) -> Routing | None:
    """Build the routing of a block now if its ids tell all: its forwards then compile without a graph break."""
    groups = ids.groups if ids.groups is not None else ids.question
    configs = model.configs()
    if not configs or ids.types is None or groups is None or ids.types.ndim != 2 or groups.shape != ids.types.shape:
        return None
    if ids.valid is not None and ids.valid.shape != ids.types.shape:
        return None
    if model.root.training:
        route_checkpoints(model.root)
    else:
        model.check(configs)
    return model.build(configs, Span(ids, (ids.types.shape[0], ids.types.shape[1])), training=False)


def routed_models(model: nn.Module, caller: str) -> list[RoutedModel]:
    """Return the models with adapters in ``model``; ``caller`` is named if there is none."""
    found = {id(m.moka_model): m.moka_model for m in model.modules() if isinstance(m, MokaLayer)}
    if not found:
        raise MokaError(f"{caller}: {type(model).__name__} has no MokA adapter; attach one with get_peft_model.")
    return list(found.values())
