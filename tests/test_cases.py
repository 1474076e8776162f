"""Verdicts whole: missing runs, alternatives, the words, what would decide."""

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from planted_claims import (
    ABOVE,
    CLIPPED,
    KL,
    NO_OVERLAPS,
    NOISE,
    about,
    clip_lowers,
    density,
    judge,
    kl,
    noisy,
    one,
    overlaps_of,
    study_of,
    undecided,
    within,
)
from scipy import stats
from test_effects import N, make_tables, trials_of

from rlsparse import claims
from rlsparse.identity import canonical_json
from rlsparse.study import PairStudy, Trial

SIX = list(range(6))


def lost_one(trial: Trial) -> bool:
    """The clipped run of seed 2 without KL penalty."""
    clipped = trial.config.train.max_grad_norm is not None
    return trial.config.seed == 2 and clipped and kl(trial) == 0 and trial.control is None


# --- missing runs ------------------------------------------------------------------------------


def test_missing_runs_are_refused_unless_allowed() -> None:
    row = one(CLIPPED, clip_lowers, failed=lost_one, seeds=SIX)
    assert row["verdict"] == "undecided"
    assert str(row["note"]).startswith(
        "1 of 24 runs are missing (failed 1); --allow-missing judges the complete cases"
    )
    assert row["would_decide"] == "run the missing trials"
    assert row["estimate"] is not None
    assert row["alternatives"] == "{}"
    row = one(CLIPPED, clip_lowers, failed=lost_one, seeds=SIX, allow_missing=True)
    assert (row["verdict"], row["num_runs"]) == ("supported", 5)
    assert str(row["note"]).startswith("1 of 24 runs are missing (failed 1); ")
    unaffected = {**CLIPPED, "where": {"algorithm.kl_coef": 0.04}}
    row = one(unaffected, clip_lowers, failed=lost_one, seeds=SIX)
    assert (row["verdict"], row["num_runs"]) == ("supported", 6)
    assert "missing" not in str(row["note"])


def test_runs_that_never_started_are_missing_too() -> None:
    status = lambda t: about(t) | ({"status": "planned"} if lost_one(t) else {})  # noqa: E731
    undecided(CLIPPED, "1 of 16 runs are missing (failed 0)", clip_lowers, more=status)


def test_bounds_by_hand() -> None:
    """The missing run at the smallest and at the largest value of its side."""
    claim = {**CLIPPED, "where": {"algorithm.kl_coef": 0.0}}

    def dense(trial: Trial) -> float:
        seed, clipped = trial.config.seed, trial.config.train.max_grad_norm is not None
        return 0.1 * float(np.exp(NOISE[seed] - 0.7 * clipped * (1 + seed / 9)))

    lost = lambda t: lost_one(t) or (t.config.seed == 4 and t.role == "factor" and not kl(t))  # noqa: E731
    plain = {t.config.seed for t in trials_of(study_of(seeds=SIX)) if lost(t)}
    assert plain == {2, 4}
    row = one(claim, dense, failed=lost, seeds=SIX, allow_missing=True)
    a = {s: logit(0.1 * np.exp(NOISE[s] - 0.7 * (1 + s / 9))) for s in SIX if s != 2}
    b = {s: logit(0.1 * np.exp(NOISE[s])) for s in SIX if s != 4}
    both = [s for s in SIX if s in a and s in b]
    ends = (
        [min(a.values()) - b[2], a[4] - max(b.values())],
        [max(a.values()) - b[2], a[4] - min(b.values())],
    )
    low, high = (np.exp(np.mean([*(a[s] - b[s] for s in both), *end])) for end in ends)
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert row["estimate"] == pytest.approx(np.exp(np.mean([a[s] - b[s] for s in both])), rel=1e-9)
    said = f"with the missing runs at the extremes seen the estimate is {low:.2f} to {high:.2f}"
    assert said in str(row["note"])


def logit(trial_density: float) -> float:
    changed = round(trial_density * N)
    return float(np.log((N - changed + 0.5) / (changed + 0.5)))


