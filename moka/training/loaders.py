"""How batches reach the device: decoded and put together by workers, pinned, copied while the device computes."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from moka.data.media_validation import usable_cores

from .preemption import outlive

# Enough to decode pictures and sound for one GPU; more cost memory, as each holds the batches it has made ready.
_MOST_WORKERS = 4


def loader_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What a section of the configuration leaves open of ``TrainingArguments`` about data loaders.

    On a GPU: workers, as many as cores are to spare, up to 4 a process; pinned memory, and copies from it that the host
    does not wait for. On a CPU, whose cores the training itself uses, no workers. Workers stay from epoch to epoch.

    Args:
        settings: the section's own, which stay as they are.
    """
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu")
    workers = settings.get("dataloader_num_workers")
    if workers is None:
        workers = max(1, min(_MOST_WORKERS, usable_cores() - 1)) if on_gpu else 0
    found: dict[str, Any] = {"dataloader_num_workers": workers}
    if workers:
        found["dataloader_persistent_workers"] = settings.get("dataloader_persistent_workers", True)
        # Read when a process forks: else tokenizers, where it has encoded before, warns of every worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = settings.get("accelerator_config") or {}
    if on_gpu and settings.get("dataloader_pin_memory", True) and isinstance(given, dict):
        found["accelerator_config"] = {"non_blocking": True, **given}
    return found


def prepared(loader: Any) -> Any:
    """A trainer's loader with workers that outlive a signal, and with random numbers of its own.

    Every pass through a loader draws the seed of its workers, with workers that stay only the first. Drawn from the
    generator that dropout draws from, a resumed run would compute something else than one that was never broken off.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper hands its work on
    if getattr(inner.worker_init_fn, "func", None) is not outlive:  # transformers may hand out the same loader again
        inner.worker_init_fn = partial(outlive, inner.worker_init_fn)
    if inner.generator is None:
        inner.generator = torch.Generator()
        inner.generator.manual_seed(0)
    return loader


def dismiss(loader: Any) -> None:
    """Let the workers of a loader go that would stay for another epoch."""
    inner = getattr(loader, "base_dataloader", loader)
    inner._iterator = None  # they end with what iterates over them
