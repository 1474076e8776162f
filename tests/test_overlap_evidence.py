"""Overlap claims against every null."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from planted_claims import (
    ABOVE,
    NO_OVERLAPS,
    NOISE,
    about,
    judge,
    kl,
    noisy,
    overlaps_of,
    study_of,
)
from scipy import stats
from test_effects import N, trials_of

from rlsparse import tables
from rlsparse.identity import canonical_json
from rlsparse.study import Study, Trial

# --- above_null --------------------------------------------------------------------------------


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
    assert (row["alternatives"], row["depends_on_definition"]) == ("{}", None)


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
        "table overlaps lacks the pair": NO_OVERLAPS,
        "both densities of a pair exceed 0.5": overlaps_of(study, noisy(1.5), 0.51),
        "a mask is empty": overlaps_of(study, noisy(1.5), 0.0),
    }
    for why, table in cases.items():
        (row,) = judge(study, overlaps=table)
        assert row["verdict"] == "undecided"
        assert why in str(row["note"])
        assert (row["estimate"] is None) == ("lift" not in str(row["note"])) == ("0.5" not in why)
        assert "nan" not in str(row["outcome"])
    few = study_of(ABOVE, seeds=[0, 1, 2])
    (row,) = judge(few, overlaps=overlaps_of(few, noisy(1.5)))
    assert "3 seeds with pairs, 4 are needed" in str(row["note"])
    alone = study_of(ABOVE, seeds=[0])
    (row,) = judge(alone)
    assert "no two finished runs, of seeds that are complete, differ in seed" in str(row["note"])


# --- kinds of nulls ----------------------------------------------------------------------------


def steady(by: float) -> Callable[[Trial, Trial], float]:
    return lambda a, b: by * (1 + 0.2 * float(NOISE[a.config.seed] + NOISE[b.config.seed]))


def test_below_null_mirrors_above_null() -> None:
    below = {**ABOVE, "kind": "below_null"}
    study = study_of(ABOVE, below)
    for by, verdicts in ((1.3, ["supported", "refuted"]), (0.7, ["refuted", "supported"])):
        rows = judge(study, overlaps=overlaps_of(study, steady(by)))
        assert [row["verdict"] for row in rows] == verdicts
    mirrored = judge(study, overlaps=overlaps_of(study, steady(1.0)))
    assert [row["verdict"] for row in mirrored] == ["refuted", "refuted"]


def test_a_claim_must_hold_against_every_named_null() -> None:
    study = study_of({**ABOVE, "null": ["uniform", "magnitude"]}, {**ABOVE, "null": ["uniform"]})
    both, single = judge(study, overlaps=overlaps_of(study, noisy(1.1)))
    assert (both["verdict"], single["verdict"]) == ("undecided", "supported")
    assert both["estimate"] == pytest.approx(1.1, rel=0.05)  # the strongest null
    assert "magnitude null" in str(both["statistic"])
    assert "null uniform, magnitude; lift over 6 pairs" in str(both["note"])
    assert both["alternatives"] == "{}"
    assert set(json.loads(str(single["alternatives"]))) == {"tensor", "magnitude"}


def with_column(table: pa.Table, name: str, values: list[float | None]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, name, pa.array(values, pa.float64()))


def test_a_null_that_the_table_lacks_is_said() -> None:
    study = study_of({**ABOVE, "null": "update_size"})
    table = overlaps_of(study, noisy(1.5))
    (row,) = judge(study, overlaps=table)
    assert row["verdict"] == "undecided"
    assert "table overlaps has no update_size null for 6 of 6 pairs" in str(row["note"])
    assert "a further seed" in str(row["would_decide"])
    full = with_column(table, "expected_update_size", [1.2e4] * table.num_rows)
    (row,) = judge(study, overlaps=full)
    assert (row["verdict"], row["estimate"]) == ("supported", pytest.approx(1.25, rel=0.1))
    assert "update_size" in str(row["note"])
    assert "update sizes of" not in str(row["note"])


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("random_reward", "update sizes of surrogates (s3)"),
        (None, "update sizes of real runs of the same algorithm (s3)"),
    ],
)
def test_the_run_that_gave_the_update_sizes_is_named(control: str | None, said: str) -> None:
    study = study_of({**ABOVE, "null": "update_size"}, controls=["random_reward"])
    table = with_column(
        overlaps_of(study, noisy(1.5)), "expected_update_size", [1.2e4] * len(noise_rows(study))
    )
    served = {t.trial_id for t in trials_of(study) if (t.control, t.config.seed) == (control, 3)}
    at = table.schema.get_field_index("update_size_of")
    names = pa.array([min(served)] * table.num_rows, pa.string())
    (row,) = judge(study, overlaps=table.set_column(at, "update_size_of", names))
    assert "update_size 1.2" in str(row["note"])
    assert said in str(row["note"])


def noise_rows(study: Study) -> list[object]:
    return overlaps_of(study, noisy(1.5)).to_pylist()


@pytest.mark.parametrize("part", ["module", "tensor"])
def test_a_claim_about_some_weights_reads_their_rows(part: str) -> None:
    name = {"module": "q", "tensor": "layers.0.q_proj"}[part]
    study = study_of({**ABOVE, part: name}, ABOVE)
    whole = overlaps_of(study, noisy(1.5)).to_pylist()
    rows = [row for row in whole if row["module"] is None]
    few = [row | {part: name, "module": "q", "num_both": round(1e4 * noise(row))} for row in rows]
    table = tables.from_rows(rows + few, "overlaps")
    found, everything = judge(study, overlaps=table)
    assert (found["verdict"], everything["verdict"]) == ("refuted", "supported")
    assert found["estimate"] == pytest.approx(1.0, rel=0.02)
    assert f"overlap in {name}" in str(found["outcome"])
    (lacking, _) = judge(study, overlaps=tables.from_rows(rows, "overlaps"))
    assert f"in {name}" in str(lacking["note"])
    assert str(lacking["would_decide"]).endswith(f"of a model that has {name}")


def noise(row: dict[str, object]) -> float:
    return 1 + 0.01 * (int(str(row["trial_a"])[:6], 16) % 3 - 1) / 3


MASKS = {"train.mask": [None, {"from": "baseline"}, {"like": {"from": "baseline"}}]}


@pytest.mark.parametrize("where", [{}, {"train.mask": "random(final)"}, {"seed": 0}])
def test_trials_under_a_mask_have_no_verdict_on_overlap(where: dict[str, object]) -> None:
    study = study_of({**ABOVE, "where": where}, factors=MASKS, controls=[])
    (row,) = judge(study, overlaps=overlaps_of(study, noisy(1.5)))
    assert row["verdict"] == "undecided"
    assert "trials under train.mask are left out of overlaps: the mask forces" in str(row["note"])
    assert row["would_decide"] == (
        "select the runs that train all weights with where: {train.mask: null}"
    )


def test_full_trials_have_a_verdict_beside_those_under_a_mask() -> None:
    study = study_of({**ABOVE, "where": {"train.mask": None}}, factors=MASKS, controls=[])
    lift = lambda a, b: 9.0 if a.config.train.mask or b.config.train.mask else noisy(1.5)(a, b)  # noqa: E731
    (row,) = judge(study, overlaps=overlaps_of(study, lift))
    assert row["verdict"] == "supported"
    assert "lift over 6 pairs by null: uniform 3" in str(row["note"])


# --- surrogates --------------------------------------------------------------------------------

REAL = {
    "kind": "above_null",
    "null": "surrogate",
    "where": {"algorithm.kl_coef": 0.0, "train.max_grad_norm": 1.0},
}


def surrogate_study(*claims_of: dict[str, object]) -> Study:
    return study_of(*claims_of, controls=["random_reward", "shuffled_reward"])


def shared(common: float, own: float) -> Callable[[Trial, Trial], float]:
    """Lift that all runs share, and what real runs share besides."""

    def found(a: Trial, b: Trial) -> float:
        real = not ({"surrogate"} & {a.role, b.role})
        jitter = 0.2 * (NOISE[a.config.seed] + NOISE[b.config.seed] + NOISE[len(a.role)])
        return common * (own if real else 1.0) * float(np.exp(jitter))

    return found


def test_surrogate_null_by_hand() -> None:
    study = surrogate_study(REAL)
    lift = shared(2.0, 1.3)
    (row,) = judge(study, overlaps=overlaps_of(study, lift))
    trials = trials_of(study)
    cell = {"algorithm.kl_coef": "0.0", "train.max_grad_norm": "1.0"}
    real = {t.config.seed: t for t in trials if t.cell == cell and t.role == "baseline"}
    fake = {(t.config.seed, t.control): t for t in trials if t.role == "surrogate"}
    assert (len(real), len(fake)) == (4, 8)

    def excess(one_of: Trial, other: Trial) -> float:
        first, second = sorted((one_of, other), key=lambda t: t.trial_id)
        return float(np.log((round(1e4 * lift(first, second)) + 0.5) / 10000.5))

    controls = ("random_reward", "shuffled_reward")
    pairs = {}
    for i, j in itertools.combinations(range(4), 2):
        a = np.mean([excess(real[i], fake[j, control]) for control in controls])
        b = np.mean([excess(real[j], fake[i, control]) for control in controls])
        pairs[i, j] = excess(real[i], real[j]) - (a + b) / 2
    mean = np.mean(list(pairs.values()))
    without = [np.mean([v for k, v in pairs.items() if seed not in k]) for seed in range(4)]
    error = np.sqrt(3 / 4 * np.sum((np.array(without) - np.mean(without)) ** 2))
    found = np.log([row["estimate"], row["ci_low"], row["ci_high"]])  # type: ignore[arg-type]
    half = stats.t.ppf(0.975, 3) * error
    np.testing.assert_allclose(found, [mean, mean - half, mean + half], rtol=1e-6)
    assert row["verdict"] == "supported"
    assert json.loads(str(row["alternatives"])) == {"magnitude": "supported"}
    assert f"surrogate {row['estimate']:.3g}" in str(row["note"])


def test_surrogates_under_a_mask_stand_in_for_nobody() -> None:
    where = {"train.mask": None, "algorithm.reward": "task"}
    factors = {"algorithm.reward": ["task", "random"], **MASKS}
    study = study_of({**REAL, "where": where}, factors=factors, controls=[])
    plain = shared(2.0, 1.3)

    def lift(a: Trial, b: Trial) -> float:
        return 9.0 if a.config.train.mask or b.config.train.mask else plain(a, b)

    (row,) = judge(study, overlaps=overlaps_of(study, lift))
    assert row["estimate"] == pytest.approx(1.3, rel=0.05)


def test_what_surrogates_share_too_is_no_excess() -> None:
    study = surrogate_study(REAL, {**REAL, "null": ["magnitude", "surrogate"]})
    rows = judge(study, overlaps=overlaps_of(study, shared(2.0, 1.0)))
    assert [row["verdict"] for row in rows] == ["refuted", "refuted"]
    assert rows[0]["estimate"] == pytest.approx(1.0, rel=0.05)


def test_without_surrogates_at_equal_rate_and_steps_there_is_no_verdict() -> None:
    study = study_of(REAL)
    (row,) = judge(study, overlaps=overlaps_of(study, noisy(1.5)))
    assert "no finished surrogate run of seed" in str(row["note"])
    assert row["would_decide"] == "add surrogate controls, such as random_reward"
    study = surrogate_study(REAL)
    slow = lambda t: about(t) | ({"num_steps": 10} if t.role == "surrogate" else {})  # noqa: E731
    (row,) = judge(study, overlaps=overlaps_of(study, noisy(1.5)), more=slow)
    assert "at learning rate 1e-05 and 20 steps" in str(row["note"])
    lost = lambda t: t.role == "surrogate" and t.config.seed == 2  # noqa: E731
    (row,) = judge(study, overlaps=overlaps_of(study, noisy(1.5)), failed=lost)
    assert "no finished surrogate run of seed 2" in str(row["note"])


def test_masks_of_runs_whose_bases_differ_do_not_overlap() -> None:
    study = study_of({**ABOVE, "between": "algorithm.kl_coef", "where": {}})
    (row,) = judge(study, overlaps=overlaps_of(study, noisy(1.5)), more=other_base)
    assert "masks of different bases have no weights in common" in str(row["note"])


def other_base(trial: Trial) -> dict[str, object]:
    """Runs with a KL penalty started from another base."""
    config = trial.config.model_dump(mode="json")
    config["model"]["source"] = "other" if kl(trial) else "tiny"
    return about(trial) | {"config": canonical_json(config)}
