"""Features of a modality inside a decoder: the hidden states at its tokens, after the first quarter of the blocks.

That is the place of the features of an encoder in the papers: what the tokens of a modality are before most of the mixing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moka.adapter.text_decoder import decoder_blocks
from moka.analysis.contribution import unwrapped
from moka.errors import MokaError


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep the input [batch, seq, hidden] of the block after the first quarter, of every forward inside the block.

    The input of a block has its graph under gradient checkpointing too, which a block's output has not.

    Raises:
        MokaError: the decoder has one block only.
    """
    blocks: Any = decoder_blocks(unwrapped(model))[1]
    if len(blocks) < 2:
        raise MokaError(f"balance: the decoder has {len(blocks)} block; features are between blocks, so 2 are needed.")
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = blocks[max(1, len(blocks) // 4)].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def pooled(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean state of the ``tokens`` [batch, seq] bool of each row, 0 without any: [batch, hidden] float32.

    Args:
        states: [batch, seq, hidden].
    """
    mask = tokens.to(states.device)[..., None]
    return (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
