"""Evaluation: free-running generation, scoring of benchmarks, comparison tables."""

from .answers import ask
from .benchmarks import BENCHMARKS, score
from .evaluate import evaluate, evaluate_benchmark, show, write
from .predictions import read_predictions
from .scoring import exact_match, normalise, wilson

__all__ = [
    "BENCHMARKS",
    "ask",
    "evaluate",
    "evaluate_benchmark",
    "exact_match",
    "normalise",
    "read_predictions",
    "score",
    "show",
    "wilson",
    "write",
]
