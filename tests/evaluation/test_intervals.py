"""Intervals: known values, what they resample, and that they come out the same again."""

import numpy as np
import pytest

from moka.evaluation import wilson
from moka.evaluation.benchmarks.intervals import bootstrap, clustered_proportion, percent, proportion, resampled


def test_independent_proportion_has_wilsons_interval():
    figure = proportion(81, 263)
    assert figure["value"] == pytest.approx(100 * 81 / 263)
    # R's binom::binom.confint(81, 263, methods = "wilson").
    assert figure["interval"] == pytest.approx([25.52706, 36.62153], abs=2e-3)
    assert (figure["n"], figure["method"]) == (263, "Wilson")


def test_proportion_of_nothing_is_undefined():
    assert proportion(0, 0) == {"value": None, "interval": None, "n": 0, "method": "Wilson"}


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(50, 10, 400)
    figure = bootstrap(np.stack([values, np.ones(400)], axis=1), percent)
    half = 100 * 1.96 * values.std() / 20
    low, high = figure["interval"]
    assert figure["value"] == pytest.approx(100 * values.mean())
    assert low == pytest.approx(100 * values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(100 * values.mean() + half, abs=0.15 * half)


def test_bootstrap_is_the_same_every_time():
    units = np.random.default_rng(2).random((30, 2))
    assert bootstrap(units, percent) == bootstrap(units, percent)
    assert resampled(units).shape == (1000, 2)


def test_records_of_one_cluster_are_drawn_together():
    # 50 clusters of 20 equal answers are 50 observations, not 1000.
    right = [cluster % 2 == 0 for cluster in range(50) for _ in range(20)]
    clusters = [cluster for cluster in range(50) for _ in range(20)]
    figure = clustered_proportion(right, clusters)
    low, high = wilson(25, 50)
    assert figure["value"] == 50
    assert figure["n"] == 1000
    assert figure["interval"] == pytest.approx([100 * low, 100 * high], abs=2.5)
    single = clustered_proportion(right, range(1000))
    assert single["method"] == "Wilson"
    assert single["interval"][1] - single["interval"][0] < 0.3 * (high - low) * 100


def test_statistic_that_is_undefined_has_no_value():
    figure = bootstrap(np.zeros((3, 2)), percent)
    assert figure["value"] is None
    assert figure["interval"] is None
