"""Values of coalitions of modalities: Shapley values, and unique, redundant and synergistic shares.

A coalition S is a set of modalities, v(S) the value of a sample when only S is available: a tensor [batch].
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from moka.errors import MokaError

Coalition = frozenset[str]
Value = Callable[[Coalition], torch.Tensor]
# Exact values need 2^n coalitions.
MAX_EXACT_PLAYERS = 5


def all_coalitions(players: Sequence[str]) -> Iterator[Coalition]:
    """Yield every subset of ``players``, the empty one first and the full one last."""
    for size in range(len(players) + 1):
        yield from (frozenset(chosen) for chosen in combinations(players, size))


@dataclass(frozen=True)
class ShapleyValues:
    """The mean marginal value of each player over the orders in which the players can join."""

    values: dict[str, torch.Tensor]  # player -> [batch]
    permutations: int | None = None  # drawn orders; None: exact

    def __getitem__(self, player: str) -> torch.Tensor:
        return self.values[player]


def shapley_values(
    value: Value, players: Sequence[str], *, permutations: int | None = None, seed: int = 0
) -> ShapleyValues:
    """Return Shapley values (Shapley 1953), exact for up to `MAX_EXACT_PLAYERS` players and sampled for more.

        phi_m = sum over S without m of |S|! (n - |S| - 1)! / n! * (v(S + m) - v(S))

    Args:
        value: v(S) [batch]; called once for each coalition that is needed.
        players: names of the modalities.
        permutations: estimate from this many drawn orders instead; default: exact, or 200 for more players.
        seed: of the drawn orders.
    """
    table: dict[Coalition, torch.Tensor] = {}

    def known(coalition: Coalition) -> torch.Tensor:
        if coalition not in table:
            table[coalition] = value(coalition)
        return table[coalition]

    n = len(players)
    if permutations is None and n > MAX_EXACT_PLAYERS:
        permutations = 200
    found = {player: torch.zeros_like(known(frozenset())) for player in players}
    if permutations is None:
        for player in players:
            others = [other for other in players if other != player]
            for coalition in all_coalitions(others):
                weight = math.factorial(len(coalition)) * math.factorial(n - len(coalition) - 1) / math.factorial(n)
                found[player] += weight * (known(coalition | {player}) - known(coalition))
        return ShapleyValues(found)
    order, generator = list(players), random.Random(seed)
    for _ in range(permutations):
        generator.shuffle(order)
        for k, player in enumerate(order):
            before = frozenset(order[:k])
            found[player] += (known(before | {player}) - known(before)) / permutations
    return ShapleyValues(found, permutations)


@dataclass(frozen=True)
class InteractionShares:
    """How two modalities share what they tell about the answer, in the unit of the value: [batch] each.

    ``unique[first] + unique[second] + redundant + synergistic`` is the value that both add.
    """

    unique: dict[str, torch.Tensor]
    redundant: torch.Tensor
    synergistic: torch.Tensor


def interaction_shares(value: Value, first: str, second: str) -> InteractionShares:
    """Split the joint gain of two modalities into unique, redundant and synergistic shares.

    With the gains g(S) = v(S) - v({}): redundant is the smaller of g({a}) and g({b}) if both have one sign, else 0; unique_m
    is g({m}) - redundant; synergistic is the rest, g({a, b}) - g({a}) - g({b}) + redundant. The pointwise reading of the
    partial information decomposition (Williams and Beer, arXiv 1004.2515) with a minimum as its redundancy.
    """
    empty = value(frozenset())
    gain_first, gain_second = value(frozenset({first})) - empty, value(frozenset({second})) - empty
    smaller = torch.where(gain_first.abs() < gain_second.abs(), gain_first, gain_second)
    redundant = torch.where(gain_first * gain_second > 0, smaller, torch.zeros_like(smaller))
    both = value(frozenset({first, second})) - empty
    return InteractionShares(
        unique={first: gain_first - redundant, second: gain_second - redundant},
        redundant=redundant,
        synergistic=both - gain_first - gain_second + redundant,
    )


def dominance_ratios(value: Value, players: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return rho_m = exp(n / (n - 1) * (mean_k s_k - s_m)) with s_m = -v({m}): [batch] for each player.

    For two players it is the ratio of the geometric means of the answer's probabilities, in which the language prior
    cancels: the discrepancy ratio of OGM-GE (arXiv 2203.15332) and the ratio of AGM (arXiv 2308.07686).

    Raises:
        MokaError: fewer than two players.
    """
    if len(players) < 2:
        raise MokaError(f"dominance ratio: compares two or more modalities, got {list(players)}.")
    scores = torch.stack([-value(frozenset({player})) for player in players])  # [players, batch]
    factor = len(players) / (len(players) - 1)
    ratios = torch.exp(factor * (scores.mean(0) - scores))
    return dict(zip(players, ratios, strict=True))