def test_a_verdict_that_hangs_on_the_missing_runs_is_none() -> None:
    """Complete seeds agree; the missing value may be as odd as another cell of its side."""

    def odd(trial: Trial) -> float:
        clipped = trial.config.train.max_grad_norm is not None
        own = 0.5 if trial.config.seed == 5 else 1.0  # moves both sides alike
        return 0.1 * own * (0.9 if clipped else 1.0) * float(np.exp(0.2 * NOISE[trial.config.seed]))

    claim = {**CLIPPED, "where": {"algorithm.kl_coef": 0.0}}
    assert one(claim, odd, seeds=SIX)["verdict"] == "supported"
    row = one(claim, odd, seeds=SIX, failed=lost_one, allow_missing=True)
    assert row["verdict"] == "undecided"
    assert "depends on the missing runs: supported without them" in str(row["note"])
    assert row["would_decide"] == "run the missing trials"


def test_bounds_of_a_mean_and_of_an_interaction() -> None:
    claim = within(0.5, 0.99, where={"algorithm.kl_coef": 0.0, "train.max_grad_norm": 1.0})
    row = one(claim, failed=lost_one, seeds=SIX, allow_missing=True)
    own = [round(0.1 * np.exp(NOISE[s] + 0.1 * NOISE[(s + 5) % 10]) * N) for s in SIX if s != 2]
    values = [np.log((N - k + 0.5) / (k + 0.5)) for k in own]
    ends = [1 / (1 + np.exp(-np.mean([*values, end]))) for end in (min(values), max(values))]
    assert f"the estimate is {ends[0]:.3f} to {ends[1]:.3f}" in str(row["note"])
    both = {"kind": "interaction", "factor": "algorithm.kl_coef", "by": "train.max_grad_norm"}
    row = one(both, failed=lost_one, seeds=SIX, allow_missing=True)
    assert row["num_runs"] == 5
    assert "with the missing runs at the extremes seen" in str(row["note"])


def test_overlap_claims_say_how_many_runs_are_missing() -> None:
    study = study_of(ABOVE, seeds=SIX)
    lost = lambda t: t.config.seed == 2  # noqa: E731
    table = overlaps_of(study, noisy(1.5))
    (row,) = judge(study, overlaps=table, failed=lost)
    assert (row["verdict"], "1 of 6 runs are missing" in str(row["note"])) == ("undecided", True)
    (row,) = judge(study, overlaps=table, failed=lost, allow_missing=True)
    assert (row["verdict"], row["num_runs"]) == ("supported", 5)
    assert str(row["note"]).startswith(
        "1 of 6 runs are missing (failed 1): 5 of 15 pairs left out, as only seeds whose runs all "
        "finished enter; no worst case is computed for overlaps; null magnitude"
    )


def test_overlap_claims_leave_out_seeds_that_are_incomplete() -> None:
    """Seeds 0, 1 and 2 lose one of four runs each; their other runs would pair with all."""
    study = study_of({**ABOVE, "where": {}}, seeds=SIX)
    table = overlaps_of(study, noisy(1.5))

    def lost(trial: Trial) -> bool:
        return trial.config.seed < 3 and bool(kl(trial)) and trial.cell != {} and clips(trial)

    (row,) = judge(study, overlaps=table, failed=lost, allow_missing=True)
    assert (row["verdict"], row["num_runs"]) == ("undecided", 3)
    assert "3 seeds with pairs, 4 are needed" in str(row["note"])
    assert "48 of 60 pairs left out" in str(row["note"])  # 4 cells x (15 - 3)
    assert row["would_decide"] == "run the missing trials"
    first = lambda t: lost(t) and t.config.seed == 0  # noqa: E731
    (row,) = judge(study, overlaps=table, failed=first, allow_missing=True)
    assert (row["verdict"], row["num_runs"]) == ("supported", 5)
    assert "lift over 40 pairs" in str(row["note"])


def clips(trial: Trial) -> bool:
    return trial.config.train.max_grad_norm is not None


def test_more_seeds_are_not_asked_for_where_missing_ones_would_do() -> None:
    lost = lambda t: t.config.seed == 2 and t.control is None  # noqa: E731
    for allowed in (False, True):
        row = one(CLIPPED, clip_lowers, failed=lost, allow_missing=allowed)
        assert row["would_decide"] == "run the missing trials"
    row = one(CLIPPED, clip_lowers, failed=lost, seeds=[0, 1, 2])
    assert row["would_decide"] == "run the missing trials; more seeds: 4 are needed"


