"""Upload of several arrays in one copy.

`HostIds` is left only for the import of `moka.adapter`, which no longer needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

_ALIGNMENT = 16  # bytes, of each array in an upload


class HostIds:
    """A reader of ids, without copies of its own."""

    def read(self, wanted: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """Return the same ids in host memory, by name."""
        return {name: None if ids is None else ids.cpu() for name, ids in wanted.items()}


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
