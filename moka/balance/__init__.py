"""Balanced multimodal learning: strategies that keep one modality from starving the others while an adapter is trained.

    batch -> prepare (hide tokens) -> forward -> backward -> update (scale the updates of A by modality) -> optimizer

A strategy says what it needs (`Needs`, with its cost in forwards); `BalanceCallback` carries strategies into any `Trainer`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from moka.errors import MokaError, nearest

from .callback import BalanceCallback
from .handles import Handles
from .learning_rates import LearningRates
from .ogm import OGM
from .opm import OPM
from .strategy import BalanceStrategy, Needs, StepContext

STRATEGIES: dict[str, type[BalanceStrategy]] = {"learning_rates": LearningRates, "ogm": OGM, "opm": OPM}


def build_strategies(entries: Sequence[Any], where: str = "balance") -> list[BalanceStrategy]:
    """Return the strategies of a configuration's list: ``[{name: ogm, alpha: 0.3}, ...]``.

    Raises:
        MokaError: an unknown name or key, a value that is not allowed, a name given twice.
    """
    found: list[BalanceStrategy] = []
    for i, entry in enumerate(entries):
        place = f"{where}[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise MokaError(f"{place}: {entry!r}; give a mapping with a name: {', '.join(STRATEGIES)}.")
        settings = dict(entry)
        name = settings.pop("name")
        if name not in STRATEGIES:
            raise MokaError(f"{place}.name: {name!r}; allowed: {', '.join(STRATEGIES)}.{nearest(name, STRATEGIES)}")
        known = inspect.signature(STRATEGIES[name]).parameters
        for key in settings:
            if key not in known:
                raise MokaError(f"{place}.{key}: unknown; {name} has {', '.join(known)}.{nearest(str(key), known)}")
        try:
            found.append(STRATEGIES[name](**settings))
        except (TypeError, AttributeError) as error:
            raise MokaError(f"{place}: {settings}: {error}. Correct the values.") from error
    names = [strategy.name for strategy in found]
    if len(set(names)) < len(names):
        raise MokaError(f"{where}: {', '.join(names)}: a strategy is named twice; give each once.")
    return found


__all__ = [
    "OGM",
    "OPM",
    "STRATEGIES",
    "BalanceCallback",
    "BalanceStrategy",
    "Handles",
    "LearningRates",
    "Needs",
    "StepContext",
    "build_strategies",
]
