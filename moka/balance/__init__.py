"""Balanced multimodal learning: strategies that keep one modality from starving the others while a MokA adapter trains."""

from .balance import Balance
from .handles import Handles
from .inforeg import InfoReg
from .mla import MLA
from .ogm import OGM
from .opm import OPM
from .pareto import MMPareto, ParetoB
from .rates import LearningRates
from .registry import STRATEGIES, build_strategies
from .relearning import Relearning
from .strategy import BalanceStrategy, Context, Needs
from .trainer import BalanceCallback, BalancedTrainer, BalancedTrainerMixin
from .unimodal import CML, UnimodalLosses
from .valuation import Valuation

__all__ = [
    "CML",
    "MLA",
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
    "InfoReg",
    "LearningRates",
    "MMPareto",
    "Needs",
    "ParetoB",
    "Relearning",
    "UnimodalLosses",
    "Valuation",
    "build_strategies",
]
