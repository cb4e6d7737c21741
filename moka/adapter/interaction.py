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
    rank = z.shape[-1]
    query_index = pairs.query_index[..., None].expand(-1, -1, rank)
    k = z.gather(1, pairs.key_index[..., None].expand(-1, -1, rank))  # [batch, keys, r]
    if kind == "mean":
        share = pairs.mask / pairs.mask.sum(-1, keepdim=True).clamp(min=1)  # [batch, queries, keys]
    else:
        share = attention_map(z.gather(1, query_index), k, pairs.mask)
    message = (share * pairs.weight[..., None]).to(z.dtype) @ k  # [batch, queries, r]
    return z.scatter_add(1, query_index, message)
