"""``MokaModel``: the tuner that puts MokA layers into a model, and the peft verbs that differ from LoRA's."""

from __future__ import annotations

import difflib
import re
import warnings

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka.errors import MokaError

from .checks import check_adapter_tensors
from .config import DEFAULT_TARGETS, TEXT, MokaConfig
from .layer import MokaLayer, MokaLinear
from .router import attach_router, detach_router


class MokaModel(BaseTuner):
    """Wraps a model whose linear layers carry MokA adapters (Wei et al., 2025, https://arxiv.org/abs/2506.05191).

    Args:
        model: any ``torch.nn.Module``; with a transformers model the language model's projections are the default.
        peft_config: a ``MokaConfig`` (or name -> config).
        adapter_name: name of the adapter.

    Example:
        >>> import moka
        >>> from peft import get_peft_model
        >>> model = get_peft_model(backbone, moka.MokaConfig(r=4, task_type="CAUSAL_LM"))
        >>> model(input_ids=ids, mm_token_type_ids=types, interaction_ids=groups, labels=labels).loss.backward()
    """

    prefix = "moka_"
    tuner_layer_cls = MokaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As in peft, after filling in the defaults that depend on the model."""
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = default_targets(model)
        if config.modality_token_ids is None:
            config.modality_token_ids = placeholder_ids(model, config)
        router = attach_router(model)
        router.add(adapter_name, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            router.remove(adapter_name)
            if not any(isinstance(m, MokaLayer) for m in model.modules()):
                detach_router(model)
            if "not found in the base model" in str(error) or "No modules were targeted" in str(error):
                raise MokaError(_no_match(config, model)) from error
            raise

    def _create_and_replace(
        self, moka_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
    ) -> None:
        rank_key = get_pattern_key(moka_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(moka_config.alpha_pattern.keys(), current_key)
        r = moka_config.rank_pattern.get(rank_key, moka_config.r)
        alpha = moka_config.alpha_pattern.get(alpha_key, moka_config.alpha)
        if isinstance(target, MokaLayer):
            target.update_layer(adapter_name, r, alpha, moka_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base)
        if not isinstance(base, (nn.Linear, Conv1D)) and getattr(backend, "layer_type", None) != "linear":
            raise MokaError(
                f"target_modules: {current_key!r} is a {type(base).__name__}; MokA adapts nn.Linear, Conv1D and "
                "quantised linear layers. Name other modules, or leave target_modules out for the defaults."
            )
        router = attach_router(self.model)
        layer = MokaLinear(
            target, adapter_name, router, r=r, alpha=alpha, config=moka_config, **get_quantization_kwargs(self)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        attach_router(self.model).remove(adapter_name)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names=None) -> nn.Module:
        """The bare backbone with the text path folded in. What media tokens had beyond that is lost, and said."""
        for name in adapter_names or self.active_adapters:
            lost = [m for m in self.peft_config[name].adapted if m != TEXT]
            if lost:
                warnings.warn(
                    f"merge_and_unload keeps the text path of adapter {name!r} alone. Lost: the {', '.join(lost)} "
                    "projections and their interaction with the question. Use merge_adapter() to keep exact outputs.",
                    stacklevel=2,
                )
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        detach_router(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MokaConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        check_adapter_tensors(model, adapter_name, remapped)
        return remapped


def default_targets(model: nn.Module) -> set[str] | str:
    """The decoder's seven projections: by plain name, or by a regex where encoders use the same names.

    Raises:
        MokaError: the model has no such layers.
    """
    # An adapter that is there already wraps its layer: the wrapper has the name, not the `base_layer` inside.
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in DEFAULT_TARGETS and hasattr(module, "weight")
    ]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    inside = [name for name in names if not prefix or name.startswith(prefix + ".")]
    if not inside:
        raise MokaError(
            f"target_modules: {type(model).__name__} has none of the default layers ({', '.join(DEFAULT_TARGETS)}); "
            f"name the linear layers to adapt, such as {_linear_names(model)[:5]}."
        )
    if len(inside) == len(names):
        return {name.rpartition(".")[2] for name in inside}
    return rf"{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(DEFAULT_TARGETS)})"


def placeholder_ids(model: nn.Module, config: MokaConfig) -> dict[str, list[int]]:
    """The model's own placeholder token ids by modality, as far as its config names them."""
    own = getattr(model, "config", None)
    by_type = {1: ("image_token_id", "image_token_index"), 2: ("video_token_id", "video_token_index")}
    by_type[3] = ("audio_token_id", "audio_token_index")
    found: dict[str, list[int]] = {}
    for name, type_ids in config.modalities.items():
        ids = []
        for fields in (by_type.get(i, ()) for i in type_ids):
            ids += [value for value in (getattr(own, field, None) for field in fields) if isinstance(value, int)]
        if ids and name != TEXT:
            found[name] = sorted(set(ids))
    return found


def _linear_names(model: nn.Module) -> list[str]:
    leaves = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    return list(dict.fromkeys(leaves))


def _no_match(config: MokaConfig, model: nn.Module) -> str:
    known = _linear_names(model)
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules)
    close = [n for w in wanted for n in difflib.get_close_matches(w.rpartition(".")[2], known, n=2)]
    # A name that exists may still match nothing where another field narrows the choice.
    narrowing = {name: getattr(config, name) for name in ("layers_to_transform", "exclude_modules")}
    also = "".join(f" {name} is {value}." for name, value in narrowing.items() if value is not None)
    return (
        f"target_modules: {wanted} matches no layer of {type(model).__name__}. Linear layers there: "
        f"{', '.join(dict.fromkeys(close or known[:8])) or 'none'}.{also}"
    )
