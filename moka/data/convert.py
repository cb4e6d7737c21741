"""Samples of any source written as our JSONL: a manifest next to media that stay, or a folder with the media in it.

open_samples(...)  ->  write_manifest: FILE.jsonl, paths relative to the media root
                   ->  convert: FOLDER/data.jsonl and FOLDER/media/...
"""

from __future__ import annotations

import errno
import glob
import io
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S, where_of
from moka.data.media_io import file_problem
from moka.data.schema import map_media, media_parts
from moka.errors import MokaError
from moka.io import atomic_dir, atomic_file, disk_full_errors
from moka.modeling.media import AudioFeatures, Waveform

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MEDIA_MODES = ("copy", "link", "none")
DATA = "data.jsonl"
# How encoded files begin; elsewhere the suffix does not matter, as decoders look at the content.
_BEGINNINGS = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3",
    b"\x1aE\xdf\xa3": ".mkv",
}  # fmt: skip
_RIFF = {b"WAVE": ".wav", b"WEBP": ".webp", b"AVI ": ".avi"}


def write_manifest(path: str | os.PathLike[str], samples: Any, indices: Sequence[int]) -> Path:
    """Return a JSONL file of the samples at ``indices``; their media stay where they are.

    Paths are relative to the returned folder, which `JsonlDataset` wants as ``media_root``.

    Raises:
        MokaError: the file is there already, no sample is left to write, or a medium is in no file.
    """
    path = Path(path)
    if path.exists():
        raise MokaError(f"{path} is there already. Name another file, or delete it.")
    if not len(indices):
        raise MokaError(f"{path}: not one sample is good, so there is nothing to write.")
    root = getattr(samples, "media_root", None) or path.parent.resolve()

    def relative(kind: str, medium: Any) -> str:
        if not isinstance(medium, str):
            raise MokaError(
                f"{path}: a manifest names files, and the {kind} of {where_of(samples, index)} is in none. Write the data "
                "set to files with `moka data convert` first."
            )
        return _relative(medium, root)

    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_errors(path), atomic_file(path) as part, open(part, "wb") as file:
        for index in indices:
            file.write(_line(map_media(samples[index], relative)))
    return root


