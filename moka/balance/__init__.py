"""Balanced multimodal learning: strategies that keep one modality from starving the others while a MokA adapter trains."""

from .balance import Balance
from .greedy import Greedy
from .handles import Handles
from .inforeg import InfoReg
from .mla import MLA
from .norms import NormBalance
from .ogm import OGM
from .opm import OPM
from .pareto import MMPareto, ParetoB
from .pmr import PMR
from .rates import LearningRates
from .registry import STRATEGIES, build_strategies
from .relearning import Relearning
from .single import SingleModality
from .strategy import BalanceStrategy, Context, Needs
from .trainer import BalanceCallback, BalancedTrainer, BalancedTrainerMixin
from .umt import UMT
from .unimodal import CML, UnimodalLosses
from .valuation import Valuation

__all__ = [
    "CML",
    "MLA",
    "OGM",
    "OPM",
    "PMR",
    "STRATEGIES",
    "UMT",
    "Balance",
    "BalanceCallback",
    "BalanceStrategy",
    "BalancedTrainer",
    "BalancedTrainerMixin",
    "Context",
    "Greedy",
    "Handles",
    "InfoReg",
    "LearningRates",
    "MMPareto",
    "Needs",
    "NormBalance",
    "ParetoB",
    "Relearning",
    "SingleModality",
    "UnimodalLosses",
    "Valuation",
    "build_strategies",
]
