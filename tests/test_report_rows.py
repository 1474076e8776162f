"""Rows of the report: trials, cells, overlaps, curves and verdicts, against numbers by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from report_study import (
    ALGORITHMS,
    PARTS,
    SEEDS,
    SIZE,
    all_trials,
    change_rows,
    claim,
    density,
    effect,
    make_study,
    make_tables,
    many_cells,
    overlap_table,
    trial,
)
from scipy import stats

from rlsparse.definitions import DEFINITIONS
from rlsparse.report.curve_rows import (
    MAX_POINTS,
    curve_rows,
    magnitude_rows,
    rank_rows,
    window_rows,
)
from rlsparse.report.overlap_rows import (
    RANDOM,
    cell_matrix,
    consensus_rows,
    explained_by,
    module_rows,
    relation_rows,
    run_matrix,
    third_runs,
    with_lifts,
)
from rlsparse.report.pairs import AGAIN, module_pairs, outside_rows, pairs_of
from rlsparse.report.rows import (
    cell_rows,
    collapsed,
    density_map,
    of_one_cell,
    short_labels,
    trial_rows,
)
from rlsparse.report.series import series_of
from rlsparse.report.study_page import summary_rows
from rlsparse.report.verdict_rows import (
    claim_rows,
    effect_rows,
    is_primary,
    mean_rows,
    shared_scope,
)

STUDY = make_study()
SMALL = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture(scope="module")
def given():
    return make_tables()


@pytest.fixture(scope="module")
def trials(given):
    return trial_rows(STUDY, given)


@pytest.fixture(scope="module")
def pairs(given, trials):
    return pairs_of(STUDY, given, trials)


# --- trials and cells ------------------------------------------------------------------------


def test_summary_holds_every_trial_that_is_not_a_control_with_counted_sparsity(given):
    changes = change_rows(all_trials())
    rows = summary_rows(STUDY, given)
    assert [(r["algorithm"], r["seed"]) for r in rows] == [
        (a, s) for a in ALGORITHMS for s in SEEDS
    ]
    for row in rows:
        last = [
            d
            for d in changes
            if d["trial_id"] == f"{row['algorithm']}{row['seed']}" and d["step"] == 150
        ]
        total = len(last) * SIZE
        if row["status"] == "failed":
            assert row["sparsity_bitwise"] is None
            continue
        for key, count in (("bitwise", "bitwise"), ("1e-05", "abs_1e-05")):
            changed = sum(d[f"num_changed_{count}"] for d in last)
            assert row[f"sparsity_{key}"] == 1 - changed / total


def test_overlap_lift_averages_the_other_seeds_of_the_cell_only(given):
    rows = {r["label"]: r["overlap_lift"] for r in summary_rows(STUDY, given)}
    # grpo: pairs (0,1) (0,2) (0,3) have lift 1.9, (1,2) (1,3) 1.85, (2,3) 1.8 over the uniform null
    assert rows["grpo s0"] == pytest.approx(1.9 / 1.1, rel=1e-3, abs=0)
    assert rows["grpo s3"] == pytest.approx((1.9 + 1.85 + 1.8) / 3 / 1.1, rel=1e-3, abs=0)
    assert rows["sft s3"] is None


def test_magnitude_lift_averages_logarithms(trials, pairs):
    rows = {r["label"]: r["magnitude_lift"] for r in with_lifts(trials, pairs)}
    expected = (1.9 * 1.85 * 1.8) ** (1 / 3) / 1.5
    assert rows["grpo s3"] == pytest.approx(expected, rel=1e-3, abs=0)


def test_other_views_definitions_tensors_and_steps_are_not_mixed_in(given, trials):
    noise = [r | {"view": "fp32", "num_changed_bitwise": SIZE} for r in change_rows(all_trials())]
    rows = overlap_table(all_trials())
    others = [
        {"view": "fp32"}, {"definition": "abs_1e-05"}, {"tensor": "model.norm.weight"},
    ]  # fmt: skip
    more = [row | {"num_both": 1} | other for row in rows for other in others]
    more += [
        row | {"num_both": 1} | other
        for row in rows
        if row["trial_a"] != row["trial_b"]
        for other in ({"step_a": 50}, {"step_b": 50}, {"step_a": 50, "step_b": 50})
    ]
    mixed = make_tables(changes=change_rows(all_trials()) + noise, overlaps=rows + more)
    found = trial_rows(STUDY, mixed)
    assert [t["sparsity"] for t in found] == [t["sparsity"] for t in trials]
    assert set(found[0]["views"]) == {"stored", "fp32"}
    assert found[0]["views"]["fp32"]["bitwise"] == 0
    plain = relation_rows(pairs_of(STUDY, given, trials))
    assert relation_rows(pairs_of(STUDY, mixed, found)) == plain
    assert outside_rows(STUDY, mixed, found) == outside_rows(STUDY, given, trials)
    assert density_map(STUDY, mixed, found) == density_map(STUDY, given, trials)


def test_cells_count_planned_finished_and_failed_and_average_the_finished(trials):
    cells = {row["group"]: row for row in cell_rows(trials)}
    sft = cells["sft"]
    assert (sft["num_planned"], sft["num_finished"], sft["num_failed"]) == (4, 3, 1)
    done = [t["sparsity"]["bitwise"] for t in trials if t["group"] == "sft" and t["sparsity"]]
    assert len(done) == 3
    assert sft["sparsity"]["bitwise"] == pytest.approx(sum(done) / 3, **SMALL)
    assert sft["views"]["stored"] == sft["sparsity"]
    zero = next(row for group, row in cells.items() if group.endswith("lr_zero"))
    assert set(zero["sparsity"].values()) == {1.0}
    assert [row["role"] == "control" for row in cells.values()] == [False] * 3 + [True] * 7


def test_snapshots_start_unchanged_and_skip_steps_without_a_measurement(trials):
    rows = {t["label"]: t for t in trials}
    points = rows["grpo s1"]["snapshots"]
    assert [p["step"] for p in points] == [0, 50, 150]
    assert points[0] == {"step": 0, "score": 0.41, "sparsity": 1.0}
    assert points[-1]["sparsity"] == rows["grpo s1"]["sparsity"]["bitwise"]
    assert rows["sft s3"]["snapshots"] == []


def test_density_map_is_over_the_last_snapshots_of_the_studied_runs(given, trials):
    rows = density_map(STUDY, given, trials)
    assert len(rows) == len(ALGORITHMS) * len(PARTS)
    found = {(r["algorithm"], r["layer"], r["module"]): r["density"] for r in rows}
    changed = [
        r["num_changed_bitwise"]
        for r in change_rows(all_trials())
        if r["trial_id"] in ("sft0", "sft1", "sft2") and r["step"] == 150
        and (r["layer"], r["module"]) == (2, "down")
    ]  # fmt: skip
    assert found["sft", 2, "down"] == pytest.approx(sum(changed) / 3 / SIZE, **SMALL)


def test_density_and_rank_are_of_one_cell_of_each_algorithm():
    def run(name, rate, role, clip="1"):
        return {"algorithm": name, "group": f"{name} {rate} {clip}", "role": role,
                "cell": {"algorithm.name": name, "rate": rate, "clip": clip}}  # fmt: skip

    runs = [
        run("sft", "1e-4", "factor"), run("sft", "1e-5", "factor"),
        run("sft", "1e-5", "factor", "2"), run("grpo", "1e-4", "factor"),
        run("grpo", "1e-5", "baseline"), run("grpo", "1e-5", "baseline"),
        run("dpo", "1e-6", "factor"), run("grpo", "1e-5", "control"),
        run("kto", "1e-5", "surrogate"),
    ]  # fmt: skip
    assert [t["group"] for t in of_one_cell(runs)] == [
        "sft 1e-5 1", "grpo 1e-5 1", "grpo 1e-5 1", "dpo 1e-6 1",
    ]  # fmt: skip
    assert of_one_cell([]) == []


def test_factors_that_an_algorithm_does_not_have_are_said():
    study = make_study(
        factors={"algorithm.name": ["sft", "grpo"], "algorithm.kl_coef": [0.0, 0.04]}
    )
    runs = [
        {"algorithm": "sft", "cell": {"algorithm.name": "sft"}},
        {"algorithm": "grpo", "cell": {"algorithm.name": "grpo", "algorithm.kl_coef": "0.0"}},
    ]
    assert collapsed(study, runs) == {"algorithm.kl_coef": ["sft"]}


def test_labels_are_cut_alike_and_stay_apart():
    long = ["ppo(value_learning_rate=0.0003, steps=4)", "prime(reward_learning_rate=0.0001)", "dpo"]
    assert short_labels(long, 20) == ["ppo", "prime", "dpo"]
    same = ["ppo(steps=4)", "ppo(steps=8)"]
    assert short_labels(same, 20) == same
    ends = ["sft s0 learning_rate=1e-05", "sft s0 learning_rate=1e-05 same_seed"]
    assert short_labels(ends, 20) == ["sft s0 learni…=1e-05", "sft s0 learni…e_seed"]
    cut = short_labels([f"grpo learning_rate=1e-05 norm={i}" for i in range(30)], 20)
    assert len(set(cut)) == 30
    assert max(map(len, cut)) <= 20


def test_with_too_many_cells_those_nearest_to_the_baseline_are_drawn():
    cells = [
        {"group": f"{a}{b}", "cell": {"a": a, "b": b}, "role": role, "num_finished": 1,
         "algorithm": "x"}
        for (a, b), role in zip(itertools.product("xyz", "12"), ["baseline", *["factor"] * 5],
                                strict=True)
    ]  # fmt: skip
    cells.append(cells[0] | {"group": "failed", "num_finished": 0})
    cells.append(cells[0] | {"group": "control", "role": "control"})
    series = series_of(cells)
    assert series.shown(10) == ["x1", "x2", "y1", "y2", "z1", "z2"]
    assert series.shown(4) == ["x1", "x2", "y1", "z1"]
    assert series.with_level({"a": "y"}) == "2 3"
    assert series.with_level({"c": "5"}) == "0 1 2 3 4 5 6 7"


# --- overlaps --------------------------------------------------------------------------------


def test_pairs_are_told_apart_by_what_the_runs_differ_in(pairs):
    rows = {r["relation"]: r for r in relation_rows(pairs)}
    # 11 studied runs finished: 4 grpo, 4 dpo, 3 sft; a replicate of each at seed 0
    assert {name: row["num_pairs"] for name, row in rows.items()} == {
        AGAIN: 3,
        "other seed": 6 + 6 + 3,
        "other algorithm": 4 + 3 + 3,
        "other seed + algorithm": (16 - 4) + (12 - 3) + (12 - 3),
        RANDOM: 15 + 10 + 30,
    }
    assert list(rows) == [
        AGAIN, "other seed", "other algorithm", "other seed + algorithm", RANDOM,
    ]  # fmt: skip


def expected_pair(a, b):
    """Counts of the planted overlap of two algorithms."""
    return int(100_000 * density(a) * density(b) * 1.3), *(int(1e5 * density(t)) for t in (a, b))


def test_measures_of_a_relation_are_means_over_its_pairs(pairs):
    row = {r["relation"]: r for r in relation_rows(pairs)}["other algorithm"]
    runs = [("dpo", "grpo")] * 4 + [("sft", "grpo")] * 3 + [("sft", "dpo")] * 3
    jaccard, one_sided, kappa, odds, lifts = [], [], [], [], []
    for names in runs:
        both, a, b = expected_pair(*(trial(name, 0) for name in names))
        n = 100_000
        jaccard.append(both / (a + b - both))
        one_sided.append((both / a + both / b) / 2)
        agree, chance = (n - a - b + 2 * both) / n, (a * b + (n - a) * (n - b)) / n**2
        kappa.append((agree - chance) / (1 - chance))
        odds.append(math.log(both * (n - a - b + both) / ((a - both) * (b - both))))
        lifts.append(math.log(both / (a * b / n * 1.5)))
    assert row["jaccard"] == pytest.approx(np.mean(jaccard), **SMALL)
    assert row["one_sided"] == pytest.approx(np.mean(one_sided), **SMALL)
    assert row["kappa"] == pytest.approx(np.mean(kappa), **SMALL)
    assert row["odds_ratio"] == pytest.approx(math.exp(np.mean(odds)), **SMALL)
    assert row["lift"]["magnitude"] == pytest.approx(math.exp(np.mean(lifts)), rel=1e-6, abs=0)
    assert row["low"]["magnitude"] == pytest.approx(math.exp(min(lifts)), rel=1e-6, abs=0)
    assert row["high"]["magnitude"] == pytest.approx(math.exp(max(lifts)), rel=1e-6, abs=0)
    assert row["lift"]["margins"] is None


def test_the_excess_is_split_in_the_order_of_the_nulls(pairs):
    part = {r["relation"]: r for r in relation_rows(pairs)}["other seed"]["explained"]
    assert part["tensor"] == pytest.approx(math.log(1.1), **SMALL)
    assert part["magnitude"] == pytest.approx(math.log(1.5 / 1.1), **SMALL)
    assert part["update_size"] == pytest.approx(math.log(1.6 / 1.5), **SMALL)
    whole = sum(part[name] for name in ("tensor", "magnitude", "update_size", "left"))
    assert part["total"] == pytest.approx(whole, **SMALL)
    without = explained_by(pairs.assign(log_update_size=np.nan))
    assert without["update_size"] is None
    assert without["num_pairs"] == len(pairs[pairs["log_magnitude"].notna()])
    known = pairs[pairs["log_magnitude"].notna()]
    few = known.assign(log_update_size=known["log_update_size"].where(known.index < 20))
    assert explained_by(few)["num_pairs"] == (known.index < 20).sum() > 0


def test_a_random_mask_takes_the_place_of_the_second_run(pairs):
    row = {r["relation"]: r for r in relation_rows(pairs)}[RANDOM]
    assert row["lift"]["uniform"] == pytest.approx(1, rel=1e-3, abs=0)
    assert row["lift"]["tensor"] is not None
    assert row["lift"]["magnitude"] is None  # such a mask knows nothing of magnitudes


def runs_of(*changes):
    """Trials of grpo with the cells, seeds and roles of ``changes``, and all their pairs."""
    rows = []
    for i, change in enumerate(changes):
        cell = json.dumps(change.get("cell", {"algorithm.name": "grpo"}))
        rows.append(trial("grpo", 0, trial_id=f"t{i}") | change | {"cell": cell})
    tables = make_tables(rows, changes=[], magnitudes=[], spectra=[])
    found = trial_rows(STUDY, tables)
    frame = pairs_of(STUDY, tables, found)
    return {(row["a"], row["b"]): row["relation"] for row in frame.to_dict("records")}


@pytest.mark.parametrize(
    ("first", "second", "relation"),
    [
        ({}, {"seed": 1}, "other seed"),
        ({"cell": {"task.name": "x"}}, {"cell": {"task.name": "y"}}, "other data"),
        ({"cell": {"train.data_seed": "1"}}, {"cell": {"train.data_seed": "2"}}, "other data"),
        ({"cell": {"x": "1"}}, {"cell": {"x": "2"}}, "other setting"),
        ({"cell": {"x": "1"}}, {"cell": {"x": "2"}, "seed": 3}, "other seed + setting"),
        ({"cell": {"algorithm": "ppo(a=1)"}, "algorithm": "ppo"}, {}, "other algorithm"),
        ({"cell": {"algorithm": "grpo(a=1)"}}, {"cell": {"algorithm": "grpo"}}, "other setting"),
        # a factor that one of them does not have is no difference but the algorithm's
        ({"cell": {"algorithm.name": "sft"}, "algorithm": "sft"},
         {"cell": {"algorithm.name": "grpo", "algorithm.kl_coef": "0.0"}}, "other algorithm"),
        ({"cell": {"algorithm.name": "sft", "task.name": "x"}, "algorithm": "sft"},
         {"cell": {"algorithm.name": "grpo", "task.name": "y"}, "seed": 1},
         "other seed + data + algorithm"),
        ({}, {"role": "control", "control": "same_seed", "replicate": 1}, AGAIN),
        ({}, {"role": "control", "control": "same_seed", "replicate": 1, "seed": 1}, ""),
        ({}, {"role": "control", "control": "lr_times_3"}, ""),
        ({}, {"role": "surrogate", "control": "shuffled_reward"}, "surrogate reward"),
        ({}, {"role": "surrogate", "seed": 1, "control": "random_reward"},
         "surrogate reward, other seed"),
        ({"cell": {"algorithm.reward": "task"}},
         {"cell": {"algorithm.reward": "random"}, "role": "surrogate"}, "surrogate reward"),
        ({"cell": {"x": "1"}}, {"cell": {"x": "2"}, "role": "surrogate"}, ""),
        ({"role": "surrogate"}, {"role": "surrogate", "seed": 1}, ""),
        ({"role": "surrogate", "control": "shuffled_reward"},
         {"role": "control", "control": "same_seed", "replicate": 1}, ""),
    ],
)  # fmt: skip
def test_relation_of_two_runs(first, second, relation):
    assert list(runs_of(first, second).values()) == [relation]
    assert list(runs_of(second, first).values()) == [relation]


def test_modules_are_of_pairs_of_seeds_only(given, trials, pairs):
    modules = module_pairs(STUDY, given, trials)
    rows = module_rows(trials, pairs, modules)
    found = {(r["algorithm"], r["module"]): r["lift"] for r in rows}
    assert [r["module"] for r in rows[:6]] == ["all"] * 3 + ["q"] * 3
    assert [r["algorithm"] for r in rows[:3]] == ["sft", "dpo", "grpo"]
    logs = [math.log(int(10_000 * 0.13**2 * lift) / (10_000 * 0.13**2 * 1.1))
            for lift in (1.9, 1.9, 1.9, 1.85, 1.85, 1.8)]  # fmt: skip
    expected = math.exp(sum(logs) / 6)
    assert found["grpo", "down"]["tensor"] == pytest.approx(expected, **SMALL)
    assert found["grpo", "down"]["update_size"] is None


def test_maps_of_runs_and_of_cells(trials, pairs):
    runs = run_matrix(trials, pairs)
    # without the failed run and the three empty masks of learning rate 0
    assert len(runs) == 18 * 17 // 2
    pair = next(r for r in runs if {r["a"], r["b"]} == {"dpo0", "grpo1"})
    both, a, b = expected_pair(trial("dpo", 0), trial("grpo", 1))
    shares = {pair["a"]: pair["share_of_a"], pair["b"]: pair["share_of_b"]}
    assert shares == {"dpo0": both / a, "grpo1": both / b}
    assert pair["jaccard"] == pytest.approx(both / (a + b - both), **SMALL)
    cells = {(r["a"], r["b"]): r for r in cell_matrix(trials, pairs, ["grpo", "dpo"])}
    assert {key: row["num_pairs"] for key, row in cells.items()} == {
        ("grpo", "grpo"): 6, ("grpo", "dpo"): 12, ("dpo", "dpo"): 6,
    }  # fmt: skip
    assert cells["grpo", "dpo"]["lift"]["tensor"] == pytest.approx(1.3 / 1.1, rel=1e-3, abs=0)


def test_cells_are_compared_over_different_seeds_only(trials, pairs):
    """Were pairs of one seed in, their overlap, e times as large here, would raise the mean."""
    seeds = np.array([t["seed"] for t in trials])
    same = seeds[pairs["a"]] == seeds[pairs["b"]]
    raised = pairs.assign(log_tensor=pairs["log_tensor"] + same)
    expected, found = (cell_matrix(trials, p, ["grpo", "dpo"]) for p in (pairs, raised))
    assert found == expected
    lone = [{**t, "seed": 7} for t in trials]
    assert cell_matrix(lone, pairs, ["grpo", "dpo"]) == []


def test_third_runs_of_the_null_of_update_size_are_named():
    rows = [trial("grpo", s) for s in (0, 1)]
    rows += [trial("grpo", 0, role="surrogate", control="shuffled_reward", trial_id="x")]
    known = overlap_table(rows)
    used = [row | {"update_size_of": ("x", "grpo1", None)[i % 3]} for i, row in enumerate(known)]
    used.append(known[0] | {"update_size_of": "grpo0", "view": "bf16"})
    given = make_tables(rows, overlaps=used)
    found = third_runs(STUDY, given, trial_rows(STUDY, given))
    assert found == [
        {"trial_id": "grpo1", "role": "baseline", "kind": "grpo", "seed": 1},
        {"trial_id": "x", "role": "surrogate", "kind": "shuffled_reward", "seed": 0},
    ]
    assert third_runs(STUDY, {}, trial_rows(STUDY, given)) == []


def test_updates_outside_the_final_mask(given, trials):
    rows = {r["trial_id"]: r for r in outside_rows(STUDY, given, trials)}
    assert len(rows) == 21
    assert rows["grpo2"]["step"] == 50
    assert rows["grpo2"]["outside"] == pytest.approx(1 - 4200 / 5000, **SMALL)


def test_consensus_is_of_all_weights_of_known_cells(given):
    rows = consensus_rows(STUDY, given, {'{"algorithm.name":"grpo"}': "grpo"})
    assert [(r["k"], r["share"]) for r in rows] == [
        (0, 0.7), (1, 0.1), (2, 0.08), (3, 0.07), (4, 0.05),
    ]  # fmt: skip
    assert rows[0]["expected"] == {"uniform": 0.002, "tensor": 0.003, "magnitude": 0.004}
    assert consensus_rows(STUDY, given, {"{}": "other"}) == []


# --- curves ----------------------------------------------------------------------------------


def test_curves_are_means_and_ranges_over_the_runs_of_a_group(given, trials):
    rows = curve_rows(trials, outside_rows(STUDY, given, trials), given)
    by_key = {(r["measure"], r["group"], r["step"]): r for r in rows}
    score = by_key["score", "grpo", 150]
    assert score["mean"] == pytest.approx(np.mean([0.55, 0.56, 0.57, 0.58]), **SMALL)
    assert (score["low"], score["high"], score["num_runs"]) == (
        pytest.approx(0.55, **SMALL), pytest.approx(0.58, **SMALL), 4,
    )  # fmt: skip
    densities = [1 - t["sparsity"]["bitwise"] for t in trials if t["group"] == "grpo"]
    assert by_key["density", "grpo", 150]["mean"] == pytest.approx(np.mean(densities), **SMALL)
    assert by_key["density", "grpo", 0]["high"] == 0
    outside = by_key["outside", "grpo", 50]["mean"]
    assert outside == pytest.approx(1 - (4000 + 150) / 5000, **SMALL)
    assert by_key["loss", "sft", 25]["num_runs"] == 3  # not of the run that failed
    assert not any(r["measure"] == "reward" for r in rows)


def test_long_curves_are_averaged_within_stretches(trials):
    steps = [{"trial_id": "grpo0", "step": step, "loss": float(step)} for step in range(1, 601)]
    given = make_tables(steps=steps)
    rows = [r for r in curve_rows(trials, [], given) if r["measure"] == "loss"]
    assert len(rows) == MAX_POINTS
    assert (rows[0]["step"], rows[0]["mean"]) == (5, pytest.approx(5.5, **SMALL))
    assert rows[-1]["mean"] == pytest.approx(595.5, **SMALL)


def test_density_over_k_steps_is_a_mean_of_windows_within_and_of_runs_beside(trials):
    steps = [
        {"trial_id": "grpo0", "step": 1, "update_sparsity_k1": 0.9},
        {"trial_id": "grpo0", "step": 2, "update_sparsity_k1": 0.7, "update_sparsity_k2": 0.6},
        {"trial_id": "grpo1", "step": 1, "update_sparsity_k1": 0.6},
        {"trial_id": "grpo1", "step": 2, "update_sparsity_k1": 0.6, "update_sparsity_k2": 0.5},
    ]
    rows = window_rows(trials, make_tables(steps=steps))
    assert [(r["group"], r["k"], r["num_runs"]) for r in rows] == [("grpo", 1, 2), ("grpo", 2, 2)]
    for row, expected in zip(rows, [(0.3, 0.2, 0.4), (0.45, 0.4, 0.5)], strict=True):
        assert [row[key] for key in ("mean", "low", "high")] == pytest.approx(expected)
    curve = curve_rows(trials, [], make_tables(steps=steps))
    found = [r["mean"] for r in curve if r["measure"] == "step_density"]
    assert found == pytest.approx([0.25, 0.35])
    one = [{k: v for k, v in row.items() if k != "update_sparsity_k2"} for row in steps]
    assert window_rows(trials, make_tables(steps=one)) == []


def test_steps_that_a_run_lacks_are_left_out(trials):
    steps = [{"trial_id": "grpo0", "step": s, "loss": 1.0} for s in (1, 2)]
    steps += [{"trial_id": "grpo1", "step": 1, "loss": 2.0}]
    rows = [r for r in curve_rows(trials, [], make_tables(steps=steps)) if r["measure"] == "loss"]
    assert [(r["step"], r["mean"], r["num_runs"]) for r in rows] == [(1, 1.5, 2)]


def test_magnitudes_are_summed_over_the_runs_of_a_group(given, trials):
    rows = [r for r in magnitude_rows(STUDY, given, trials) if r["group"] == "grpo · lr_times_3"]
    assert [(r["exponent"], r["density"]) for r in rows] == [
        (-20, 0.0), (-12, 1.0), (-11, 0.75), (-10, 0.5), (-9, 0.25),
    ]  # fmt: skip
    assert rows[1]["num_elements"] == 4000
    assert rows[0]["rounding_threshold"] == pytest.approx(256 * 3e-5, **SMALL)


def test_ranks_are_shares_of_matrices(given, trials):
    rows = rank_rows(STUDY, given, trials)
    found = {(r["statistic"], r["kind"]): r for r in rows}
    assert found["rank", "update"]["high"] == 1
    assert found["rank", "update"]["num_matrices"] == 6
    assert found["rank", "null"]["low"] == pytest.approx(0.9, **SMALL)
    assert found["energy rank", "update"]["low"] == pytest.approx(0.35, **SMALL)
    assert {r["share"] for r in rows} == {1.0}


# --- verdicts --------------------------------------------------------------------------------


def test_claims_keep_their_numbers_and_name_the_scale(given):
    rows = {r["id"]: r for r in claim_rows(given)}
    assert rows["rl-is-sparser-than-sft"]["estimate"] == 8.0
    assert rows["kl-has-limited-effect"]["estimate"] is None
    assert [r["scale"] for r in rows.values()] == [
        "odds ratio", "density ratio", "fraction", "observed / expected",
    ]  # fmt: skip
    statistics = {
        "mean of score_gain, inside [0, 1]": "difference",
        "mean of sparsity.bitwise, inside [0, 1]": "fraction",
        "difference of score_gain, a minus b": "difference",
        "ratio of kl_final, a over b": "ratio",
        "ratio of the odds ratios of sparsity.bitwise by x over y": "ratio",
        "lift over the tensor null between seed": "observed / expected",
        "slope of score_gain on kl_final": "slope",
    }
    claims = make_tables(claims=[claim(kind="x", statistic=said) for said in statistics])
    assert [row["scale"] for row in claim_rows(claims)] == list(statistics.values())
    assert rows["rl-is-sparser-than-sft"]["alternatives"] == {"abs_1e-05@stored": "supported"}


def test_what_an_outcome_says_behind_its_verdict():
    scope = "base x: y (z), view bf16; no evidence"
    shared = {"scope": scope, "verdict": "undecided"}
    claims = [
        claim(**shared, outcome=f"undecided, as seed 3: failed: odds ratio 2 [1, 4] ({scope})"),
        claim(**shared | NO_ESTIMATE, outcome=f"undecided, as seed 3: failed ({scope})"),
        claim(scope=scope, outcome=f"supported: odds ratio 8 [6, 11] ({scope})"),
        claim(outcome=None),
    ]
    rows = claim_rows(make_tables(claims=claims))
    assert [row["qualifier"] for row in rows] == ["seed 3: failed"] * 2 + ["", ""]


NO_ESTIMATE = {"estimate": None}


def test_scope_that_most_claims_share_is_said_once(given):
    rows = {r["id"]: r for r in claim_rows(given)}
    assert shared_scope(list(rows.values())) == [
        "base tiny", "task chain_sum", "learning rate 1e-05", "150 steps", "view stored",
        "no evidence",
    ]  # fmt: skip
    assert rows["lr-zero-changes-nothing"]["own_scope"] == ["learning rate 0.0"]
    assert rows["subnetwork-recurs"]["own_scope"] == []


def test_effects_are_shown_back_on_a_readable_scale(given):
    rows = effect_rows(given)
    sft, gain = rows[0], next(r for r in rows if r["response"] == "score_gain")
    assert (sft["shown_scale"], gain["shown_scale"]) == ("odds ratio", "difference")
    assert sft["shown"] == pytest.approx(0.1353352832, rel=1e-9, abs=0)
    assert sft["shown_high"] == pytest.approx(0.1652988882, rel=1e-9, abs=0)
    assert (sft["estimate"], gain["shown"]) == (-2.0, 0.02)
    assert [is_primary(r["response"]) for r in rows] == [True] * 5 + [False]
    assert (is_primary("score_after"), is_primary("score_validation")) == (True, False)


def test_p_of_the_interval_stands_before_an_exact_p_at_its_floor():
    gaps = np.array([-2.1, -1.9, -2.4, -1.6])
    low, high = stats.t.interval(0.95, 3, gaps.mean(), stats.sem(gaps))
    row = effect("sft", gaps.mean(), ci_low=low, ci_high=high)
    methods = {
        "matched by seed, t interval, exact sign flips": "sign flips",
        "pairs of seeds, jackknife by seed, swapped labels": "swapped labels",
        "unpaired (Welch)": "",
    }
    rows = effect_rows(make_tables(effects=[row | {"method": name} for name in methods]))
    assert [r["exact_test"] for r in rows] == list(methods.values())
    expected = stats.ttest_1samp(gaps, 0).pvalue
    assert [r["p_shown"] for r in rows] == pytest.approx([expected, expected, 0.125], **SMALL)
    unsure = row | {"method": "exact sign flips", "ci_low": None, "ci_high": None}
    assert effect_rows(make_tables(effects=[unsure]))[0]["p_shown"] == 0.125


def test_overlap_within_a_level_is_named_for_what_it_is():
    rows = effect_rows(
        make_tables(effects=[effect("sft", 0.2, response="overlap.bitwise@stored", scale="log",
                                    reference="other seed")])
    )  # fmt: skip
    assert (rows[0]["contrast"], rows[0]["shown_scale"]) == ("sft, between its seeds", "ratio")


def test_an_effect_within_the_only_combination_is_the_pooled_one():
    within = [effect("sft", -2.0, within=json.dumps({"x": str(i)})) for i in range(3)]
    one = effect_rows(make_tables(effects=[effect("sft", -2.0), within[0]]))
    assert [r["within"] for r in one] == [{}]
    three = effect_rows(make_tables(effects=[effect("sft", -2.0), *within]))
    assert [r["within"] for r in three] == [{}, {"x": "0"}, {"x": "1"}, {"x": "2"}]


def test_means_come_back_from_log_odds(given):
    row = mean_rows(given)[1]
    assert row["shown"] == pytest.approx(math.e / (1 + math.e), **SMALL)
    assert row["shown_low"] == pytest.approx(1 / (1 + math.exp(-0.5)), **SMALL)


def test_many_cells_make_many_groups():
    found = trial_rows(STUDY, make_tables(many_cells()))
    assert len({t["group"] for t in found}) == 4
    assert set(found[0]["sparsity"]) == set(DEFINITIONS)
