"""The rules of verdicts as such: p values, intervals, error rates."""

import numpy as np
import pytest
from scipy import stats

from rlsparse.claims.contrasts import Contrast
from rlsparse.claims.rules import Region, Rule


def rule(region: Region, others: Region | None = None, decides: str = "all") -> Rule:
    return Rule("identity", float, "", "", region, others or region, decides)  # type: ignore[arg-type]


def drawn(*means: float, n: int = 5, seed: int = 0) -> list[Contrast]:
    rng = np.random.default_rng(seed)
    return [Contrast.of(rng.normal(mean, 1, n)) for mean in means]


def test_a_contrast_is_a_t_test() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, 7)
    found = stats.ttest_1samp(values, 0.2)
    one = Contrast.of(values)
    assert one.p_value(0.2) == pytest.approx(found.pvalue, rel=1e-12)
    low, high = found.confidence_interval(0.9)
    assert one.interval(0.9) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))
    assert one.p_value(np.inf) == 0.0
    steady = Contrast.of(np.full(4, 0.5))
    assert (steady.p_value(0.5), steady.p_value(0.4)) == (1.0, 0.0)
    assert np.isnan(
        [*Contrast.of(values[:1]).interval(0.9), Contrast.of(values[:0]).estimate]
    ).all()


@pytest.mark.parametrize("decides", ["all", "equivalent", "any"])
def test_verdicts_by_p_are_verdicts_by_interval(decides: str) -> None:
    region, alpha, k = Region(-0.6, 0.9), 0.05, 3
    seen = set()
    for seed in range(300):
        contrasts = drawn(*np.random.default_rng(seed).normal(0.15, 0.5, k), n=60, seed=seed)
        inside_at = {"all": alpha, "equivalent": 2 * alpha, "any": alpha / k}[decides]
        tight = [one.interval(1 - inside_at) for one in contrasts]
        wide = [one.interval(1 - alpha / k) for one in contrasts]
        inside = all(low > -0.6 and high < 0.9 for low, high in tight)
        outside = any(high < -0.6 or low > 0.9 for low, high in wide)
        supported, refuted = (p < alpha for p in rule(region, decides=decides).p_values(contrasts))
        expected = {
            "all": (inside, outside), "equivalent": (inside, False), "any": (outside, inside)
        }[decides]  # fmt: skip
        assert (supported, refuted) == expected
        seen.add(expected)
    assert len(seen) == (2 if decides == "equivalent" else 3)


def test_false_verdicts_at_the_edge_are_rare() -> None:
    """All true effects 0, the edge: neither verdict is right, over five contrasts."""
    rng = np.random.default_rng(7)
    num, k, n = 4000, 5, 5
    values = rng.normal(0, 1, (num, k, n))
    least = rule(Region(low=0.0))
    found = [least.p_values([Contrast.of(values[i, j]) for j in range(k)]) for i in range(num)]
    supported, refuted = np.mean(np.array(found) < 0.05, axis=0)
    error = np.sqrt(0.025 * 0.975 / num)
    assert supported < 0.01
    assert abs(refuted - 0.025) < 4 * error  # one side of two, Bonferroni is nearly exact


def test_a_region_that_fails_below_another_edge() -> None:
    """Above 0 is beaten; below .02 is not: in between the interval decides which."""
    beaten = Region(0.0, fails_below=0.02)
    near = Contrast("", 0.01, 0.002, 3, 4)
    assert beaten.p_inside(near) < 0.05
    assert beaten.p_outside(near) < 0.05
    assert beaten.p_outside(Contrast("", 0.03, 0.002, 3, 4)) == 1.0
    assert beaten.p_inside(Contrast("", -0.01, 0.002, 3, 4)) == 1.0


def test_a_value_on_an_edge_lies_inside_a_closed_region_only() -> None:
    on, half = Contrast.of(np.zeros(4)), Contrast.of(np.array([0.0, 0.0, 0.1, -0.1]))
    closed, opened = Region(0.0, 0.1, closed=True), Region(0.0, 0.1)
    assert (closed.p_inside(on), closed.p_outside(on)) == (0.0, 1.0)
    assert opened.p_inside(on) == 1.0
    assert closed.p_inside(half) == 1.0  # its interval reaches below 0
    assert closed.p_inside(Contrast.of(np.full(4, 0.2))) == 1.0


def test_seeds_needed_are_enough_and_one_less_is_not() -> None:
    for seed in range(20):
        (one,) = drawn(0.3, n=4, seed=seed)
        said = rule(Region(low=0.0)).seeds_needed([one], 0.05)
        spread = one.error * 2

        def half(n: int, spread: float = spread) -> float:
            return float(stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n))

        if said.startswith("more than 200"):
            assert half(200) >= abs(one.estimate)
        else:
            n = int(said.split()[1])
            assert half(n) < abs(one.estimate) <= half(n - 1)


def test_the_decisive_contrast() -> None:
    clear, near = Contrast("clear", 1.0, 0.1, 3, 4), Contrast("near", 0.3, 0.1, 3, 4)
    below, far = Contrast("below", -0.2, 0.1, 3, 4), Contrast("far", -0.9, 0.1, 3, 4)
    above = rule(Region(low=0.0))
    assert above.decisive([clear, near]) == 1
    assert above.decisive([clear, below, near]) == 1
    assert above.decisive([below, clear, far]) == 2
