"""Checkpoints that can be trusted: one is complete if it has ``checkpoint.json``, which is written last.

RUN/checkpoints/stageN/checkpoint-STEP/   what transformers writes, and ``checkpoint.json`` with the size of every file

What a killed run left without it is removed when the run resumes. All nodes of a run need to see the same folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import moka
from moka.errors import MokaError, counted
from moka.io import write_json
from moka.type_checks import read_dataclass

from .distributed_backend import UNIVERSAL

METADATA = "checkpoint.json"
FORMAT_VERSION = 2
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems without fsync
# A network file system may show another node's file late.
_VISIBLE_WITHIN_S = 60.0


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of ``checkpoint.json``: facts of the run that wrote the checkpoint.

    Args:
        step: optimizer steps of its stage.
        world_size: processes.
        zero_stage: DeepSpeed's, 0 to 3; None without DeepSpeed.
        data: `dataloading.data_fingerprint` of the training data; None if unknown.
        files: name -> bytes.
    """

    step: int
    world_size: int = 1
    zero_stage: int | None = None
    data: dict[str, Any] | None = None
    files: dict[str, int] = field(default_factory=dict)
    moka_version: str = moka.__version__
    torch_version: str = torch.__version__
    transformers_version: str = transformers.__version__
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, checkpoint: str | Path) -> CheckpointMetadata:
        """Read the metadata of a checkpoint, without looking at its files.

        Raises:
            MokaError: there are none, they are damaged, or a newer moka wrote them.
        """
        path = Path(checkpoint) / METADATA
        if not path.is_file():
            raise MokaError(f"{checkpoint} has no {METADATA}: it is incomplete, or something else wrote it.")
        return read_dataclass(cls, path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file in a folder, by its name relative to it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def complete(checkpoint: Path, metadata: CheckpointMetadata, written: Iterable[dict[str, int]]) -> None:
    """Put all files of a checkpoint on the disk and write its metadata. For the main process, after all have written.

    Args:
        written: `file_sizes` as each process sees them.
    Raises:
        MokaError: a file that another process wrote cannot be seen here.
    """
    expected = {name: size for one in written for name, size in one.items()}
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while missing := sorted(expected.items() - file_sizes(checkpoint).items()):
        if time.monotonic() > deadline:
            raise MokaError(
                f"{checkpoint / missing[0][0]}, written by another process, cannot be seen from the main one. Put output.dir "
                "on a file system that all nodes share."
            )
        time.sleep(0.5)
    for name in expected:
        _sync(checkpoint / name)
    write_json(checkpoint / METADATA, {**asdict(metadata), "files": dict(sorted(expected.items()))})
    for path in (checkpoint / METADATA, *{(checkpoint / name).parent for name in expected}, checkpoint.parent):
        _sync(path)


def problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None for a complete one."""
    try:
        files = CheckpointMetadata.read(checkpoint).files
    except MokaError as error:
        return str(error)
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing."
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, and {size} were written."
    return None


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Return the newest complete checkpoint of a stage's folder and its step; (None, 0) if there is none.

    Newer ones are left out with a printed reason; those that a killed run had not finished are removed. For the main process.

    Raises:
        MokaError: there are checkpoints, and every one is damaged.
    """
    for path in folder.glob(f"{UNIVERSAL}*"):  # of a conversion that was killed
        shutil.rmtree(path, ignore_errors=True)
    damaged = []
    for step, path in reversed(checkpoints(folder)):
        if not (path / METADATA).is_file():
            print(f"note: {path} was incomplete when the run ended; it is removed.")
            shutil.rmtree(path, ignore_errors=True)
            continue
        wrong = problem(path)
        if wrong is None:
            return path, step
        print(f"note: {path} is damaged and left out: {wrong}")
        damaged.append(path)
    if damaged:
        raise MokaError(
            f"--resume: {folder} has {counted(len(damaged), 'checkpoint')}, and each is damaged ({problem(damaged[0])}) Copy "
            "a complete one back, or remove them to train this stage from its beginning."
        )
    return None, 0


def rotate(folder: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Keep ``limit`` complete checkpoints; never remove the newest one, nor the best one."""
    if not limit or limit < 0:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    complete = [path for _, path in checkpoints(folder) if (path / METADATA).is_file()]
    surplus = len(complete) - max(limit, len(kept))
    for path in [path for path in complete if path.name not in kept][: max(surplus, 0)]:
        # The metadata first: an interrupted removal must not leave something that looks complete.
        (path / METADATA).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def print_changes(checkpoint: Path, processes: int, data: dict[str, Any] | None, name: str) -> None:
    """Print what differs from the run that wrote the checkpoint, and so may change the loss curve.

    Args:
        data: the fingerprint of the training data now.
        name: of these data, for messages.
    """
    metadata = CheckpointMetadata.read(checkpoint)
    if metadata.world_size != processes:
        print(
            f"note: {checkpoint.name} was written by {counted(metadata.world_size, 'process', 'processes')}, and the run "
            f"resumes with {processes}: data order, optimizer and schedule are kept; dropout draws other numbers."
        )
    if metadata.data is not None and data is not None and metadata.data != data:
        then, now = metadata.data.get("samples"), data["samples"]
        print(
            f"note: {name} has {now} samples, and had {then} when {checkpoint.name} was written"
            f"{'; their ids differ' if then == now else ''}: the run resumes on other data."
        )
    for library, then, now in (
        ("torch", metadata.torch_version, torch.__version__),
        ("transformers", metadata.transformers_version, transformers.__version__),
        ("moka", metadata.moka_version, moka.__version__),
    ):
        if then != now:
            print(
                f"note: {checkpoint.name} was written with {library} {then}, and this is {now}: losses may differ a little."
            )


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of everything that has the name of a checkpoint, in the order of steps."""
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            found.append((int(step), path))
    return sorted(found)


def _sync(path: Path) -> Any:
    """Write a file or a folder's entries to the disk itself, so that a power cut cannot keep the name and lose the content."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
