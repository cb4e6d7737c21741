"""Coordinate the processes of one run: gather objects, do work on the main process, and raise errors together.

A process that raises while the others wait in a collective would leave them waiting. So all work before training runs
inside ``collective_errors`` or through ``run_on_all``: an error on one process ends every process, with one message.

Work that only one process does (a download, a check of every file) may take longer than training's own timeout for
collectives (``ddp_timeout``, 30 minutes by default). So these functions use a gloo group of their own with a timeout of
days; a process that died is still noticed at once, by its closed connection.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moka.errors import MokaError

T = TypeVar("T")
_EXIT_DELAY_S = 5.0
_TIMEOUT = timedelta(days=7)
# The texts by which gloo, NCCL and the store report that another process has ended.
_PEER_LOSS = (
    *("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "remote process exited"),
    *("NCCL communicator was aborted", "Connection refused", "Timed out waiting"),
)
_group: tuple[Any, Any] | None = None  # the world that the group was made in, and the group


def is_distributed() -> bool:
    """Return whether this process belongs to an initialized process group."""
    return dist.is_available() and dist.is_initialized()


def connect(use_cpu: bool = False) -> torch.device:
    """Join the other processes if a launcher started several; return this process's device."""
    from accelerate import PartialState

    return PartialState(cpu=use_cpu or not torch.accelerator.is_available()).device


def default_device() -> torch.device:
    """Return the accelerator of this process (CUDA, MPS, XPU, NPU, ...), or the CPU if there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def is_main() -> bool:
    """Return whether this process writes the run folder: rank 0, or the only process."""
    return dist.get_rank() == 0 if is_distributed() else True


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes: ``(0, 1)`` if there is only one."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def should_print_errors() -> bool:
    """Return whether this process prints its error. Before the group exists all processes fail the same way: rank 0 prints."""
    return is_distributed() or os.environ.get("RANK", "0") in ("", "0")


def disconnect(success: bool) -> None:
    """Destroy the process groups; without it gloo's threads may abort an interpreter that ends.

    After an error other processes may still be inside a collective, for which NCCL would wait, so the group is left to
    the launcher.
    """
    global _group
    if not is_distributed():
        return
    group, _group = _group, None
    if group is not None:
        dist.destroy_process_group(group[1])
        del group
    if success or dist.get_backend() == "gloo":
        dist.destroy_process_group()
        # A trainer that is no longer used may still keep connections, in a reference cycle.
        gc.collect()


def is_peer_loss(error: BaseException) -> bool:
    """Return whether the error reports that another process has ended."""
    return is_distributed() and any(text in str(error) for text in _PEER_LOSS)


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_long_timeout_group())
    return values


def all_reduce_any(flag: bool) -> bool:
    """Return whether the flag is true on any process. Cheap enough for every step."""
    if not is_distributed():
        return flag
    own = torch.tensor(int(flag))
    dist.all_reduce(own, op=dist.ReduceOp.MAX, group=_long_timeout_group())
    return bool(own)


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sums over all processes of as many numbers on each. Cheap enough for every step."""
    if not is_distributed():
        return [float(value) for value in values]
    own = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(own, group=_long_timeout_group())
    return own.tolist()


def broadcast_from_main(action: Callable[[], T]) -> T:
    """Run ``action`` on the main process and return its result on every process.

    For decisions read from files, which another node may see later.
    """
    result = None
    with collective_errors():
        if is_main():
            result = action()
    return all_gather_object(result)[0]


def run_on_main(action: Callable[[], Any]) -> None:
    """Run ``action`` on the main process; the others wait for it, and end if it fails."""
    with collective_errors():
        if is_main():
            action()


def run_on_all(action: Callable[[], T], main_first: bool = False) -> T:
    """Run ``action`` on every process inside ``collective_errors``.

    Args:
        main_first: the main process runs it before the others: it downloads what they then find in the cache.
    """
    if not main_first or not is_distributed():
        with collective_errors():
            return action()
    result: Any = None
    for turn in (is_main(), not is_main()):
        with collective_errors():
            if turn:
                result = action()
    return result


def print_main(text: str) -> None:
    """Print a line on the main process only."""
    if is_main():
        print(text)


@contextmanager
def collective_errors() -> Iterator[None]:
    """End every process if the block fails on one of them. All processes must enter it.

    Raises:
        The block's error on the first process on which it failed; the others exit quietly with the same code.
    """
    if not is_distributed():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    codes = all_gather_object(0 if error is None else 2 if isinstance(error, (MokaError, OSError)) else 1)
    first = next((rank for rank, code in enumerate(codes) if code), None)
    if first is None:
        return
    if error is not None and dist.get_rank() == first:
        raise error
    # A launcher ends all processes as soon as the first has ended: let that be the one that prints the reason.
    time.sleep(_EXIT_DELAY_S)
    raise SystemExit(codes[first])


def _long_timeout_group() -> Any:
    """Return the group of all processes with a timeout of days. The first call, made by all processes, creates it."""
    global _group
    if _group is None or _group[0] is not dist.group.WORLD:
        _group = dist.group.WORLD, dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return _group[1]
