"""One run, several processes: what fails on one of them ends all of them, with one message.

A process that raises while the others wait at a barrier would leave them waiting; so everything before training is done
through ``agree``.

What one process does alone (a download, a check of every file) may take longer than training's own limit on waiting for
each other (``ddp_timeout``, 30 minutes by default, after which NCCL ends the run). So the processes tell each other what
they have to on connections of their own, which wait for days; one that has died is noticed at once all the same, by its
closed connection.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moka.errors import MokaError

T = TypeVar("T")
_COURTESY_S = 5.0
_PATIENCE = timedelta(days=7)
# How gloo, NCCL and the store say that another process is gone.
_GONE = (
    *("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "remote process exited"),
    *("NCCL communicator was aborted", "Connection refused", "Timed out waiting"),
)
_group: tuple[Any, Any] | None = None  # the processes it connects, and the group


def connected() -> bool:
    """Whether this process is one of several that can talk to each other."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process writes the run folder: the one of rank 0, or the only one."""
    return dist.get_rank() == 0 if connected() else True


def share_of_work() -> tuple[int, int]:
    """(k, n): of n processes this is the k-th, from 0."""
    return (dist.get_rank(), dist.get_world_size()) if connected() else (0, 1)


def speaks() -> bool:
    """Whether this process should print its error. Before the processes are connected all fail alike: one line is enough."""
    return connected() or os.environ.get("RANK", "0") == "0"


def disconnect(well: bool) -> None:
    """Take leave of the other processes. Without it gloo's threads may abort an interpreter that ends.

    After an error the others may be inside a collective; NCCL would wait for them, so it is left to the launcher.
    """
    global _group
    if not connected():
        return
    group, _group = _group, None
    if group is not None:
        dist.destroy_process_group(group[1])
        del group
    if well or dist.get_backend() == "gloo":
        dist.destroy_process_group()
        # A trainer that is no longer in use may hold the connections still, in a cycle; they end with it.
        gc.collect()


def lost_peer(error: BaseException) -> bool:
    """Whether this is how a process learns that another one is gone."""
    return connected() and any(text in str(error) for text in _GONE)


def everyones(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks."""
    if not connected():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient())
    return values


def any_of(flag: bool) -> bool:
    """Whether any process says so. Cheap enough for every step."""
    if not connected():
        return flag
    own = torch.tensor(int(flag))
    dist.all_reduce(own, op=dist.ReduceOp.MAX, group=_patient())
    return bool(own)


def of_main(action: Callable[[], T]) -> T:
    """What ``action`` returns on the main process, on every process.

    For what is read from files and decides what all do next: another node may see a file later.
    """
    return everyones(agree(action if is_main() else _nothing))[0]


def say(text: str) -> None:
    """Print a line, once."""
    if is_main():
        print(text)


def _patient() -> Any:
    """The group of all processes that waits for days. The first call, which all make together, connects them."""
    global _group
    if _group is None or _group[0] is not dist.group.WORLD:
        _group = dist.group.WORLD, dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _group[1]


def agree(action: Callable[[], T], main_first: bool = False) -> T:
    """Run ``action`` on every process; where it fails on any, every process ends.

    Args:
        main_first: the main process alone first (it downloads and prepares what the others then find).
    Raises:
        The action's error, on the first process that met it; the others leave quietly with the same exit code.
    """
    if not connected():
        return action()
    if not main_first:
        return _step(action)
    early = _step(action if is_main() else _nothing)
    late = _step(_nothing if is_main() else action)
    return early if is_main() else late


def on_main(action: Callable[[], Any]) -> None:
    """Run ``action`` on the main process; the others wait for it, and end with it where it fails."""
    agree(action if is_main() else _nothing)


def _nothing() -> Any:
    return None


def _step(action: Callable[[], T]) -> T:
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    codes = everyones(0 if error is None else 2 if isinstance(error, (MokaError, OSError)) else 1)
    first = next((rank for rank, code in enumerate(codes) if code), None)
    if first is None:
        return result
    if error is not None and dist.get_rank() == first:
        raise error
    # A launcher ends all processes when the first has ended; let that be the one that says why.
    time.sleep(_COURTESY_S)
    raise SystemExit(codes[first])
