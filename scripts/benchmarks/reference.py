"""The method computed plainly, the way the paper's published code computes it; for comparison only.

    x ── x * mask_text   ── dropout ── A_text   ── z_text   ─┐
    x ── x * mask_visual ── dropout ── A_visual ── z_visual ─┤ for each sample of the batch: its media tokens attend to
    x ── x * mask_audio  ── dropout ── A_audio  ── z_audio  ─┤ its question's text tokens, and the result is scattered back
                                                             └─(+)── B ── s ──(+ W0 x)

Every modality has a full-length copy of x, masked, and a matrix of its own; a Python loop goes over the samples. With
dropout off the numbers are MokA's, which every benchmark asserts before it measures (``variants.check_same``).

Source of the method: Wei, Miao, Zhou, Hu, NeurIPS 2025, https://arxiv.org/abs/2506.05191.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from moka.adapter import MokaLinear


@dataclass
class Masks:
    """Which token is what; set before each forward, read by every layer."""

    modalities: list[torch.Tensor]  # of [batch, seq] bool, text first
    question: torch.Tensor  # [batch, seq] bool


class ReferenceLinear(nn.Module):
    """A frozen linear map with the adapter, computed plainly."""

    def __init__(
        self,
        base: nn.Module,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        dropout: float,
        shared: dict[str, Masks],
    ) -> None:
        """``A``: [M, r, in]; ``B``: [out, r]; ``shared``: has the masks of the running forward under "masks"."""
        super().__init__()
        self.base_layer, self.scaling, self.shared = base, scaling, shared
        self.A = nn.ModuleList(_linear(a) for a in A)
        self.B = _linear(B)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in] -> [batch, seq, out]"""
        masks = self.shared["masks"]
        parts = []
        for A, mask in zip(self.A, masks.modalities, strict=True):
            parts.append(A(self.dropout(x * mask[..., None].to(x.dtype))))  # [batch, seq, r]
        text, *media = parts
        mixed = text
        for z, mask in zip(media, masks.modalities[1:], strict=True):
            mixed = mixed + z + _read_question(z, text, mask, masks.question)
        return self.base_layer(x) + self.B(mixed) * self.scaling


def _read_question(z: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    """Return what each media token of one modality takes from its question: [batch, seq, r], zeros elsewhere."""
    read = torch.zeros_like(z)
    for sample in range(len(z)):
        queries, keys = z[sample, mask[sample]], text[sample, question[sample]]  # [queries, r], [keys, r]
        if len(queries) and len(keys):
            share = (queries @ keys.T / math.sqrt(z.shape[-1])).softmax(-1)
            read[sample, mask[sample]] = (share @ keys).to(read.dtype)
    return read


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def put_reference(backbone: nn.Module, adapted: nn.Module, shared: dict[str, Masks]) -> nn.Module:
    """Adapt ``backbone`` in place with the weights of ``adapted``, a PeftModel with MokA on the same backbone."""
    inner = adapted.base_model.model
    for name, layer in inner.named_modules():
        if isinstance(layer, MokaLinear):
            config, A, B = layer.moka_config["default"], layer.moka_A["default"].weight, layer.moka_B["default"].weight
            base = backbone.get_submodule(name)
            scaling = config.alpha / config.r
            parent, _, child = name.rpartition(".")
            plain = ReferenceLinear(base, A.detach(), B.detach(), scaling, config.dropout, shared)
            setattr(backbone.get_submodule(parent), child, plain)
    return backbone


def stacked_gradients(layer: ReferenceLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in the layout of ``moka_A`` [M, r, in] and ``moka_B`` [out, r]."""
    return torch.stack([a.weight.grad for a in layer.A]), layer.B.weight.grad
