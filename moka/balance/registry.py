"""Strategies by their names in the YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moka.errors import MokaError, nearest
from moka.type_checks import from_mapping

from .balance import check_together
from .greedy import Greedy
from .inforeg import InfoReg
from .mla import MLA
from .norms import NormBalance
from .ogm import OGM
from .opm import OPM
from .pareto import MMPareto, ParetoB
from .pmr import PMR
from .rates import LearningRates
from .relearning import Relearning
from .single import SingleModality
from .strategy import BalanceStrategy
from .umt import UMT
from .unimodal import CML, UnimodalLosses
from .valuation import Valuation

STRATEGIES: dict[str, type[BalanceStrategy]] = {
    strategy.name: strategy
    for strategy in (
        LearningRates,
        OGM,
        OPM,
        UnimodalLosses,
        CML,
        MMPareto,
        ParetoB,
        Relearning,
        InfoReg,
        MLA,
        Valuation,
        PMR,
        UMT,
        SingleModality,
        Greedy,
        NormBalance,
    )
}


def build_strategies(entries: Sequence[Mapping[str, Any]], where: str = "balance") -> list[BalanceStrategy]:
    """Return the strategies of a list such as ``[{name: opm, q_base: 0.5}]``.

    Args:
        where: begins the messages.
    Raises:
        MokaError: an unknown name or key (with the nearest one), a value that is not allowed, two that change the same thing.
    """
    found = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise MokaError(
                f"{where}: entry {number + 1} is {entry!r}; a mapping with name is expected, such as {{name: ogm, alpha: 0.3}}."
            )
        name = entry["name"]
        if name not in STRATEGIES:
            raise MokaError(
                f"{where}: unknown strategy {name!r}; there is {', '.join(STRATEGIES)}.{nearest(str(name), STRATEGIES)}"
            )
        values = {key: value for key, value in entry.items() if key != "name"}
        found.append(from_mapping(STRATEGIES[name], values, f"{where}: {name}"))  # type: ignore[type-var]
    check_together(found)
    return found
