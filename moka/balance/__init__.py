"""Balanced multimodal learning: strategies that keep one modality from starving the others while a MokA adapter trains."""

from .balance import Balance
from .handles import Handles
from .ogm import OGM
from .opm import OPM
from .pareto import MMPareto, ParetoB
from .rates import LearningRates
from .registry import STRATEGIES, build_strategies
from .strategy import BalanceStrategy, Context, Needs
from .trainer import BalanceCallback, BalancedTrainer, BalancedTrainerMixin
from .unimodal import CML, UnimodalLosses

__all__ = [
    "CML",
    "OGM",
    "OPM",
    "STRATEGIES",
    "Balance",
    "BalanceCallback",
    "BalanceStrategy",
    "BalancedTrainer",
    "BalancedTrainerMixin",
    "Context",
    "Handles",
    "LearningRates",
    "MMPareto",
    "Needs",
    "ParetoB",
    "UnimodalLosses",
    "build_strategies",
]
