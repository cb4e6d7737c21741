"""The two halves of an adapter's update as autograd functions that keep next to nothing for backward.

    down   x [tokens, in]  ->  z [tokens, width]      dropout, every modality's A in one product, each token's own kept
    up     y [..., out]    +=  s z B^T                onto the base layer's result, with no tensor of its size in between

peft's LoRA keeps, of each layer, the dropped-out input and its mask, and passes the update through three tensors of the
output's size. Here backward draws the dropout anew from its seed and keeps the input as it is, which layers that read the
same one share. `reference_path` runs the same computation out of plain PyTorch operators, which `torch.compile` takes, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

_fused = True


@contextmanager
def reference_path() -> Iterator[None]:
    """Compute by plain PyTorch operators inside the block, as under ``torch.compile``: what the rest is held against."""
    global _fused
    before, _fused = _fused, False
    try:
        yield
    finally:
        _fused = before


def fused() -> bool:
    """Whether the functions of this file are in use here: compilers, tracers and ``torch.func`` take plain operators."""
    transformed = torch._C._are_functorch_transforms_active()
    return _fused and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products of ``x`` here: its own, or autocast's."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module's calls, forward or backward, and may keep what he sees."""
    everywhere = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 or FSDP holds a part of it here: it is whole in its own layer's call alone."""
    return hasattr(parameter, "ds_status") or hasattr(parameter, "full_tensor")


def draw_seed() -> int:
    """A seed from torch's default generator, whose state gradient checkpointing restores before it computes anew."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def dropped_positions(elements: int, rate: float, seed: int) -> torch.Tensor:
    """Which of ``elements`` dropout sets to zero, ascending, each with probability ``rate`` on its own.

    The gaps between them are geometric, so that for a rate of 5 % one number is drawn for twenty elements: an order of
    magnitude faster on a CPU than torch's Bernoulli numbers, which are drawn one by one on one thread.
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
        count = count // 16 + 16  # what the first draw fell short of
    positions = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
    return torch.from_numpy(positions[: np.searchsorted(positions, elements)])


def _draw(shape: torch.Size, device: torch.device, rate: float, seed: int) -> torch.Tensor | None:
    """What this seed drops of a tensor of ``shape``: on a CPU the positions of what it drops, elsewhere a mask [..., in] of what
    it keeps; None: nothing is dropped."""
    if rate == 0:
        return None
    if device.type == "cpu":
        return dropped_positions(shape.numel(), rate, seed)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - rate, generator=generator)


def _drop(x: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
    """``x`` with what was drawn (`_draw`) at zero; the others are not scaled up."""
    if drawn is None:
        return x
    if drawn.dtype == torch.bool:
        return x * drawn
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1).index_fill_(0, drawn, 0)
    return x


