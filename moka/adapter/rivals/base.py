"""The interface of a method that is not MokA: how a token's low-rank activations are mixed.

z_k  = A_k dropout(x_t)            every A in one product                 [tokens, #A, r]
z~_t = mix(z, W_g x_t, m(t))       the method's own                       [tokens, #B, r]
y_t += s sum_k B_k z~_t,k          s = alpha / r
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from ..ops import compute_dtype, project

if TYPE_CHECKING:
    from ..config import MokaConfig
    from ..layer import MokaLinear
    from ..routing import View


class Rival:
    """One method. It has no state: adapters of several layers and models share it."""

    name: ClassVar[str]
    # Allowed keys of MokaConfig.method_options and their defaults.
    options: ClassVar[dict[str, float]] = {}
    by_modality: ClassVar[bool] = False  # a token's update depends on its modality
    trained_by_modality: ClassVar[bool] = False  # gradients do
    mergeable: ClassVar[bool] = True  # a text token's update is a constant matrix

    @property
    def routed(self) -> bool:
        """Return whether training needs to know each token's modality."""
        return self.by_modality or self.trained_by_modality

    def reads_padding(self, config: MokaConfig) -> bool:
        """Return whether training needs to know which tokens are padding."""
        return self.trained_by_modality

    def counts(self, modalities: int) -> tuple[int, int, int]:
        """Return the number of A matrices [r, in], of B matrices [out, r], and of rows of the gate W_g [rows, in]."""
        raise NotImplementedError

    def mix(self, z: torch.Tensor, logits: torch.Tensor | None, view: View) -> torch.Tensor:
        """Return z~ [tokens, #B, r].

        Args:
            z: [tokens, #A, r].
            logits: W_g x [tokens, rows] float32; None without a gate.
            view: the tokens' modalities.
        """
        return z

    def text_path(self, A: torch.Tensor, B: torch.Tensor, text_row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the constant path of text tokens, A [width, in] and B [out, width], of a method that can be merged.

        A: [#A, r, in]; B: [#B, out, r]; text_row: index of text among the modalities.
        """
        return A.flatten(0, 1), B.transpose(0, 1).flatten(1)

    def auxiliary_loss(
        self, layer: MokaLinear, name: str, x: torch.Tensor, A: torch.Tensor, logits: torch.Tensor | None, view: View
    ) -> torch.Tensor | None:
        """Return a scalar whose gradient is added in backward, never to the reported loss; None: there is none.

        x: [tokens, in]; A: [#A, r, in]; the others as in ``mix``.
        """
        return None

    def rank_space(self, layer: MokaLinear, name: str, x: torch.Tensor, view: View) -> torch.Tensor:
        """Return z~ [tokens, #B * r] of one adapter, less what the base weight contains of it. x: [..., in]."""
        config, A = layer.moka_config[name], layer.moka_A[name]()
        x = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
        z = project(x, A.flatten(0, 1).to(x.dtype), layer.dropout_rate(name)).unflatten(1, A.shape[:2])
        gate = layer.moka_gate[name]() if name in layer.moka_gate else None
        logits = None if gate is None else F.linear(x, gate.to(x.dtype)).float()
        mixed = self.mix(z, logits, view)
        if layer.training and mixed.requires_grad:
            loss = self.auxiliary_loss(layer, name, x, A, logits, view)
            if loss is not None:
                mixed = _AddGradient.apply(mixed, loss, layer.moka_model.auxiliary_scale)
        if view.disabled:
            mixed = torch.zeros_like(mixed)
        elif view.adapter_mask is not None:
            mixed = mixed * view.adapter_mask[..., None]
        if layer.is_merged(name):
            mixed = mixed - self.mix(z, logits, replace(view, row=config.text_row, rows=None))
        return mixed.flatten(1)


class _AddGradient(torch.autograd.Function):
    """The identity of ``z``; in backward the gradient of a scalar, times a scale, flows besides that of z."""

    @staticmethod
    def forward(ctx, z, loss, scale):
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz):
        dtype, device = ctx.like
        return dz, torch.full((), ctx.scale, dtype=dtype, device=device), None


def own_rows(z: torch.Tensor, view: View) -> torch.Tensor:
    """Return each token's z under its own modality's A: [tokens, #A, r] -> [tokens, r]; the modalities' A come first."""
    if view.rows is None:
        return z[:, view.row]
    tokens, matrices, _ = z.shape
    index = torch.arange(tokens, device=z.device) * matrices + view.rows.flatten()
    return z.flatten(0, 1).index_select(0, index)


def weighted(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return each matrix's z times its weight, in the dtype of z. z: [tokens, #A, r] or [tokens, 1, r]; weights: [tokens, n]."""
    return z * weights.to(z.dtype)[..., None]
