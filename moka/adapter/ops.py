"""The computation of MokA in the low-rank space, on flat tokens.

    z_m   = dropout(x) A_m^T                           every modality's A in one product        [tokens, M * r]
    z_t   = z_m(t)                                     each token's own                         [tokens, r]
    z~_t  = z_t + lambda softmax(z_t . z_j / sqrt(r)) z_j    media tokens over the question's text tokens
    y_t  += s B z~_t

Source: Wei, Miao, Zhou, Hu, "MokA" (NeurIPS 2025), section 3, https://arxiv.org/abs/2506.05191.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .routing import Attention


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of matrix products of ``x`` here: its own, or autocast's."""
    kind = x.device.type
    # Not `torch.amp.is_autocast_available`, which torch.compile of torch 2.11 does not trace: meta tensors alone have none.
    casts = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def project(x: torch.Tensor, A: torch.Tensor, rate: float) -> torch.Tensor:
    """Return dropout(x) A^T.

    x: [..., in]; A: [width, in] in the dtype of ``x``; rate: probability of dropout -> [tokens, width].
    """
    flat = x.reshape(-1, x.shape[-1])
    if rate == 0:
        return flat @ A.t()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if traced:
        return F.dropout(flat, rate) @ A.t()
    return _DroppedProduct.apply(flat, A, rate, draw_seed())


class _DroppedProduct(torch.autograd.Function):
    """dropout(x) A^T that keeps the input as it is and draws the dropout again from its seed in backward.

    ``F.dropout`` would keep the dropped input and its mask, for every projection; drawing the dropped positions is an
    order of magnitude faster on a CPU than drawing a number for each element (7 % of a training step).
    """

    @staticmethod
    def forward(ctx, x, A, rate, seed):
        ctx.save_for_backward(x, A)
        ctx.rate, ctx.seed = rate, seed
        return (_dropped(x, rate, seed) @ A.t()).mul_(1 / (1 - rate))

    @staticmethod
    def backward(ctx, dz):
        x, A = ctx.saved_tensors
        dz = dz / (1 - ctx.rate)
        dropped = _drawn(x.shape, x.device, ctx.rate, ctx.seed)
        dA = dz.t() @ _zeroed(x, dropped) if ctx.needs_input_grad[1] else None
        dx = _zeroed(dz @ A, dropped) if ctx.needs_input_grad[0] else None
        return dx, dA, None, None


def _dropped(x: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
    return _zeroed(x, _drawn(x.shape, x.device, rate, seed))


def _zeroed(x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with the drawn elements at zero: positions [n] or a mask in the shape of ``x``."""
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped, 0)
    return x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def _drawn(shape: torch.Size, device: torch.device, rate: float, seed: int) -> torch.Tensor:
    if device.type == "cpu":
        return dropped_positions(shape.numel(), rate, seed)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(rate, generator=generator)


def draw_seed() -> int:
    """Return a seed from torch's default generator, whose state gradient checkpointing restores before it recomputes."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def dropped_positions(elements: int, rate: float, seed: int) -> torch.Tensor:
    """Return which of ``elements`` dropout sets to zero, ascending, each with probability ``rate`` on its own.

    The gaps between them are geometric, so that for a rate of 5 % one number is drawn for twenty elements.
    """
    generator = np.random.Generator(np.random.SFC64(seed))
    drawn, last = [], -1
    expected = elements * rate
    count = int(expected + 4 * math.sqrt(expected) + 16)
    while last < elements:
        # The floor of an exponential number is geometric: P(gap > k) = (1 - rate)^k.
        gaps = generator.standard_exponential(count, dtype=np.float32)
        gaps *= -1 / math.log1p(-rate)
        positions = gaps.astype(np.int64)
        positions += 1
        np.cumsum(positions, out=positions)
        positions += last
        drawn.append(positions)
        last = int(positions[-1])
        count = count // 16 + 16  # for what the first draw fell short of
    positions = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
    return torch.from_numpy(positions[: np.searchsorted(positions, elements)])


def interact(z: torch.Tensor, attention: Attention, projections: int, mean: bool) -> torch.Tensor:
    """Add lambda times what each query reads from its keys (arXiv 2506.05191, section 3.2).

    z: [batch * seq, projections * r] -> the same shape. Every projection attends by itself, as a head does, so that the map
    of queries and keys is not kept, and is never as large as seq by seq. ``mean``: read the mean of the keys instead.
    """
    batch, width = len(attention.query), z.shape[1]
    k = (
        z.index_select(0, attention.flat_key).view(batch, -1, projections, width // projections).transpose(1, 2)
    )  # [batch, n, keys, r]
    if mean:
        read = mean_weights(attention).to(z.dtype)[:, None] @ k
    else:
        q = z.index_select(0, attention.flat_query).view(batch, -1, projections, width // projections).transpose(1, 2)
        read = _attend(q, k, attention.bias)  # [batch, n, queries, r]
    read = read.transpose(1, 2).reshape(-1, width)
    return z.index_add(0, attention.flat_query, read * attention.weight.view(-1, 1).to(z.dtype))


def mean_weights(attention: Attention) -> torch.Tensor:
    """Return the weight of each key in the mean of a query's keys: [batch, queries, keys] float32."""
    mask = attention.mask
    if mask is None:
        batch, queries = attention.query.shape
        return torch.full(
            (batch, queries, attention.key.shape[1]), 1 / attention.key.shape[1], device=attention.key.device
        )
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def _attend(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    scale, rank = q.shape[-1] ** -0.5, q.shape[-1]
    if q.is_cuda and rank % 8:
        # The kernels for GPUs that build no map take only widths that are multiples of 8.
        q, k = F.pad(q, (0, -rank % 8)), F.pad(k, (0, -rank % 8))
    bias = bias if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=bias, scale=scale)[..., :rank]


def add_update(result: torch.Tensor, z: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """Return result + scale * z B^T in the dtype of ``result``. result: [..., out]; z: [tokens, r]; B: [out, r]."""
    if z.dtype == result.dtype:
        # Contiguous: otherwise autograd computes B's gradient in an order that is 5 to 15 times slower on a CPU.
        return torch.addmm(result.reshape(-1, result.shape[-1]), z, B.t().contiguous(), alpha=scale).view(result.shape)
    return result + (z @ B.t() * scale).view(result.shape).to(result.dtype)
