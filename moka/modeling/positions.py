"""Positions of tokens where pictures lie on a grid: the multimodal rotary embedding (M-RoPE) of Qwen2-VL and Qwen2.5-VL.

    text      t: 0 1 2 3         picture of 2 x 2 at 4   t: 4 4 4 4      text after it   t: 6 7
              h: 0 1 2 3                                 h: 4 4 5 5                      h: 6 7
              w: 0 1 2 3                                 w: 4 5 4 5                      w: 6 7

Source: Bai et al., Qwen2.5-VL Technical Report (2025); `get_rope_index` of `transformers`, which needs text between two
pictures and loops over the tokens in Python.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def grid_positions(
    type_ids: torch.Tensor, valid: torch.Tensor, grids: Iterable[tuple[list[int], tuple[int, int]]]
) -> torch.Tensor:
    """Temporal, vertical and horizontal position of each token, from 0 in every row: [3, batch, seq].

    Args:
        type_ids: [batch, seq] ``mm_token_type_ids``.
        valid: [batch, seq], 0 or False at padding, which gets position 0 and takes no room.
        grids: for each modality whose items lie on a grid, its type ids and (rows, columns); every item has
            rows x columns tokens, row by row, and the items of a row may follow each other without text between them.
            All other tokens, of sound for example, count on as text does.
    """
    valid = valid.bool()
    advance = valid.long()  # [batch, seq] by how much the position grows behind each token
    row, column = torch.zeros_like(advance), torch.zeros_like(advance)
    for ids, (rows, columns) in grids:
        here = torch.isin(type_ids, torch.tensor(ids, device=type_ids.device)) & valid
        cell = (here.long().cumsum(-1) - 1) % (rows * columns)  # [batch, seq], of its own picture
        row, column = torch.where(here, cell // columns, row), torch.where(here, cell % columns, column)
        last = (cell == rows * columns - 1).long()
        advance = torch.where(here, last * max(rows, columns), advance)
    start = advance.cumsum(-1) - advance
    return torch.stack([start, start + row, start + column]) * valid
