"""Kinds of claims that compare several contrasts, against oracles by hand, scipy, statsmodels."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import statsmodels.api as sm
from planted_claims import NOISE, density, judge, kl, one, study_of, undecided
from scipy import stats
from test_effects import N, make_study

from rlsparse.claims.words import interval, number
from rlsparse.study import Trial


def logit(trial_density: float) -> float:
    """Log odds of being unchanged, of the counts that the tables hold."""
    changed = round(trial_density * N)
    return float(np.log((N - changed + 0.5) / (changed + 0.5)))


# --- monotone ----------------------------------------------------------------------------------

LEVELS = {"algorithm.kl_coef": [0.1, 0.0, 0.04]}  # not in order of their numbers
RISING = {"kind": "monotone", "factor": "algorithm.kl_coef", "direction": "increasing"}


def along(*steps: float) -> Callable[[Trial], float]:
    """Density by KL coefficient 0, .04, .1, with noise of its own at each seed and level."""

    def found(trial: Trial) -> float:
        index = [0.0, 0.04, 0.1].index(kl(trial))
        return 0.1 * steps[index] * float(np.exp(0.1 * NOISE[(trial.config.seed + 3 * index) % 10]))

    return found


def test_monotone_goes_from_level_to_level_by_number() -> None:
    falling = along(1.0, 0.95, 0.6)  # fewer changed weights: sparsity rises
    row = one(RISING, falling, factors=LEVELS)
    assert (row["verdict"], row["margin"], row["num_runs"]) == ("supported", None, 4)
    assert "algorithm.kl_coef = 0.04 against 0.0" in str(row["statistic"])  # the smaller step
    assert (
        one({**RISING, "direction": "decreasing"}, falling, factors=LEVELS)["verdict"] == "refuted"
    )
    bend = one(RISING, along(1.0, 0.6, 0.8), factors=LEVELS)
    assert bend["verdict"] == "refuted"
    assert "weights (algorithm.kl_coef = 0.1 against 0.04) 0.7" in str(bend["outcome"])
    undecided(RISING, "reaches across the margin", along(1.0, 0.8, 0.8), factors=LEVELS)


def test_monotone_is_tested_by_its_least_clear_step_and_refuted_with_bonferroni() -> None:
    row = one(RISING, along(1.0, 0.9, 0.7), factors=LEVELS)
    values = {
        level: np.array([logit(0.1 * by * np.exp(0.1 * NOISE[(s + 3 * i) % 10])) for s in range(4)])
        for i, (level, by) in enumerate([(0.0, 1.0), (0.04, 0.9), (0.1, 0.7)])
    }
    steps = [values[0.04] - values[0.0], values[0.1] - values[0.04]]
    p_values = [stats.ttest_1samp(step, 0).pvalue for step in steps]
    assert row["p_value"] == pytest.approx(max(p_values), rel=1e-6)
    assert row["estimate"] == pytest.approx(np.exp(steps[np.argmax(p_values)].mean()), rel=1e-9)
    falls = one({**RISING, "direction": "decreasing"}, along(1.0, 0.9, 0.7), factors=LEVELS)
    assert falls["p_value"] == pytest.approx(2 * min(p_values), rel=1e-6)


def test_levels_that_are_no_numbers_are_in_the_order_of_the_study() -> None:
    factors = {"train.max_grad_norm": [None, 2.0, 1.0]}
    claim = {"kind": "monotone", "factor": "train.max_grad_norm", "direction": "decreasing"}
    by = {None: 1.0, 2.0: 1.6, 1.0: 1.7}
    dense = lambda t: density(t) * by[t.config.train.max_grad_norm]  # noqa: E731
    row = one(claim, dense, factors=factors)
    assert row["verdict"] == "supported"
    assert "2.0 against null" in str(row["statistic"])
    by[2.0], by[1.0] = by[1.0], by[2.0]
    assert one(claim, dense, factors=factors)["verdict"] == "refuted"


def test_monotone_of_scores() -> None:
    score = lambda t: 0.4 + 2 * kl(t)  # noqa: E731
    for response, scale in (("score_after", 1.2), ("score_gain", 0.08)):
        row = one({**RISING, "response": response}, along(1, 1, 1), factors=LEVELS, score=score)
        assert row["verdict"] == "supported"
        assert row["estimate"] == pytest.approx(scale, rel=0.2)


# --- interaction -------------------------------------------------------------------------------

CROSSED = {"algorithm.kl_coef": [0.0, 0.04, 0.1], "train.max_grad_norm": [None, 1.0]}
BOTH = {"kind": "interaction", "factor": "algorithm.kl_coef", "by": "train.max_grad_norm"}


def crossed(extra: float, noise: float = 1.0) -> Callable[[Trial], float]:
    """KL .1 without clipping has ``extra`` times the density that both alone would give."""

    def found(trial: Trial) -> float:
        clipped = trial.config.train.max_grad_norm is not None
        own = NOISE[(trial.config.seed + 2 * [0.0, 0.04, 0.1].index(kl(trial)) + clipped) % 10]
        both = extra if not clipped and kl(trial) == 0.1 else 1.0
        return (
            0.1
            * (1 - 3 * kl(trial))
            * (0.8 if clipped else 1.0)
            * both
            * float(np.exp(noise * own))
        )

    return found


def differences(found: Callable[[Trial], float], claim: Mapping[str, object]) -> np.ndarray:
    """[2 contrasts, 4 seeds] of differences of differences, by hand.

    The baseline clips at 1.0: that is the reference.
    """
    from test_effects import trials_of

    runs = [t for t in trials_of(study_of(claim, factors=CROSSED)) if t.control is None]
    at = {(kl(t), t.config.train.max_grad_norm, t.config.seed): logit(found(t)) for t in runs}
    return np.array(
        [
            [
                (at[level, None, s] - at[0.0, None, s]) - (at[level, 1.0, s] - at[0.0, 1.0, s])
                for s in range(4)
            ]
            for level in (0.04, 0.1)
        ]
    )


def test_interaction_by_hand() -> None:
    found = crossed(2.0, noise=0.3)
    row = one(BOTH, found, factors=CROSSED)
    contrasts = differences(found, BOTH)
    edge = np.log(1.25)
    p_values = [stats.ttest_1samp(one_of, -edge).pvalue for one_of in contrasts]
    assert row["verdict"] == "supported"
    assert row["p_value"] == pytest.approx(2 * p_values[1], rel=1e-6)  # Bonferroni over two
    mean, error = contrasts[1].mean(), contrasts[1].std(ddof=1) / 2
    half = stats.t.ppf(1 - 0.05 / 4, 3) * error
    expected = np.exp([mean, mean - half, mean + half])
    shown = [row["estimate"], row["ci_low"], row["ci_high"]]
    np.testing.assert_allclose(np.array(shown, float), expected, rtol=1e-6)
    assert (row["ci_level"], row["margin"]) == (pytest.approx(0.975), 1.25)
    assert "algorithm.kl_coef = 0.1, train.max_grad_norm = null" in str(row["statistic"])


def test_interaction_is_refuted_if_all_lie_inside_and_else_undecided() -> None:
    assert one(BOTH, crossed(1.0, noise=0.2), factors=CROSSED)["verdict"] == "refuted"
    undecided(BOTH, "reaches across the margin", crossed(1.25, noise=1.0), factors=CROSSED)
    wider = {**BOTH, "margin": 3.0}
    assert one(wider, crossed(2.0, noise=0.3), factors=CROSSED)["verdict"] == "refuted"
    inside = one(wider, crossed(2.0, noise=0.3), factors=CROSSED)
    contrasts = differences(crossed(2.0, noise=0.3), wider)
    each = [max(stats.ttest_1samp(c, e).pvalue for e in (-np.log(3), np.log(3))) for c in contrasts]
    assert inside["p_value"] == pytest.approx(min(1.0, 2 * max(each)), rel=1e-6)


def test_interaction_of_the_gain_in_score_is_a_difference() -> None:
    def score(trial: Trial) -> float:
        clipped = trial.config.train.max_grad_norm is not None
        steady = 0.002 * NOISE[(trial.config.seed + 3 * clipped) % 10] / 0.03
        return 0.5 + steady * (kl(trial) > 0) + (0.1 if not clipped and kl(trial) == 0.1 else 0.0)

    row = one({**BOTH, "response": "score_gain"}, factors=CROSSED, score=score)
    assert (row["verdict"], row["margin"]) == ("supported", 0.02)
    assert row["estimate"] == pytest.approx(0.1, abs=0.01)


def test_interaction_needs_both_factors_crossed() -> None:
    only = {**BOTH, "where": {"train.max_grad_norm": 1.0}}
    undecided(only, "do not vary algorithm.kl_coef and train.max_grad_norm together")
    undecided({**BOTH, "by": "train.batch_size"}, "the study does not vary train.batch_size")


def test_interaction_by_algorithm_compares_fields_of_two_algorithms() -> None:
    study = make_study(
        factors={"algorithm.name": ["grpo", "rloo"], "algorithm.kl_coef": [0.0, 0.04]},
        claims=[
            {
                "id": "c",
                "kind": "interaction",
                "factor": "algorithm.kl_coef",
                "by": "algorithm.name",
            }
        ],
    )

    def found(trial: Trial) -> float:
        by = 1.6 if trial.config.algorithm.name == "rloo" and kl(trial) else 1.0
        return 0.1 * by * float(np.exp(NOISE[trial.config.seed] * (0.2 if kl(trial) else 1)))

    (row,) = judge(study, found, more=lambda t: {})
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert row["estimate"] == pytest.approx((0.84 / 0.16) / (0.9 / 0.1), rel=0.02)


# --- recovers ----------------------------------------------------------------------------------

ARMS = {"train.weight_decay": [0.0, 0.1, 0.2], "train.learning_rate": [1e-5, 3e-5]}
RECOVERS = {
    "kind": "recovers",
    "where": {},
    "a": {"train.weight_decay": 0.1, "train.learning_rate": 1e-5},
    "b": {"train.weight_decay": 0.0, "train.learning_rate": 1e-5},
    "random": {"train.weight_decay": 0.2},
}
"""Weight decay stands for the mask: 0 for all weights, .1 for the subnetwork, .2 for random."""


def scored(
    full: float, mask: float, random: float, tuned: float, noise: float = 0.1
) -> Callable[[Trial], float]:
    def found(trial: Trial) -> float:
        arm = {0.0: full, 0.1: mask, 0.2: random}[trial.config.train.weight_decay]
        if trial.config.train.weight_decay == 0.2 and trial.config.train.learning_rate == 3e-5:
            arm = tuned
        return arm + noise * NOISE[(trial.config.seed + round(100 * arm)) % 10]

    return found


@pytest.mark.parametrize(
    ("scores", "verdict", "words"),
    [
        ((0.60, 0.60, 0.40, 0.45), "supported", "recovers and specific"),
        ((0.60, 0.50, 0.40, 0.45), "refuted", "does not recover"),
        ((0.60, 0.60, 0.40, 0.60), "refuted", "recovers but not specific"),
        ((0.60, 0.60, 0.40, 0.70), "refuted", "recovers but not specific"),
        ((0.60, 0.58, 0.40, 0.45), "undecided", ""),
        ((0.60, 0.60, 0.40, 0.59, 0.5), "undecided", ""),
        ((0.60, 0.60, 0.40, 0.58), "supported", "recovers and specific"),
        ((0.60, 0.60, 0.40, 0.59, 0.05), "supported", "recovers and specific"),  # by under .02
    ],
)
def test_recovers(scores: tuple[float, ...], verdict: str, words: str) -> None:
    row = one(RECOVERS, factors=ARMS, score=scored(*scores))
    assert row["verdict"] == verdict
    assert words in str(row["outcome"])
    assert row["depends_on_definition"] is None


def test_recovers_compares_scores_by_seed_with_the_best_tuned_random_mask() -> None:
    score = scored(0.60, 0.60, 0.40, 0.53)
    row = one(RECOVERS, factors=ARMS, score=score)
    gaps = np.array(
        [score_of(score, 0.1, 1e-5, s) - score_of(score, 0.2, 3e-5, s) for s in range(4)]
    )
    non_inferior = np.array(
        [score_of(score, 0.1, 1e-5, s) - score_of(score, 0.0, 1e-5, s) for s in range(4)]
    )
    p_values = [
        stats.ttest_1samp(gaps, 0).pvalue,
        stats.ttest_1samp(non_inferior, -0.02).pvalue if non_inferior.std() else 0.0,
    ]
    assert row["p_value"] == pytest.approx(max(p_values), rel=1e-6)
    assert 'a minus random at {"train.learning_rate":"3e-05"}' in str(row["statistic"])
    assert row["estimate"] == pytest.approx(gaps.mean(), rel=1e-9)
    which = 'a minus random at {"train.learning_rate":"3e-05"}'
    assert str(row["note"]).startswith(
        f"the estimate is of {which}; a minus b {number(non_inferior.mean())} ["
    )
    shown = interval(*(float(str(row[key])) for key in ("estimate", "ci_low", "ci_high")))
    assert f", {which} {shown}" in str(row["note"])


def score_of(score: Callable[[Trial], float], decay: float, rate: float, seed: int) -> float:
    from test_effects import trials_of

    (found,) = [
        score(t)
        for t in trials_of(study_of(factors=ARMS))
        if t.control is None
        and (t.config.train.weight_decay, t.config.train.learning_rate) == (decay, rate)
        and t.config.seed == seed
    ]
    return found


# --- associated --------------------------------------------------------------------------------

ON = {"kind": "associated", "response": "sparsity.bitwise", "on": "score_gain"}


def test_associated_is_the_slope_within_seeds() -> None:
    score = lambda t: 0.4 + 4 * kl(t) + 0.1 * NOISE[t.config.seed]  # noqa: E731
    dense = lambda t: 0.1 * float(np.exp(-3 * kl(t) + 0.3 * noise_of(t)))  # noqa: E731

    def noise_of(trial: Trial) -> float:
        return float(NOISE[(trial.config.seed + round(100 * kl(trial))) % 10])

    factors = {"algorithm.kl_coef": [0.0, 0.04, 0.1]}
    row = one(ON, dense, factors=factors, score=score)
    slopes = []
    for seed in range(4):
        y = [
            logit(0.1 * np.exp(-3 * k + 0.3 * NOISE[(seed + round(100 * k)) % 10]))
            for k in (0.0, 0.04, 0.1)
        ]
        slopes.append(np.polyfit([4 * k for k in (0.0, 0.04, 0.1)], y, 1)[0])
    found = stats.ttest_1samp(slopes, 0)
    low, high = found.confidence_interval(0.95)
    shown = [row["estimate"], row["ci_low"], row["ci_high"], row["p_value"]]
    expected = [np.mean(slopes), low, high, found.pvalue]
    np.testing.assert_allclose(np.array(shown, float), expected, rtol=1e-4)
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert "slopes within seeds" in str(row["note"])
    assert (
        one({**ON, "sign": "negative"}, dense, factors=factors, score=score)["verdict"] == "refuted"
    )
    for margin, verdict in ((0.1, "supported"), (10.0, "refuted")):
        row = one({**ON, "margin": margin}, dense, factors=factors, score=score)
        assert row["verdict"] == verdict
        rising = lambda t: dense(t) ** -1 / 100  # noqa: E731
        row = one(
            {**ON, "margin": margin, "sign": "negative"}, rising, factors=factors, score=score
        )
        assert (row["verdict"], row["estimate"] < 0) == (verdict, True)  # type: ignore[operator]


def test_associated_over_one_run_per_seed_is_least_squares() -> None:
    seeds = list(range(8))
    score = lambda t: 0.4 + 3 * NOISE[t.config.seed]  # noqa: E731
    dense = lambda t: 0.1 * float(np.exp(-2 * NOISE[t.config.seed] + NOISE[9 - t.config.seed]))  # noqa: E731
    claim = {**ON, "on": "score_after"}
    row = one(claim, dense, factors={}, controls=[], seeds=seeds, score=score)
    x = [np.log((round(512 * s) + 0.5) / (512.5 - round(512 * s))) for s in 0.4 + 3 * NOISE[:8]]
    y = [logit(0.1 * np.exp(-2 * NOISE[s] + NOISE[9 - s])) for s in seeds]
    line = sm.OLS(y, sm.add_constant(x)).fit()
    low, high = line.conf_int(0.05)[1]
    shown = [row["estimate"], row["ci_low"], row["ci_high"], row["p_value"]]
    expected = [line.params[1], low, high, line.pvalues[1]]
    np.testing.assert_allclose(np.array(shown, float), expected, rtol=1e-6)
    assert row["num_runs"] == 8
    assert "least squares over one run per seed" in str(row["note"])


def test_associated_without_spread_is_undecided() -> None:
    undecided(ON, "0 seeds have a slope, 4 are needed: it takes 3 runs that differ in score_gain")
    undecided({**ON, "at": {"score": 0.4}}, "at.score interpolates density")
    undecided({**ON, "at": {"kl": "common"}, "on": "sparsity.bitwise"}, "common is of pairs")
