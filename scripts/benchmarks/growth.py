"""Many points of the training step: growth curves over one quantity each, and the ladder of sizes."""

from __future__ import annotations

import gc
from argparse import Namespace

import torch

from .batches import MODALITIES, make_batch
from .levels import check_step, chosen, step_point
from .measure import Point
from .sizes import open_backbone
from .variants import ALL, make_variants

CURVES: dict[str, tuple] = {
    "seq": (128, 256, 512, 1024, 2048, 4096, 8192),
    "media": (0.0, 0.3, 0.6, 0.9),
    "modalities": tuple(range(1, len(MODALITIES) + 1)),
    "batch": (1, 2, 4, 8, 16, 32),
}
# backbone, dtype, checkpointing, batch, tokens of a row; those after the embedded one are for a GPU
LADDER = (
    ("random:tiny", "float32", False, 16, 64),
    ("random:15m", "float32", False, 16, 64),
    ("random:60m", "float32", False, 16, 64),
    ("embedded:smollm2-135m", "float32", False, 16, 64),
    ("random:1b", "bfloat16", True, 4, 2048),
    ("random:1b", "nf4", True, 4, 2048),
    ("random:7b", "bfloat16", True, 4, 2048),
    ("random:7b", "nf4", True, 4, 2048),
)
ON_GPU = ("random:1b", "random:7b")
NO_GPU = "not run: no GPU"


def growth(arguments: Namespace) -> list[Point]:
    """A training step with one quantity changed at a time; rows grow one at a time, in a batch of one."""
    points = []
    for curve in arguments.curves:
        for value in CURVES[curve]:
            if curve == "seq" and not arguments.shortest <= value <= arguments.longest:
                continue
            changed = {"seq": value, "batch": 1} if curve == "seq" else {curve: value}
            points.append(_one(Namespace(**{**vars(arguments), **changed}), {"curve": curve, "value": value}))
    return points


def ladder(arguments: Namespace) -> list[Point]:
    """A training step of each size; those of a billion parameters and more on a GPU only."""
    points = []
    for backbone, dtype, checkpointing, batch, seq in LADDER:
        if arguments.sizes and backbone not in arguments.sizes:
            continue
        settings = {"backbone": backbone, "dtype": dtype, "checkpointing": checkpointing, "batch": batch, "seq": seq}
        if arguments.only_dtype and dtype != arguments.only_dtype:
            continue
        if backbone in ON_GPU and not torch.cuda.is_available():
            points.append(Point(settings, missing=NO_GPU))
            continue
        device = "cuda" if backbone in ON_GPU else arguments.device
        own = {"backbone": backbone, "dtype": dtype, "batch": batch, "seq": seq, "device": device}
        points.append(_one(Namespace(**{**vars(arguments), **own}), settings, checkpointing))
    return points


def _one(arguments: Namespace, settings: dict, checkpointing: bool = False) -> Point:
    backbone = open_backbone(arguments.backbone, arguments.dtype, arguments.device, arguments.seed)
    models, shared = make_variants(backbone, arguments, chosen(arguments, ALL))
    batch = make_batch(arguments, backbone.config.vocab_size)
    shared["masks"] = batch.masks
    try:
        check_step(models, batch, arguments)
        return step_point(models, batch, arguments, settings, checkpointing)
    finally:
        del backbone, models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
