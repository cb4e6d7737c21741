"""What the layers read of a `View`: flat indices and masks, made by the first layer and shared by all of one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .config import MokaConfig
from .routing import Pairs, View


@dataclass(frozen=True)
class Attention:
    """Queries and keys of all rows by their place among the tokens [batch * seq]."""

    query: torch.Tensor  # [batch * queries] int
    key: torch.Tensor  # [batch * keys] int
    bias: (
        torch.Tensor | None
    )  # [batch, 1, queries, keys], added to the logits; None: each query reads every key of its row
    weight: torch.Tensor  # [batch * queries, 1] lambda, 0 for queries that stand in for missing ones or have no key
    shares: torch.Tensor | None  # [batch, 1, queries, keys] of the mean interaction, which has no logits
    batch: int


@dataclass(frozen=True)
class Selection:
    """A `View` in the dtype and on the device in which a layer computes."""

    index: torch.Tensor | None  # [batch * seq] token * M + its row of A; None: every token is text
    keep: torch.Tensor | None  # [batch * seq, 1] 0 for tokens that the adapter leaves alone; None: it takes them all
    attention: Attention | None  # None: no token interacts


def select(view: View, config: MokaConfig, x: torch.Tensor) -> Selection:
    """The selection of this view for inputs like ``x``, made once."""
    # What is made in inference mode cannot be kept for a backward.
    key = (x.dtype, x.device, config.interaction, torch.is_inference_mode_enabled())
    made = view.derived.get(key)
    if made is None:
        made = view.derived[key] = _make(view, config, x)
    return made


def _make(view: View, config: MokaConfig, x: torch.Tensor) -> Selection:
    index = None
    if view.row is not None:
        row = view.row.to(x.device).flatten()
        index = torch.arange(len(row), device=x.device) * len(config.modalities) + row
    keep = None if view.adapted is None else view.adapted.to(x).flatten(0, 1)
    attention = None
    if view.pairs is not None and view.row is not None:
        attention = _attention(view.pairs, view.row.shape[1], config.interaction, x)
    return Selection(index, keep, attention)


def _attention(pairs: Pairs, seq: int, kind: str, x: torch.Tensor) -> Attention:
    begin = torch.arange(len(pairs.query_index), device=x.device)[:, None] * seq  # [batch, 1]
    mask = pairs.mask.to(x.device)  # [batch, queries, keys]
    weight = pairs.weight.to(x) * mask.any(-1)
    bias = shares = None
    if kind == "mean":
        shares = (mask / mask.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype)[:, None]
    elif not pairs.full:
        # Finite: a row of nothing but minus infinity is NaN, and half, that adding to it stays finite.
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill_(~mask, torch.finfo(x.dtype).min / 2)[:, None]
    query, key = (begin + pairs.query_index.to(x.device)).flatten(), (begin + pairs.key_index.to(x.device)).flatten()
    return Attention(query, key, bias, weight.view(-1, 1), shares, len(pairs.query_index))


def attend(z: torch.Tensor, attention: Attention, projections: int) -> torch.Tensor:
    """Add lambda times what each query reads from its keys (arXiv 2506.05191, section 3.2).

    z: [batch * seq, projections * r] -> the same shape. Every projection attends by itself, as a head does, so that the map
    of queries and keys is at no time kept, and never as large as sequence by sequence.
    """
    batch, rank = attention.batch, z.shape[1] // projections
    k = z.index_select(0, attention.key).view(batch, -1, projections, rank).transpose(1, 2)  # [batch, heads, keys, r]
    if attention.shares is not None:
        read = attention.shares @ k
    else:
        q = z.index_select(0, attention.query).view(batch, -1, projections, rank).transpose(1, 2)
        read = _attention_of(q, k, attention.bias)  # [batch, heads, queries, r]
    read = read.transpose(1, 2).reshape(-1, projections * rank)
    return z.index_add(0, attention.query, read * attention.weight)


def _attention_of(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    scale, rank = q.shape[-1] ** -0.5, q.shape[-1]
    if q.is_cuda and rank % 8:
        # The kernels for GPUs that build no map take widths that are multiples of 8 alone.
        q, k = F.pad(q, (0, -rank % 8)), F.pad(k, (0, -rank % 8))
    return F.scaled_dot_product_attention(q, k, k, attn_mask=bias, scale=scale)[..., :rank]
