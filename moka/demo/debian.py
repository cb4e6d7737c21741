"""Files from a Debian mirror: a package is fetched once, checked against its sha256, and read without dpkg.

    .deb (an ar archive)  =  debian-binary, control.tar.xz, data.tar.xz -> the files of the package

Nothing is installed and none of the package's scripts is looked at.
"""

from __future__ import annotations

import http.client
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from tqdm import tqdm

from moka.errors import MokaError

from .wheels import cache_dir, publish, sha256_of, staging

_BLOCK = 1 << 18  # bytes read at a time
_TIMEOUT_S = 60
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # name 16, time 12, owner 6, group 6, mode 8, size 10, end 2


@dataclass(frozen=True)
class DebianPackage:
    """One pinned ``.deb`` file. ``pool`` is its folder on a mirror."""

    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    pool: str
    architecture: str = "all"

    @property
    def filename(self) -> str:
        """The name mirrors give the file, so that a copy made elsewhere can be put into the cache by hand."""
        return f"{self.name}_{self.version}_{self.architecture}.deb"

    @property
    def url(self) -> str:
        return f"{self.pool.rstrip('/')}/{self.filename}"


def fetch_deb(package: DebianPackage) -> Path:
    """The path of the package in the cache; downloaded, with a progress bar, when it is not there, or not full.

    Safe for several processes at once: each downloads into a folder of its own, and the rename is atomic. The sha256
    makes the file trustworthy, so plain http is as good as https.

    Raises:
        MokaError: the mirror cannot be reached, the file is not the pinned one, no space, or the cache cannot be
            written. Nothing half-written stays after.
    """
    target = cache_dir() / "packages" / package.filename
    if target.is_file() and sha256_of(target) == package.sha256:
        return target
    with staging(package.megabytes) as folder:
        made = folder / package.filename
        _download(package, made, target)
        digest = sha256_of(made)
        if digest != package.sha256:
            raise MokaError(
                f"the downloaded {package.filename} ({made.stat().st_size} bytes) has sha256 {digest}, but "
                f"{package.sha256} is expected; the file was deleted. Try again; if it persists, something between "
                f"here and {package.url} serves a different file: put the right one into {target.parent} by hand"
            )
        publish(made, target)
    return target


def package_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The regular files of a ``.deb`` whose name is ``wanted``, in the archive's order: (name, content).

    Names are relative, with "/" between their parts (``usr/share/...``). Links, devices and names that lead out of the
    archive's root are passed over. One pass over the archive, in little memory.

    Raises:
        MokaError: not a Debian package, cut short, or its data are packed in another way than xz, gz or bz2.
    """
    try:
        with open(path, "rb") as file:
            name = _seek_data(file, path)
            if not name.endswith((".tar", ".tar.xz", ".tar.gz", ".tar.bz2")):
                raise MokaError(f"{path.name} has {name}, which this Python cannot unpack; xz, gz and bz2 are known")
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    safe = _safe_name(member.name)
                    if member.isfile() and safe and wanted(safe):
                        content = archive.extractfile(member)
                        assert content is not None  # only for what is no file
                        yield safe, content.read()
    except (tarfile.TarError, EOFError) as error:
        raise MokaError(f"{path} is damaged ({error}); delete it and run again") from error


def _download(package: DebianPackage, made: Path, target: Path) -> None:
    """Stream the package into ``made``, or raise a MokaError with the cause and a remedy."""
    try:
        response = cast(IO[bytes], urllib.request.urlopen(package.url, timeout=_TIMEOUT_S))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreachable(package, target, error) from error
    total = round(package.megabytes * 1e6)
    bar = tqdm(total=total, desc=f"fetching {package.name}", unit="B", unit_scale=True, file=sys.stderr)
    with response, open(made, "wb") as file, bar:
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _unreachable(package, target, error) from error
            if not block:
                return
            file.write(block)  # outside the `try`: a full disk is no trouble of the network
            bar.update(len(block))


def _unreachable(package: DebianPackage, target: Path, error: Exception) -> MokaError:
    reason = getattr(error, "reason", None) or error
    return MokaError(
        f"could not download {package.url}: {' '.join(str(reason).split()) or type(error).__name__}; check the network "
        f"(http_proxy), or put {package.filename} into {target.parent} by hand"
    )


def _seek_data(file: IO[bytes], path: Path) -> str:
    """Move to the start of ``data.tar.*`` in an ar archive, and return that name."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise MokaError(f"{path} is not a Debian package (no ar archive); delete it and run again")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        size = header[48:58].strip()
        if not size.isdigit():
            break
        if name.startswith("data.tar"):
            return name
        file.seek(int(size) + int(size) % 2, 1)  # members begin at even places
    raise MokaError(f"{path} is not a Debian package (it has no data.tar); delete it and run again")


def _safe_name(name: str) -> str:
    """The name without "./" in front; empty where it is absolute or climbs out."""
    path = PurePosixPath(name)
    return "" if path.is_absolute() or ".." in path.parts else str(path)
