"""A factor is equivalent only if it acted and the study would have seen it."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from planted_claims import (
    CLIP,
    KL,
    NOISE,
    about,
    density,
    judge,
    kl,
    one,
    study_of,
    undecided,
)
from scipy import stats
from test_effects import N, make_study, trials_of

from rlsparse.study import Trial

# --- equivalent --------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [KL, CLIP])
def test_equivalent_is_supported(claim: dict[str, object]) -> None:
    row = one(claim)
    assert (row["verdict"], row["margin"], row["num_runs"]) == ("supported", 1.25, 4)
    assert row["estimate"] == pytest.approx(1, abs=0.02)
    assert row["ci_level"] == pytest.approx(0.9)
    assert 0.8 < row["ci_low"] <= row["estimate"] <= row["ci_high"] < 1.25  # type: ignore[operator]


def test_p_of_equivalent_is_the_larger_of_two_one_sided_tests() -> None:
    row = one(KL)
    changed = np.array([[round(density(t) * N) for t in side] for side in sides(KL)])
    ratios = np.log((changed[1] + 0.5) / (changed[0] + 0.5)).reshape(2, 4).mean(axis=0)
    tests = [
        stats.ttest_1samp(ratios, edge, alternative=side).pvalue
        for edge, side in ((-np.log(1.25), "greater"), (np.log(1.25), "less"))
    ]
    assert row["p_value"] == pytest.approx(max(tests), rel=1e-6)


def sides(claim: Mapping[str, object]) -> list[list[Trial]]:
    """Runs without and with a KL penalty, in the same order of clipping and seed."""
    trials = [trial for trial in trials_of(study_of(claim)) if trial.control is None]
    trials.sort(key=lambda t: (t.config.train.max_grad_norm or 0, t.config.seed))
    return [[t for t in trials if (kl(t) > 0) is wanted] for wanted in (False, True)]


def test_equivalent_needs_a_factor_that_acted() -> None:
    idle = {"kl_final": 0.1, "num_clipped_steps": 0}
    undecided(KL, "no level moves the realised KL one way", more=lambda t: idle)
    undecided(CLIP, "no step of any run was clipped", more=lambda t: idle)
    # noise in the realised KL is not an action
    noisy = lambda t: {"kl_final": 0.1 + NOISE[t.config.seed] * (kl(t) > 0)}  # noqa: E731
    undecided(KL, "no level moves the realised KL one way", more=noisy)


def acts_not(trial: Trial) -> float:
    """A density that neither factor moves."""
    by = 2.5 if trial.control == "lr_times_3" else 1.0
    return by * 0.1 * float(np.exp(NOISE[trial.config.seed]))


SAME = (
    "the factor did not act: runs at all its levels have exactly the same sparsity.bitwise@stored"
)


@pytest.mark.parametrize("factor", ["algorithm.clip_range", "train.momentum"])
def test_a_factor_that_changed_nothing_is_not_equivalent(factor: str) -> None:
    field = factor.partition(".")[2]
    study = study_of({"kind": "equivalent", "factor": factor}, factors={factor: [0.1, 0.5, 0.9]})
    (row,) = judge(study, acts_not)
    assert row["verdict"] == "undecided"
    assert (row["note"], row["estimate"]) == (SAME, 1.0)

    def acts_once(trial: Trial) -> float:  # one weight of one run
        section = getattr(trial.config, factor.partition(".")[0])
        odd = trial.config.seed == 1 and getattr(section, field) == 0.9
        return acts_not(trial) + (trial.control is None and odd) / N

    assert judge(study, acts_once)[0]["verdict"] == "supported"


def test_without_a_measured_kl_runs_that_differ_show_that_its_penalty_acted() -> None:
    for lost in (lambda t: True, lambda t: kl(t) == 0):
        unknown = lambda t, lost=lost: about(t) | ({"kl_final": None} if lost(t) else {})  # noqa: E731
        row = one(KL, more=unknown)
        assert row["verdict"] == "supported"
        assert "the realised KL was not measured in " in str(row["note"])
    assert "in 8 of 16 runs" in str(row["note"])
    undecided(KL, SAME, acts_not, more=unknown)
    undecided(KL, SAME, acts_not)
    assert "not measured" not in str(one(KL)["note"])


def test_equivalent_needs_a_sensitive_study() -> None:
    weak = lambda t: 0.1 * (1.1 if t.control else 1) * float(np.exp(NOISE[t.config.seed]))  # noqa: E731
    undecided(KL, "not sensitive: three times the learning rate moves density by 1.1", weak)
    loud = lambda t: 0.1 * (1.4 * float(np.exp(-12 * NOISE[t.config.seed])) if t.control else 1)  # noqa: E731
    undecided(KL, "not sensitive: three times the learning rate moves density by 1.", loud)
    undecided(
        KL,
        "lr_times_3: 3 seeds with complete matched runs",
        failed=lambda t: t.control == "lr_times_3" and t.config.seed == 0,
    )
    (row,) = judge(study_of(KL, controls=[]))
    assert "no finished lr_times_3 control" in str(row["note"])


def test_a_level_of_the_grid_shows_the_sensitivity() -> None:
    factors = {"algorithm.kl_coef": [0.0, 0.04], "train.learning_rate": [1e-5, 3e-5]}
    baseline = {"algorithm": {"name": "grpo", "kl_coef": 0.0}, "train": {"num_steps": 20,
                "learning_rate": 1e-5}}  # fmt: skip
    given = {"factors": factors, "baseline": baseline, "controls": ["lr_times_3"]}

    def faster(trial: Trial) -> float:
        return density(trial) * (2.5 if trial.config.train.learning_rate > 2e-5 else 1.0)

    assert one(KL, faster, **given)["verdict"] == "supported"
    undecided(KL, "not sensitive: three times the learning rate moves density by 1", **given)
    undecided(KL, "no finished lr_times_3 control", faster, **(given | {"controls": []}))


def test_runs_that_speak_against_equivalence_are_told_first() -> None:
    study = study_of(KL, controls=[])
    (row,) = judge(study, lambda t: density(t) * (2 if kl(t) else 1))
    assert str(row["note"]).startswith(
        "the interval lies beyond the margin: the runs speak against the claim; no sign of sensi"
    )
    assert str(row["would_decide"]).startswith("nothing in sight")


def test_equivalent_with_too_wide_or_contrary_an_interval() -> None:
    def wide(trial: Trial) -> float:
        return density(trial) * float(np.exp(20 * NOISE[trial.config.seed] * (kl(trial) > 0)))

    undecided(KL, "reaches across the margin", wide)
    undecided(KL, "speak against the claim", lambda t: density(t) * (2 if kl(t) else 1))


def test_every_level_must_be_equivalent() -> None:
    factors = {"algorithm.kl_coef": [0.0, 0.04, 0.1]}
    study = study_of(KL, factors=factors)
    (row,) = judge(study)
    assert row["verdict"] == "supported"
    (row,) = judge(study, lambda t: density(t) * (1.25 if kl(t) == 0.1 else 1))
    assert row["verdict"] == "undecided"
    assert row["estimate"] == pytest.approx(1.25, rel=1e-2)  # the level that stands out


def test_fields_of_algorithms_are_judged_apart() -> None:
    """Effects of ``beta`` in DPO and SimPO that cancel in the mean are no equivalence."""
    study = make_study(
        baseline={"algorithm": {"name": "dpo"}, "train": {"num_steps": 20}},
        factors={"algorithm.name": ["dpo", "simpo"], "algorithm.beta": [0.1, 2.0]},
        controls=["lr_times_3"],
        claims=[
            {"id": "same", "kind": "equivalent", "factor": "algorithm.beta"},
            {"id": "more", "kind": "greater", "a": {"algorithm.beta": 2.0},
             "b": {"algorithm.beta": 0.1}},
            {"id": "less", "kind": "greater", "a": {"algorithm.beta": 2.0},
             "b": {"algorithm.beta": 0.1}, "where": {"algorithm": "simpo"}},
        ],
    )  # fmt: skip

    def moved(trial: Trial) -> float:
        by = {"dpo": 0.25, "simpo": 2.0}[trial.config.algorithm.name]
        by = by if trial.cell["algorithm.beta"] == "2.0" else 1.0
        return 0.05 * by * (3 if trial.control else 1) * float(np.exp(NOISE[trial.config.seed]))

    def verdicts(density: Callable[[Trial], float], **made: Callable[..., object]):
        return judge(study, density, more=lambda t: {}, **made)

    same, more, less = verdicts(moved)
    assert same["verdict"] == "undecided"
    assert "beyond the margin" in str(same["note"])
    assert "the estimate is of" not in str(same["note"])  # as of claims that recover
    assert same["num_runs"] == more["num_runs"] == 4
    assert more["verdict"] == "refuted"  # sparser in DPO, but not in SimPO
    assert less["verdict"] == "refuted"
    slight = lambda t: 1.01 if t.cell["algorithm.beta"] == "2.0" else 1.0  # noqa: E731
    by_seed = lambda t: float(np.exp(NOISE[t.config.seed]))  # noqa: E731
    still = verdicts(lambda t: 0.05 * (3 if t.control else 1) * slight(t) * by_seed(t))
    assert still[0]["verdict"] == "supported"
    lost = verdicts(moved, failed=lambda t: t.config.algorithm.name == "simpo")[0]
    assert '{"algorithm.name":"simpo"}: 0 seeds with complete matched runs' in str(lost["note"])


def test_claims_leave_surrogates_out_unless_the_reward_is_asked_for() -> None:
    reward = {"a": {"algorithm.reward": "task"}, "b": {"algorithm.reward": "random"}}
    study = make_study(
        factors={"algorithm.reward": ["task", "random"]},
        controls=["shuffled_reward", "lr_times_3"],
        claims=[
            {"id": "real", "kind": "within", "low": 0.0, "high": 0.95},
            {"id": "asked", "kind": "within", "low": 0.0, "high": 0.95,
             "where": {"role": "surrogate"}},
            {"id": "sparser", "kind": "greater", **reward},
            {"id": "same", "kind": "equivalent", "factor": "algorithm.reward"},
        ],
    )  # fmt: skip

    def dense(trial: Trial) -> float:
        by = 4 if trial.role == "surrogate" else 3 if trial.control else 1
        return 0.1 * by * float(np.exp(NOISE[trial.config.seed]))

    real, asked, sparser, same = judge(study, dense)
    assert real["estimate"] == pytest.approx(0.9, abs=0.01)
    assert asked["estimate"] == pytest.approx(0.6, abs=0.03)
    assert (sparser["verdict"], sparser["num_runs"]) == ("supported", 4)
    assert (same["verdict"], same["num_runs"]) == ("undecided", 4)
    assert same["estimate"] == pytest.approx(4, rel=1e-3)


def test_equivalent_without_the_factor() -> None:
    where = {"algorithm.kl_coef": 0.0}
    undecided({**KL, "where": where}, "do not vary algorithm.kl_coef from 0.0")
    undecided({**KL, "factor": "train.batch_size"}, "the study does not vary train.batch_size")
