"""Shapley values, shares and ratios against values computed by hand."""

import math

import pytest
import torch

from moka import MokaError
from moka.analysis import dominance_ratios, interaction_shares, shapley_values
from moka.analysis.coalitions import all_coalitions


def game(weights, bonus=0.0):
    """A value that adds the players' weights, and a bonus for the first two together."""
    names = list(weights)

    def value(coalition):
        together = bonus if {names[0], names[1]} <= coalition else 0.0
        return torch.tensor([sum(weights[name] for name in coalition) + together, 1.0])

    return value


def test_an_additive_game_gives_each_player_its_weight():
    weights = {"visual": 2.0, "audio": -0.5, "touch": 0.0}
    values = shapley_values(game(weights), list(weights))
    assert values.permutations is None
    for name, weight in weights.items():
        torch.testing.assert_close(values[name], torch.tensor([weight, 0.0]))


def test_a_joint_bonus_is_shared_equally():
    values = shapley_values(game({"visual": 1.0, "audio": 3.0}, bonus=4.0), ["visual", "audio"])
    assert values["visual"][0] == pytest.approx(3.0)
    assert values["audio"][0] == pytest.approx(5.0)


def test_sampled_values_approach_the_exact_ones_and_sum_exactly():
    players = list("abcdef")
    value = game({name: float(k) for k, name in enumerate(players)}, bonus=2.0)
    sampled = shapley_values(value, players)
    assert sampled.permutations == 200
    exact = {name: k + (1.0 if name in "ab" else 0.0) for k, name in enumerate(players)}
    for name in players:
        assert sampled[name][0] == pytest.approx(exact[name], abs=0.3)
    assert sum(sampled[name][0] for name in players) == pytest.approx(value(frozenset(players))[0])


@pytest.mark.parametrize(
    ("a", "b", "both", "unique_a", "unique_b", "redundant", "synergistic"),
    [
        (1.0, 3.0, 3.0, 0.0, 2.0, 1.0, 0.0),  # a says a part of what b says
        (1.0, 2.0, 3.0, 0.0, 1.0, 1.0, 1.0),
        (0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0),  # only together, as a sum of two digits
        (-1.0, 2.0, 1.0, -1.0, 2.0, 0.0, 0.0),  # one misleads
        (-1.0, -3.0, -3.0, 0.0, -2.0, -1.0, 0.0),
    ],
)
def test_shares_of_two_modalities(a, b, both, unique_a, unique_b, redundant, synergistic):
    table = {frozenset(): 5.0, frozenset("a"): 5 + a, frozenset("b"): 5 + b, frozenset("ab"): 5 + both}
    shares = interaction_shares(lambda coalition: torch.tensor([table[coalition]]), "a", "b")
    found = (shares.unique["a"], shares.unique["b"], shares.redundant, shares.synergistic)
    assert [value.item() for value in found] == pytest.approx([unique_a, unique_b, redundant, synergistic])
    assert sum(value.item() for value in found) == pytest.approx(both)


def test_the_ratio_of_two_modalities_is_that_of_their_probabilities():
    table = {"visual": math.log(0.8), "audio": math.log(0.2)}
    ratios = dominance_ratios(lambda coalition: torch.tensor([table[next(iter(coalition))]]), ["visual", "audio"])
    assert ratios["visual"].item() == pytest.approx(4.0)
    assert ratios["audio"].item() == pytest.approx(0.25)
    with pytest.raises(MokaError, match="visual"):
        dominance_ratios(lambda coalition: torch.tensor([0.0]), ["visual"])


def test_coalitions_are_every_subset_once():
    found = list(all_coalitions(["a", "b", "c"]))
    assert len(found) == len(set(found)) == 8
    assert found[0] == frozenset()
    assert found[-1] == frozenset("abc")
