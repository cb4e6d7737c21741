"""A section of the configuration as `MokaTrainingArguments`: completed for this machine and its processes, and tried."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy
from transformers.utils import is_liger_kernel_available

from moka.config import MokaTrainingArguments
from moka.data.media_validation import usable_cores
from moka.distributed import run_on_all
from moka.errors import MokaError

from .callbacks import check_reports
from .distributed_backend import use_deepspeed
from .launch import check_deepspeed

_MANY_STEPS = 1_000_000  # to try a schedule before the number of steps is known
# Enough to decode pictures and sound for one GPU; more cost memory, as each keeps the batches that it has prepared.
_MOST_WORKERS = 4


def training_arguments(
    section: dict[str, Any], output_dir: str | Path, name: str = "training"
) -> MokaTrainingArguments:
    """Return the arguments of one stage from its section.

    Args:
        name: of the section, for messages.
    Raises:
        MokaError: what transformers refuses, or this machine cannot do; a global batch that cannot be divided.
    """
    check_deepspeed(section, name)
    check_reports(section.get("report_to"), f"{name}.report_to")
    settings = {"use_cpu": not torch.accelerator.is_available(), **section}
    settings |= loader_settings(settings)
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in settings and new in TrainingArguments.__dataclass_fields__:  # transformers 5.23 renamed them
            settings[new] = settings.pop(old)
    for key in ("bf16", "fp16", "tf32"):
        if settings.get(key) and settings["use_cpu"]:
            raise MokaError(f"{name}.{key}: true needs a GPU, and this run is on the CPU. Take it out.")
    with _refused_settings(name):
        arguments = MokaTrainingArguments(output_dir=str(output_dir), **settings)
    _try_settings(arguments, name)
    run_on_all(lambda: _check_processes(arguments))
    run_on_all(lambda: _set_accumulation(arguments, section, name))
    run_on_all(lambda: use_deepspeed(arguments, name))
    return arguments


def loader_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a section of the configuration leaves open of ``TrainingArguments`` about data loaders.

    On a GPU: workers, as many as cores are to spare, up to 4 a process; pinned memory, and copies from it that the host
    does not wait for. On a CPU, whose cores the training itself uses, no workers. Workers stay from epoch to epoch.

    Args:
        settings: the section's own, which stay as they are.
    """
    on_gpu = torch.accelerator.is_available() and not settings.get("use_cpu")
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


@contextmanager
def _refused_settings(name: str, fields: str = "") -> Iterator[None]:
    """Turn any error of transformers or torch about settings into one that names the section and the fields."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        of = f" of {fields}" if fields else ""
        raise MokaError(f"{name}: transformers refuses these settings{of}: {reason}") from error


def _try_settings(arguments: MokaTrainingArguments, name: str) -> None:
    """Build, for one small parameter, what transformers builds from the settings only when a stage starts."""
    with _refused_settings(
        name, "optim, optim_args, learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon"
    ):
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(2, 2, device=arguments.device))], **settings)
    with _refused_settings(name, "lr_scheduler_type, lr_scheduler_kwargs, warmup_steps"):
        warmup, given = arguments.get_warmup_steps(_MANY_STEPS), cast("dict | None", arguments.lr_scheduler_kwargs)
        get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, _MANY_STEPS, given)
    with _refused_settings(name, "seed, data_seed"):
        torch.Generator().manual_seed(data_seed(arguments))
    with _refused_settings(name, "log_level"):
        arguments.get_process_log_level()
    with _refused_settings(name, "torch_compile_backend"):
        DynamoBackend((arguments.torch_compile_backend or "no").upper())
    if arguments.neftune_noise_alpha is not None and not arguments.neftune_noise_alpha >= 0:
        raise MokaError(f"{name}.neftune_noise_alpha: {arguments.neftune_noise_alpha} is negative; 5 is usual.")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise MokaError(f"{name}.use_liger_kernel: liger-kernel is not installed. Install it, or set it to false.")
    if arguments.save_strategy == SaveStrategy.BEST and arguments.metric_for_best_model is None:
        raise MokaError(f"{name}.save_strategy: best needs {name}.metric_for_best_model, for example eval_loss.")


def data_seed(arguments: TrainingArguments) -> int:
    """Return the seed of the order of samples."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def _check_processes(arguments: MokaTrainingArguments) -> None:
    started = int(os.environ.get("WORLD_SIZE") or "1")
    if started != arguments.world_size:
        raise MokaError(
            f"The launcher started {started} processes, and each would train only (device {arguments.device.type}, world "
            f"size {arguments.world_size}). Take use_cpu out of the settings, or launch one process."
        )
    if arguments.n_gpu > 1:
        # DataParallel would cut media and text of a batch at different places.
        print(f"note: {arguments.n_gpu} GPUs are visible and one is used; --launcher ddp or zero2 uses all.")
        arguments._n_gpu = 1


def _set_accumulation(arguments: MokaTrainingArguments, section: dict[str, Any], name: str) -> None:
    parts = divided(section, arguments.world_size, name)
    if parts is None:
        return
    size, steps = parts
    given = section.get("gradient_accumulation_steps")
    if given is not None and given != steps:
        raise MokaError(
            f"{name}: global_batch_size {arguments.global_batch_size} takes {steps} accumulation steps, and "
            f"gradient_accumulation_steps is {given}. Take one of the two out."
        )
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, steps


def divided(section: dict[str, Any], processes: int, name: str) -> tuple[int, int] | None:
    """Return `divide` for a section of a configuration; None if it gives no ``global_batch_size``."""
    total = section.get("global_batch_size")
    largest = section.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    return None if total is None else divide(total, largest, processes, name)


def divide(total: int, largest: int, processes: int, name: str = "training") -> tuple[int, int]:
    """Return (samples on a device at once, accumulation steps) whose product with ``processes`` is ``total``.

    Args:
        largest: what a device takes at once, ``per_device_train_batch_size``; fewer if ``total`` needs no more.
        name: of the section, for messages.
    Raises:
        MokaError: they do not divide ``total``; with what would.
    """
    if (parts := _parts(total, largest, processes)) is not None:
        return parts
    counts = [n for n in range(1, total + 1) if _parts(total, largest, n)]
    totals = [n for n in range(1, total + processes * largest + 1) if _parts(n, largest, processes)]
    raise MokaError(
        f"{name}.global_batch_size: {total} cannot be divided over {processes} processes with "
        f"{name}.per_device_train_batch_size: {largest}. Launch {_nearest(counts, processes, 4)} processes, or set "
        f"global_batch_size to {_nearest(totals, total, 2)}."
    )


def _parts(total: int, largest: int, processes: int) -> tuple[int, int] | None:
    share, rest = divmod(total, processes)
    if rest or (share > largest and share % largest):
        return None
    return min(share, largest), max(1, share // largest)


def _nearest(numbers: Iterable[int], wanted: int, count: int) -> str:
    """Return the few that are nearest to ``wanted``, as "2, 4 or 8"."""
    chosen = [str(n) for n in sorted(sorted(numbers, key=lambda n: (abs(n - wanted), n))[:count])]
    return " or ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))
