"""Shared by data sets of records with media paths: paths that stay inside one folder, the check before
training, and files that are there complete or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from moka.data.schema import map_media, media_parts
from moka.errors import MokaError

from .media_io import file_problem

BAR_AFTER_S = 2.0  # a progress bar for what is done at once is noise


class RecordDataset:
    """The base of map-style datasets of checked samples; a subclass gives ``len``, indexing, `where` and ``media_root``.

    Attributes:
        media_root: the folder that relative media paths start from and that no path may leave, resolved.
    """

    media_root: Path

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The place of a sample in its file, as it opens error messages."""
        raise NotImplementedError

    def missing_media(self, limit: int = 20, share: tuple[int, int] = (0, 1)) -> list[str]:
        """Return what a run would stumble over: media files that are absent, empty or folders. Empty when all is well.

        Reads and checks every sample but opens no medium; meant for the moment before training starts.

        Args:
            limit: how many files are listed.
            share: (k, n): of n processes that look through a part of the samples each, this is the k-th.

        Returns:
            One line a file, in the order of the samples, with the place that first names it; when there are more than
            ``limit``, a last line says how many in all.

        Raises:
            MokaError: as for indexing.
        """
        missing: set[str] = set()
        listed: list[str] = []
        for index in tqdm(
            range(share[0], len(self), share[1]), "checking media", unit="sample", delay=BAR_AFTER_S, leave=False
        ):
            for kind, medium in media_parts(self[index]):
                if not isinstance(medium, str) or medium in missing:
                    continue
                if problem := file_problem(medium):
                    missing.add(medium)
                    if len(listed) < limit:
                        listed.append(f"{self.where(index)}: {kind} {medium}: {problem}")
        if len(missing) > limit:
            listed.append(f"... and {len(missing) - limit} more: {len(missing)} media files are missing in all")
        return listed

    def with_absolute_paths(self, sample: dict[str, Any], where: str) -> dict[str, Any]:
        """A copy of a checked sample whose media paths are absolute; decoded media and bytes pass.

        Raises:
            MokaError: a path leaves the media root.
        """
        return map_media(sample, lambda kind, medium: self._resolve(medium, kind, where))

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
                "Give a path inside it, or set media_root to a folder that has all the media."
            )
        return str(path)


def checked_root(root: Path) -> Path:
    """The media root, resolved.

    Raises:
        MokaError: it is not a folder.
    """
    if not root.is_dir():
        raise MokaError(f"media_root {str(root)!r} is not a folder. Give the folder that the media paths start from.")
    return root.resolve()
