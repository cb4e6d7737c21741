"""Samples from a JSONL file: one JSON object a line, in the format of `moka.data.schema`.

Only the places of the lines are kept in memory (16 bytes a sample), so a file of any size opens in the time of one
read. Media paths are relative to one folder, the media root, and may not lead out of it.
"""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moka.data.decoders import file_problem
from moka.data.schema import check_sample, map_media, media_parts
from moka.errors import MokaError

_BAR_AFTER_S = 2.0  # a progress bar for what is done at once is noise


class JsonlDataset:
    """A map-style dataset (``len`` and indexing) of checked samples with absolute media paths.

    Args:
        path: the JSONL file, UTF-8. Blank lines are skipped.
        media_root: the folder that relative media paths start from and that no path may leave, be it by ``..``, as an
            absolute path or through a symbolic link; the file's own folder by default.
        require_answer: whether every sample must hold an assistant message with text.

    Raises:
        MokaError: the file is absent, empty or not a file, or the media root is not a folder. Indexing raises it for
            bad JSON, a bad sample or a path that leaves the media root, with file and line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_root: str | os.PathLike[str] | None = None,
        require_answer: bool = True,
    ) -> None:
        self.path = Path(path)
        self.require_answer = require_answer
        if problem := file_problem(self.path):
            raise MokaError(f"{self.path}: {problem}. A JSONL file is due, one sample a line.")
        root = self.path.parent if media_root is None else Path(media_root)
        if not root.is_dir():
            raise MokaError(
                f"media_root {str(root)!r} is not a folder. Give the folder that the media paths start from."
            )
        self.media_root = root.resolve()
        self._offsets, self._lines = _index(self.path)
        if not self._offsets:
            raise MokaError(f"{self.path}: holds blank lines only. A JSONL file is due, one sample a line.")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = f"{self.path}:{self._lines[index]}"
        # Opened for each sample: a shared handle would be one file position for all forked loader workers.
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        sample = check_sample(_parse(line, where), where, self.require_answer)
        return map_media(sample, lambda kind, medium: self._resolve(medium, kind, where))

    def missing_media(self, limit: int = 20) -> list[str]:
        """What a run would stumble over: media files that are absent, empty or folders. Empty when all is well.

        Reads and checks every sample but opens no medium; meant for the moment before training starts.

        Args:
            limit: how many files are listed.

        Returns:
            One line a file, in the order of the samples, with the place that first names it; when there are more than
            ``limit``, a last line tells how many in all.

        Raises:
            MokaError: as for indexing.
        """
        missing: set[str] = set()
        listed: list[str] = []
        for index in tqdm(range(len(self)), "checking media", unit="sample", delay=_BAR_AFTER_S, leave=False):
            for kind, medium in media_parts(self[index]):
                if not isinstance(medium, str) or medium in missing:
                    continue
                if problem := file_problem(medium):
                    missing.add(medium)
                    if len(listed) < limit:
                        listed.append(f"{self.path}:{self._lines[index]}: {kind} {medium}: {problem}")
        if len(missing) > limit:
            listed.append(f"... and {len(missing) - limit} more: {len(missing)} media files are missing in all")
        return listed

    def _resolve(self, medium: Any, kind: str, where: str) -> Any:
        if not isinstance(medium, str):
            return medium
        try:
            path = (self.media_root / medium).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL character
            raise MokaError(f"{where}: {kind} path {medium!r} is not a path that can be followed: {error}.") from error
        if not path.is_relative_to(self.media_root):
            raise MokaError(
                f"{where}: {kind} path {medium!r} leads to {path}, outside the media root {self.media_root}. "
                "Give a path inside it, or set media_root to a folder that holds all the media."
            )
        return str(path)


def _index(path: Path) -> tuple[array[int], array[int]]:
    """Byte offset and line number (from 1) of every line that is not blank."""
    offsets, lines = array("q"), array("q")
    offset = 0
    with (
        open(path, "rb") as file,
        tqdm(
            total=path.stat().st_size,
            desc=f"indexing {path.name}",
            unit="B",
            unit_scale=True,
            delay=_BAR_AFTER_S,
            leave=False,
        ) as bar,
    ):
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                lines.append(number)
            offset += len(line)
            bar.update(len(line))
    return offsets, lines


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))  # some editors open the file with a byte order mark
    except UnicodeDecodeError as error:
        raise MokaError(f"{where}: is not UTF-8 text ({error.reason}). Save the file as plain UTF-8 JSONL.") from error
    except json.JSONDecodeError as error:
        hint = "Mend or remove the line."
        if line.strip() in (b"[", b"{") or line.lstrip().startswith(b"[{"):
            hint = "Each line must hold one whole object: this looks like indented JSON or a JSON array."
        raise MokaError(f"{where}: is not valid JSON: {error.msg} at column {error.colno}. {hint}") from error
