"""What factors do to overlap, against loops over pairs of runs and planted overlaps."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats
from test_effects import make_study, make_tables, pick, trials_of

from rlsparse import tables
from rlsparse.effects import overlap_effects
from rlsparse.study import Study, Trial

KL, CLIP = "algorithm.kl_coef", "train.max_grad_norm"
BOTH = 1_000_000
TWO_WAY = make_study(factors={KL: [0.0, 0.04], CLIP: [None, 1.0]})
ONE = make_study(factors={KL: [0.0, 0.04]}, seeds=[0, 1, 2, 3, 4])

Excess = Callable[[Trial, Trial], float]


def overlap_row(a: Trial, b: Trial, excess: float, **more: object) -> dict[str, object]:
    row: dict[str, object] = {
        "trial_a": a.trial_id, "step_a": 20, "trial_b": b.trial_id, "step_b": 20,
        "definition": "bitwise", "view": "stored", "num_elements": 10**8,
        "num_a": 10**7, "num_b": 10**7, "num_both": BOTH,
        "expected_magnitude": (BOTH + 0.5) / np.exp(excess) - 0.5,
    }  # fmt: skip
    return row | more


def rows_of(trials: list[Trial], excess: Excess) -> list[dict[str, object]]:
    pairs = itertools.combinations(sorted(trials, key=lambda t: t.trial_id), 2)
    return [overlap_row(a, b, excess(a, b)) for a, b in pairs]


def run(
    study: Study,
    rows: list[dict[str, object]],
    failed: Callable[[Trial], bool] = lambda trial: False,
) -> pd.DataFrame:
    trials = make_tables(trials_of(study), lambda t: 0.1, failed)[0]
    overlaps = tables.from_rows(rows, "overlaps")
    return overlap_effects.overlap_effects(study, trials, overlaps).to_pandas()


def random_excess(a: Trial, b: Trial) -> float:
    key = sorted([a.trial_id, b.trial_id])
    node = sum(np.random.default_rng(list(t.encode())).normal(0, 0.3) for t in key)
    return float(0.5 + node + np.random.default_rng(list("".join(key).encode())).normal(0, 0.2))


def contrast(trials: list[Trial], factor: str, level: str, excess: Excess) -> float:
    """Over all pairs of different seeds that agree in the other factors."""
    kinds: dict[str, list[float]] = {"across": [], "at": [], "reference": []}
    for a, b in itertools.combinations(trials, 2):
        others = [{k: v for k, v in t.cell.items() if k != factor} for t in (a, b)]
        if a.config.seed == b.config.seed or others[0] != others[1]:
            continue
        at = [t.cell[factor] == level for t in (a, b)]
        kind = "at" if all(at) else "across" if any(at) else "reference"
        kinds[kind].append(excess(a, b))
    means = {kind: np.mean(values) for kind, values in kinds.items()}
    return float(means["across"] - (means["at"] + means["reference"]) / 2)


@pytest.mark.parametrize(("factor", "level"), [(KL, "0.04"), (CLIP, "null")])
def test_contrast_equals_loops_over_pairs(factor: str, level: str) -> None:
    trials = trials_of(TWO_WAY)
    frame = run(TWO_WAY, rows_of(trials, random_excess))
    row = pick(frame, factor=factor, level=level, method=overlap_effects.ACROSS)
    expected = contrast(trials, factor, level, random_excess)
    assert row["estimate"] == pytest.approx(expected, rel=1e-8)
    without = [
        contrast([t for t in trials if t.config.seed != seed], factor, level, random_excess)
        for seed in range(4)
    ]
    pseudo = [4 * expected - 3 * one for one in without]
    low, high = stats.t.interval(0.95, 3, np.mean(pseudo), stats.sem(pseudo))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), rel=1e-8)

    def swapped(swap: tuple[int, ...], trial: Trial) -> Trial:
        """The run whose label this one bears once the labels of some seeds are swapped."""
        if not swap[trial.config.seed]:
            return trial
        cells = {tuple(t.cell.items()): t for t in trials if t.config.seed == trial.config.seed}
        other = {KL: ("0.0", "0.04"), CLIP: ("null", "1.0")}[factor]
        flipped = dict(zip(other, other[::-1], strict=True))[trial.cell[factor]]
        return cells[tuple((trial.cell | {factor: flipped}).items())]

    found = [
        contrast(
            trials, factor, level,
            lambda a, b, s=swap: random_excess(swapped(s, a), swapped(s, b)),
        )
        for swap in itertools.product([0, 1], repeat=4)
    ]  # fmt: skip
    p = np.mean([abs(one) >= abs(expected) - 1e-12 for one in found])
    assert row["p_value"] == pytest.approx(p, rel=1e-12)
    assert (row["p_floor"], row["num_runs"], row["within"]) == (0.125, 4, "{}")
    assert (row["response"], row["scale"]) == ("overlap.bitwise@stored", "log")
    assert row["reference"] == {KL: "0.0", CLIP: "1.0"}[factor]
    assert row["p_adjusted"] == row["p_value"]


def test_rows_within_levels_equal_means_over_pairs() -> None:
    trials = trials_of(TWO_WAY)
    frame = run(TWO_WAY, rows_of(trials, random_excess))
    frame = frame[frame["method"] == overlap_effects.WITHIN]
    assert frame[["factor", "level"]].to_numpy().tolist() == [
        [KL, "0.0"], [KL, "0.04"], [CLIP, "null"], [CLIP, "1.0"],
    ]  # fmt: skip
    assert set(frame["reference"]) == {"other seed"}
    for row in frame.to_dict("records"):
        ours = [t for t in trials if t.cell[row["factor"]] == row["level"]]

        def mean(seeds: set[int], ours: list[Trial] = ours) -> float:
            pairs = itertools.combinations([t for t in ours if t.config.seed in seeds], 2)
            values = [random_excess(a, b) for a, b in pairs
                      if a.cell == b.cell and a.config.seed != b.config.seed]  # fmt: skip
            return float(np.mean(values))

        every = set(range(4))
        assert row["estimate"] == pytest.approx(mean(every), rel=1e-8)
        pseudo = [4 * mean(every) - 3 * mean(every - {seed}) for seed in every]
        low, high = stats.t.interval(0.95, 3, np.mean(pseudo), stats.sem(pseudo))
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), rel=1e-8)
        assert row["num_runs"] == 4
        assert np.isnan(row["p_value"])


def moved(a: Trial, b: Trial) -> float:
    """The factor takes .4 away between levels; same-seed pairs, which do not count, share much."""
    if a.config.seed == b.config.seed:
        return 5.0
    shift = -0.4 if a.cell[KL] != b.cell[KL] else 0.0
    return shift + random_excess(a, b)


def test_a_factor_that_moves_the_subnetwork_is_below_zero() -> None:
    row = pick(run(ONE, rows_of(trials_of(ONE), moved)), method=overlap_effects.ACROSS)
    nothing = pick(run(ONE, rows_of(trials_of(ONE), random_excess)), method=overlap_effects.ACROSS)
    assert row["estimate"] == pytest.approx(nothing["estimate"] - 0.4, rel=1e-8)
    assert row["ci_high"] < 0
    assert row["p_value"] == row["p_floor"] == 1 / 16


def test_what_runs_share_with_all_others_cancels() -> None:
    def popular(a: Trial, b: Trial) -> float:
        return float(sum(np.random.default_rng(list(t.trial_id.encode())).normal() for t in (a, b)))

    row = pick(run(ONE, rows_of(trials_of(ONE), popular)), method=overlap_effects.ACROSS)
    assert (row["estimate"], row["ci_low"], row["ci_high"]) == pytest.approx((0, 0, 0), abs=1e-7)


def test_lost_runs_cost_their_seed() -> None:
    def failed(trial: Trial) -> bool:
        return trial.config.seed == 3 and trial.cell == {KL: "0.04"}

    trials = trials_of(ONE)
    there = [t for t in trials if not failed(t)]
    frame = run(ONE, rows_of(there, random_excess), failed)
    row = pick(frame, method=overlap_effects.ACROSS)
    kept = [t for t in trials if t.config.seed != 3]
    assert row["estimate"] == pytest.approx(contrast(kept, KL, "0.04", random_excess), rel=1e-8)
    assert row["num_runs"] == 4
    within = frame[frame["method"] == overlap_effects.WITHIN]
    assert dict(zip(within["level"], within["num_runs"], strict=True)) == {"0.0": 5, "0.04": 4}


def test_a_run_lost_in_one_cell_costs_its_seed_in_all() -> None:
    def failed(trial: Trial) -> bool:
        return trial.config.seed == 3 and trial.cell == {KL: "0.04", CLIP: "null"}

    trials = trials_of(TWO_WAY)
    rows = rows_of([t for t in trials if not failed(t)], random_excess)
    frame = run(TWO_WAY, rows, failed)
    kept = [t for t in trials if t.config.seed != 3]
    for factor, level in ((KL, "0.04"), (CLIP, "null")):
        row = pick(frame, factor=factor, level=level, method=overlap_effects.ACROSS)
        expected = contrast(kept, factor, level, random_excess)
        assert row["estimate"] == pytest.approx(expected, rel=1e-8)
        assert row["num_runs"] == 3


def test_runs_without_a_changed_weight_are_left_out() -> None:
    trials = trials_of(ONE)
    empty = next(t for t in trials if t.config.seed == 2)
    rows = rows_of(trials, random_excess)
    for row in rows:
        for side in ("a", "b"):
            if row[f"trial_{side}"] == empty.trial_id:
                row |= {f"num_{side}": 0, "num_both": 0, "expected_magnitude": 0.0}
    row = pick(run(ONE, rows), method=overlap_effects.ACROSS)
    kept = [t for t in trials if t.config.seed != 2]
    assert row["estimate"] == pytest.approx(contrast(kept, KL, "0.04", random_excess), rel=1e-8)
    assert row["num_runs"] == 4


def test_only_last_snapshots_of_all_weights_in_the_default_view_count() -> None:
    trials = trials_of(ONE)
    rows = rows_of(trials, random_excess)
    a, b = sorted(trials, key=lambda t: t.trial_id)[:2]
    noise = [
        overlap_row(a, b, 9.0, **more)
        for more in (
            {"view": "bf16"}, {"definition": "abs_1e-05"}, {"module": "q"}, {"tensor": "x"},
            {"step_a": 10}, {"step_b": 10}, {"trial_b": a.trial_id, "step_a": 10},
        )
    ]  # fmt: skip
    assert run(ONE, noise + rows + noise).equals(run(ONE, rows))
    rng = np.random.default_rng(0)
    assert run(ONE, list(rng.permutation(np.array(rows, object)))).equals(run(ONE, rows))


def test_a_mask_is_no_factor_of_overlaps() -> None:
    """Table ``overlaps`` has no runs under a mask; the others are at one level of it."""
    masks = {"train.mask": [None, {"like": {"from": "baseline"}}]}
    study = make_study(factors={KL: [0.0, 0.04], **masks}, seeds=ONE.seeds)
    full = [t for t in trials_of(study) if t.config.train.mask is None]
    steady = lambda a, b: 0.1 * (a.config.seed + b.config.seed) + (a.cell[KL] == b.cell[KL])  # noqa: E731
    frame, plain = run(study, rows_of(full, steady)), run(ONE, rows_of(trials_of(ONE), steady))
    assert set(frame["factor"]) == {KL}
    pd.testing.assert_frame_equal(frame, plain)


def test_overlaps_that_do_not_exist_are_null() -> None:
    """As between runs of different bases: those of one base have some, across there are none."""
    trials = trials_of(ONE)
    by_level = [[t for t in trials if t.cell[KL] == level] for level in ("0.0", "0.04")]
    rows = [row for part in by_level for row in rows_of(part, random_excess)]
    frame = run(ONE, rows)
    row = pick(frame, method=overlap_effects.ACROSS)
    assert row["num_runs"] == 0
    assert row[["estimate", "ci_low", "p_value"]].isna().all()
    assert frame.loc[frame["method"] == overlap_effects.WITHIN, "num_runs"].tolist() == [5, 5]
    assert set(run(ONE, [])["num_runs"]) == {0}


def test_two_seeds_have_no_interval_and_no_test() -> None:
    study = make_study(factors={KL: [0.0, 0.04]}, seeds=[0, 1])
    row = pick(run(study, rows_of(trials_of(study), moved)), method=overlap_effects.ACROSS)
    assert not np.isnan(row["estimate"])
    assert np.isnan(row["ci_low"])
    assert (row["p_value"], row["p_floor"]) == (1, 1)


def test_fields_of_two_algorithms_stay_apart_and_holm_counts_them() -> None:
    study = make_study(
        baseline={"algorithm": {"name": "dpo"}, "train": {"num_steps": 20}},
        factors={"algorithm": [{"name": "dpo"}, {"name": "simpo"}], "algorithm.beta": [0.1, 2.0]},
    )

    def excess(a: Trial, b: Trial) -> float:
        dpo = a.config.algorithm.name == b.config.algorithm.name == "dpo"
        beta = "algorithm.beta"
        return random_excess(a, b) - 2.0 * (dpo and a.cell[beta] != b.cell[beta])

    frame = run(study, rows_of(trials_of(study), excess))
    beta = frame[(frame["factor"] == "algorithm.beta")
                 & (frame["method"] == overlap_effects.ACROSS)]  # fmt: skip
    assert beta["within"].tolist() == [f'{{"algorithm.name":"{x}"}}' for x in ("dpo", "simpo")]
    dpo, simpo = beta["estimate"]
    assert dpo < -1.5 < simpo
    assert beta["p_value"].iloc[0] == 0.125
    assert beta["p_adjusted"].iloc[0] == 0.25
    assert pick(frame, factor="algorithm", method=overlap_effects.ACROSS)["num_runs"] == 4


def test_nested_factor_is_held_fixed_where_both_have_it() -> None:
    study = make_study(factors={"algorithm.name": ["grpo", "sft"], KL: [0.0, 0.04]})
    trials = trials_of(study)
    frame = run(study, rows_of(trials, random_excess))
    row = pick(frame, factor="algorithm.name", method=overlap_effects.ACROSS)
    one_cell = [sft_against_grpo(trials, kl) for kl in ("0.0", "0.04")]
    assert row["estimate"] == pytest.approx(np.mean(one_cell), rel=1e-8)


def sft_against_grpo(trials: list[Trial], kl: str) -> float:
    """SFT against GRPO at one KL coefficient."""
    kept = [t for t in trials if t.cell.get(KL, kl) == kl]
    values: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for a, b in itertools.combinations(kept, 2):
        if a.config.seed != b.config.seed:
            num_sft = sum(t.config.algorithm.name == "sft" for t in (a, b))
            values[num_sft].append(random_excess(a, b))
    means = {k: np.mean(v) for k, v in values.items()}
    return float(means[1] - (means[0] + means[2]) / 2)


def test_control_is_a_factor() -> None:
    study = make_study(controls=["lr_times_3"])
    frame = run(study, rows_of(trials_of(study), random_excess))
    row = pick(frame, factor="control.lr_times_3")
    assert (row["level"], row["reference"], row["num_runs"]) == ("lr_times_3", "none", 4)


def masks_of(trials: list[Trial], distance: float, seed: int) -> list[dict[str, object]]:
    """Overlaps of random masks; levels prefer other weights, the more the greater the distance."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(0, 1, 20_000), rng.normal(0, 1, (2, 20_000))
    masks = {}
    for trial in trials:
        liking = shared + distance * own[int(trial.cell[KL] == "0.04")] + rng.normal(0, 1, 20_000)
        masks[trial.trial_id] = liking > np.quantile(liking, 0.9)
    rows = []
    for a, b in itertools.combinations(sorted(trials, key=lambda t: t.trial_id), 2):
        both = int((masks[a.trial_id] & masks[b.trial_id]).sum())
        counts = {"num_a": 2000, "num_b": 2000, "num_both": both, "expected_magnitude": 200.0}
        rows.append(overlap_row(a, b, 0.0, **counts))
    return rows


