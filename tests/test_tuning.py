"""Arms are tuned on validation alone, by brute force; what is compared are their other seeds."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import pytest
from planted_claims import judge, one, study_of, undecided
from scipy import stats
from test_effects import trials_of

from rlsparse.claims.tuning import arms, best
from rlsparse.study import Trial

RATE, DECAY, KL = "train.learning_rate", "train.weight_decay", "algorithm.kl_coef"
RATES = (3e-5, 3e-6, 1e-5)  # not in their order
TUNING, FRESH = (4, 1), (0, 2, 3, 5, 6)
FIELDS: dict[str, object] = {
    "factors": {DECAY: [0.0, 0.1, 0.2], KL: [0.0, 0.04], RATE: list(RATES)},
    "controls": [],
    "seeds": [0, 1, 2, 3, 4, 5, 6],
}
TUNE = {"tune": RATE, "tuning_seeds": list(TUNING)}
RECOVERS = {
    "kind": "recovers",
    "a": {DECAY: 0.1, KL: 0.0},
    "b": {DECAY: 0.0, KL: 0.0},
    "random": {DECAY: 0.2},
    **TUNE,
}
"""Weight decay stands for the mask; of random masks there are two cells."""
GREATER = {
    "kind": "greater", "response": "score_after", "a": {DECAY: 0.1}, "b": {DECAY: 0.0},
    "where": {KL: 0.0}, **TUNE,
}  # fmt: skip
ARMS = {"a": (0.1, 0.0), "b": (0.0, 0.0), "no kl": (0.2, 0.0), "kl": (0.2, 0.04)}

Point = tuple[float, float, float, int]
"""Weight decay, KL coefficient, learning rate, seed."""


def point(trial: Trial) -> Point:
    train = trial.config.train
    return (train.weight_decay, trial.config.algorithm.kl_coef, train.learning_rate,
            trial.config.seed)  # type: ignore[union-attr]  # fmt: skip


POINTS: list[Point] = list(
    itertools.product((0.0, 0.1, 0.2), (0.0, 0.04), RATES, range(7))
)  # fmt: skip


def drawn(seed: int, steps: int) -> dict[Point, float]:
    """A score for every run: few distinct ones, so that means tie."""
    values = np.random.default_rng(seed).integers(1, steps, len(POINTS)) / steps
    return dict(zip(POINTS, map(float, values), strict=True))


def planted(
    validation: Mapping[Point, float], test: Mapping[Point, float], **more: object
) -> dict[str, object]:
    """What ``one`` makes tables of."""

    def about(trial: Trial) -> dict[str, object]:
        return {"score_validation": validation[point(trial)], "num_validation_problems": 64}

    return {**FIELDS, "score": lambda trial: test[point(trial)], "more": about, **more}


def chosen(validation: Mapping[Point, float], lost: tuple[Point, ...] = ()) -> dict[str, float]:
    """Best rate of each arm, by brute force; lost runs take their rate out."""

    def mean(arm: tuple[float, float], rate: float) -> float:
        each = [validation[*arm, rate, seed] for seed in TUNING]
        gone = any((*arm, rate, seed) in lost for seed in TUNING)
        return -1.0 if gone else sum(each) / len(each)

    return {
        name: min(RATES, key=lambda rate: (-mean(arm, rate), rate)) for name, arm in ARMS.items()
    }


def said(row: Mapping[str, object]) -> str:
    """What the note says of tuning, without what follows."""
    return str(row["note"]).split(f"{RATE} tuned on validation at seeds 4, 1: ")[1]


def gaps(
    test: Mapping[Point, float], rates: Mapping[str, float], other: str, seeds: tuple[int, ...]
) -> np.ndarray:
    return np.array(
        [test[*ARMS["a"], rates["a"], s] - test[*ARMS[other], rates[other], s] for s in seeds]
    )


@pytest.mark.parametrize("seed", range(12))
def test_recovers_compares_each_arm_at_the_rate_that_validates_best(seed: int) -> None:
    validation, test = drawn(seed, 4), drawn(seed + 100, 50)
    row = one(RECOVERS, **planted(validation, test))
    rates = chosen(validation)
    inside, outside = [], []
    for other, low, below in (("b", -0.02, -0.02), ("no kl", 0.0, 0.02), ("kl", 0.0, 0.02)):
        found = gaps(test, rates, other, FRESH)
        inside.append(stats.ttest_1samp(found, low).pvalue if found.mean() > low else 1.0)
        outside.append(stats.ttest_1samp(found, below).pvalue if found.mean() < below else 1.0)
    p_value = min(max(inside), min(1.0, 3 * min(outside)))
    assert row["p_value"] == pytest.approx(p_value, rel=1e-6)
    assert row["num_runs"] == len(FRESH)
    names = {
        arm: f"{arm if arm in 'ab' else 'random'} (kl_coef={kl}, weight_decay={decay})"
        for arm, (decay, kl) in ARMS.items()
    }
    for arm, name in names.items():
        means = {r: np.mean([validation[*ARMS[arm], r, s] for s in TUNING]) for r in sorted(RATES)}
        listed = ", ".join(f"{rate!r} ({mean:.3f})" for rate, mean in means.items())
        assert f"{name} {rates[arm]!r} of {listed}" in said(row)


@pytest.mark.parametrize("seed", range(4))
def test_greater_by_brute_force(seed: int) -> None:
    validation, test = drawn(seed, 4), drawn(seed + 100, 50)
    row = one({**GREATER, "response": "score_gain"}, **planted(validation, test))
    rates = chosen(validation)
    found = gaps(test, rates, "b", FRESH)
    assert row["estimate"] == pytest.approx(found.mean(), rel=1e-9)
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(found, 0).pvalue, rel=1e-6)
    assert row["num_runs"] == len(FRESH)
    rate = " and ".join(sorted(map(repr, {rates["a"], rates["b"]})))
    assert f"learning rate {rate}," in str(row["scope"])


def clear(gain: float = 0.0) -> tuple[dict[Point, float], dict[Point, float]]:
    """Validation and test scores where the middle rate is best, and all arms are alike but a."""
    validation, test = {}, {}
    noise = np.random.default_rng(0).normal(0, 0.004, len(POINTS))
    for each, own in zip(POINTS, noise, strict=True):
        by_rate = {3e-6: 0.3, 1e-5: 0.5, 3e-5: 0.4}[each[2]]
        validation[each] = by_rate + own / 10
        test[each] = by_rate + own + gain * (each[0] == 0.1)
    return validation, test


def test_neither_fresh_seeds_nor_test_scores_have_a_part_in_the_choice() -> None:
    validation, test = clear(0.1)
    row = one(RECOVERS, **planted(validation, test))
    assert row["verdict"] == "supported"
    other = {each: 1 - value if each[3] in FRESH else value for each, value in validation.items()}
    turned = {each: 1 - value for each, value in test.items()}
    assert said(one(RECOVERS, **planted(other, test))) == said(row)
    assert said(one(RECOVERS, **planted(validation, turned))).startswith(said(row).split(";")[0])
    assert one(RECOVERS, **planted(other, test)) == row
    at_tuning = {e: 1 - v if e[3] in TUNING else v for e, v in test.items()}
    assert one(RECOVERS, **planted(validation, at_tuning)) == row  # nor are these compared


def test_what_is_tuned_decides_the_verdict() -> None:
    """Untuned, a wins by its rate; tuned, it does not, nor does it beat random masks."""
    validation, test = clear()
    claim = {name: given for name, given in GREATER.items() if name not in TUNE}
    unfair = {**claim, "a": {DECAY: 0.1, RATE: 1e-5}, "b": {DECAY: 0.0, RATE: 3e-6}}
    assert one(unfair, **planted(validation, test))["verdict"] == "supported"
    assert one(GREATER, **planted(validation, test))["verdict"] == "undecided"
    assert "recovers but not specific" in str(one(RECOVERS, **planted(validation, test))["outcome"])
    validation, test = clear(-0.1)
    assert one(GREATER, **planted(validation, test))["verdict"] == "refuted"


# --- failures ----------------------------------------------------------------------------------


def failing(*lost: Point) -> Callable[[Trial], bool]:
    return lambda trial: point(trial) in lost


def test_a_level_with_a_failed_tuning_run_is_not_eligible() -> None:
    validation, test = clear(0.1)
    lost = (0.1, 0.0, 1e-5, 4)
    row = one(RECOVERS, **planted(validation, test, failed=failing(lost)))
    assert chosen(validation, (lost,))["a"] == 3e-5
    assert "a (kl_coef=0.0, weight_decay=0.1) 3e-05 of 3e-06 (0.3" in said(row)
    assert "1e-05 (a run is missing), 3e-05 (0.4" in said(row)
    assert row["num_runs"] == len(FRESH)
    assert "runs are missing" not in str(row["note"])
    assert row["estimate"] == pytest.approx(0.0, abs=0.01)  # .4 + .1 against .5


def test_failures_matter_only_where_runs_are_compared() -> None:
    validation, test = clear(0.1)
    row = one(RECOVERS, **planted(validation, test))
    loser = one(RECOVERS, **planted(validation, test, failed=failing((0.1, 0.0, 3e-6, 2))))
    assert loser == row
    winner = planted(validation, test, failed=failing((0.1, 0.0, 1e-5, 2)))
    undecided(RECOVERS, "1 of 20 runs are missing (failed 1)", **winner)
    allowed = one(RECOVERS, **winner, allow_missing=True)
    assert (allowed["verdict"], allowed["num_runs"]) == ("supported", len(FRESH) - 1)


def test_without_an_eligible_level_there_is_no_verdict() -> None:
    validation, test = clear(0.1)
    lost = [(0.2, 0.04, rate, seed) for rate, seed in zip(RATES, (1, 4, 1), strict=True)]
    given = planted(validation, test, failed=failing(*lost))
    arm = "random (kl_coef=0.04, weight_decay=0.2)"
    undecided(RECOVERS, f"no level of {RATE} has all its runs at the tuning seeds: {arm}", **given)
    row = one(RECOVERS, **given, allow_missing=True)
    assert row["verdict"] == "undecided"
    assert (
        "random (kl_coef=0.04, weight_decay=0.2) none of 3e-06 (a run is missing), 1e-05 (a run"
        in said(row)
    )
    assert one(GREATER, **given)["verdict"] == "supported"  # does not compare it


def test_without_validation_scores_there_is_no_verdict() -> None:
    _, test = clear(0.1)
    given = {**FIELDS, "score": lambda trial: test[point(trial)], "more": lambda trial: {}}
    for claim, num in ((RECOVERS, 24), (GREATER, 12)):
        undecided(claim, f"{num} runs at the tuning seeds have no validation score", **given)
        row = one(claim, **given)
        assert "task.num_validation_problems" in str(row["would_decide"])
        assert "tuned on validation" not in str(row["note"])


def test_three_seeds_besides_the_tuning_seeds_decide_nothing() -> None:
    validation, test = clear(0.1)
    given = {**planted(validation, test), "seeds": [0, 1, 2, 3, 4]}
    undecided(GREATER, "3 seeds with complete matched runs, 4 are needed", **given)
    undecided(RECOVERS, "3 seeds with complete matched runs, 4 are needed", **given)
    given["seeds"] = [1, 4]
    undecided(GREATER, "0 seeds with complete matched runs, 4 are needed", **given)
    undecided(RECOVERS, "0 seeds with complete matched runs, 4 are needed", **given)
    assert one(GREATER, **{**given, "seeds": [0, 1, 2, 3, 4, 5]})["verdict"] == "supported"


# --- factors -----------------------------------------------------------------------------------


def test_a_side_without_the_factor_is_compared_as_it_is() -> None:
    study = study_of(
        {"kind": "greater", "response": "score_after", "a": {"algorithm": "grpo"},
         "b": {"algorithm": "sft"}, "tune": KL, "tuning_seeds": [0, 1]},
        factors={"algorithm.name": ["grpo", "sft"], KL: [0.0, 0.04]},
        controls=[], seeds=range(6),
    )  # fmt: skip

    def kl(trial: Trial) -> float:
        return getattr(trial.config.algorithm, "kl_coef", -1.0)

    noise = np.random.default_rng(1).normal(0, 0.01, 100)
    (row,) = judge(
        study, lambda trial: 0.1,
        score=lambda t: {-1.0: 0.4, 0.0: 0.3, 0.04: 0.5}[kl(t)] + noise[t.config.seed + int(kl(t))],
        more=lambda t: {"score_validation": None if kl(t) < 0 else 0.5 + kl(t)},
    )  # fmt: skip
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    note = str(row["note"])
    assert (
        f"{KL} tuned on validation at seeds 0, 1: a (algorithm=grpo) 0.04 of 0.0 (0.500), 0.04"
        in note
    )
    assert "b (" not in note


def test_budgets_may_differ_in_what_is_tuned() -> None:
    claim = {**GREATER, "where": {}, "tune": "train.batch_size", "tuning_seeds": [0, 1]}
    factors = {DECAY: [0.0, 0.1], "train.batch_size": [32, 64]}

    def about(trial: Trial) -> dict[str, object]:
        arm, size = trial.config.train.weight_decay, trial.config.train.batch_size
        return {"score_validation": 0.6 if (arm > 0) == (size == 64) else 0.5}

    def score(trial: Trial) -> float:
        return 0.4 + trial.config.train.weight_decay + 0.01 * (trial.config.seed % 3)

    given = {"factors": factors, "controls": [], "seeds": range(6), "score": score}
    row = one(claim, more=about, **given)
    assert row["verdict"] == "supported"
    assert (
        "a (weight_decay=0.1) 64 of 32 (0.500), 64 (0.600); b (weight_decay=0.0) 32 of 32 (0.600)"
        in str(row["note"])
    )
    fixed = {**claim, "a": {DECAY: 0.1, "train.batch_size": 64},
             "b": {DECAY: 0.0, "train.batch_size": 32}}  # fmt: skip
    undecided(fixed, "no side has several levels of train.batch_size", more=about, **given)


def test_algorithms_stay_together_when_a_field_of_theirs_is_tuned() -> None:
    """A claim on masks pools what it pooled untuned."""
    names = {"algorithm.name": ["grpo", "rloo"], KL: [0.0, 0.04], DECAY: [0.0, 0.1]}
    claim = {**GREATER, "where": {}, "tune": KL, "tuning_seeds": [0, 1]}
    noise = np.random.default_rng(2).normal(0, 0.01, 10)

    def score(trial: Trial) -> float:
        return 0.4 + trial.config.train.weight_decay * (1 + noise[trial.config.seed])

    about = {"score_validation": 0.5}
    row = one(claim, factors=names, controls=[], seeds=range(6), score=score, more=lambda t: about)
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert "grpo" not in str(row["statistic"])
    assert "a (algorithm=grpo, weight_decay=0.1) 0.0 of 0.0 (0.500), 0.04 (0.500)" in str(
        row["note"]
    )


# --- the choice itself -------------------------------------------------------------------------


def test_equal_means_go_to_the_first_level() -> None:
    assert best({"1e-06": (0.1 + 0.2) / 2, "1e-05": 0.15}) == "1e-06"
    assert best({"1e-06": 0.15, "1e-05": (0.1 + 0.2) / 2}) == "1e-06"  # in floats the second wins
    assert best({"1e-06": 0.15, "1e-05": 0.1500001}) == "1e-05"
    assert best({"x": np.nan, "y": 0.0}) == "y"
    assert best({"x": np.nan, "y": np.nan}) is None
    assert best({"x": np.nan}) == "x"


def test_controls_are_arms_of_their_own() -> None:
    """They bear the labels of the cell that they vary."""
    rows = [
        {"trial_id": f"{level}{control}{seed}", "cell": {RATE: level}, "control": control,
         "seed": seed, "status": "finished", "score_validation": score}
        for level, control, score in (("1e-05", None, 0.2), ("3e-05", None, 0.1),
                                      ("1e-05", "lr_zero", 0.9))
        for seed in range(3)
    ]  # fmt: skip
    found = arms(pd.DataFrame(rows), RATE, ["1e-05", "3e-05"], [0])
    second, first = sorted(found, key=lambda arm: len(arm.scores))
    assert first.scores == {"1e-05": 0.2, "3e-05": 0.1}
    assert list(first.fresh["trial_id"]) == ["1e-05None1", "1e-05None2"]
    assert list(second.fresh["trial_id"]) == ["1e-05lr_zero1", "1e-05lr_zero2"]
    assert (first.cell, second.cell) == ({}, {"control": "lr_zero"})


def test_levels_that_are_no_numbers_tie_as_listed() -> None:
    factors = {DECAY: [0.0, 0.1], "train.max_grad_norm": [None, 2.0, 1.0]}
    claim = {**GREATER, "where": {}, "tune": "train.max_grad_norm", "tuning_seeds": [0, 1]}
    about = {"score_validation": 0.5}
    row = one(claim, factors=factors, controls=[], seeds=range(6), more=lambda t: about)
    assert "a (weight_decay=0.1) null of null (0.500), 2.0 (0.500), 1.0 (0.500)" in str(row["note"])


def test_a_missing_run_is_as_one_that_failed() -> None:
    """One that is planned, and one that is not even there."""
    validation, _ = clear()
    rows = [
        {"trial_id": str(at), "cell": {RATE: repr(at[2])}, "control": None, "seed": at[3],
         "status": "planned" if at[2:] == (1e-5, 1) else "finished",
         "score_validation": validation[at]}
        for at in POINTS
        if at[:2] == (0.1, 0.0) and at[2:] != (3e-5, 4)
    ]  # fmt: skip
    (found,) = arms(pd.DataFrame(rows), RATE, ["3e-06", "1e-05", "3e-05"], TUNING)
    assert np.isnan([found.scores["1e-05"], found.scores["3e-05"]]).all()
    assert (found.level, found.num_unscored) == ("3e-06", 0)
    assert len(trials_of(study_of(GREATER, **FIELDS))) == len(POINTS)


def test_an_arm_with_more_levels_gains_nothing_where_it_is_compared() -> None:
    """All levels are equally good; a run that is lucky on validation is lucky on the test, too."""
    rng = np.random.default_rng(3)
    levels = [f"{level}" for level in range(6)]
    at = list(itertools.product(levels, range(6)))
    runs = pd.DataFrame(
        {
            "cell": [{RATE: level} for level, _ in at],
            "control": [None] * len(at),
            "seed": [seed for _, seed in at],
            "status": "finished",
        }
    )
    fresh, tuning = [], []
    for _ in range(100):
        luck = rng.normal(0, 1, len(at))
        (found,) = arms(runs.assign(score_validation=luck), RATE, levels, [0, 1])
        assert sorted(found.fresh["seed"]) == [2, 3, 4, 5]
        own = np.array([level == found.level for level, _ in at])
        fresh.append(luck[found.fresh.index].mean())
        tuning.append(luck[own & (runs["seed"] < 2)].mean())
    error = 1 / np.sqrt(4 * 100)
    assert abs(np.mean(fresh)) < 4 * error
    assert np.mean(tuning) > 12 * error  # the best of six
