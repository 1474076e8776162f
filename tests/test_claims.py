"""Every branch of every verdict, on studies with planted answers."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from test_effects import N, make_study, make_tables, trials_of

from rlsparse import claims, tables
from rlsparse.errors import TableError
from rlsparse.study import Study, Trial

FACTORS = {"algorithm.kl_coef": [0.0, 0.04], "train.max_grad_norm": [None, 1.0]}
CONTROLS = ["lr_zero", "same_seed", "lr_times_3"]
NOISE = np.random.default_rng(0).normal(0, 0.03, 10)


def study_of(*given: Mapping[str, object], **fields: object) -> Study:
    listed = [{"id": f"c{i}", **claim} for i, claim in enumerate(given)]
    return make_study(**{"factors": FACTORS, "controls": CONTROLS, "claims": listed} | fields)


def kl(trial: Trial) -> float:
    return float(trial.config.algorithm.kl_coef)  # type: ignore[union-attr]


def density(trial: Trial) -> float:
    """Moved by the seed, by three times the learning rate, and hardly by the factors."""
    seed, clipped = trial.config.seed, trial.config.train.max_grad_norm is not None
    noise = NOISE[seed] + 0.1 * NOISE[(seed + 3) % 10] * (kl(trial) > 0)
    noise += 0.1 * NOISE[(seed + 5) % 10] * clipped
    by = {"lr_zero": 0.0, "lr_times_3": 2.5}.get(str(trial.control), 1.0)
    return float(by * 0.1 * np.exp(noise))


def about(trial: Trial) -> dict[str, object]:
    realised = 0.5 / (1 + kl(trial) * 20) + 0.01 * trial.config.seed
    clipped = 0 if trial.config.train.max_grad_norm is None else 7
    return {"kl_final": realised, "num_clipped_steps": clipped}


def judge(
    study: Study,
    density: Callable[[Trial], float] = density,
    *,
    registered: Mapping[str, str] | None = None,
    overlaps: pa.Table | None = None,
    identical: Mapping[str, bool] | None = None,
    **made: Callable[..., object],
) -> list[dict[str, object]]:
    trials = trials_of(study)
    if registered is None:
        registered = {claim.id: "registered" for claim in study.claims}
    if identical is None:
        identical = {t.trial_id: True for t in trials if t.control == "same_seed"}
    if overlaps is None:
        overlaps = tables.SCHEMAS["overlaps"].empty_table()
    parts = make_tables(trials, density, **{"more": about} | made)  # type: ignore[arg-type]
    table = claims.judge(study, registered, *parts, overlaps, identical)
    assert tables.check(table, "claims").equals(table)
    return list(table.to_pylist())


def one(claim: Mapping[str, object], *given: object, **fields: object) -> dict[str, object]:
    (row,) = judge(study_of(claim), *given, **fields)  # type: ignore[arg-type]
    return row


# --- exact -------------------------------------------------------------------------------------

LR_ZERO = {"kind": "exact", "where": {"control": "lr_zero"}}
IDENTICAL = {"kind": "exact", "response": "identical_replicates"}


def test_exact_sparsity_is_supported_only_at_no_change_at_all() -> None:
    row = one(LR_ZERO)
    assert (row["verdict"], row["estimate"], row["num_runs"]) == ("supported", 1.0, 1)
    assert row["depends_on_definition"] is False
    assert row["ci_low"] is None
    assert row["statistic"] == "sparsity.bitwise@stored is exactly 1 in every run"
    row = one(LR_ZERO, lambda trial: 1 / N)
    assert (row["verdict"], row["depends_on_definition"]) == ("refuted", False)


def test_exact_is_refuted_by_any_definition() -> None:
    row = one(LR_ZERO, lambda t: 1 / N, by_definition=lambda t, d: float(d == "rel_1e-03"))
    assert row["verdict"] == "refuted"
    assert row["depends_on_definition"] is True
    assert row["note"] == "differs under rel_1e-03"


def test_exact_without_its_runs_is_undecided() -> None:
    row = one(LR_ZERO, failed=lambda trial: trial.control == "lr_zero")
    assert row["verdict"] == "undecided"
    assert row["note"] == "1 runs planned, 0 finished; a selected run did not finish"
    row = one({**LR_ZERO, "where": {"control": "lr_zero", "seed": 9}})
    assert (row["verdict"], row["num_runs"]) == ("undecided", 0)
    assert row["note"] == 'no run matches {"control":"lr_zero","seed":9}'
    row = one({**LR_ZERO, "response": "sparsity.bitwise@fp32"})
    assert (row["verdict"], row["note"]) == (
        "undecided",
        "sparsity.bitwise@fp32 was measured in 0 of 1 runs",
    )


def test_identical_replicates() -> None:
    study = study_of(IDENTICAL)
    (replica,) = [t.trial_id for t in trials_of(study) if t.control == "same_seed"]
    (row,) = judge(study, identical={replica: True})
    assert (row["verdict"], row["num_runs"], row["depends_on_definition"]) == ("supported", 1, None)
    (row,) = judge(study, identical={replica: False})
    assert row["verdict"] == "refuted"
    (row,) = judge(study, identical={})
    assert row["verdict"] == "undecided"
    (row,) = judge(study_of(IDENTICAL, controls=[]))
    assert row["note"] == 'no run matches {"control":"same_seed"}'


def test_exact_score_of_a_replicate_is_not_taken_for_its_identity() -> None:
    claim = {"kind": "exact", "response": "score_after", "value": 0.5}
    row = one({**claim, "where": {"control": "same_seed"}})
    assert (row["verdict"], row["estimate"]) == ("supported", 0.5)


# --- within, greater ---------------------------------------------------------------------------


def within(low: float, high: float, **more: object) -> dict[str, object]:
    return {"kind": "within", "low": low, "high": high, **more}


def test_within_by_hand() -> None:
    where = {"algorithm.kl_coef": 0.0, "train.max_grad_norm": None}
    row = one(within(0.7, 0.95, where=where))
    changed = np.array([round(0.1 * np.exp(NOISE[seed]) * N) for seed in range(4)])
    logits = np.log((N - changed + 0.5) / (changed + 0.5))
    half = 3.182446305 * logits.std(ddof=1) / 2
    expected = [logits.mean(), logits.mean() - half, logits.mean() + half]
    found = [row["estimate"], row["ci_low"], row["ci_high"]]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.array(expected))), rtol=1e-6)
    assert (row["verdict"], row["num_runs"], row["p_floor"]) == ("supported", 4, 0.125)
    assert row["ci_level"] == pytest.approx(0.95)
    assert row["margin"] is None
    assert one(within(0.0, 0.8, where=where))["verdict"] == "refuted"
    row = one(within(0.8981, 0.95, where=where))
    assert row["verdict"] == "undecided"
    assert row["note"] == "the interval reaches across the margin; robust to definition"
    assert 0.05 < row["p_value"] < 0.125  # type: ignore[operator]


def test_runs_of_a_seed_are_one_unit() -> None:
    row = one(within(0.7, 0.95))
    assert row["num_runs"] == 4  # of 16 runs


def test_fewer_than_four_seeds_decide_nothing() -> None:
    (row,) = judge(study_of(within(0, 1), seeds=[0, 1, 2]))
    assert (row["verdict"], row["num_runs"]) == ("undecided", 3)
    assert "3 seeds with complete matched runs, 4 are needed" in str(row["note"])
    assert row["p_value"] is None


def test_failed_runs_are_said() -> None:
    row = one(within(0, 1), failed=lambda t: t.config.seed == 2 and t.role == "baseline")
    assert row["verdict"] == "undecided"
    assert str(row["note"]).startswith("16 runs planned, 15 finished; 3 seeds with complete")


def test_nothing_selected_is_said() -> None:
    row = one(within(0, 1, where={"algorithm": "dpo"}))
    assert row["verdict"] == "undecided"
    assert row["note"] == 'no run matches {"algorithm":"dpo"}'


CLIPPED = {
    "kind": "greater",
    "a": {"train.max_grad_norm": 1.0},
    "b": {"train.max_grad_norm": None},
}


def clip_lowers(trial: Trial) -> float:
    steady = 1 + 0.02 * NOISE[trial.config.seed + 4 * (kl(trial) > 0)]
    return 0.1 * float(steady) * (0.5 if trial.config.train.max_grad_norm else 1.0)


def test_greater_by_hand() -> None:
    row = one(CLIPPED, clip_lowers)
    assert row["verdict"] == "supported"
    assert row["estimate"] == pytest.approx((0.95 / 0.05) / (0.9 / 0.1), rel=1e-2)
    assert (row["margin"], row["num_runs"], row["depends_on_definition"]) == (1.0, 4, False)
    assert "below the floor of an exact sign-flip" in str(row["note"])
    assert "odds ratio of sparsity.bitwise@stored, a over b" in str(row["statistic"])
    assert one({**CLIPPED, "margin": 2.0}, clip_lowers)["verdict"] == "supported"
    assert one({**CLIPPED, "margin": 2.2}, clip_lowers)["verdict"] == "refuted"
    assert one({**CLIPPED, "margin": 2.1111}, clip_lowers)["verdict"] == "undecided"
    swapped = {**CLIPPED, "a": CLIPPED["b"], "b": CLIPPED["a"]}
    assert one(swapped, clip_lowers)["verdict"] == "refuted"


def test_greater_against_a_control() -> None:
    cell = {"algorithm.kl_coef": 0.0, "train.max_grad_norm": None}
    claim = {"kind": "greater", "a": cell, "b": {"control": "lr_times_3"}}
    row = one(claim)
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert row["estimate"] == pytest.approx((0.9 / 0.1) / (0.75 / 0.25), rel=0.05)


def test_greater_of_scores() -> None:
    def score(trial: Trial) -> float:
        return 0.6 if trial.config.train.max_grad_norm else 0.5

    for response, estimate, margin in (("score_after", 1.5, 1.0), ("score_gain", 0.1, 0.0)):
        row = one({**CLIPPED, "response": response}, score=score)
        assert (row["verdict"], row["margin"]) == ("supported", margin)
        assert row["estimate"] == pytest.approx(estimate, rel=1e-2)
        assert row["depends_on_definition"] is None
    equal = one({**CLIPPED, "response": "score_gain"})
    assert (equal["verdict"], equal["estimate"], equal["p_value"]) == ("undecided", 0.0, 1.0)


def test_scores_of_unknown_precision_are_not_compared() -> None:
    undecided(
        {**CLIPPED, "response": "score_after"},
        "num_eval_problems is not known (8 of 8)",
        more=lambda t: {"num_eval_problems": None},
    )


def test_greater_at_a_step_and_at_a_common_score() -> None:
    row = one({**CLIPPED, "at": {"step": 10}}, clip_lowers)
    assert row["estimate"] == pytest.approx((0.975 / 0.025) / (0.95 / 0.05), rel=1e-2)
    row = one({**CLIPPED, "at": {"step": 11}}, clip_lowers)
    assert row["verdict"] == "undecided"
    assert "no snapshot at step 11; there are 10, 20 (8 of 8)" in str(row["note"])

    def score(trial: Trial) -> float:  # at step 10 the clipped run has what the other ends with
        return 0.75 if trial.config.train.max_grad_norm else 0.5

    row = one({**CLIPPED, "at": {"score": "common"}}, clip_lowers, score=score)
    assert row["estimate"] == pytest.approx((0.975 / 0.025) / (0.9 / 0.1), rel=1e-2)
    row = one({**CLIPPED, "at": {"score": 0.7}}, clip_lowers, score=score)
    assert "score 0.7 is not reached (8 of 8)" in str(row["note"])


def test_definitions_that_disagree_are_named() -> None:
    def only_small(trial: Trial, definition: str) -> float:
        clipped = trial.config.train.max_grad_norm is not None
        return 2.0 if clipped and definition == "abs_1e-05" else 1.0

    row = one(CLIPPED, clip_lowers, by_definition=only_small)
    assert (row["verdict"], row["depends_on_definition"]) == ("supported", True)
    assert "depends on the definition: undecided under abs_1e-05" in str(row["note"])
    row = one({**CLIPPED, "response": "sparsity.abs_1e-05"}, clip_lowers, by_definition=only_small)
    assert row["verdict"] == "undecided"
    assert "supported under bitwise, supported under abs_1e-08" in str(row["note"])


# --- equivalent --------------------------------------------------------------------------------

KL = {"kind": "equivalent", "factor": "algorithm.kl_coef"}
CLIP = {"kind": "equivalent", "factor": "train.max_grad_norm"}


@pytest.mark.parametrize("claim", [KL, CLIP])
def test_equivalent_is_supported(claim: dict[str, object]) -> None:
    row = one(claim)
    assert (row["verdict"], row["margin"], row["num_runs"]) == ("supported", 1.25, 4)
    assert row["estimate"] == pytest.approx(1, abs=0.02)
    assert row["ci_level"] == pytest.approx(0.9)
    assert 0.8 < row["ci_low"] <= row["estimate"] <= row["ci_high"] < 1.25  # type: ignore[operator]


def undecided(claim: Mapping[str, object], why: str, *given: object, **fields: object) -> None:
    row = one(claim, *given, **fields)
    assert row["verdict"] == "undecided"
    assert why in str(row["note"])


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
    assert (row["note"], row["estimate"]) == (f"{SAME}; robust to definition", 1.0)

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


# --- runs that learned nothing -----------------------------------------------------------------


def idle(trial: Trial) -> bool:
    """No run with gradient clipping ever had a reward."""
    return trial.config.train.max_grad_norm is not None


def test_runs_that_learned_nothing_are_not_sparse() -> None:
    why = "changed no weight at all (no signal, or all rounded away): "
    none = lambda t: 0.0 if idle(t) else density(t)  # noqa: E731
    row = one(CLIPPED, none)
    ids = sorted(t.trial_id for t in trials_of(study_of(CLIPPED)) if idle(t))
    assert row["verdict"] == "undecided"
    assert row["note"] == f"8 of the 16 runs {why}{', '.join(ids[:3])}, ...; robust to definition"
    once = lambda t: 0.0 if idle(t) and t.config.seed == 1 and kl(t) else clip_lowers(t)  # noqa: E731
    undecided(CLIPPED, f"1 of the 16 runs {why}", once)
    undecided({**CLIPPED, "response": "sparsity.abs_1e-05"}, f"1 of the 16 runs {why}", once)
    undecided(within(0, 1), f"8 of the 16 runs {why}", none)
    undecided(CLIP, f"train.max_grad_norm = null: 8 of the 16 runs {why}", none)
    control = lambda t: 0.0 if t.control == "lr_times_3" else density(t)  # noqa: E731
    undecided(KL, f"no sign of sensitivity: lr_times_3: 4 of the 8 runs {why}", control)


def test_runs_that_moved_only_below_a_tolerance_are_evidence() -> None:
    """Unchanged within 1e-5, or in a coarser view, is not untrained; no learning rate neither."""
    above = lambda t, d: float(d == "bitwise" or not idle(t))  # noqa: E731
    claim = {**CLIPPED, "response": "sparsity.abs_1e-05"}
    assert one(claim, clip_lowers, by_definition=above)["verdict"] == "supported"
    untrained = {"algorithm": {"name": "grpo"}, "train": {"num_steps": 20, "learning_rate": 0.0}}
    off = study_of(CLIPPED, baseline=untrained)
    none = lambda t: 0.0 if idle(t) else clip_lowers(t)  # noqa: E731
    assert judge(off, none)[0]["verdict"] == "supported"
    study = study_of({**CLIPPED, "response": "sparsity.bitwise@bf16"})
    trials, steps, stored = make_tables(trials_of(study), clip_lowers, more=about)
    coarse = make_tables(trials_of(study), none)[2]
    at = coarse.schema.get_field_index("view")
    coarse = coarse.set_column(at, coarse.field(at), pa.array(["bf16"] * coarse.num_rows))
    empty = tables.SCHEMAS["overlaps"].empty_table()
    deltas = pa.concat_tables([stored, coarse])
    table = claims.judge(study, {}, trials, steps, deltas, empty, {})
    assert table["verdict"].to_pylist() == ["supported"]


def test_runs_are_read_where_the_claim_reads_them() -> None:
    study = study_of({**CLIPPED, "at": {"step": 10}}, CLIPPED)
    trials = trials_of(study)
    tables_of = make_tables(trials, clip_lowers, more=about)
    slow = {trial.trial_id for trial in trials if idle(trial)}
    rows = tables_of[2].to_pylist()
    for row in rows:
        if row["trial_id"] in slow and row["step_after"] == 10:
            row |= {name: 0 for name in row if name.startswith("num_changed_")}
    deltas = tables.from_rows(rows, "tensor_deltas")
    empty = tables.SCHEMAS["overlaps"].empty_table()
    found = claims.judge(study, {}, *tables_of[:2], deltas, empty, {})
    assert found["verdict"].to_pylist() == ["undecided", "supported"]


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


# --- above_null --------------------------------------------------------------------------------


def overlaps_of(
    study: Study, lift: Callable[[Trial, Trial], float], share: float = 0.1
) -> pa.Table:
    """Overlaps of all pairs; ``lift`` is over magnitude, the other nulls expect half as much."""
    rows: list[dict[str, object]] = []
    trials = sorted(trials_of(study), key=lambda trial: trial.trial_id)
    for a, b in itertools.combinations(trials, 2):
        expected = share**2 * N
        row: dict[str, object] = {"trial_a": a.trial_id, "step_a": 20, "definition": "bitwise"}
        row |= {"trial_b": b.trial_id, "step_b": 20, "view": "stored", "num_elements": N}
        row |= {"num_a": int(share * N), "num_b": int(share * N)}
        row |= {"num_both": round(expected * lift(a, b)), "expected_magnitude": expected}
        row |= {"expected_uniform": expected / 2, "expected_tensor": expected / 2}
        rows += [row, row | {"module": "q", "num_both": 0}]
    return tables.from_rows(rows, "overlaps")


ABOVE = {"kind": "above_null", "where": {"algorithm.kl_coef": 0.0, "train.max_grad_norm": None}}


def noisy(lift: float) -> Callable[[Trial, Trial], float]:
    return lambda a, b: lift * float(np.exp(NOISE[a.config.seed] + NOISE[b.config.seed]))


def test_above_null_by_hand() -> None:
    study = study_of(ABOVE)
    (row,) = judge(study, overlaps=overlaps_of(study, noisy(1.5)))
    assert (row["verdict"], row["num_runs"], row["margin"]) == ("supported", 4, 1.1)
    pairs = {
        (a, b): np.log((round(1e4 * 1.5 * np.exp(NOISE[a] + NOISE[b])) + 0.5) / 10000.5)
        for a, b in itertools.combinations(range(4), 2)
    }
    mean = np.mean(list(pairs.values()))
    without = [np.mean([v for k, v in pairs.items() if seed not in k]) for seed in range(4)]
    error = np.sqrt(3 / 4 * np.sum((np.array(without) - np.mean(without)) ** 2))
    found = np.log([row["estimate"], row["ci_low"], row["ci_high"]])  # type: ignore[arg-type]
    np.testing.assert_allclose(found, mean + error * np.array([0, -3.182446305, 3.182446305]))
    note = str(row["note"])
    assert "null magnitude; lift over 6 pairs by null: uniform 3" in note
    assert row["depends_on_definition"] is None


@pytest.mark.parametrize(
    ("null", "lift", "verdict"),
    [
        ("magnitude", 1.0, "refuted"),
        ("magnitude", 1.1, "undecided"),
        ("uniform", 1.0, "supported"),
        ("tensor", 0.4, "refuted"),
    ],
)
def test_above_null_verdicts(null: str, lift: float, verdict: str) -> None:
    study = study_of({**ABOVE, "null": null})
    steady = lambda a, b: lift * float(np.exp(0.2 * (NOISE[a.config.seed] + NOISE[b.config.seed])))  # noqa: E731
    (row,) = judge(study, overlaps=overlaps_of(study, steady))
    assert row["verdict"] == verdict


def test_above_null_between_levels_pairs_within_the_seed() -> None:
    study = study_of({**ABOVE, "between": "algorithm.kl_coef", "where": {}})

    def lift(a: Trial, b: Trial) -> float:
        ours = a.config.seed == b.config.seed and kl(a) != kl(b)
        ours = ours and a.config.train.max_grad_norm == b.config.train.max_grad_norm
        return 1.5 * float(np.exp(NOISE[a.config.seed])) if ours else 0.0

    (row,) = judge(study, overlaps=overlaps_of(study, lift))
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert "lift over 8 pairs" in str(row["note"])


def test_masks_of_different_bases_do_not_overlap() -> None:
    claim = {**ABOVE, "between": "model.source", "where": {}}
    study = study_of(claim, factors={"model.source": ["tiny", "smollm2-135m"]}, controls=[])
    (row,) = judge(study)
    assert row["verdict"] == "undecided"
    assert "masks of different bases have no weights in common" in str(row["note"])


def test_above_null_between_seeds_stays_within_the_cell() -> None:
    study = study_of({**ABOVE, "where": {}})

    def lift(a: Trial, b: Trial) -> float:
        return noisy(1.5)(a, b) if a.cell == b.cell and not (a.control or b.control) else 0.0

    (row,) = judge(study, overlaps=overlaps_of(study, lift))
    assert (row["verdict"], row["num_runs"]) == ("supported", 4)
    assert "lift over 24 pairs" in str(row["note"])


def test_above_null_at_a_step() -> None:
    study = study_of({**ABOVE, "at": {"step": 20}}, {**ABOVE, "at": {"step": 10}})
    rows = judge(study, overlaps=overlaps_of(study, noisy(1.5)))
    assert [row["verdict"] for row in rows] == ["supported", "undecided"]
    assert ", 10), (" in str(rows[1]["note"])


def test_one_dense_mask_of_a_pair_does_not_hinder_a_verdict() -> None:
    study = study_of(ABOVE)
    table = overlaps_of(study, noisy(1.5))
    dense = table.set_column(
        table.schema.get_field_index("num_a"), "num_a", pa.array([N * 3 // 4] * table.num_rows)
    )
    (row,) = judge(study, overlaps=dense)
    assert row["verdict"] == "supported"


def test_above_null_undecided() -> None:
    study = study_of(ABOVE)
    cases = {
        "table overlaps lacks the pair": None,
        "both densities of a pair exceed 0.5": overlaps_of(study, noisy(1.5), 0.51),
        "a mask is empty": overlaps_of(study, noisy(1.5), 0.0),
    }
    for why, table in cases.items():
        (row,) = judge(study, overlaps=table)
        assert row["verdict"] == "undecided"
        assert why in str(row["note"])
    few = study_of(ABOVE, seeds=[0, 1, 2])
    (row,) = judge(few, overlaps=overlaps_of(few, noisy(1.5)))
    assert "3 seeds with pairs, 4 are needed" in str(row["note"])
    alone = study_of(ABOVE, seeds=[0])
    (row,) = judge(alone)
    assert "no two finished runs differ in seed alone" in str(row["note"])


# --- all claims --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ({**KL, "response": "score_after"}, "kind equivalent cannot be about score_after"),
        ({**ABOVE, "response": "sparsity.bitwise"}, "kind above_null cannot be about"),
        ({**ABOVE, "response": "overlap.abs_1e-05"}, "cannot be about overlap.abs_1e-05"),
        ({**ABOVE, "at": {"score": 0.5}}, "at.score interpolates density"),
        (within(0, 1, response="sparsity.nearly"), "cannot be about sparsity.nearly"),
        (within(0, 1, at={"score": "common"}), "at.score common is of pairs"),
        (within(0, 1, response="identical_replicates"), "cannot be about identical_replicates"),
        ({**LR_ZERO, "response": "overlap.bitwise"}, "kind exact cannot be about overlap.bitwise"),
        ({**CLIPPED, "margin": 0.0}, "must be above 0"),
    ],
)
def test_claims_that_make_no_sense_are_undecided(claim: dict[str, object], why: str) -> None:
    undecided(claim, why)


def test_holm_over_the_claims_that_are_tested() -> None:
    clear, vague = within(0.5, 0.99), within(0.9, 0.95)
    rows = judge(study_of(clear, vague, LR_ZERO))
    assert [row["ci_level"] for row in rows] == [pytest.approx(0.975), pytest.approx(0.95), None]
    alone = [one(clear)["p_value"], one(vague)["p_value"]]
    assert rows[0]["p_value"] == pytest.approx(2 * alone[0])  # type: ignore[operator]
    assert rows[1]["p_value"] == pytest.approx(alone[1])
    assert "Holm over 2 claims" in str(rows[0]["statistic"])


def test_verdict_is_reached_exactly_below_p_of_5_percent() -> None:
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(4):
        bounds = [sorted(rng.uniform(0.88, 0.92, 2)) for _ in range(4)]
        for row in judge(study_of(*(within(*pair) for pair in bounds))):
            decided = row["verdict"] != "undecided"
            assert decided == (row["p_value"] < 0.05)  # type: ignore[operator]
            seen.add(row["verdict"])
    assert seen == {"supported", "refuted", "undecided"}


def test_post_hoc_claims_do_not_touch_registered_ones() -> None:
    clear = within(0.5, 0.99)
    before = judge(study_of(clear))
    after = judge(study_of(clear, clear, clear), registered={"c0": "registered", "c1": "extended"})
    assert [row["registered"] for row in after] == ["registered", "extended", "post hoc"]
    p = float(str(before[0]["p_value"]))
    assert [row["p_value"] for row in after] == [pytest.approx(p * k) for k in (2, 2, 3)]


def test_scope_names_what_was_held_fixed() -> None:
    row = one(within(0, 1, where={"role": "baseline"}))
    assert row["scope"] == (
        "base tiny; task chain_sum; learning rate 1e-05; steps 20; precision bf16-mixed; "
        "view stored; checks the pipeline, is no evidence about LLMs"
    )
    baseline = {"algorithm": {"name": "grpo"}, "model": {"source": "org/model@v1"}}
    (row,) = judge(study_of(within(0, 1, response="sparsity.bitwise@bf16"), baseline=baseline))
    assert "base org/model@v1" in str(row["scope"])
    assert "view bf16" in str(row["scope"])
    assert "LLMs" not in str(row["scope"])


def test_row_order_does_not_matter() -> None:
    study = study_of(KL, CLIP, CLIPPED, within(0.7, 0.95), ABOVE, LR_ZERO, IDENTICAL)
    trials = trials_of(study)
    parts = [*make_tables(trials, density, more=about), overlaps_of(study, noisy(1.5))]
    identical = {t.trial_id: True for t in trials if t.control == "same_seed"}
    rng = np.random.default_rng(0)
    shuffled = [part.take(pa.array(rng.permutation(part.num_rows))) for part in parts]
    status = {claim.id: "registered" for claim in study.claims}
    expected = claims.judge(study, status, *parts, identical)
    assert claims.judge(study, status, *shuffled, identical).equals(expected)
    assert [r["verdict"] for r in expected.to_pylist()] == ["supported"] * 2 + ["undecided"] + [
        "supported"
    ] * 4


def test_note_of_the_author_is_kept() -> None:
    row = one({**LR_ZERO, "note": "as in the paper"})
    assert row["note"] == "as in the paper"


def test_trials_without_their_configurations_are_refused() -> None:
    empty = [tables.SCHEMAS[name].empty_table() for name in ("trials", "steps", "tensor_deltas")]
    with pytest.raises(TableError, match="lacks the column config"):
        claims.judge(study_of(), {}, *empty, tables.SCHEMAS["overlaps"].empty_table(), {})
