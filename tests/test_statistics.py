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


@pytest.mark.parametrize(("n", "m"), [(2, 2), (4, 4), (5, 3), (12, 7)])
def test_welch_equals_scipy(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(1, 1, n), rng.normal(0, 3, m)
    expected = stats.ttest_ind(a, b, equal_var=False)
    gap, low, high, p = statistics.welch(a, b, 0.9)
    assert gap == pytest.approx(a.mean() - b.mean(), rel=1e-12)
    np.testing.assert_allclose((low, high), expected.confidence_interval(0.9), rtol=1e-9)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)


def test_welch_of_few_or_constant_values() -> None:
    assert np.isnan(statistics.welch([], [1.0])).all()
    assert statistics.welch([3.0], [1.0, 2.0])[0] == 1.5
    assert np.isnan(statistics.welch([3.0], [1.0, 2.0])[1:]).all()
    assert statistics.welch([3.0, 3.0], [1.0, 1.0]) == (2.0, 2.0, 2.0, 0.0)
    assert statistics.welch([3.0, 3.0], [3.0, 3.0])[3] == 1.0


def test_bootstrap_equals_scipy_and_is_the_same_every_time() -> None:
    values = np.random.default_rng(5).gamma(2, 1, 12)
    found = statistics.bootstrap_interval(values)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert found[0] == pytest.approx(values.mean(), rel=1e-12)
    np.testing.assert_allclose(found[1:], expected, rtol=0.02)
    assert statistics.bootstrap_interval(values) == found


def test_bootstrap_is_shown_from_ten_units() -> None:
    mean, low, high = statistics.bootstrap_interval(range(9))
    assert (mean, np.isnan(low), np.isnan(high)) == (4.0, True, True)
    assert not np.isnan(statistics.bootstrap_interval(range(10))).any()
    assert np.isnan(statistics.bootstrap_interval([])[0])


@pytest.mark.parametrize(("n", "expected"), [(4, 0.80), (8, 0.89)])
def test_why_a_bootstrap_of_few_units_is_not_shown(n: int, expected: float) -> None:
    rng = np.random.default_rng(6)
    covered = []
    for _ in range(1500):
        values = rng.normal(0, 1, n)
        means = values[rng.integers(0, n, (1000, n))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered.append(low < 0 < high)
    assert np.mean(covered) == pytest.approx(expected, abs=0.03)


def test_benjamini_hochberg_equals_scipy() -> None:
    rng = np.random.default_rng(7)
    for size in (1, 2, 7, 40):
        p = rng.beta(0.5, 1, size)
        expected = stats.false_discovery_control(p, method="bh")
        np.testing.assert_allclose(statistics.benjamini_hochberg(p), expected, rtol=1e-12)
    found = statistics.benjamini_hochberg([0.01, np.nan, 0.04])
    np.testing.assert_allclose(found, [0.03, np.nan, 0.06])
    assert statistics.benjamini_hochberg([]).size == 0


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_label_swap_equals_brute_force(n: int) -> None:
    """Over runs of two levels: every way to give out the labels within each seed."""
    rng = np.random.default_rng(n)
    overlap = rng.normal(0, 1, (2 * n, 2 * n))
    overlap += overlap.T
    seed = np.arange(2 * n) // 2

    def statistic(level: np.ndarray) -> float:
        gaps = []
        for kinds in ((0, 1), (1, 0)), ((0, 0),), ((1, 1),):
            found = [
                overlap[a, b]
                for a in range(2 * n)
                for b in range(a + 1, 2 * n)
                if seed[a] != seed[b] and (level[a], level[b]) in kinds
            ]
            gaps.append(np.mean(found))
        return gaps[0] - (gaps[1] + gaps[2]) / 2

    labelings = [
        np.array([label for first in swap for label in (first, 1 - first)])
        for swap in itertools.product([0, 1], repeat=n)
    ]
    own = abs(statistic(labelings[0]))
    expected = np.mean([abs(statistic(level)) >= own - 1e-12 for level in labelings])
    gaps = np.zeros((n, n))
    for i, j in itertools.permutations(range(n), 2):
        (a, b), (c, d) = (2 * i, 2 * i + 1), (2 * j, 2 * j + 1)
        across, within = overlap[a, d] + overlap[b, c], overlap[a, c] + overlap[b, d]
        gaps[i, j] = (across - within) / 2
    assert statistics.label_swap(gaps) == pytest.approx(expected, rel=1e-12)


def test_label_swap_floor_is_what_equal_gaps_give() -> None:
    for n in (2, 3, 4, 6, 18):
        gaps = np.full((n, n), -1.0)
        floor = statistics.label_swap_floor(n)
        assert statistics.label_swap(gaps) == pytest.approx(floor, rel=1e-9, abs=1e-4)
    assert statistics.label_swap_floor(2) == 1
    assert statistics.label_swap_floor(6) == 1 / 32
    assert np.isnan(statistics.label_swap(np.zeros((1, 1))))
    assert np.isnan(statistics.label_swap(np.full((3, 3), np.nan)))


def test_label_swap_is_valid_under_the_null() -> None:
    rng = np.random.default_rng(8)
    p = []
    for _ in range(2000):
        gaps = rng.normal(0, 1, (4, 4))
        p.append(statistics.label_swap(gaps + gaps.T))
    for alpha in (0.125, 0.25, 0.5):
        assert np.mean(np.array(p) <= alpha) == pytest.approx(alpha, abs=0.03)
