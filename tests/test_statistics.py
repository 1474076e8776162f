"""Inference against scipy, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rlsparse import statistics


def test_log_odds_and_density_by_hand() -> None:
    assert statistics.log_odds(0, 99) == pytest.approx(np.log(0.005 / 0.995))
    assert statistics.log_odds(99, 99) == pytest.approx(np.log(0.995 / 0.005))
    assert statistics.log_density(3, 6) == pytest.approx(np.log(0.5))
    np.testing.assert_allclose(statistics.log_odds([1, 2], [4, 4]), [np.log(1.5 / 3.5), 0.0])


@pytest.mark.parametrize("changed", [0, 1, 7, 10**9 - 1, 10**9])
def test_odds_of_a_density_are_those_of_its_counts(changed: int) -> None:
    odds = statistics.odds_unchanged(float(statistics.log_density(changed, 10**9)))
    assert odds == pytest.approx(-float(statistics.log_odds(changed, 10**9)), rel=1e-5, abs=1e-5)


def test_t_interval_and_p_equal_scipy() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, (3, 5))
    mean, low, high = statistics.t_interval(values, 0.9)
    expected = stats.t.interval(0.9, 4, values.mean(1), stats.sem(values, axis=1))
    np.testing.assert_allclose((low, high), expected)
    np.testing.assert_allclose(mean, values.mean(1))
    for row in values:
        expected_p = stats.ttest_1samp(row, 0.2).pvalue
        assert statistics.t_p_value(row, 0.2) == pytest.approx(expected_p)


def test_too_few_or_constant_values() -> None:
    assert np.isnan(statistics.t_interval([])[0])
    mean, low, high = statistics.t_interval([2.0])
    assert (mean, np.isnan(low), np.isnan(high)) == (2.0, True, True)
    assert np.isnan(statistics.t_p_value([2.0], 0))
    assert statistics.t_p_value([1.0, 1.0], 0) == 0
    assert statistics.t_p_value([1.0, 1.0], 1) == 1
    assert np.isnan(statistics.sign_flip([]))


def test_t_interval_covers_at_its_level() -> None:
    values = np.random.default_rng(1).normal(0.7, 2, (20_000, 4))
    _, low, high = statistics.t_interval(values)
    assert np.mean((low < 0.7) & (high > 0.7)) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_sign_flip_equals_brute_force(n: int) -> None:
    values = np.random.default_rng(n).normal(0.5, 1, n)
    flips = [abs(np.dot(s, values)) for s in itertools.product([1, -1], repeat=n)]
    expected = np.mean([flip >= abs(values.sum()) - 1e-12 for flip in flips])
    assert statistics.sign_flip(values) == pytest.approx(expected)


def test_sign_flip_floor_is_what_equal_signs_give() -> None:
    for n in (1, 3, 4, 6, 16):
        assert (
            statistics.sign_flip(np.arange(1.0, n + 1)) == statistics.sign_flip_floor(n) == 2 / 2**n
        )
    assert statistics.sign_flip_floor(0) == 1
    assert statistics.sign_flip(np.zeros(5)) == 1
    many = np.random.default_rng(0).normal(0.4, 1, 20)
    assert statistics.sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert statistics.sign_flip(np.ones(40)) >= statistics.sign_flip_floor(40) > 0


def test_holm_by_hand() -> None:
    adjusted = statistics.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.02, np.nan, 0.9]), [0.06, np.nan, 1.0])
    np.testing.assert_allclose(
        statistics.holm_levels([0.01, 0.04, 0.03, 0.005], 0.05), [0.05 / 3, 0.025, 0.025, 0.0125]
    )


def test_holm_levels_decide_as_holm_p_values_do() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        p = rng.uniform(0, 0.1, rng.integers(1, 6))
        rejected = p < statistics.holm_levels(p, 0.05)
        np.testing.assert_array_equal(rejected, statistics.holm(p) < 0.05)


def test_jackknife_of_values_of_one_unit_each_is_the_values() -> None:
    values = [3.0, 1.0, 4.0, 1.5]
    np.testing.assert_allclose(statistics.jackknife(values, [{0}, {1}, {2}, {3}]), values)
    assert statistics.jackknife([1.0], [{0, 1}]).size == 0


@pytest.mark.parametrize(("node", "pair"), [(1.0, 0.0), (1.0, 0.5), (0.0, 1.0)])
def test_jackknife_interval_over_dependent_pairs_covers(node: float, pair: float) -> None:
    rng = np.random.default_rng(4)
    n, pairs = 5, list(itertools.combinations(range(5), 2))
    covered, naive = [], []
    for _ in range(1500):
        effect, noise = rng.normal(0, 1, n), rng.normal(0, 1, len(pairs))
        values = [
            node * (effect[a] + effect[b]) + pair * e
            for (a, b), e in zip(pairs, noise, strict=True)
        ]
        _, low, high = statistics.t_interval(statistics.jackknife(values, [set(p) for p in pairs]))
        covered.append(low < 0 < high)
        _, low, high = statistics.t_interval(values)
        naive.append(low < 0 < high)
    assert np.mean(covered) > 0.93
    if node:
        assert np.mean(naive) < 0.85  # why a t interval over pairs will not do
