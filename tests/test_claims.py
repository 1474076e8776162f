"""Verdicts on studies with planted answers: exact claims, means, contrasts, multiplicity."""

import json

import numpy as np
import pyarrow as pa
import pytest
from planted_claims import (
    ABOVE,
    CLIP,
    CLIPPED,
    KL,
    NOISE,
    about,
    clip_lowers,
    density,
    judge,
    noisy,
    one,
    overlaps_of,
    study_of,
    undecided,
    within,
)
from scipy import stats
from test_effects import N, make_tables, trials_of

from rlsparse import claims, tables
from rlsparse.errors import TableError
from rlsparse.study import Trial

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


def test_exact_knows_of_failed_runs() -> None:
    none_fails = {"kind": "exact", "response": "failed", "value": 0.0}
    row = one(none_fails, failed=lambda trial: trial.config.seed == 2)
    assert (row["verdict"], row["num_runs"]) == ("refuted", 16)
    assert "failed is 0 in 12 of 16 runs" in str(row["outcome"])
    assert one(none_fails)["verdict"] == "supported"


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
    row = one(IDENTICAL)
    assert (row["verdict"], row["num_runs"], row["depends_on_definition"]) == ("supported", 1, None)
    for known, verdict in ((False, "refuted"), (None, "undecided")):
        row = one(IDENTICAL, more=lambda t, known=known: {"identical": known})
        assert row["verdict"] == verdict
    (row,) = judge(study_of(IDENTICAL, controls=[]))
    assert row["note"] == 'no run matches {"control":"same_seed"}'


def test_exact_score_of_a_replicate_is_not_taken_for_its_identity() -> None:
    claim = {"kind": "exact", "response": "score_after", "value": 0.5}
    row = one({**claim, "where": {"control": "same_seed"}})
    assert (row["verdict"], row["estimate"]) == ("supported", 0.5)


# --- within, greater ---------------------------------------------------------------------------


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
    assert row["note"] == "the interval reaches across the margin"
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
    assert str(row["note"]).startswith("1 of 16 runs are missing (failed 1); --allow")


def test_nothing_selected_is_said() -> None:
    row = one(within(0, 1, where={"algorithm": "dpo"}))
    assert row["verdict"] == "undecided"
    assert row["note"] == 'no run matches {"algorithm":"dpo"}'


def test_greater_by_hand() -> None:
    row = one(CLIPPED, clip_lowers)
    assert row["verdict"] == "supported"
    assert row["estimate"] == pytest.approx((0.95 / 0.05) / (0.9 / 0.1), rel=1e-2)
    assert (row["margin"], row["num_runs"], row["depends_on_definition"]) == (1.0, 4, False)
    assert "rests on t: 4 seeds give an exact test p 0.125 at best" in str(row["note"])
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
    assert "no sparsity.bitwise@stored at step 11; there are 10, 20 (8 of 8)" in str(row["note"])

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
    assert "depends on the definition: undecided under abs_1e-05@stored" in str(row["note"])
    found = json.loads(str(row["alternatives"]))
    assert found.pop("abs_1e-05@stored") == "undecided"
    assert set(found.values()) == {"supported"}
    assert len(found) == 5
    row = one({**CLIPPED, "response": "sparsity.abs_1e-05"}, clip_lowers, by_definition=only_small)
    assert row["verdict"] == "undecided"
    listed = "bitwise@stored, abs_1e-08@stored, abs_1e-07@stored and 3 more"
    assert f"depends on the definition: supported under {listed}" in str(row["note"])


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


def test_dropping_a_registered_claim_gains_nothing() -> None:
    given = [within(0.5, 0.99), within(0.9, 0.95), within(0.85, 0.93)]
    before, after = judge(study_of(*given)), judge(study_of(given[0]), num_dropped=2)
    for key in ("p_value", "ci_low", "ci_high", "verdict"):
        assert after[0][key] == before[0][key], key
    assert "Holm over 3 claims" in str(after[0]["statistic"])
    (late,) = judge(study_of(given[0]), num_dropped=2, registered={})
    assert (late["registered"], late["p_value"]) == ("post hoc", before[0]["p_value"])