def convert(samples: Any, output: str | os.PathLike[str], media: str = "copy") -> Path:
    """Write every sample to ``output/data.jsonl``, and the media as ``media`` says; the folder appears when it is complete.

    Hidden folders of earlier conversions to ``output`` that were killed are removed.

    Args:
        samples: map-style, of checked samples with media as paths, bytes or decoded (drawings as PNG, MFCC as .npy,
            sound as float WAV: nothing is lost).
        output: a folder that is not there, or is empty.
        media: "copy", "link" (hard links, which take no space and lead nowhere out of the folder) or "none": the files
            stay, and ``data.media_root`` has to name their folder (``samples.media_root``).

    Returns:
        The path of data.jsonl.

    Raises:
        MokaError: the folder has something, a sample is bad, a medium is not there, or it cannot be linked to.
    """
    if media not in MEDIA_MODES:
        raise MokaError(f"media is {media!r}; allowed are {', '.join(MEDIA_MODES)}.")
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MokaError(
            f"{output} is there already, and nothing is ever overwritten. Name another folder, or delete it."
        )
    for leftover in output.parent.glob(f".{glob.escape(output.name[:80])}.*.tmp"):
        with _lock(leftover) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
    with atomic_dir(output) as folder, _lock(folder):
        writer = _MediaWriter(folder, getattr(samples, "media_root", None), media)
        with open(folder / DATA, "wb") as file:
            for index in tqdm(range(len(samples)), "converting", unit="sample", delay=BAR_AFTER_S, leave=False):
                file.write(_line(writer.written(samples[index], f"{index:06d}", where_of(samples, index))))
        if output.exists() and any(output.iterdir()):
            raise MokaError(f"{output} was filled by another process in the meantime. Name another folder.")
    return output / DATA


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder while the block runs, also against other processes; give False if another one has locked it."""
    if fcntl is None or not folder.is_dir():
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


class _MediaWriter:
    """A writer of media into ``folder``; files named by several samples are written once."""

    def __init__(self, folder: Path, root: Path | None, mode: str) -> None:
        self.folder, self.root, self.mode = folder, root, mode
        self._names: dict[str, str] = {}  # source -> name in the folder

    def written(self, sample: dict[str, Any], stem: str, where: str) -> dict[str, Any]:
        """Return the sample with the names that its media have in the folder."""
        numbers = iter(range(sum(1 for _ in media_parts(sample))))

        def put(kind: str, medium: Any) -> str:
            name = f"extracted/{stem}-{next(numbers)}"  # apart from files, which keep their names
            if isinstance(medium, str):
                return self._file(medium, name, f"{where}: {kind} {medium}")
            if self.mode == "none":
                raise MokaError(f"{where}: the {kind} is in no file. Take --media copy, which writes it to one.")
            return self._made(kind, medium, name, where)

        return map_media(sample, put)

    def _file(self, source: str, name: str, where: str) -> str:
        if source in self._names:
            return self._names[source]
        if reason := file_problem(source):
            raise MokaError(f"{where}: {reason}. Leave bad samples out with `moka data check --manifest FILE`.")
        if self.mode == "none":
            self._names[source] = _relative(source, self.root)
            return self._names[source]
        relative = _relative(source, self.root)
        name = name + Path(source).suffix if relative == source else f"media/{relative}"
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.mode == "copy":
            shutil.copyfile(source, target)
        else:
            _link(source, target)
        self._names[source] = name
        return name

    def _made(self, kind: str, medium: Any, name: str, where: str) -> str:
        suffix, content = _encoded(kind, medium, where)
        target = self.folder / (name + suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return name + suffix


def _link(source: str, target: Path) -> None:
    """Return a hard link: a symbolic one would lead out of the media root, which readers refuse."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise MokaError(
            f"{source} cannot be linked to from {target.parent} ({error.strerror}). Write to the same file system, or "
            "take --media copy."
        ) from error


def _encoded(kind: str, medium: Any, where: str) -> tuple[str, bytes]:
    """Return suffix and content of a file that is decoded to the same medium."""
    buffer = io.BytesIO()
    if isinstance(medium, bytes):
        riff = _RIFF.get(medium[8:12]) if medium[:4] == b"RIFF" else None
        mp4 = ".mp4" if medium[4:8] == b"ftyp" else None
        known = next((s for start, s in _BEGINNINGS.items() if medium.startswith(start)), ".bin")
        return riff or mp4 or known, medium
    if isinstance(medium, Image.Image):
        medium.save(buffer, format="PNG")
        return ".png", buffer.getvalue()
    if isinstance(medium, AudioFeatures) and medium.kind == "mfcc":
        np.save(buffer, medium.values)
        return ".npy", buffer.getvalue()
    if isinstance(medium, Waveform):
        return ".wav", _wav(medium)
    raise MokaError(f"{where}: a decoded {kind} ({type(medium).__name__}) has no file format here. Give it as a file.")


def _wav(waveform: Waveform) -> bytes:
    """Return a mono WAV file of 32-bit floats, so that no sample is rounded."""
    data = waveform.samples.astype("<f4").tobytes()
    layout = struct.pack("<HHIIHH", 3, 1, waveform.rate, 4 * waveform.rate, 4, 32)  # float, mono, rate, bytes a second
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _relative(path: str, root: Path | None) -> str:
    """Return ``path`` from ``root`` on, with forward slashes, if it is inside, or else as it is."""
    inside = root is not None and Path(path).is_relative_to(root)
    return Path(path).relative_to(root).as_posix() if root and inside else path


def _line(sample: dict[str, Any]) -> bytes:
    # Half of a surrogate pair, which is no Unicode text, stays a JSON escape.
    return json.dumps(sample, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
