"""Measure which modality a multimodal LLM uses: contributions, gradients, attention, and the report of `moka diagnose`."""

from .coalitions import InteractionShares, ShapleyValues, dominance_ratios, interaction_shares, shapley_values
from .contribution import Contribution

__all__ = [
    "Contribution",
    "InteractionShares",
    "ShapleyValues",
    "dominance_ratios",
    "interaction_shares",
    "shapley_values",
]
