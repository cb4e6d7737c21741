"""Write files and folders atomically: each is complete or absent, also on a full disk.

A temporary name is unique and made by moka (``.NAME.RANDOM.tmp`` next to the target), so that no user's file is ever taken
for one of ours, and two processes that write the same target do not disturb each other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moka.errors import MokaError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report the system's errors in types of their own, of which only the text is left.
_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "file write failed", "unexpected pos")


@contextmanager
def disk_full_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk, however it is reported inside the block, into one clear ``MokaError``."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        reported = type(error).__name__ in ("OSError", "RuntimeError", "SafetensorError")
        if not full and not (reported and any(text in str(error) for text in _TEXTS)):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        raise MokaError(
            f"{path} cannot be written: the disk is full ({reason}). Free space; a run resumes with --resume."
        ) from error


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to. It is renamed to ``path`` if the block succeeds, and removed otherwise."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # mkstemp's files are private
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill. It replaces ``folder`` if the block succeeds, and is removed otherwise."""
    part = None
    try:
        with disk_full_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name[:80]}.", suffix=".tmp", dir=folder.parent))
            part.chmod(0o777 & ~_umask())
            yield part
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with disk_full_errors(path), atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_output(path: Path, text: str, inputs: Iterable[Path] = (), option: str = "--output") -> None:
    """Write a text file that a user named: through a symbolic link to its target, and into a device or pipe as it is.

    Args:
        inputs: files that are read; none of them is overwritten.
        option: that named the file, for the message.
    Raises:
        MokaError: the file is one of the inputs.
    """
    if any(path.exists() and file.exists() and os.path.samefile(path, file) for file in inputs):
        raise MokaError(f"{option}: {path} is the file that is read; name another.")
    if path.exists() and not path.is_file():
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    write_text(Path(os.path.realpath(path)), text)


def check_output_folder(output: Path, source: Path, is_result: Callable[[Path], bool], overwrite: bool) -> None:
    """Check that a folder that a user named can be written without losing anything else.

    Args:
        source: the folder that is read; neither may be inside the other.
        is_result: whether a folder has an earlier result; no other folder is replaced.
    Raises:
        MokaError: the place is taken, or is an earlier result and ``overwrite`` is not given.
    """
    target, read = output.resolve(), source.resolve()
    problem = ""
    if target.is_relative_to(read) or read.is_relative_to(target):
        problem = f"is {source}, has it or is inside it"
    elif taken := next(
        (folder for folder in (target, *target.parents) if folder.exists() and not folder.is_dir()), None
    ):
        problem = f"cannot be made: {taken} is a file"
    elif target.exists() and any(target.iterdir()) and not (overwrite and is_result(target)):
        problem = "is not empty"
        problem += (
            " (add --overwrite to replace it)" if is_result(target) else " and has no earlier result to be replaced"
        )
    if problem:
        raise MokaError(f"--output: {output} {problem}; give another folder.")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, kind: type = object) -> Any:
    """Read a JSON file.

    Raises:
        MokaError: the file cannot be read or parsed, or has a value of another ``kind``.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"a {kind.__name__} is expected, not a {type(value).__name__}")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise MokaError(f"{path} cannot be read as JSON ({error}); it is damaged. Copy the folder again.") from error


def append_jsonl(path: Path, record: Any) -> None:
    """Append one record as a line of JSON. A line that was cut off before (a kill, a full disk) is ended first."""
    with disk_full_errors(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def read_jsonl(path: Path) -> list[Any]:
    """Return the records of a JSONL file that moka itself appends to; none if it is absent. A line that was cut off is skipped."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
