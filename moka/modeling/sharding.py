"""Parameters of which each process has a part: DeepSpeed's ZeRO-3, and FSDP2.

Under ZeRO-3 a parameter is an empty tensor outside a forward. What reads parameters elsewhere has to gather them, on all
processes and in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments


def is_sharded_tensor(parameter: torch.Tensor) -> bool:
    """Return whether this process has a part of the parameter."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a parameter of the module is kept in parts."""
    return any(is_sharded_tensor(parameter) for parameter in module.parameters())


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the full parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """ZeRO-3's parameters are complete inside the block, to be read; every process has to enter it. Without ZeRO-3 nothing
    happens.
    """
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=None):
        yield


def full_state_dict(module: nn.Module, wanted: Callable[[str, torch.Tensor], bool]) -> dict[str, torch.Tensor]:
    """Full copies, on the CPU, of the wanted tensors of the module's state; every process has to call it.

    What DeepSpeed trains in bfloat16 comes as the float32 values that its optimizer has.
    """
    state = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if wanted(key, tensor):
            state[key] = full_tensor(tensor).detach().cpu().clone().contiguous()
    return state


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full of a tensor that may be kept in parts; every process has to call it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        precise = safe_get_full_fp32_param(tensor)
        if precise is not None:
            return precise
    if not is_sharded_tensor(tensor):
        return tensor
    with gathered([tensor]):
        return tensor.detach().clone()


@contextmanager
def loading_full_tensors(module: nn.Module) -> Iterator[None]:
    """Inside, full tensors that all processes have may be loaded into FSDP's parts: each process keeps its own."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        yield


@contextmanager
def without_wrappers(module: nn.Module) -> Iterator[None]:
    """Inside, blocks stand instead of torch's checkpointing wrappers around them, whose names peft does not know.

    FSDP's own activation checkpointing puts them there; peft would save and load nothing of an adapter inside them.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, CheckpointWrapper)
    ]
    for parent, name, child in found:
        parent._modules[name] = child._checkpoint_wrapped_module
    try:
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


@contextmanager
def without_sharding() -> Iterator[None]:
    """Models built or loaded inside are full on every process, also where the run partitions its backbone.

    transformers partitions whatever it builds once a ZeRO-3 configuration exists. Encoders are small, and some read
    their weights when they are built; DeepSpeed partitions them later.
    """
    from transformers.integrations import deepspeed as integration

    reference: Any = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            integration.set_hf_deepspeed_config(reference())


def zero_settings(plugin: Any) -> dict[str, Any]:
    return {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})


def zero_stage(arguments: TrainingArguments) -> int:
    """0 (also without DeepSpeed) to 3, from the run's DeepSpeed file or from `accelerate launch`."""
    return int(zero_settings(arguments.deepspeed_plugin).get("stage", 0))


def fsdp_requested() -> bool:
    """Return whether `accelerate launch` was asked to use FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")
