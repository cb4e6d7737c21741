"""``MokaModel``: the tuner that puts MokA layers into a model, and the peft verbs that differ from LoRA's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from moka.errors import MokaError

from .checks import TASK_HEADS, check_adapter_tensors, check_finite, planned_tensors, read_tensors
from .config import TEXT, MokaConfig
from .context import current
from .generation import unwrap_generate, wrap_generate
from .input_groups import set_groups
from .layer import MokaLinear
from .matching import PREFIX, Shapes, match_layers, match_names, without_others
from .quantization import get_quantization_kwargs
from .targets import (
    check_supported,
    coverage,
    decoder_scope,
    fill_targets,
    matches,
    no_match,
    placeholder_ids,
    structure_ids,
    tower_modality,
)
from .text_decoder import is_linear, named_modules
from .wrapping import RoutedModel


class MokaModel(BaseTuner):
    """Wraps a model whose linear layers carry MokA adapters (Wei et al., 2025, https://arxiv.org/abs/2506.05191).

    Args:
        model: any ``torch.nn.Module``; with a transformers model the language model's projections are the default.
        peft_config: a ``MokaConfig`` (or name -> config).
        adapter_name: name of the adapter.

    Example:
        >>> import moka
        >>> from peft import get_peft_model
        >>> config = moka.MokaConfig.from_processor(processor, r=4, task_type="CAUSAL_LM")
        >>> model = get_peft_model(backbone, config)
        >>> model(**processor(text=prompt, images=image, return_tensors="pt")).logits
    """

    prefix = "moka_"
    tuner_layer_cls = MokaLinear
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Here, as peft would add the configuration to those of the wrapped model before it injects.
        if any(isinstance(module, (PeftModel, BaseTuner)) for module in (model, *model.children())):
            raise MokaError(
                "model: it is a PeftModel already. Use model.load_adapter(folder, adapter_name) or model.add_adapter, or give "
                "model.get_base_model()."
            )
        super().__init__(model, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model itself: peft before 0.21 calls ``self.model.forward``, which runs no hooks."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        before = current.call
        try:
            return self.model(*args, **kwargs)
        finally:
            current.call = before  # a keyboard interrupt runs no hook

    def coverage(self, adapter_name: str | None = None) -> float:
        """Return the share of the decoder's block weights that an adapter's layers hold, 0 to 1."""
        name = adapter_name or self.active_adapters[0]
        layers = [n for n, m in self.model.named_modules() if isinstance(m, MokaLinear) and name in m.moka_A]
        return coverage(self.model, layers)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as in peft, after filling in the defaults that depend on the model.

        Raises:
            MokaError: before anything is changed, if the adapter does not fit the model.
        """
        config: Any = self.peft_config[adapter_name]
        default_targets = config.target_modules is None
        prepare_config(config, model)
        self._scope = decoder_scope(model)
        self._saved_layers: set[str] = set()  # of an adapter whose targets are paths that moved
        self._given = config.target_modules
        self._check_plan(model, config)
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        further = any(isinstance(module, MokaLinear) for module in model.modules())
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules = self._given  # peft shortens long lists, also to names that mean something else here
        if further:  # peft before 0.21 freezes what was trainable before
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        set_groups(model, MokaLinear)
        routed = RoutedModel.of(model)
        routed.attach()
        wrap_generate(routed)
        pending = config.__dict__.pop("pending", None)
        if pending is None:
            routed.unchecked.add(adapter_name)
        is_new = pending is None and not config.inference_mode
        if is_new and self._scope is not None and (share := self.coverage(adapter_name)) < 0.5:
            remedy = (
                "Name more layers" if default_targets else "Leave target_modules out for all projections of a block"
            )
            warnings.warn(
                f"target_modules: the adapter {adapter_name!r} covers {share:.0%} of the decoder's block weights. {remedy}, if "
                "more was intended; weights of experts that are one parameter are left as they are.",
                stacklevel=2,
            )

    def _check_plan(self, model: nn.Module, config: MokaConfig) -> None:
        """Refuse, before anything is changed, targets and saved tensors that the model has no place for."""
        pending = config.__dict__.get("pending")
        shapes = {} if pending is None else pending.shapes
        saved = {name: shape for name, shape in shapes.items() if ".moka_" in name}
        layers = self._matched(model, config)
        if not layers and saved:
            # A pattern of full paths, saved under another version of transformers: the names in the file say the layers.
            candidates = [name for name, module in named_modules(model) if is_linear(module)]
            self._saved_layers = match_layers(saved, candidates) or set()
            layers = self._matched(model, config)
        if not layers:
            raise MokaError(no_match(config, model))
        for name, module in layers.items():
            if "experts" in name.split("."):
                raise MokaError(
                    f"target_modules: {name!r} sees only the tokens that a router gives it, and MokA must know which they are. "
                    "Name layers outside of the experts."
                )
            if not is_linear(module):
                raise MokaError(
                    f"target_modules: {name!r} is a {type(module).__name__}; MokA adapts nn.Linear, Conv1D and quantised "
                    "linear layers. Name other modules, or leave target_modules out for the defaults."
                )
        if saved and pending is not None:
            sizes: Any = {name: _get_in_out_features(_base(module)) for name, module in layers.items()}
            match_names(planned_tensors(sizes, config), saved)
            modules = {name: shape for name, shape in shapes.items() if name not in saved}
            match_names(_own_shapes(model, config, modules), modules)
            check_finite(read_tensors(pending.weights), str(pending.weights))

    def _matched(self, model: nn.Module, config: MokaConfig) -> dict[str, nn.Module]:
        found = named_modules(model)
        return {name: module for name, module in found if self._check_target_module_exists(config, name)}

    # An instance method where peft has a static one: names mean the decoder of this model.
    def _check_target_module_exists(self, config: MokaConfig, key: str):  # type: ignore[override]
        return key in self._saved_layers if self._saved_layers else matches(config, key, self._scope, self._given)

    def _create_and_replace(  # type: ignore[override]
        self, moka_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
    ) -> None:
        rank_key = get_pattern_key(moka_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(moka_config.alpha_pattern.keys(), current_key)
        r = moka_config.rank_pattern.get(rank_key, moka_config.r)
        alpha = moka_config.alpha_pattern.get(alpha_key, moka_config.alpha)
        outside = self._scope is not None and current_key not in self._scope
        tower = tower_modality(self.model, current_key, moka_config) if outside else None
        if isinstance(target, MokaLinear):
            target.update_layer(adapter_name, r, alpha, moka_config, tower)
            return
        routed = RoutedModel.of(self.model)
        layer = MokaLinear(target, routed, current_key, **get_quantization_kwargs(self))
        layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, r, alpha, moka_config, tower)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Iterator[None]:
        # peft would drop the argument silently and run every row through the active adapter.
        if adapter_names is not None:
            raise MokaError(
                "adapter_names: a batch of several adapters is for LoRA; run each adapter's rows separately."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a sum of MokA adapters is no MokA adapter, as each attends in a low-rank space of its own."""
        raise MokaError("add_weighted_adapter: not for MokA. Activate several adapters: base_model.set_adapter([...]).")

    def delete_adapter(self, adapter_name: str) -> None:
        if any(adapter_name in m.merged_adapters for m in self.model.modules() if isinstance(m, MokaLinear)):
            raise MokaError(
                f"delete_adapter: {adapter_name!r} is merged into the weights; call unmerge_adapter() first."
            )
        super().delete_adapter(adapter_name)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """Merge the text path into the weights; media tokens keep their residual, so no output changes.

        Args:
            adapter_names: default: the active ones.
            safe_merge: refuse, before any weight changes, an adapter that is not finite.
            requantize: merge into quantised weights too, which rounds them again; a warning gives the size of the error.
        Raises:
            MokaError: quantised weights without ``requantize``.
        """
        self._check_merge_allowed()
        layers = self._check_merge(adapter_names, safe_merge, requantize)
        shared = _shared_weights(self.model)
        errors = []
        for layer in layers:
            with onload_layer(layer):
                tied = id(layer.get_base_layer().weight) in shared
                errors += layer.merge(safe_merge, adapter_names, requantize, tied)
        if errors:
            weights, updates = zip(*errors, strict=True)
            kind = next(q.backend_name for q in (layer.quantization_backend for layer in layers) if q is not None)
            warnings.warn(
                f"Merged into {len(errors)} {kind} weights, which rounded them again. Error, relative to the weight: "
                f"mean {100 * sum(weights) / len(weights):.2g} %, largest {100 * max(weights):.2g} %; relative to the "
                f"update that was merged: mean {100 * sum(updates) / len(updates):.3g} %. Dequantise the backbone "
                "before merging to avoid it.",
                stacklevel=3,
            )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool, requantize: bool) -> list[MokaLinear]:
        """Refuse, before any weight changes, what cannot be merged; return the layers."""
        layers = [module for module in self.model.modules() if isinstance(module, MokaLinear)]
        for layer in layers:
            for name in adapter_names or layer.active_adapters:
                if name in layer.moka_A and name not in layer.merged_adapters:
                    layer.check_merge(name, safe_merge, requantize)
        return layers

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names=None, requantize: bool = False
    ) -> nn.Module:
        """Return the bare backbone with the text path merged in, and warn of what media tokens had beyond that."""
        self._check_merge(adapter_names, safe_merge, requantize)
        for name in adapter_names or self.active_adapters:
            config: Any = self.peft_config[name]
            lost = [m for m in config.adapted if m != TEXT]
            if config.rival is not None and not config.rival.by_modality and config.adapt is None:
                continue  # every token has the path that is merged
            if lost:
                interaction = " and their interaction with the question" if config.interacts else ""
                warnings.warn(
                    f"merge_and_unload keeps only the text path of adapter {name!r}. Lost: the {', '.join(lost)} "
                    f"projections{interaction}. Use merge_adapter() to keep exact outputs.",
                    stacklevel=2,
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged|Already following adapters")
            self.merge_adapter(adapter_names, safe_merge, requantize)
            # All is merged; with merge=True peft also sets tie_word_embeddings to False if the head has its own weight now.
            return self._unload_and_optionally_merge(merge=True, progressbar=progressbar, adapter_names=adapter_names)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper) and not hasattr(new_module, "weight"):
            # peft would look for a weight in what modules_to_save unwraps, which a complete encoder does not have.
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        routed = RoutedModel.of(self.model)
        unwrap_generate(routed)
        routed.forget()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # peft before 0.21 loads an adapter without asking the tuner; names that moved would be passed over.
        # Wrappers of torch's checkpointing are not in the names of a state dict.
        own = {
            f"{prefix}{name.replace('._checkpoint_wrapped_module', '')}": tuple(p.shape)
            for name, p in self.named_parameters()
            if ".moka_" in name
        }
        given = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if ".moka_" in key}
        for key in given.keys() - set(without_others(given)):
            del given[key], state_dict[key]
        if given.keys() - own.keys():
            for adapter in self.peft_config:
                names = (
                    match_names(_of_adapter(own, adapter), _of_adapter(given, adapter))
                    if _of_adapter(given, adapter)
                    else {}
                )
                for key, name in names.items():
                    state_dict[name] = state_dict.pop(key)
        check_finite({key: state_dict[key] for key in own if key in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # The one place where peft (0.21 and newer) says which adapter is about to be loaded: all of it must be there.
        # It gives a name to tensors without one, after which those of others could not be distinguished.
        state_dict = {name: state_dict[name] for name in without_others(state_dict)}
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return check_adapter_tensors(model, adapter_name, remapped)


def _own_shapes(model: nn.Module, config: MokaConfig, saved: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that tensors of ``modules_to_save`` have in ``model``, of those called as in ``saved``."""
    own, modules = dict(model.named_parameters()), config.modules_to_save or ()
    found = {}
    for name in saved:
        parameter = own.get(name.removeprefix(PREFIX))
        if parameter is not None and any(f".{module}." in f".{name}" for module in modules):
            found[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties the parameter
    return found


def _of_adapter(shapes: Shapes, adapter: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if f".{adapter}." in f"{name}."}


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def prepare_config(config: MokaConfig, model: nn.Module) -> None:
    """Fill in what depends on the model, and refuse what cannot work with it.

    Raises:
        MokaError: names the field and the remedy.
    """
    own = placeholder_ids(model, config)
    # No field: a configuration that was completed for one model must not be taken for another that differs.
    completed = config.__dict__.setdefault("completed", {})
    if config.modality_token_ids is None:
        config.modality_token_ids = completed["modality_token_ids"] = own
    elif completed.get("modality_token_ids", own) != own:
        raise MokaError(
            f"modality_token_ids: this configuration was completed for another model ({completed['modality_token_ids']}), and "
            f"those of {type(model).__name__} are {own}. Give each model a configuration of its own (copy.deepcopy before use)."
        )
    for name, ids in config.modality_token_ids.items():
        if name in own and not set(ids) & set(own[name]):
            warnings.warn(
                f"modality_token_ids: {name!r} has {list(ids)}, and the placeholder tokens of {type(model).__name__} are "
                f"{own[name]}: its media would be routed as text. Leave the field out for the model's own.",
                stacklevel=2,
            )
    placeholders = {i for ids in config.modality_token_ids.values() for i in ids}
    structure = {*(config.structure_token_ids or ()), *structure_ids(model, placeholders)}
    config.structure_token_ids = sorted(structure - placeholders)
    check_supported(model, config)
    fill_targets(config, model)
    if config.bias != "none" and not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise MokaError(
            f"bias: {config.bias!r} needs peft 0.21 or newer, which saves trained biases; here only 'none'."
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    wanted = set(config.modules_to_save or ()) - set(TASK_HEADS)
    unknown = sorted(m for m in wanted if not any(name.endswith(m) for name in names))
    if unknown:
        raise MokaError(f"modules_to_save: {type(model).__name__} has no module called {unknown}.")


def _shared_weights(model: nn.Module) -> set[int]:
    """Return ids of the weights that more than one module has, such as tied embeddings."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared
