"""Records that an evaluation makes one by one and keeps: a line each in one file, resumable with any number of processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moka.distributed import rank_and_world_size
from moka.io import append_jsonl, read_json, read_jsonl, write_json, write_text

SETTINGS = "settings.json"


class KeptRecords:
    """FOLDER/NAME, and while records are made, a part of it for each process: FOLDER/NAME.part-RANK.

    ``settings.json`` next to it is all that a record depends on; records with other settings are moved away.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.folder, self.path = Path(folder), Path(folder) / name

    def read(self, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the records that were made with the same settings; the others are moved to NAME.previous."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings, known = json.loads(json.dumps(settings)), self.folder / SETTINGS
        if (self.path.exists() or self._parts()) and (not known.exists() or read_json(known) != settings):
            self._remove_parts()
            if self.path.exists():
                before = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
                self.path.replace(before)
                print(
                    f"note: earlier {self.path.stem}, of another model or with other settings, were moved to {before}."
                )
        write_json(known, settings)
        for file in (self.path, *self._parts()):
            yield from (record for record in read_jsonl(file) if isinstance(record, dict))

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to the part of this process."""
        append_jsonl(self.path.with_name(f"{self.path.name}.part-{rank_and_world_size()[0]}"), record)

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Write all records as one file, in their order, and remove the parts."""
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self._remove_parts()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.path.name}.part-*"))

    def _remove_parts(self) -> None:
        for part in self._parts():
            part.unlink()
