"""Checkpoints that are whole: written under another name, sealed, then renamed; what is not whole is never resumed from.

RUN/checkpoints/stageN/checkpoint-STEP/   whole, with ``checkpoint.json``: the size and SHA-256 of every file
RUN/checkpoints/stageN/unfinished/        being written, by all processes of the run; one that was killed leaves it
RUN/checkpoints/stageN/damaged-...        found damaged by --resume, and left for you to look at

All nodes of a run need to see the same folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import moka
from moka.demo.wheels import sha256_of
from moka.errors import MokaError, counted
from moka.io import read_json, write_json

SEAL, UNFINISHED, DAMAGED = "checkpoint.json", "unfinished", "damaged-"
FORMAT_VERSION = 1
_OLD = ".old"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that have none
# A network file system may show another node's file late.
_VISIBLE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Seal:
    """What ``checkpoint.json`` says of the run that wrote the checkpoint.

    Args:
        step: optimizer steps of its stage.
        world_size: processes.
        zero_stage: DeepSpeed's, 0 to 3; None without DeepSpeed.
        unlogged_loss: sum of the losses since the last logging step, mean over processes.
        last_logged: that logging step.
        owes_evaluation: the evaluation of this step was broken off, and is due.
    """

    step: int
    world_size: int = 1
    zero_stage: int | None = None
    unlogged_loss: float = 0.0
    last_logged: int = 0
    owes_evaluation: bool = False
    moka_version: str = moka.__version__
    torch_version: str = torch.__version__
    transformers_version: str = transformers.__version__


def read_seal(checkpoint: str | Path) -> Seal:
    """The facts of a checkpoint, without looking at its files.

    Raises:
        MokaError: it has no seal, or a damaged one.
    """
    return _parsed(_read(Path(checkpoint)), Path(checkpoint))


def _read(checkpoint: Path) -> dict[str, Any]:
    if not (checkpoint / SEAL).is_file():
        raise MokaError(f"{checkpoint} has no {SEAL}: it is not whole, or another version wrote it.")
    return read_json(checkpoint / SEAL)


def _parsed(raw: Any, checkpoint: Path) -> Seal:
    known = {f.name for f in fields(Seal)}
    try:
        if raw["format_version"] > FORMAT_VERSION:
            raise MokaError(f"{checkpoint} was written by a newer moka ({raw.get('moka_version')}); upgrade moka-peft.")
        return Seal(**{key: value for key, value in raw.items() if key in known})
    except (KeyError, TypeError) as error:
        raise MokaError(f"{checkpoint / SEAL} is damaged ({error}).") from error


def begin(final: Path) -> Path:
    """Where the processes write the checkpoint that will be ``final``; empty. For the main process alone."""
    part = final.parent / UNFINISHED / final.name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def listing(folder: Path) -> dict[str, int]:
    """Name relative to ``folder`` -> bytes, of every file in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def finish(part: Path, final: Path, facts: Seal, written: Iterable[dict[str, int]]) -> None:
    """Seal what the processes wrote into ``part`` and make it ``final``. For the main process alone, after all others.

    Args:
        written: ``listing(part)`` of every process.
    Raises:
        MokaError: a file that another process wrote cannot be seen here.
    """
    due = {name: size for one in written for name, size in one.items()}
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while lost := sorted(name for name, size in due.items() if not _has(part / name, size)):
        if time.monotonic() > deadline:
            raise MokaError(
                f"{part / lost[0]}, written by another process, cannot be seen from the main one. Put output.dir on a file "
                "system that all nodes share."
            )
        time.sleep(0.5)
    files = {name: {"size": (part / name).stat().st_size, "sha256": sha256_of(part / name)} for name in sorted(due)}
    write_json(part / SEAL, {"format_version": FORMAT_VERSION, **asdict(facts), "files": files})
    for name in (*files, SEAL):
        _sync(part / name)
    for folder in {part, *((part / name).parent for name in files)}:
        _sync(folder)
    if final.exists():
        final.rename(part.with_name(final.name + _OLD))
    part.rename(final)
    shutil.rmtree(final.parent / UNFINISHED, ignore_errors=True)
    _sync(final.parent)