def test_a_share_exactly_on_its_bound_is_inside() -> None:
    row = one(within(0.0, 0.1, response="failed"))
    assert (row["verdict"], row["estimate"], row["ci_high"]) == ("supported", 0.0, 0.0)
    row = one({"kind": "reproduces", "response": "failed", "value": 0.0, "margin": 0.1})
    assert row["verdict"] == "supported"


def test_failures_are_a_response_themselves() -> None:
    claim = {"kind": "greater", "response": "failed", "margin": 0.0}
    claim |= {"a": {"train.max_grad_norm": None}, "b": {"train.max_grad_norm": 1.0}}
    fails = lambda t: t.config.train.max_grad_norm is None and (kl(t) == 0 or t.config.seed == 1)  # noqa: E731
    row = one(claim, failed=fails)
    assert (row["verdict"], row["num_runs"], row["margin"]) == ("supported", 4, 0.0)
    assert row["estimate"] == pytest.approx((0.5 + 1.0 + 0.5 + 0.5) / 4, rel=1e-12)
    assert "missing" not in str(row["note"])
    pending = lambda t: {"status": "planned"} if t.config.seed == 3 else {}  # noqa: E731
    undecided(claim, "4 of 16 runs are missing (failed 0)", failed=fails, more=pending)


# --- alternatives ------------------------------------------------------------------------------


def test_other_views_are_alternatives() -> None:
    study = study_of({**CLIPPED, "response": "sparsity.bitwise@bf16"})
    trials, steps, stored = make_tables(trials_of(study), clip_lowers, more=about)
    coarse = make_tables(trials_of(study), lambda t: 0.1 * float(np.exp(NOISE[t.config.seed])))[2]
    at = coarse.schema.get_field_index("view")
    coarse = coarse.set_column(at, coarse.field(at), pa.array(["bf16"] * coarse.num_rows))
    changes = pa.concat_tables([stored, coarse])
    (row,) = claims.judge(
        study, {}, trials, steps, changes, NO_OVERLAPS, allow_missing=False
    ).to_pylist()
    found = json.loads(row["alternatives"])
    assert row["verdict"] == "undecided"
    assert len(found) == 13
    assert found["abs_1e-08@bf16"] == "undecided"
    assert {found[name] for name in found if name.endswith("@stored")} == {"supported"}
    assert row["depends_on_definition"] is True
    assert "supported under bitwise@stored, abs_1e-08@stored" in row["note"]


def test_other_nulls_are_alternatives() -> None:
    study = study_of(ABOVE)
    (row,) = judge(study, overlaps=overlaps_of(study, lambda a, b: 0.9))
    assert row["verdict"] == "refuted"
    assert row["alternatives"] == "{}"  # magnitude is the strongest null there
    assert row["depends_on_definition"] is None
    weaker = study_of({**ABOVE, "null": "uniform"})
    (row,) = judge(weaker, overlaps=overlaps_of(weaker, lambda a, b: 0.9))
    assert row["verdict"] == "supported"
    assert json.loads(str(row["alternatives"])) == {"tensor": "supported", "magnitude": "refuted"}
    assert row["depends_on_definition"] is True
    assert "depends on the null: refuted under magnitude" in str(row["note"])


# --- words -------------------------------------------------------------------------------------

SCOPE = (
    "(base tiny, task chain_sum, learning rate 1e-05, 20 steps, bf16-mixed, view stored; "
    "checks the pipeline, is no evidence about LLMs)"
)


