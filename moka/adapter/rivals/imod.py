"""IMoD (experimental): one LoRA whose A is divided by fixed random masks into text, other and shared elements.

    y_t += s B A x_t                                             as LoRA, also at inference: it merges
    grad A = grad_A L_task + l1 G_D + l2 G_S                     never added to the loss; x is a constant in G_D and G_S

    G_D = grad_A |(A * (M_t + M_s)) X_t - A X_t|^2 + |(A * (M_o + M_s)) X_o - A X_o|^2         decoupling
    G_S = grad_A 1 - (c_t + c_o) cos(mean s_t, mean s_o),    s_i = (A * M_s) X_i               alignment

X_t, X_o: the inputs of the text tokens and of the others of one sequence, without padding; c: the mean cosine of a token's s and
its mean. Both are means over the sequences of a batch; a sequence of one kind has no alignment term. M_t + M_o + M_s = 1, drawn
once for each layer from ``seed`` and the layer's name. The shared elements' share of block l of L is ``shared_share`` +
``shared_growth`` * l / L; the rest is halved between text and others.

Known to us from a third party's summary and not from its code: r_s(0), ``shared_share``, is a guess, and so are the units of l1.
Source: "Implicit Modality Decomposition", CVPR 2026.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .base import Rival

if TYPE_CHECKING:
    from ..layer import MokaLinear
    from ..routing import View

TEXT, OTHER, SHARED = 0, 1, 2


class IMoD(Rival):
    name = "imod"
    options = {
        "shared_share": 0.2,
        "shared_growth": 0.4,
        "decoupling_weight": 1.0,
        "alignment_weight": 1e-4,
        "seed": 0,
    }
    trained_by_modality = True

    def counts(self, modalities):
        return 1, 1, 0

    def auxiliary_loss(self, layer, name, x, A, logits, view) -> torch.Tensor | None:
        config, masks = layer.moka_config[name], element_masks(layer, name, A[0])
        text, other = _tokens(view, config.text_row, len(x), x.device)  # [batch, seq] bool
        with torch.autocast(x.device.type, enabled=False):
            parts = A[0].float() * torch.stack([masks == part for part in (TEXT, OTHER, SHARED)])  # [3, r, in]
            s = (x.detach().float() @ parts.flatten(0, 1).t()).view(*text.shape, 3, -1)  # [batch, seq, 3, r]
            # A masked less A: the others' elements are taken from text, and text's from the others.
            taken = (s[:, :, OTHER] * text[..., None]).square().sum() + (
                s[:, :, TEXT] * other[..., None]
            ).square().sum()
            alignment = _alignment(s[:, :, SHARED], text, other)
        weights = config.method_option("decoupling_weight"), config.method_option("alignment_weight")
        return weights[0] * taken / len(text) + weights[1] * alignment


def _tokens(view: View, text_row: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are text and which are others, [batch, seq] bool each; padding is neither."""
    valid, rows = view.valid, view.rows
    known = valid if valid is not None else rows
    real = torch.ones((1, tokens) if known is None else known.shape, dtype=torch.bool, device=device)
    real = real if valid is None else valid.to(device)
    text = torch.full_like(real, view.row == text_row) if rows is None else rows == text_row
    return real & text, real & ~text


def _alignment(s: torch.Tensor, text: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the mean over sequences of 1 - (c_t + c_o) cos(mean s_t, mean s_o). s: [batch, seq, r]; masks: [batch, seq]."""
    means, concentrations = [], []
    for mask in (text, other):
        part, count = mask[..., None].to(s.dtype), mask.sum(1).clamp(min=1)  # [batch, seq, 1], [batch]
        mean = (s * part).sum(1) / count[:, None]  # [batch, r]
        cosine = F.cosine_similarity(s, mean[:, None], dim=-1)  # [batch, seq]
        means.append(mean)
        concentrations.append((cosine * mask).sum(1) / count)
    both = text.any(1) & other.any(1)
    loss = 1 - (concentrations[0] + concentrations[1]) * F.cosine_similarity(means[0], means[1], dim=-1)
    return (loss * both).sum() / len(both)


def element_masks(layer: MokaLinear, name: str, A: torch.Tensor) -> torch.Tensor:
    """Return whose each element of A [r, in] is, int8: 0 text, 1 other, 2 shared. Kept with the layer, not saved."""
    kept = layer.moka_masks.get(name)
    if kept is None or kept.shape != A.shape:
        config = layer.moka_config[name]
        option = config.method_option
        shared = min(1.0, option("shared_share") + option("shared_growth") * layer.moka_depth)
        generator = torch.Generator().manual_seed(int(option("seed")) + zlib.crc32(layer.moka_path.encode()))
        drawn = torch.rand(A.shape, generator=generator)
        kept = torch.full(A.shape, OTHER, dtype=torch.int8)
        kept[drawn < shared + (1 - shared) / 2] = TEXT
        kept[drawn < shared] = SHARED
    if kept.device != A.device:
        kept = kept.to(A.device)
    layer.moka_masks[name] = kept
    return kept


def relative_depth(model: nn.Module, path: str) -> float:
    """Return l / L of the layer at ``path``, which is in block l, from 0, of L; 0 if it is in no list of blocks."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return int(part) / len(list(model.get_submodule(".".join(parts[:index])).children()))
    return 0.0
