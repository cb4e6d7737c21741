"""Positions of tokens: of pictures on a grid, and of several samples in one row.

The multimodal rotary embedding (M-RoPE) of Qwen2-VL and Qwen2.5-VL:

    text      t: 0 1 2 3         picture of 2 x 2 at 4   t: 4 4 4 4      text after it   t: 6 7
              h: 0 1 2 3                                 h: 4 4 5 5                      h: 6 7
              w: 0 1 2 3                                 w: 4 5 4 5                      w: 6 7

Source: Bai et al., Qwen2.5-VL Technical Report (2025); `get_rope_index` of `transformers`, which needs text between two
pictures and loops over the tokens in Python.

In a packed row positions restart at 0 with each sample: 0 1 2 0 1 0 1 2 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def grid_positions(
    type_ids: torch.Tensor, valid: torch.Tensor, grids: Iterable[tuple[list[int], tuple[int, int]]]
) -> torch.Tensor:
    """Return the temporal, vertical and horizontal position of each token, from 0 in every row: [3, batch, seq].

    Args:
        type_ids: [batch, seq] ``mm_token_type_ids``.
        valid: [batch, seq], 0 or False at padding, which gets position 0 and moves no other token.
        grids: for each modality whose items form a grid, its type ids and (rows, columns); every item has
            rows x columns tokens, row by row, and the items of a row may follow each other without text between them.
            All other tokens, of sound for example, count on as text does.
    """
    valid = valid.bool()
    advance = valid.long()  # [batch, seq] by how much the position grows after each token
    row, column = torch.zeros_like(advance), torch.zeros_like(advance)
    for ids, (rows, columns) in grids:
        # Compared one by one: a tensor of them would have to be copied to the device.
        here = torch.stack([type_ids == i for i in ids]).any(0) & valid
        cell = (here.long().cumsum(-1) - 1) % (rows * columns)  # [batch, seq], of its own picture
        row, column = torch.where(here, cell // columns, row), torch.where(here, cell % columns, column)
        last = (cell == rows * columns - 1).long()
        advance = torch.where(here, last * max(rows, columns), advance)
    start = advance.cumsum(-1) - advance
    return torch.stack([start, start + row, start + column]) * valid


def samples_begin(position_ids: torch.Tensor | None, mask: Any = None) -> torch.Tensor | None:
    """Find the first token of each sample in packed rows, and all padding: bool [batch, seq]; None: no row is packed.

    Args:
        position_ids: [batch, seq].
        mask: [batch, seq], 0 at padding; None: there is none.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    begins = position_ids == 0
    if mask is None:
        valid = torch.ones_like(begins)
    elif isinstance(mask, torch.Tensor) and mask.shape == position_ids.shape:
        valid = mask != 0
    else:
        return None
    if not bool((begins[:, 1:] & valid[:, 1:] & valid[:, :-1]).any()):
        return None
    begins = begins | ~valid
    begins[:, 0] = True
    return begins


def restarted(positions: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    """Count grid positions [3, batch, seq] of rows again from the first token of each sample (`samples_begin`)."""
    place = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
    first = place.where(begins, 0).cummax(-1).values  # [batch, seq] column of the first token of its sample
    return positions - positions[0].gather(1, first)


def flash_lengths(begins: torch.Tensor, device: torch.device | None = None) -> dict[str, Any]:
    """Return flash attention's arguments for packed rows: by itself it sees restarts only in a batch of one row.

    Args:
        begins: [batch, seq] of `samples_begin`; the host waits if it is not in host memory.
        device: of the language model; None: that of ``begins``.
    """
    starts = begins.flatten().nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([begins.numel()])]).int()  # [samples + 1]
    longest = int(ends.diff().max())
    ends = ends if device is None else ends.to(device, non_blocking=True)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