def test_the_outcome_is_a_sentence_with_scope() -> None:
    row = one(CLIPPED, clip_lowers)
    shown = [f"{row[name]:.2f}" for name in ("estimate", "ci_low", "ci_high")]
    assert row["outcome"] == (
        f"supported: odds ratio of unchanged weights {shown[0]} [{shown[1]}, {shown[2]}] {SCOPE}"
    )
    assert row["would_decide"] is None
    row = one({**CLIPPED, "margin": 2.1111}, clip_lowers)
    assert str(row["outcome"]).startswith(
        "undecided, as the interval reaches across the margin: odds ratio of unchanged weights 2.1"
    )
    row = one({**CLIPPED, "at": {"score": "common"}}, clip_lowers)
    assert "20 steps, bf16-mixed, at equal score, view stored;" in str(row["outcome"])
    assert ", at equal score, log density interpolated linearly; t int" in str(row["statistic"])
    row = one({"kind": "exact", "where": {"control": "lr_zero"}})
    assert str(row["outcome"]).startswith(
        "supported: sparsity.bitwise@stored is 1 in 1 of 1 runs (base tiny"
    )
    row = one(within(0, 1, response="sparsity.nearly"))
    assert str(row["outcome"]).startswith("undecided, as a claim of kind within cannot be about")


def test_runs_made_elsewhere_have_the_scope_that_is_known() -> None:
    given = study_of(CLIPPED)
    claim = given.claims[0]
    study = PairStudy(
        name="p",
        question="?",
        pairs="pairs.csv",
        factors={"train.max_grad_norm": [None, 1.0]},
        settings={"model.source": "org/base"},
        claims=(claim,),
    )

    def known(trial: Trial) -> dict[str, object]:
        config = {
            "model": {"source": "org/base"},
            "algorithm": {"name": "grpo"},
            "train": {"num_steps": 20, "max_grad_norm": trial.config.train.max_grad_norm},
            "seed": trial.config.seed,
        }
        return about(trial) | {"config": canonical_json(config)}

    parts = make_tables(trials_of(given), clip_lowers, more=known)
    (row,) = claims.judge(study, {}, *parts, NO_OVERLAPS, allow_missing=False).to_pylist()
    assert row["verdict"] == "supported"
    assert row["scope"] == (
        "base org/base, task unknown, learning rate unknown, 20 steps, precision unknown, "
        "view stored"
    )
    lost = study.model_copy(update={"claims": (claim.model_copy(update={"where": {"seed": 99}}),)})
    (row,) = claims.judge(lost, {}, *parts, NO_OVERLAPS, allow_missing=False).to_pylist()
    assert row["scope"].startswith("base org/base, task unknown")


# --- what would decide -------------------------------------------------------------------------


def seeds_by_brute_force(values: np.ndarray, edge: float, coverage: float) -> int:
    spread, distance = values.std(ddof=1), abs(values.mean() - edge)
    return next(
        n
        for n in range(2, 1000)
        if stats.t.ppf((1 + coverage) / 2, n - 1) * spread / np.sqrt(n) < distance
    )


def test_the_number_of_seeds_that_would_decide() -> None:
    def dense(trial: Trial) -> float:
        clipped = trial.config.train.max_grad_norm is not None
        return 0.1 * float(np.exp((-0.02 if clipped else 0) + NOISE[trial.config.seed] * clipped))

    row = one(CLIPPED, dense)
    gaps = np.array([logit(0.1 * np.exp(-0.02 + NOISE[s])) - logit(0.1) for s in range(4)])
    wanted = seeds_by_brute_force(gaps, 0.0, 0.95)
    assert wanted > 4
    assert row["verdict"] == "undecided"
    assert row["would_decide"] == f"about {wanted} seeds, if the spread stays"
    at_edge = {**CLIPPED, "margin": float(np.exp(gaps.mean()))}
    row = one(at_edge, dense)
    assert row["would_decide"] == "more than 200 seeds: the estimate lies at the margin"


def test_remedies_of_reasons() -> None:
    remedies: list[tuple[dict[str, object], dict[str, object], str]] = [
        (KL, {"controls": []}, "add the control lr_times_3"),
        (within(0, 1), {"seeds": [0, 1]}, "more seeds: 4 are needed"),
        ({**CLIPPED, "margin": 0.0}, {}, "mend the claim"),
    ]
    for claim, fields, remedy in remedies:
        row = one(claim, **fields)
        assert (row["verdict"], row["would_decide"]) == ("undecided", remedy)
    against: Callable[[Trial], float] = lambda t: density(t) * (2 if kl(t) else 1)  # noqa: E731
    assert "never refutes" in str(one(KL, against)["would_decide"])
