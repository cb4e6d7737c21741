"""Where the time of a training step goes, by operator and by group."""

from __future__ import annotations

import random
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .batches import make_batch
from .levels import LOSS, check_step, chosen, set_checkpointing, training_step
from .reference import ReferenceLinear
from .sizes import open_backbone
from .variants import ALL, make_variants

GROUPS = ("backbone matmuls", "attention", "adapter", "loss and logits", "optimizer", "other")
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::linear", "aten::matmul")
ADAPTED = "adapted layer"  # the range of one in a profile
PROFILED = tuple(name for name in ALL if name != "bare again")
BACKWARD = 1  # the scope of autograd's nodes
PROJECTIONS = 3  # that share an input and may be computed together: q, k, v


@dataclass
class Profile:
    """Self time of a training step in milliseconds, mean over the rounds."""

    operators: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    groups: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0.0))


class Grouping:
    """Says the group of an operator: by its name, by the shapes of its inputs, by the layer that ran it.

    A matrix product with a side of r, M r, or that for several projections is the adapter's, unless the backbone has a
    side as narrow; one with the vocabulary's side makes logits. What else runs in an adapted layer, or in the backward
    pass of that, is the adapter's too: dropout, masks, sums, attention in rank space.
    """

    def __init__(self, config: Any, rank: int, modalities: int) -> None:
        widths = {config.hidden_size, config.intermediate_size, config.vocab_size}
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        widths |= {head, head * heads, head * (getattr(config, "num_key_value_heads", None) or heads)}
        self.narrow = {rank * n for n in range(1, PROJECTIONS * modalities + 1)} - widths
        self.vocabulary = config.vocab_size

    def group(self, name: str, shapes: Iterable, within: str) -> str:
        """``within``: the names of the ranges around the operator, and around the one whose gradient it computes."""
        sides = {side for shape in shapes for side in (shape if isinstance(shape, (list, tuple)) else ())}
        if "_scaled_dot_product" in name or "flash_attention" in name:
            return "adapter" if ADAPTED in within else "attention"
        if "Optimizer" in name or "Optimizer" in within:
            return "optimizer"
        if self.vocabulary in sides or LOSS in within:
            return "loss and logits"
        if name in MATMULS and not self.narrow & sides:
            return "backbone matmuls"
        return "adapter" if ADAPTED in within or name in MATMULS else "other"


def mark_layers(model: nn.Module) -> None:
    """Have every adapted layer's forward in a range of the profile, without hooks: MokA computes a layer with hooks apart."""
    for layer in model.modules():
        if isinstance(layer, (BaseTunerLayer, ReferenceLinear)):
            layer.forward = _marked(layer.forward)


def _marked(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.profiler.record_function(ADAPTED):
            return forward(*args, **kwargs)

    return marked


def profiles(arguments: Namespace) -> dict[str, Profile]:
    """One profile a variant, of ``arguments.rounds`` steps in interleaved order."""
    backbone = open_backbone(arguments.backbone, arguments.dtype, arguments.device, arguments.seed)
    grouping = Grouping(backbone.config, arguments.rank, arguments.modalities)
    models, shared = make_variants(backbone, arguments, chosen(arguments, PROFILED))
    batch = make_batch(arguments, backbone.config.vocab_size)
    shared["masks"] = batch.masks
    check_step(models, batch, arguments)
    set_checkpointing(models, arguments.checkpointing == "yes")
    steps = {name: training_step(name, model, batch, arguments) for name, model in models.items()}
    for name, model in models.items():
        mark_layers(model)
        for _ in range(arguments.warm_up):
            steps[name]()
    found = {name: Profile() for name in steps}
    draw = random.Random(arguments.seed)
    with tqdm(total=arguments.rounds * len(steps), desc="rounds", disable=None) as bar:
        for _ in range(arguments.rounds):
            for name in draw.sample(list(steps), len(steps)):
                _add(found[name], steps[name], grouping, arguments)
                bar.update()
    return found


def _add(into: Profile, step: Callable[[], None], grouping: Grouping, arguments: Namespace) -> None:
    on_gpu = torch.device(arguments.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == DeviceType.CPU]
    # A backward node bears the number of the operator that made it: the last one, of those that bear it.
    made_by = {e.sequence_nr: e for e in sorted(events, key=_start) if e.sequence_nr >= 0 and not _is_backward(e)}
    for event in events:
        # On a GPU: of the kernels that the operator started.
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        group = grouping.group(event.name, event.input_shapes or (), _around(event, made_by))
        into.operators[event.name] += spent / 1000 / arguments.rounds
        into.calls[event.name] += 1 / arguments.rounds
        into.groups[group] += spent / 1000 / arguments.rounds


def _start(event: Any) -> float:
    return event.time_range.start


def _is_backward(event: Any) -> bool:
    return event.scope == BACKWARD or event.name.startswith("autograd::engine")


def _around(event: Any, made_by: dict[int, Any]) -> str:
    """Names of the ranges around an operator, and around what its range is the backward pass of."""
    names = []
    while event is not None:
        names.append(event.name)
        maker = made_by.get(event.sequence_nr) if _is_backward(event) else None
        while maker is not None:
            names.append(maker.name)
            maker = maker.cpu_parent
        event = event.cpu_parent
    return " ".join(names)


def as_json(found: dict[str, Profile]) -> dict[str, Any]:
    return {
        name: {
            "groups_ms": own.groups,
            "operators": [
                {"name": operator, "ms": spent, "calls": own.calls[operator]} for operator, spent in top(own, 50)
            ],
        }
        for name, own in found.items()
    }


def top(own: Profile, count: int) -> list[tuple[str, float]]:
    return sorted(own.operators.items(), key=lambda item: -item[1])[:count]
