"""HydraLoRA: one A, as many B as modalities, weighed for each token by a softmax router.

    y_t += s sum_k w_k(x_t) B_k A x_t,    w(x) = softmax(W_g x)

Source: Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", NeurIPS 2024,
https://arxiv.org/abs/2404.19245.
"""

from .base import Rival, weighted


class HydraLora(Rival):
    name = "hydralora"
    mergeable = False

    def counts(self, modalities):
        return 1, modalities, modalities

    def mix(self, z, logits, view):
        return weighted(z, logits.softmax(-1))