def recover(folder: Path) -> list[str]:
    """Remove what a killed run left half-written in a stage's folder; its names. For the main process alone."""
    unfinished = folder / UNFINISHED
    names = sorted(path.name for path in unfinished.iterdir()) if unfinished.is_dir() else []
    for name in names:
        # It was killed between the two renames that replace a checkpoint.
        final = folder / name.removesuffix(_OLD)
        if name.endswith(_OLD) and not final.exists():
            (unfinished / name).rename(final)
    shutil.rmtree(unfinished, ignore_errors=True)
    return [name for name in names if not name.endswith(_OLD)]


def rotate(folder: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Keep ``limit`` sealed checkpoints; never remove the one just written, nor the best one.

    What has no seal counts for nothing: it is neither kept for a good one nor removed.
    """
    if not limit or limit < 0:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    sealed = [path for _, path in _by_step(folder) if (path / SEAL).is_file()]
    surplus = len(sealed) - max(limit, len(kept))
    for path in [path for path in sealed if path.name not in kept][: max(surplus, 0)]:
        # The seal first: a removal that is broken off must not leave something that looks whole.
        (path / SEAL).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None for a whole one. Reads all of it."""
    try:
        raw = _read(checkpoint)
        _parsed(raw, checkpoint)
        files = {str(name): (spec["size"], spec["sha256"]) for name, spec in raw["files"].items()}
    except (MokaError, KeyError, TypeError, AttributeError) as error:
        return str(error) if isinstance(error, MokaError) else f"{checkpoint / SEAL} is damaged ({error!r})."
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing."
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, and {size} were written."
        try:
            if sha256_of(path) != digest:
                return f"{path} is not what was written (SHA-256)."
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})."
    return None


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest whole checkpoint of a stage's folder and its step; (None, 0) where there is none at all.

    What is wrong with newer ones is printed, and they are renamed: they must count for nothing when the run goes on.
    For the main process alone.

    Raises:
        MokaError: there are checkpoints, and none is whole.
    """
    for name in recover(folder):
        print(f"note: {folder / UNFINISHED / name} was half-written when the run ended; it is removed.")
    damaged: list[Path] = []
    for step, path in reversed(_by_step(folder)):
        wrong = fault(path)
        if wrong is None:
            for worse in damaged:
                aside = worse.with_name(DAMAGED + worse.name)
                shutil.rmtree(aside, ignore_errors=True)
                worse.rename(aside)
                print(f"note: {worse.name} is left out, and kept as {aside}; {path.name} is the last whole one.")
            return path, step
        print(f"note: {path} is damaged: {wrong}")
        damaged.append(path)
    if damaged:
        raise MokaError(
            f"--resume: {folder} holds {len(damaged)} checkpoints and none is whole ({fault(damaged[0])}) Copy a whole one "
            "back, or remove them to train this stage from its beginning."
        )
    return None, 0


def say_changes(checkpoint: Path, processes: int) -> None:
    """Print what is not as it was when the checkpoint was written, and so may change the loss curve."""
    seal = read_seal(checkpoint)
    if seal.world_size != processes:
        print(
            f"note: {checkpoint.name} was written by {counted(seal.world_size, 'process', 'processes')}, and the run goes on with "
            f"{processes}: data order, optimizer and schedule are kept; dropout draws other numbers."
        )
    for name, then, now in (
        ("torch", seal.torch_version, torch.__version__),
        ("transformers", seal.transformers_version, transformers.__version__),
        ("moka", seal.moka_version, moka.__version__),
    ):
        if then != now:
            print(
                f"note: {checkpoint.name} was written with {name} {then}, and this is {now}: losses may differ a little."
            )


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            found.append((int(step), path))
    return sorted(found)


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _sync(path: Path) -> None:
    """To the disk itself, so that a power cut cannot keep the name and lose the content."""
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
