"""``MokaModel``: the tuner that puts MokA layers into a model, and the peft verbs that differ from LoRA's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka.errors import MokaError

from .checks import TASK_HEADS, check_adapter_tensors
from .config import TEXT, MokaConfig
from .layer import MokaLayer, MokaLinear
from .rollback import take_back, trained
from .targets import fill_targets, no_match, placeholder_ids
from .wrapping import attach_router, detach_router


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
            fill_targets(config, model)
        if config.modality_token_ids is None:
            config.modality_token_ids = placeholder_ids(model, config)
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        wanted = set(config.modules_to_save or ()) - set(TASK_HEADS)
        unknown = sorted(m for m in wanted if not any(name.endswith(m) for name in names))
        if unknown:
            raise MokaError(f"modules_to_save: {type(model).__name__} has no module called {unknown}.")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        router = attach_router(model)
        router.add(adapter_name, config)
        if getattr(config, "awaits_weights", False):
            self.__dict__.setdefault("_awaiting", {})[adapter_name] = trainable
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            take_back(self, adapter_name, trainable)
            if "not found in the base model" in str(error) or "No modules were targeted" in str(error):
                raise MokaError(no_match(config, model)) from error
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

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Iterator[None]:
        # peft would drop the argument without a word and run every row through the active adapter.
        if adapter_names is not None:
            raise MokaError("adapter_names: a batch of several adapters is for LoRA; run each adapter's rows alone.")
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        attach_router(self.model).remove(adapter_name)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """Fold the text path into the weights; media tokens keep their residual, so no output changes.

        Args:
            adapter_names: default: the active ones.
            safe_merge: refuse, before any weight changes, an adapter that is not finite.
            requantize: fold into quantised weights too, which rounds them again; a warning says how large the error is.
        Raises:
            MokaError: quantised weights without ``requantize``.
        """
        with self._folding(adapter_names, safe_merge, requantize):
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names=None, requantize: bool = False
    ) -> nn.Module:
        """The bare backbone with the text path folded in. What media tokens had beyond that is lost, and said."""
        with self._folding(adapter_names, safe_merge, requantize):
            for name in adapter_names or self.active_adapters:
                lost = [m for m in self.peft_config[name].adapted if m != TEXT]
                if lost:
                    warnings.warn(
                        f"merge_and_unload keeps the text path of adapter {name!r} alone. Lost: the {', '.join(lost)} "
                        "projections and their interaction with the question. Use merge_adapter() to keep exact outputs.",
                        stacklevel=2,
                    )
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _folding(self, adapter_names: list[str] | None, safe_merge: bool, requantize: bool) -> Iterator[None]:
        """Refuse before any weight changes, and say what rounding did after."""
        layers = [module for module in self.model.modules() if isinstance(module, MokaLayer)]
        for layer in layers:
            for name in adapter_names or layer.active_adapters:
                if name in layer.moka_A and name not in layer.merged_adapters:
                    layer.check_merge(name, safe_merge, requantize)
        router = attach_router(self.model)
        router.requantize, router.fold_errors, router.tied = requantize, [], _shared_weights(self.model)
        try:
            yield
        finally:
            errors, router.requantize, router.fold_errors = router.fold_errors, False, []
            router.tied = set()
        if errors:
            weights, updates = zip(*errors, strict=True)
            kind = next(q.backend_name for q in (layer.quantization_backend for layer in layers) if q is not None)
            warnings.warn(
                f"Folded into {len(errors)} {kind} weights, which rounded them again. Error, relative to the weight: "
                f"mean {100 * sum(weights) / len(weights):.2g} %, largest {100 * max(weights):.2g} %; relative to the "
                f"update that was folded: mean {100 * sum(updates) / len(updates):.3g} %. Dequantise the backbone "
                "before merging to avoid it.",
                stacklevel=3,
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper) and not hasattr(new_module, "weight"):
            # peft would look for a weight in what modules_to_save unwraps, which a whole encoder does not have.
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

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
        tuner = getattr(model, "base_model", None)
        awaiting = tuner.__dict__.get("_awaiting", {}) if isinstance(tuner, cls) else {}
        try:
            check_adapter_tensors(model, adapter_name, remapped)
        except MokaError:
            if adapter_name in awaiting and not trained(tuner, adapter_name):
                take_back(tuner, adapter_name, awaiting[adapter_name])
            raise
        awaiting.pop(adapter_name, None)
        return remapped


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of the weights that more than one module holds, such as tied embeddings."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared
