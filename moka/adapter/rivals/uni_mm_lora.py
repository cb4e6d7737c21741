"""Uni-modal + multimodal LoRA: an A for each modality with a shared B, and one LoRA that sees every token.

    y_t += s (B A_m(t) x_t + B' A' x_t)

Source: the MokA paper, figure 4, https://arxiv.org/abs/2506.05191.
"""

import torch

from .base import Rival, own_rows


class UniMMLora(Rival):
    """The last A and B are A' and B'."""

    name = "uni_mm_lora"
    by_modality = True

    def counts(self, modalities):
        return modalities + 1, 2, 0

    def mix(self, z, logits, view):
        return torch.stack((own_rows(z, view), z[:, -1]), 1)

    def text_path(self, A, B, text_row):
        return torch.cat((A[text_row], A[-1])), B.transpose(0, 1).flatten(1)
