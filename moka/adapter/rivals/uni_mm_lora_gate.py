"""Uni-modal + multimodal LoRA with a gate between the two.

    y_t += s (g_t B A_m(t) x_t + (1 - g_t) B' A' x_t),    g_t = sigmoid(w x_t)

The paper names the gate and does not print it: one logit a token is our reading.
Source: the MokA paper, figure 4, https://arxiv.org/abs/2506.05191.
"""

import torch

from .base import weighted
from .uni_mm_lora import UniMMLora


class UniMMLoraGate(UniMMLora):
    name = "uni_mm_lora_gate"
    mergeable = False

    def counts(self, modalities):
        return modalities + 1, 2, 1

    def mix(self, z, logits, view):
        return weighted(super().mix(z, logits, view), torch.cat((logits, -logits), -1).sigmoid())
