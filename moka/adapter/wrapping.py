"""Hooks around the calls of an adapted model, which build the routing of each forward.

A peft adapter sees one tensor, ``x``; MokA must also know which token is of which modality. So a hook before each call of
the adapted model takes the routing arguments, builds the routing, and keeps it until the hook after the call:

    model(mm_token_type_ids=..., interaction_ids=... | question_mask=..., attention_mask=...)
        -> Routing, built once -> read by every layer while the forward runs

Nothing depends on ``model.forward``, which trainers and accelerate replace. Modules inside that are models themselves have
the hooks too: a trainer may call the decoder and never the outer model. The outermost one that knows its tokens decides.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
    given_ids,
    ids_of_call,
    read,
    resolve,
    tokens_of,
)
from .layer import MokaLinear
from .routing import Routing, View, build_view, uniform_view, view_key

_NO_ROUTING = (
    "A MokA layer ran without routing: every token is treated as text, also image and sound. Pass mm_token_type_ids "
    "(and interaction_ids or question_mask) to the model's forward or generate, or wrap the call in "
    "`with moka.routing(model, mm_token_type_ids=...):`."
)


class RoutedModel:
    """The model that has adapters, its adapted layers, and the hooks on it. Shared by all of them."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.layers: list[MokaLinear] = []
        self.warned: set[str] = set()
        self.has_routed = False  # some forward was routed: a recomputation without routing has lost it
        self.unchecked: set[str] = set()  # adapters that came through a loader of which we see nothing
        self.modules: list[nn.Module] = []  # with hooks, each inside of the one before
        self.auxiliary_scale = 1.0  # of gradients that methods add in backward: 1 / batches accumulated
        self.knows_layers = False  # a transformers model: fewer tokens in a layer are the last ones, or those named
        self._handles: list = []

    def __deepcopy__(self, memo: dict) -> RoutedModel:
        """Copy it with its model only: the copy of a part, such as embeddings trained as a copy, belongs to this model."""
        if id(self.root) not in memo:
            return self
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in vars(self).items()}
        return copied

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
        self.layers = [module for module in self.root.modules() if isinstance(module, MokaLinear)]
        decoder = {id(layer) for layer in self.layers if not layer.moka_tower}
        embeds: nn.Module | None = None
        for module in self.root.modules():
            inner = isinstance(module, PreTrainedModel) and any(id(m) in decoder for m in module.modules())
            if inner or module is self.root:
                hook = CallHook(self, module, len(self.modules))
                self._handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(hook.after, always_call=True))
                self.modules.append(module)
                self.knows_layers = self.knows_layers or inner
                if inner and embeds is None:
                    with suppress(NotImplementedError, AttributeError):
                        embeds = module.get_input_embeddings()  # type: ignore[operator]
        if embeds is not None:
            self._handles.append(embeds.register_forward_hook(self.remember_embedded))

    def detach(self) -> None:
        """Remove the hooks."""
        self.modules = []
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
            current.embedded = weakref.ref(self), args[0]

    def configs(self) -> dict[str, MokaConfig]:
        """Return the configurations of the adapters that some layer uses now."""
        found: dict[str, MokaConfig] = {}
        for layer in self.layers:
            if not layer._disable_adapters:
                for name in layer.adapters_in_use():
                    found[name] = layer.moka_config[name]
        return found

    def is_merged(self) -> bool:
        """Return whether every layer's adapters are merged, so that text has nothing to add."""
        return all(layer.merged_adapters and not layer._disable_adapters for layer in self.layers)

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

    def build(self, configs: dict[str, MokaConfig], span: Span, training: bool, kept: Any = None) -> Routing:
        """Build the routing of a forward for ``configs``."""
        only, device = active_only(self), span.ids.device or torch.device("cpu")  # layers elsewhere move it, once
        made: dict[tuple, View] = {}
        valid = None if span.ids.valid is None else span.cut(span.ids.valid, False)
        with torch.inference_mode(False):  # it may outlive an inference
            for config in configs.values():
                key = view_key(config)
                if key not in made:
                    made[key] = build_view(config, *resolve(self, config, span, training), only, device, valid)
        self.has_routed = True
        kept = kept if isinstance(kept, torch.Tensor) and kept.dim() == 1 else None
        return Routing(span.shape, {name: made[view_key(c)] for name, c in configs.items()}, device, kept, only)

    def routing_outside(self, layer: MokaLinear, call: Call | None) -> Routing | None:
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
        configs = [config for config in configs if config.rival is None or config.rival.routed]
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
        """Begin a call with a routing of its own, if no call around it has."""
        call = running_call(self.model)
        compiling = torch.compiler.is_compiling()
        inside = call is not None and call.routing is not None and call.hook.depth < self.depth
        if compiling:
            inside = inside or self._prebuilt(args, kwargs) is not None
        elif inside and call is not None and call.routing is not None:
            inside = self._has_tokens_of(call, call.routing, args, kwargs)
        if not inside:
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
        current.call = Call(self.model, self, routing, parent, self._input_ids(args, kwargs))
        if self.model.root.training:
            route_checkpoints(self.model.root)

    def _input_ids(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        at = self.positional.index("input_ids") if "input_ids" in self.positional else len(args)
        ids = args[at] if at < len(args) else kwargs.get("input_ids")
        return ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None

    def _has_tokens_of(self, call: Call, routing: Routing, args: tuple, kwargs: dict) -> bool:
        """Return whether this call inside another has its tokens, and is no forward of others: from a hook, of a pair.

        Almost always it has the very same tensor, or embeddings, of which nothing is known.
        """
        ids, outer = self._input_ids(args, kwargs), call.tokens
        if ids is None or outer is None or ids is outer:
            return True
        if ids.shape != outer.shape:
            return False
        differs = (ids != outer.to(ids.device)).cpu().numpy()
        # The tokens of media may be replaced by others before the language model sees them.
        for view in routing.views.values():
            if view.rows is not None:
                differs = differs & (view.rows == view.row).cpu().numpy()
        return not differs.any()

    def _routing(self, arguments: dict) -> Routing | None:
        model, root = self.model, self.model.root
        block, tokens, only = ids_block(model), tokens_of(arguments), active_only(model)
        outside = None if block is None else block.ids
        decodes = block is not None and tokens is not None and _decodes(block, cache_of(arguments))
        if decodes and block is not None and tokens is not None and not (torch.is_grad_enabled() or root.training):
            # A layer needs no more: its text path of the adapters that it uses.
            shape, merged = (tokens.shape[0], tokens.shape[1]), only is None and model.is_merged()
            return Routing(shape, {}, tokens.device, only=only, text_steps=block.text_steps, merged=merged)
        configs = model.configs()
        if not configs:
            return None
        if not root.training:
            model.check(configs)
        if decodes and tokens is not None:
            views = {name: uniform_view(config, only=only) for name, config in configs.items()}
            return Routing((tokens.shape[0], tokens.shape[1]), views, tokens.device, only=only)
        if self._is_left_to_inner(arguments, outside):
            return None
        if tokens is not None and arguments.get("input_ids") is None:
            arguments["input_ids"] = embedded_ids(model, tokens)
        current.embedded = None  # it is not of a later forward
        cache = cache_of(arguments)
        if block is not None and tokens is not None and not _may_be_prompt(block, cache, tokens.shape[1]):
            outside = None
        span = ids_of_call(arguments, outside, any(config.interacts for config in configs.values()))
        if span is None:
            return None
        if block is not None and span.begin is not None and cache is not None:
            block.caches.append(cache)
        training = root.training and torch.is_grad_enabled()
        return model.build(configs, span, training, arguments.get("logits_to_keep"))

    def _is_left_to_inner(self, arguments: dict, outside: GivenIds | None) -> bool:
        """Return whether ids of the expanded prompt are given, and these tokens are not expanded yet."""
        tokens = arguments.get("input_ids")
        if outside is None or outside.types is None or tokens is None or arguments.get("mm_token_type_ids") is not None:
            return False
        if outside.start is not None or tuple(tokens.shape) == outside.types.shape or cache_length(cache_of(arguments)):
            return False
        return expands_inside(self.model, self.depth)

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


def expands_inside(model: RoutedModel, depth: int) -> bool:
    """Return whether the module with hooks at ``depth`` contains a language model of its own, which generates.

    Such a module may expand media before it calls the language model.
    """
    return any(hasattr(type(module), "generate") for module in model.modules[depth + 1 :])


def embedded_ids(model: RoutedModel, embeds: torch.Tensor) -> torch.Tensor | None:
    """Return the ids of ``embeds`` if they were embedded just before this forward, as frameworks do in a hook."""
    found, current.embedded = current.embedded, None
    if found is None or found[0]() is not model or found[1].shape != embeds.shape[:2]:
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


def _may_be_prompt(block: Block, cache: Any, seq: int) -> bool:
    """Return whether ``seq`` tokens after those of ``cache`` may be of the prompt of generate.

    They may be of another sequence, such as the unconditional branch of guidance, which begins with a part of the prompt
    and has a cache of its own.
    """
    if block.ids is None or block.ids.start is None:
        return True
    if cache is None:
        return seq >= block.ids.length  # without a cache every step gets the complete prompt
    return any(cache is known for known in block.caches) or cache_length(cache) <= block.ids.start


def _in_backward() -> bool:
    graph_task = getattr(torch._C, "_current_graph_task_id", None)
    return graph_task is not None and graph_task() != -1


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


def set_auxiliary_scale(model: nn.Module, scale: float) -> None:
    """Set the factor of the gradients that IMoD and balance losses add in backward: 1 / batches accumulated for a step."""
    for module in model.modules():
        if isinstance(module, MokaLinear):
            module.moka_model.auxiliary_scale = scale


def routed_models(model: nn.Module, caller: str) -> list[RoutedModel]:
    """Return the models with adapters in ``model``; ``caller`` is named if there is none."""
    found = {id(m.moka_model): m.moka_model for m in model.modules() if isinstance(m, MokaLinear)}
    if not found:
        raise MokaError(f"{caller}: {type(model).__name__} has no MokA adapter; attach one with get_peft_model.")
    return list(found.values())