def test_on_masks() -> None:
    trials = trials_of(ONE)
    far = pick(run(ONE, masks_of(trials, 1.0, 0)), method=overlap_effects.ACROSS)
    assert far["ci_high"] < -0.1
    assert far["p_value"] == far["p_floor"]
    found = [
        pick(run(ONE, masks_of(trials, 0.0, seed)), method=overlap_effects.ACROSS)
        for seed in range(30)
    ]
    covered = np.mean([row["ci_low"] < 0 < row["ci_high"] for row in found])
    assert covered >= 0.9
    p = np.array([row["p_value"] for row in found])
    assert np.mean(p <= 0.25) <= 0.4


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_intervals_cover(shares_prompts: bool) -> None:
    """Also where runs of a seed are alike in all cells, which leaving out runs would not see."""
    trials = trials_of(TWO_WAY)
    rng = np.random.default_rng(3)
    across, within = [], []
    table = make_tables(trials, lambda t: 0.1)[0]
    for _ in range(50):
        seeds = rng.normal(0, 0.3 if shares_prompts else 0.0, 4)
        nodes = dict(zip([t.trial_id for t in trials], rng.normal(0, 0.1, 16), strict=True))

        def excess(a: Trial, b: Trial, seeds=seeds, nodes=nodes) -> float:
            common = seeds[a.config.seed] + seeds[b.config.seed]
            return float(1 + common + nodes[a.trial_id] + nodes[b.trial_id] + rng.normal(0, 0.1))

        rows = tables.from_rows(rows_of(trials, excess), "overlaps")
        frame = overlap_effects.overlap_effects(TWO_WAY, table, rows).to_pandas()
        row = pick(frame, factor=KL, method=overlap_effects.ACROSS)
        across.append(row["ci_low"] < 0 < row["ci_high"])
        row = pick(frame, factor=KL, level="0.0", method=overlap_effects.WITHIN)
        within.append(row["ci_low"] < 1 < row["ci_high"])
    assert np.mean(across) >= 0.92
    assert np.mean(within) >= 0.88


def test_methods_are_documented() -> None:
    frame = run(ONE, rows_of(trials_of(ONE), random_excess))
    assert set(frame["method"]) == set(overlap_effects.METHODS)
    assert isinstance(tables.check(pa.Table.from_pandas(frame), "effects"), pa.Table)
