"""The variants that are compared, each a model of its own on the same backbone."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moka import MokaConfig, MokaError
from moka.adapter import MokaLinear
from moka.adapter.config import DEFAULT_TARGETS

from .batches import Batch, modalities
from .reference import Masks, ReferenceLinear, put_reference, stacked_gradients

ALL = ("bare", "bare again", "lora", "moka", "reference")
OBSERVED = "moka observed"  # of a training step, if asked for: B's gradient is split by modality in every step
INFERENCE = ("prefill", "decode")  # levels
SHARED_ABOVE = 2 << 30  # bytes of a backbone of which the variants do not hold a copy each
TOLERANCE = 1e-4  # of the largest magnitude, between MokA and the reference


def make_variants(
    backbone: nn.Module, arguments: Namespace, names: Iterable[str] = ALL, targets: Iterable[str] = DEFAULT_TARGETS
) -> tuple[dict[str, nn.Module], dict[str, Masks]]:
    """Models by variant, and the place where the reference looks for its masks.

    "bare again" is a second copy of the bare backbone: what its ratio is off 1 is the measurement's own error. Adapters
    are as after training: B is not zero. Copies of large backbones share their frozen weights.

    Args:
        backbone: frozen.
        arguments: ``rank``, ``dropout``, ``modalities``, ``dtype``.
        names: of ``ALL``, "moka merged" and ``OBSERVED``.
        targets: the linear maps to adapt.
    """
    shared: dict[str, Masks] = {}
    made: dict[str, nn.Module] = {}
    names, targets = list(names), list(targets)
    adapter = {"r": arguments.rank, "target_modules": targets}
    task = "CAUSAL_LM" if hasattr(backbone, "lm_head") else None
    own = MokaConfig(
        alpha=4 * arguments.rank,
        dropout=arguments.dropout,
        modalities=modalities(arguments.modalities),
        task_type=task,
        **adapter,
    )
    plain = LoraConfig(lora_alpha=4 * arguments.rank, lora_dropout=arguments.dropout, task_type=task, **adapter)
    # Without autocast (inference) the adapters are in the backbone's own dtype, as loaded models are.
    settings = {"autocast_adapter_dtype": arguments.level not in INFERENCE}
    for name in names:
        if name == "reference":
            continue
        copied = duplicate(backbone)
        if name.startswith("bare"):
            made[name] = copied
        else:
            config = copy.deepcopy(plain if name.startswith("lora") else own)
            made[name] = as_trained_(get_peft_model(copied, config, **settings))
        if name == "moka merged":
            unshare(made[name])
            made[name].merge_adapter()
    if "reference" in names:
        source = made.get("moka") or as_trained_(get_peft_model(duplicate(backbone), copy.deepcopy(own), **settings))
        made["reference"] = put_reference(duplicate(backbone), source, shared)
    return {name: made[name] for name in names}, shared


def duplicate(model: nn.Module) -> nn.Module:
    """A copy with weights of its own; of a large model, with the same frozen weights."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return copy.deepcopy(model, {id(p): p for p in model.parameters()} if size > SHARED_ABOVE else {})


def unshare(model: nn.Module) -> None:
    """Give the adapted layers weights of their own, before they are merged into."""
    for layer in model.modules():
        if isinstance(layer, MokaLinear):
            base = layer.get_base_layer()
            base.weight = copy.deepcopy(base.weight)


def as_trained_(model: nn.Module) -> nn.Module:
    """B as after training, and not zero."""
    source = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moka_B" in name or "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=source) * 0.02
            parameter.data.copy_(drawn)
    return model


def precision(arguments: Namespace) -> AbstractContextManager:
    """Mixed precision of training, as transformers' Trainer sets it for ``bf16``."""
    if arguments.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(arguments.device).type, dtype=torch.bfloat16)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training would change."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


Forward = Callable[[str, nn.Module, torch.Tensor], torch.Tensor]  # variant, model, its input -> outputs


def check_same(moka: nn.Module, reference: nn.Module, given: torch.Tensor, forward: Forward) -> float:
    """Assert that MokA and the reference compute the same: outputs, gradients of the input, of A and of B.

    Args:
        given: input of ``forward`` in float32; dropout is off.
    Returns:
        The largest difference, relative to the largest magnitude of its tensor.
    Raises:
        MokaError: they differ by more than ``TOLERANCE``.
    """
    found = []
    for name, model in (("moka", moka), ("reference", reference)):
        was = model.training
        x = given.detach().clone().requires_grad_(True)
        output = forward(name, model.eval(), x)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
        (output * weights).sum().backward()
        found.append({"outputs": output.detach(), "gradients of the input": x.grad, **_adapter_gradients(model)})
        model.zero_grad(set_to_none=True)
        model.train(was)
    worst = max(((found[0][name] - other).abs().max().item() / _size(other), name) for name, other in found[1].items())
    if not worst[0] <= TOLERANCE:
        raise MokaError(
            f"The plain reference and MokA do not compute the same: {worst[1]} differ by {worst[0]:.2g} of the largest "
            f"magnitude, {TOLERANCE:g} is allowed. Times of different methods are silent; nothing was measured."
        )
    return worst[0]


def _size(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() or math.inf


def _adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    layers = [module for module in model.modules() if isinstance(module, (MokaLinear, ReferenceLinear))]
    for number, layer in enumerate(layers):
        if isinstance(layer, ReferenceLinear):
            pair = stacked_gradients(layer)
        else:
            pair = layer.moka_A["default"].weight.grad, layer.moka_B["default"].weight.grad
        found |= {f"gradients of {kind} in layer {number}": g for kind, g in zip("AB", pair, strict=True)}
    return found


def forward_arguments(name: str, batch: Batch) -> dict[str, torch.Tensor]:
    """Return what the variant's forward takes next to the embeddings."""
    given = {} if batch.mask is None else {"attention_mask": batch.mask}
    return given | (batch.routing if name.startswith("moka") else {})
