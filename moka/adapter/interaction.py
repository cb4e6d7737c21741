"""The cross-modal interaction of MokA, in the low-rank space (arXiv 2506.05191, section 3.2)."""

from __future__ import annotations

import math

import torch

from .routing import Pairs


def attention_map(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax_j(q . k_j / sqrt(r)) over the allowed keys, in float32.

    q: [batch, queries, r]; k: [batch, keys, r]; mask: [batch, queries, keys] bool -> [batch, queries, keys] float32.
    A query without any key gets zeros, never NaN.
    """
    logits = (q @ k.transpose(1, 2)).float() / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    # Rows without keys come out of the softmax uniform; the second mask makes them zero.
    return logits.softmax(-1) * mask


def interact(z: torch.Tensor, pairs: Pairs, kind: str) -> torch.Tensor:
    """Add lambda times what each query reads from its keys.

    z: [batch, seq, r] -> [batch, seq, r]. ``kind``: "question" and "reversed" attend (they differ in who is query,
    which ``pairs`` says), "mean" averages the keys.
    """
    k = z.gather(1, _spread(pairs.key_index, z))  # [batch, keys, r]
    share = attention_shares(z, pairs, kind)
    message = (share * pairs.weight[..., None]).to(z.dtype) @ k  # [batch, queries, r]
    return z.scatter_add(1, _spread(pairs.query_index, z), message)


def attention_shares(z: torch.Tensor, pairs: Pairs, kind: str) -> torch.Tensor:
    """What each query takes from each of its keys: [batch, queries, keys], rows that sum to 1, or to 0 without keys."""
    if kind == "mean":
        return pairs.mask / pairs.mask.sum(-1, keepdim=True).clamp(min=1)
    q, k = z.gather(1, _spread(pairs.query_index, z)), z.gather(1, _spread(pairs.key_index, z))
    return attention_map(q, k, pairs.mask)


def _spread(index: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """[batch, n] positions as an index into z [batch, seq, r]."""
    return index[..., None].expand(-1, -1, z.shape[-1])
