"""LoRAMoE: as many LoRAs as modalities, weighed for each token by a softmax router.

    y_t += s sum_k w_k(x_t) B_k A_k x_t,    w(x) = softmax(W_g x)

``balance_weight`` (0: off): the gradient of L = balance_weight * Var(I) / mean(I) is added, I_k = sum_t w_k(x_t) over the tokens of a
forward, padding left out. It is the paper's localized balancing constraint without its types of experts (delta = 0).
Source: Dou et al., "LoRAMoE", ACL 2024, https://arxiv.org/abs/2312.09979.
"""

from __future__ import annotations

import torch

from .base import Rival, weighted


class LoraMoE(Rival):
    name = "loramoe"
    options = {"balance_weight": 0.0}
    mergeable = False

    def reads_padding(self, config):
        return config.method_option("balance_weight") > 0

    def counts(self, modalities):
        return modalities, modalities, modalities

    def mix(self, z, logits, view):
        return weighted(z, logits.softmax(-1))

    def auxiliary_loss(self, layer, name, x, A, logits, view) -> torch.Tensor | None:
        weight = layer.moka_config[name].method_option("balance_weight")
        if weight == 0:
            return None
        weights = logits.softmax(-1)
        valid = view.valid
        if valid is not None:
            weights = weights * valid.to(x.device).reshape(-1, 1)
        importance = weights.sum(0)  # [experts]
        return weight * importance.var(correction=0) / importance.mean()