def test_scope_names_what_was_held_fixed() -> None:
    row = one(within(0, 1, where={"role": "baseline"}))
    assert row["scope"] == (
        "base tiny, task chain_sum, learning rate 1e-05, 20 steps, bf16-mixed, "
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
    rng = np.random.default_rng(0)
    shuffled = [part.take(pa.array(rng.permutation(part.num_rows))) for part in parts]
    status = {claim.id: "registered" for claim in study.claims}
    expected = claims.judge(study, status, *parts, allow_missing=False)
    assert claims.judge(study, status, *shuffled, allow_missing=False).equals(expected)
    assert [r["verdict"] for r in expected.to_pylist()] == ["supported"] * 2 + ["undecided"] + [
        "supported"
    ] * 4


def test_note_of_the_author_is_kept() -> None:
    row = one({**LR_ZERO, "note": "as in the paper"})
    assert row["note"] == "as in the paper"


def test_trials_without_their_configurations_are_refused() -> None:
    names = ("trials", "steps", "changes", "overlaps")
    empty = [tables.SCHEMAS[name].empty_table() for name in names]
    with pytest.raises(TableError, match="lacks the column config"):
        claims.judge(study_of(), {}, *empty, allow_missing=False)


# --- reproduces, the KL ------------------------------------------------------------------------


def reproduces(value: float, margin: float, **more: object) -> dict[str, object]:
    where = {"algorithm.kl_coef": 0.0, "train.max_grad_norm": None}
    return {"kind": "reproduces", "value": value, "margin": margin, "where": where, **more}


def test_reproduces_by_hand() -> None:
    row = one(reproduces(0.9, 0.01))
    changed = np.array([round(0.1 * np.exp(NOISE[seed]) * N) for seed in range(4)])
    logits = np.log((N - changed + 0.5) / (changed + 0.5))
    edges = np.log([0.89 / 0.11, 0.91 / 0.09])
    p = max(stats.ttest_1samp(logits, edge).pvalue for edge in edges)
    assert (row["verdict"], row["margin"]) == ("supported", 0.01)
    assert row["p_value"] == pytest.approx(p, rel=1e-6)
    assert one(reproduces(0.85, 0.02))["verdict"] == "refuted"
    assert one(reproduces(0.89, 0.008))["verdict"] == "undecided"


def test_where_one_further_run_would_lie() -> None:
    wide = lambda t: 0.1 * float(np.exp(10 * NOISE[t.config.seed]))  # noqa: E731
    changed = np.array([round(0.1 * np.exp(10 * NOISE[seed]) * N) for seed in range(4)])
    logits = np.log((N - changed + 0.5) / (changed + 0.5))
    half = stats.t.ppf(0.975, 3) * logits.std(ddof=1) * np.sqrt(1 + 1 / 4)
    low, high = 1 / (1 + np.exp(-(logits.mean() + half * np.array([-1, 1]))))
    said = f"95% prediction interval of one further run [{low:.3f}, {high:.3f}]"
    assert said in str(one(reproduces(0.9, 0.01), wide)["note"])


def test_reproduces_on_the_scales_of_other_responses() -> None:
    spread = lambda t: 0.6 + 0.1 * NOISE[t.config.seed]  # noqa: E731
    row = one(reproduces(0.35, 0.02, response="score_gain"), score=spread)
    assert row["verdict"] == "supported"
    assert row["estimate"] == pytest.approx(0.35 + 0.1 * NOISE[:4].mean(), rel=1e-9)
    measured = lambda t: {"kl_final": 0.02 * float(np.exp(NOISE[t.config.seed]))}  # noqa: E731
    for value, verdict in ((0.02, "supported"), (0.03, "refuted"), (0.001, "refuted")):
        row = one(reproduces(value, 0.003, response="kl_final"), more=measured)
        assert row["verdict"] == verdict
        assert row["estimate"] == pytest.approx(0.02 * np.exp(NOISE[:4].mean()), rel=1e-9)


def test_greater_of_the_kl_is_a_ratio() -> None:
    def measured(trial: Trial) -> dict[str, object]:
        by = 1.5 if trial.config.train.max_grad_norm else 1.0
        return {"kl_final": 0.02 * by * float(np.exp(NOISE[trial.config.seed] * (by > 1)))}

    claim = {**CLIPPED, "response": "kl_final"}
    row = one(claim, more=measured)
    assert (row["verdict"], row["margin"]) == ("supported", 1.0)
    assert row["estimate"] == pytest.approx(1.5 * np.exp(NOISE[:4].mean()), rel=1e-9)
    assert one({**claim, "margin": 2.0}, more=measured)["verdict"] == "refuted"
    below = lambda t: {"kl_final": -0.001 if t.config.seed == 0 else 0.02}  # noqa: E731
    undecided(claim, "kl_final is not above 0 (2 of 8)", more=below)


def test_greater_at_a_kl() -> None:
    realised = lambda t: 0.04 if t.config.train.max_grad_norm else 0.02  # noqa: E731
    row = one({**CLIPPED, "at": {"kl": "common"}}, clip_lowers, kl=realised, more=lambda t: {})
    # the clipped run has KL .02 at step 10, with half of its final density
    assert row["estimate"] == pytest.approx((0.975 / 0.025) / (0.9 / 0.1), rel=1e-2)
    assert "at equal KL" in str(row["outcome"])
    far = {**CLIPPED, "at": {"kl": 0.5}}
    undecided(far, "kl 0.5 is not reached (8 of 8)", clip_lowers, kl=realised, more=lambda t: {})
