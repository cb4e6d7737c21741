"""Evaluation: free-running generation, scoring, comparison tables."""

from .evaluate import evaluate, show, write
from .scoring import exact_match, normalise, wilson

__all__ = ["evaluate", "exact_match", "normalise", "show", "wilson", "write"]
