"""Taking back an adapter that failed while it was injected or loaded, so that the model is as it was."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import MokaLayer
from .wrapping import attach_router, detach_router


def take_back(tuner: BaseTuner, adapter_name: str, trainable: list[nn.Parameter]) -> None:
    """Undo the injection of ``adapter_name``; ``trainable`` is what was trainable before it."""
    model = tuner.model
    awaiting = tuner.__dict__.get("_awaiting", {})
    awaiting.pop(adapter_name, None)
    if not awaiting:
        tuner.__dict__.pop("_awaiting", None)
    tuner.peft_config.pop(adapter_name, None)
    attach_router(model).remove(adapter_name)
    left = [name for name in tuner.active_adapters if name != adapter_name][:1]
    for name, module in list(model.named_modules()):
        inside = None
        if isinstance(module, MokaLayer):
            if adapter_name in module.moka_A:
                module.delete_adapter(adapter_name)
            inside = None if len(module.moka_A) else module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, new_active_adapters=left)
            inside = None if len(getattr(module, "modules_to_save", "kept")) else module.original_module
        if inside is not None:  # no adapter is left in it
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, inside)
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    tuner.targeted_module_names = [name for name in getattr(tuner, "targeted_module_names", []) if name in layers]
    if any(isinstance(module, MokaLayer) for module in model.modules()):
        return
    detach_router(model)
    model.__dict__.pop("peft_config", None)
    kept = {id(parameter) for parameter in trainable}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in kept


def trained(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter was trained since its injection: B starts at zero, unless its configuration says otherwise."""
    for layer in model.modules():
        if isinstance(layer, MokaLayer) and adapter_name in layer.moka_B:
            B = layer.moka_B[adapter_name]
            if layer.moka_config[adapter_name].init_weights and not B.is_meta and bool(B.any()):
                return True
    return False
