"""Writing files so that each is there whole or not at all, also on a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moka.data.records import whole_file
from moka.errors import MokaError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report the system's errors in types of their own, of which the text alone is left.
_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "file write failed", "unexpected pos")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a disk that is full, however it is reported, into one clear error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if not full and not any(text in str(error) for text in _TEXTS):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        raise MokaError(
            f"{path} cannot be written: the disk is full ({reason}). Free space; a run goes on with --resume."
        ) from error


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes its place when the block ends well, and is removed when it does not."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(folder):
            part.mkdir(parents=True)
            yield part
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """As ``Path.write_text``, whole or not at all."""
    with writing(path), whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises ``MokaError`` for a file that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MokaError(f"{path} cannot be read as JSON ({error}); it is damaged. Copy the folder again.") from error