def _add_kept(dx: torch.Tensor, dz: torch.Tensor, A: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
    """dx + dz A where nothing was dropped, and dx where it was. Writes onto ``dx``."""
    flat = dx.view(-1, dx.shape[-1])
    if drawn is None:
        flat.addmm_(dz, A)
    elif drawn.dtype == torch.bool:
        flat.addcmul_(dz @ A, drawn.view(flat.shape))
    else:
        elements = dx.view(-1)
        before = elements.index_select(0, drawn)
        flat.addmm_(dz, A)
        elements.index_copy_(0, drawn, before)
    return dx


def _project(
    x: torch.Tensor,
    A: torch.Tensor,
    index: torch.Tensor | None,
    keep: torch.Tensor | None,
    factor: float,
    rate: float,
    seed: int,
) -> torch.Tensor:
    given = _drop(x, _draw(x.shape, x.device, rate, seed)).reshape(-1, x.shape[-1])
    z = given @ A.flatten(0, 1).t()  # [tokens, M * width]
    if index is not None:
        z = z.view(-1, A.shape[1]).index_select(0, index)  # [tokens, width]
    if factor != 1:
        z *= factor
    if keep is not None:
        z *= keep
    return z


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, index, keep, factor, rate, seed, owns_gradient):
        z = _project(x, A, index, keep, factor, rate, seed)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A, index, keep)
        ctx.shape, ctx.factor, ctx.rate, ctx.seed, ctx.owns_gradient = x.shape, factor, rate, seed, owns_gradient
        ctx.set_materialize_grads(False)
        return x.detach(), z

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dz):
        x, A, index, keep = ctx.saved_tensors
        if dz is None:
            return dx, None, None, None, None, None, None, None
        dz = dz.to(A.dtype) * ctx.factor
        if keep is not None:
            dz *= keep
        if index is not None:
            slots = dz.new_zeros(dz.shape[0] * A.shape[0], A.shape[1])
            dz = slots.index_copy_(0, index, dz).view(dz.shape[0], -1)  # [tokens, M * width]
        drawn = _draw(ctx.shape, A.device, ctx.rate, ctx.seed)
        dA = None
        if ctx.needs_input_grad[1]:
            dA = (dz.t() @ _drop(x, drawn).reshape(-1, ctx.shape[-1])).view_as(A)
        if ctx.needs_input_grad[0]:
            if dx is None:
                dx = A.new_zeros(ctx.shape)
            elif not (ctx.owns_gradient and dx.is_contiguous() and dx.dtype == A.dtype):
                dx = dx.to(A.dtype, copy=True, memory_format=torch.contiguous_format)
            dx = _add_kept(dx, dz, A.flatten(0, 1), drawn)
        return dx, dA, None, None, None, None, None, None


def down(
    x: torch.Tensor,
    A: torch.Tensor,
    index: torch.Tensor | None,
    keep: torch.Tensor | None,
    factor: float,
    dropout: float,
    owns_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` again, and z [tokens, width] = factor * dropout(x) A_m^T, with each token's own m.

    The base layers are to read the ``x`` that this returns: their gradient then comes to the same function as that of z,
    and the one is added onto the other.

    Args:
        x: [..., in].
        A: [M, width, in] in the dtype of ``x``.
        index: [tokens] token * M + m; None: A is [1, width, in], for every token.
        keep: [tokens, 1] 0 for tokens that the adapter leaves alone, 1 for the others; None: it takes them all.
        factor: a scale.
        dropout: probability with which an element of ``x`` is dropped; the others are scaled by 1 / (1 - dropout).
        owns_gradient: the gradient of the returned ``x`` is nobody else's, so that it may be written to. A linear layer
            makes a new one.
    """
    seed = draw_seed() if dropout else 0
    arguments = (x, A, index, keep, factor / (1 - dropout), dropout, seed)
    if not torch.is_grad_enabled():
        return x, _project(*arguments)
    return _Down.apply(*arguments, owns_gradient)


def _add(y: torch.Tensor, z: torch.Tensor, B: torch.Tensor, scale: float, in_place: bool) -> torch.Tensor:
    flat = y.view(-1, y.shape[-1])
    if not in_place:
        return torch.addmm(flat, z, B.t(), alpha=scale).view(y.shape)
    flat.addmm_(z, B.t(), alpha=scale)
    return y


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, B, scale, in_place):
        y = _add(y, z, B, scale, in_place)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(z, B)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, B = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1]).to(z.dtype)
        dz = dB = None
        # Written so that the long side is the columns of the result: the other way is half as fast on a CPU.
        if ctx.needs_input_grad[1]:
            dz = (B.t() @ flat.t()).mul_(ctx.scale).t()
        if ctx.needs_input_grad[2]:
            dB = (z.t() @ flat).mul_(ctx.scale).t()
        return dy, dz, dB, None, None


def up(y: torch.Tensor, z: torch.Tensor, B: torch.Tensor, scale: float, in_place: bool) -> torch.Tensor:
    """y + scale * z B^T.

    Args:
        y: [..., out], contiguous.
        z: [tokens, r] in the dtype of ``y``.
        B: [out, r] likewise.
        in_place: write onto ``y``, which nobody else may need.
    """
    return _Up.apply(y, z, B, scale, in_place) if torch.is_grad_enabled() else _add(y, z, B, scale, in_place)
