"""Between host and device: what a forward can know of its batch without asking the device, and one upload for the rest.

A value that is read back from a GPU (``bool(t.all())``, ``int(t.sum())``, ``t.nonzero()``) stops the program until the GPU
has caught up, and with that the GPU too, which then waits for new work. How many tokens of a batch are text, or interact,
is known in host memory before the batch leaves for the device: `HostIds` keeps it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# What tells which token is what, by the names it has in a batch.
ID_NAMES = (
    "input_ids",
    "attention_mask",
    "labels",
    "mm_token_type_ids",
    "interaction_ids",
    "question_mask",
    "position_ids",
)
_ALIGNMENT = 16  # bytes, of each array in an upload


class HostIds:
    """Copies in host memory of the ids of one batch, passed to ``forward`` or ``generate`` as ``host_ids``.

    They say what the tensors of the same names say, which lie on the device. No dataclass and no mapping, so that what
    moves, pins, casts or slices the tensors of a batch leaves it alone.

    Args:
        batch: its tensors of `ID_NAMES` that lie in host memory are kept, not copied.

    Example:
        >>> host_ids = HostIds(batch)
        >>> model(**{name: tensor.to("cuda") for name, tensor in batch.items()}, host_ids=host_ids)
    """

    __slots__ = ("_copies",)

    def __init__(self, batch: Mapping[str, Any] | None = None) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        for name, ids in (batch or {}).items():
            if name in ID_NAMES and isinstance(ids, torch.Tensor) and ids.device.type == "cpu":
                self._copies[name] = ids

    def find(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        """``ids`` in host memory, where they lie there or a copy of them does; None: only the device knows them.

        A copy of another shape is not taken: it is of the batch before someone cut it.
        """
        copy = ids if ids.device.type == "cpu" else self._copies.get(name)
        return copy if copy is not None and copy.shape == ids.shape else None

    def read(self, wanted: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """The same ids in host memory, by name; with one read-back for all that only the device knows, and none again."""
        away = {name: ids for name, ids in wanted.items() if ids is not None and self.find(name, ids) is None}
        if away:
            self._copies |= _read_back(away)
        return {name: None if ids is None else self.find(name, ids) for name, ids in wanted.items()}


def _read_back(away: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(iter(away.values())).device
    # As int64; of a mask of floating point it matters alone what is 0.
    flat = [(ids != 0 if ids.is_floating_point() else ids).reshape(-1).to(device, torch.int64) for ids in away.values()]
    parts = torch.cat(flat).cpu().split([len(part) for part in flat])
    return {name: part.view(ids.shape) for (name, ids), part in zip(away.items(), parts, strict=True)}


def on_device(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``ids`` on ``device``, where they may lie in host memory; the host does not wait."""
    return upload([ids.numpy()], device)[0] if ids.device.type == "cpu" else ids.to(device, non_blocking=True)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays as tensors on ``device``: one copy, for which the host does not wait. On a CPU they share their memory."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu" or not arrays:
        return tensors
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]).tolist()
    starts = [0, *ends[:-1]]
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=True):
        packed.numpy()[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
