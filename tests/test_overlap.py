"""Overlap and its nulls against plain loops over unpacked masks, one weight at a time."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from planted import FLOATS
from planted_masks import MODULES, SHAPES, Planted, a_run, plant_runs

from rlsparse import overlap, tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.claim_config import AboveNullClaim, At
from rlsparse.errors import TableError
from rlsparse.overlap.comparison import compare
from rlsparse.overlap.mask_counts import Place, add_up, count_chunk, count_job, jobs, weights_of
from rlsparse.study import StudyBase
from rlsparse.tensor_file import bits_dtype

NAMED = "model.layers.0.self_attn.q_proj.weight"
STUDY = StudyBase(
    name="study",
    question="?",
    claims=(
        AboveNullClaim(id="early", kind="above_null", at=At(step=3)),
        AboveNullClaim(id="one", kind="above_null", tensor=NAMED),
    ),
)
RUNS = [
    a_run("r0", 0, steps=(3, 9)),
    a_run("r1", 1, steps=(3, 6, 9)),
    a_run("r2", 2),
    a_run("s0", 0, role="surrogate", control="random_reward"),
    a_run("z0", 0, role="control", control="same_seed", replicate=1, steps=(3,), num_steps=3),
    a_run("z1", 1, role="control", control="lr_zero", steps=(3,), num_steps=3),  # early and last
]
NUM_PAIRS = 15 + 6 - 1
SEEDS = {run.trial_id: run.seed for run in RUNS}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant_runs(tmp_path_factory.mktemp("planted"), RUNS)


def count(planted: Planted, view: str = "stored"):
    comparison = compare(STUDY, planted.runs, view)
    after = {run.trial_id: Checkpoint.open(run.after[run.steps[-1]]) for run in planted.runs}
    return overlap.count_masks(
        comparison, planted.table((view,)), Checkpoint.open(planted.path), after
    )


# --- the oracle: dictionaries and Fractions of weights, no arrays -------------------------------


def magnitude(weight: float) -> object:
    if not math.isfinite(weight):
        return "not finite"
    digits, exponent = math.frexp(abs(weight))
    return 0 if weight == 0 else (exponent, digits == 0.5)


def update_bins(planted: Planted, trial: str, name: str) -> list[object]:
    """Magnitude, and decile of the update's size among the moved weights of that magnitude."""
    sides = planted.weights[name], planted.after[trial][name]
    with np.errstate(invalid="ignore"):
        before, after = (s.bits.view(FLOATS["bf16"]).astype(float).tolist() for s in sides)
    by_stratum = defaultdict(list)
    sizes: list[object] = []
    for x, y in zip(before, after, strict=True):
        size = abs(y - x)
        if math.isfinite(size) and size > 0:
            digits, exponent = math.frexp(max(size, 2.0**-126))
            size = math.ldexp(math.floor(digits * 16) / 16, exponent)
            by_stratum[magnitude(x)].append(size)
        sizes.append(size if math.isfinite(size) else "not finite")
    bins: list[object] = []
    for x, size in zip(before, sizes, strict=True):
        if size == "not finite" or size == 0:
            bins.append((magnitude(x), size))
            continue
        alike = by_stratum[magnitude(x)]
        rank = sum(s < size for s in alike) + sum(s == size for s in alike) / 2
        bins.append((magnitude(x), "decile", math.floor(10 * rank / len(alike))))
    return bins


def in_strata(a: list[bool], b: list[bool], strata: list[object]) -> float:
    counts: dict[object, list[int]] = defaultdict(lambda: [0, 0, 0])
    for x, y, stratum in zip(a, b, strata, strict=True):
        counts[stratum][0] += x
        counts[stratum][1] += y
        counts[stratum][2] += 1
    return sum(x * y / n for x, y, n in counts.values())


def of_margins(a: list[bool], b: list[bool], shape: tuple[int, ...]) -> float:
    if len(shape) == 1:
        return sum(a) * sum(b) / len(a)
    columns = math.prod(shape[1:])
    rows = sum(
        sum(a[r * columns : (r + 1) * columns]) * sum(b[r * columns : (r + 1) * columns])
        for r in range(shape[0])
    )
    cols = sum(sum(a[c::columns]) * sum(b[c::columns]) for c in range(columns))
    return rows * cols / (sum(a) * sum(b))


def expected_row(planted: Planted, a: tuple[str, int], b: tuple[str, int], names: list[str]):
    """Counts and expectations of a pair in some tensors."""
    independent = [
        t for t in ("s0", "r0", "r1", "r2") if SEEDS[t] not in (SEEDS[a[0]], SEEDS[b[0]])
    ]
    # Surrogates come first, then the baseline, each seed once: r0 has the seed of s0.
    independent = [t for t in independent if t != "r0"]
    row: dict[str, object] = defaultdict(float)
    row["update_size_of"] = independent[0] if a[0] != b[0] and independent else None
    for name in names:
        weights = planted.weights[name].bits.view(FLOATS["bf16"]).astype(float).tolist()
        x, y = (planted.masks[run][name].tolist() for run in (a, b))
        row["num_elements"] += len(x)
        row["num_a"] += sum(x)
        row["num_b"] += sum(y)
        row["num_both"] += sum(p and q for p, q in zip(x, y, strict=True))
        row["expected_tensor"] += in_strata(x, y, [0] * len(x))
        row["expected_magnitude"] += in_strata(x, y, [magnitude(w) for w in weights])
        if a[0] != b[0]:
            row["expected_margins"] += of_margins(x, y, planted.weights[name].shape)
            if row["update_size_of"]:
                bins = update_bins(planted, str(row["update_size_of"]), name)
                row["expected_update_size"] += in_strata(x, y, bins)
    row["expected_uniform"] = row["num_a"] * row["num_b"] / row["num_elements"]
    return row


def wanted_pairs() -> list[tuple[tuple[str, int], tuple[str, int]]]:
    last = [(run.trial_id, run.steps[-1]) for run in RUNS]
    early = [(run.trial_id, 3) for run in RUNS if 3 in run.steps]
    pairs = {*itertools.combinations(sorted(last), 2), *itertools.combinations(sorted(early), 2)}
    return sorted(pairs)


def test_overlaps_equal_a_plain_loop(planted: Planted) -> None:
    result = overlap.overlaps(count(planted))
    assert result.schema.equals(tables.SCHEMAS["overlaps"], check_metadata=True)
    wanted = []
    for a, b in wanted_pairs():
        for module in (None, "k", "norm", "q"):
            names = [name for name in SHAPES if module in (None, MODULES[name])]
            wanted.append((a, b, module, None, names))
        wanted.append((a, b, "q", NAMED, [NAMED]))
    for run in RUNS:
        for one, other in itertools.combinations(run.steps, 2):
            wanted.append(((run.trial_id, one), (run.trial_id, other), None, None, list(SHAPES)))
    rows = result.to_pylist()
    assert len(rows) == len(wanted) == NUM_PAIRS * 5 + 4
    null_updates = 0
    for row, (a, b, module, tensor, names) in zip(rows, wanted, strict=True):
        key = (row["trial_a"], row["step_a"]), (row["trial_b"], row["step_b"])
        assert (*key, row["module"], row["tensor"]) == (a, b, module, tensor)
        assert (row["definition"], row["view"]) == ("bitwise", "stored")
        oracle = expected_row(planted, a, b, names)
        for name in ("num_elements", "num_a", "num_b", "num_both", "update_size_of"):
            assert row[name] == oracle[name], name
        for null in ("uniform", "tensor", "magnitude", "update_size", "margins"):
            value = oracle.get(f"expected_{null}")
            null_updates += null == "update_size" and value is None
            assert row[f"expected_{null}"] == (
                value if value is None else pytest.approx(value, rel=1e-12, abs=1e-9)
            ), null
        assert (row["num_both_random"] is None) == (a[0] == b[0])
    assert null_updates == 4  # pairs within a trial alone


def test_random_masks_keep_the_count_of_each_tensor(planted: Planted) -> None:
    """Draws of a pair are the same again, add up over modules, and scatter around the mean."""
    frame = overlap.overlaps(count(planted)).to_pandas()
    frame = frame[frame["trial_a"] != frame["trial_b"]]
    again = overlap.overlaps(count(planted)).to_pandas().loc[frame.index]
    assert (frame["num_both_random"] == again["num_both_random"]).all()
    whole = frame[frame["tensor"].isna()]
    keys = ["trial_a", "step_a", "trial_b", "step_b"]
    modules = whole[whole["module"].notna()].groupby(keys)["num_both_random"].sum()
    overall = whole[whole["module"].isna()].set_index(keys)["num_both_random"]
    assert (modules == overall[modules.index]).all()
    norm = whole[whole["module"] == "norm"]
    excess = norm["num_both_random"] - norm["expected_tensor"]
    assert 0 < excess.abs().max() < 12
    assert excess.nunique() > 5


def test_a_random_mask_does_not_depend_on_the_other_runs(planted: Planted) -> None:
    after = {run.trial_id: Checkpoint.open(run.after[run.steps[-1]]) for run in planted.runs}
    few = compare(STUDY, planted.runs[:2], "stored")
    base = Checkpoint.open(planted.path)
    alone = overlap.overlaps(overlap.count_masks(few, planted.table(), base, after)).to_pandas()
    every = overlap.overlaps(count(planted)).to_pandas()
    pair = every[(every["trial_a"] == "r0") & (every["trial_b"] == "r1") & (every["step_a"] == 9)]
    mine = alone[(alone["trial_a"] == "r0") & (alone["trial_b"] == "r1") & (alone["step_a"] == 9)]
    names = ["num_both_random", "num_both", "expected_margins"]
    assert len(pair) == 5
    assert pair[names].to_numpy().tolist() == mine[names].to_numpy().tolist()


def test_chunks_add_up(planted: Planted) -> None:
    """Cut by hand into chunks of whole rows, in any order; deciles are of each chunk."""
    comparison = compare(STUDY, planted.runs, "stored")
    whole = overlap.overlaps(count(planted)).to_pandas()
    parts = []
    for name, shape in SHAPES.items():
        bits, columns = planted.weights[name].bits, math.prod(shape[1:])
        size = math.lcm(64, columns)
        for chunk, start in reversed(list(enumerate(range(0, bits.size, size)))):
            here = slice(start, min(start + size, bits.size))
            length = here.stop - start
            masks = np.zeros((len(comparison.runs), -(-length // 64)), np.uint64)
            for row, run in enumerate(comparison.runs):
                packed = np.packbits(planted.masks[run][name][here], bitorder="little")
                masks.view(np.uint8)[row, : packed.size] = packed
            place = Place(name, MODULES[name], chunk, length, columns if len(shape) > 1 else 0)
            none = [np.zeros(length)] * len(comparison.references)
            parts.append(count_chunk(comparison, place, masks, bits[here], "bf16", none))
    cut = overlap.overlaps(add_up(comparison, parts)).to_pandas()
    assert len(parts) > 2 * len(SHAPES)
    exact = [c for c in whole.columns if not c.startswith("expected")]
    assert cut[exact].equals(whole[exact])
    for null in ("uniform", "tensor", "magnitude", "margins"):
        np.testing.assert_allclose(
            cut[f"expected_{null}"], whole[f"expected_{null}"], rtol=1e-12, atol=0
        )
    # A run that moved nothing divides by nothing but chunks.
    (row,) = cut[
        (cut["trial_a"] == "r1") & (cut["trial_b"] == "r2") & (cut["tensor"] == NAMED)
    ].to_dict("records")
    x, y = (planted.masks[run][NAMED].tolist() for run in (("r1", 9), ("r2", 9)))
    weights = planted.weights[NAMED].bits.view(FLOATS["bf16"]).astype(float).tolist()
    strata: list[object] = [(i // 64, magnitude(w)) for i, w in enumerate(weights)]
    assert row["expected_update_size"] == pytest.approx(in_strata(x, y, strata), rel=1e-12, abs=0)


def test_rows_come_in_any_order(planted: Planted) -> None:
    comparison, base = compare(STUDY, planted.runs, "stored"), Checkpoint.open(planted.path)
    after = {run.trial_id: Checkpoint.open(run.after[run.steps[-1]]) for run in planted.runs}
    masks = planted.table()
    shuffled = masks.take(np.random.default_rng(0).permutation(masks.num_rows))
    found = [overlap.count_masks(comparison, m, base, after) for m in (masks, shuffled)]
    assert overlap.overlaps(found[0]).equals(overlap.overlaps(found[1]))


def test_only_masks_of_the_view_are_compared(planted: Planted) -> None:
    comparison, base = compare(STUDY, planted.runs, "fp16"), Checkpoint.open(planted.path)
    with pytest.raises(TableError, match=r"has no mask of .* chunk 0 in view fp16"):
        overlap.count_masks(comparison, planted.table(), base, _after(planted))
    found = overlap.overlaps(count(planted, "fp16")).to_pandas()
    assert set(found["view"]) == {"fp16"}
    stored = overlap.overlaps(count(planted)).to_pandas()
    assert (found["num_both"] == stored["num_both"]).all()


def _after(planted: Planted) -> dict[str, Checkpoint]:
    return {run.trial_id: Checkpoint.open(run.after[run.steps[-1]]) for run in planted.runs}


def test_damaged_masks_are_refused(planted: Planted) -> None:
    comparison, base = compare(STUDY, planted.runs, "stored"), Checkpoint.open(planted.path)
    masks, after = planted.table(), _after(planted)
    snapshots = [i for i, kind in enumerate(masks["kind"].to_pylist()) if kind == "snapshot"]
    missing = masks.take(sorted({*range(masks.num_rows)} - {snapshots[0]}))
    with pytest.raises(TableError, match=r"trial r0 step 3 has no mask of .*k_proj"):
        overlap.count_masks(comparison, missing, base, after)
    twice = masks.take([*range(masks.num_rows), snapshots[0]])
    with pytest.raises(TableError, match="is there twice"):
        overlap.count_masks(comparison, twice, base, after)
    rows = masks.to_pylist()
    rows[snapshots[0]]["mask"] += b"\0"
    with pytest.raises(TableError, match="25 bytes, not one for 192 weights"):
        overlap.count_masks(comparison, tables.from_rows(rows, "masks"), base, after)


def test_a_reference_of_another_layout_is_refused(planted: Planted, tmp_path) -> None:
    from planted import write_folder

    tensors = {n: t for n, t in planted.after["r1"].items() if "norm" not in n}
    other = Checkpoint.open(write_folder(tmp_path / "other", tensors))
    base, whole = Checkpoint.open(planted.path), _after(planted)["r0"]
    with pytest.raises(TableError, match=r"model.norm.weight .* is not alike in all runs"):
        weights_of(base, [whole, other])
    assert "model.norm.weight" not in weights_of(base, [other])
    assert list(weights_of(base, [])) == list(weights_of(base, [], whole)) == list(SHAPES)


def test_a_job_pickles_and_serves_several_views(planted: Planted) -> None:
    import pickle

    comparisons = [compare(STUDY, planted.runs, view) for view in ("stored", "bf16")]
    base, after = Checkpoint.open(planted.path), _after(planted)
    weights = weights_of(base, [after[trial] for trial in comparisons[0].references])
    masks = planted.table(("stored", "bf16"))
    for job in pickle.loads(pickle.dumps(list(jobs(weights)))):
        rows = masks.filter(np.array(masks["tensor"].to_pylist()) == job.place.tensor)
        one, other = count_job(comparisons, job, rows)
        assert (one.both == other.both).all()
        assert one.strata.changed.sum() == other.strata.changed.sum()
    assert bits_dtype(weights[NAMED].before.dtype).itemsize == 2


def test_no_runs_give_an_empty_table(planted: Planted) -> None:
    totals = overlap.count_masks(
        compare(STUDY, [], "stored"),
        tables.SCHEMAS["masks"].empty_table(),
        Checkpoint.open(planted.path),
    )
    assert overlap.overlaps(totals).equals(tables.SCHEMAS["overlaps"].empty_table())


def test_many_rows_keep_the_modules_that_claims_name(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "MAX_ROWS", NUM_PAIRS * 5 - 1)
    frame = overlap.overlaps(count(planted)).to_pandas()
    assert set(frame["module"].dropna()) == {"q"}  # the tensor's own
    assert frame[frame["tensor"].isna()]["module"].isna().all()
    assert (frame["tensor"] == NAMED).sum() == NUM_PAIRS


# --- measures ----------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    assert overlap.one_sided(6, 10) == 0.6
    assert overlap.jaccard(6, 10, 8) == 0.5
    # 100 weights: 6 both, 4 only a, 2 only b, 88 neither
    chance = 0.1 * 0.08 + 0.9 * 0.92
    expected = (0.94 - chance) / (1 - chance)
    assert overlap.kappa(6, 10, 8, 100) == pytest.approx(expected, rel=1e-12, abs=0)
    assert overlap.odds_ratio(6, 10, 8, 100) == pytest.approx(6 * 88 / (4 * 2), rel=1e-12, abs=0)
    assert overlap.lift(6, 0.8) == pytest.approx(7.5, rel=1e-12, abs=0)
    assert overlap.max_lift(10, 8, 100) == 10
    np.testing.assert_allclose(overlap.jaccard([1, 0], [1, 0], [1, 0]), [1.0, np.nan])
    np.testing.assert_allclose(overlap.odds_ratio([6, 6], 10, 8, [100, 12]), [66, 0])
    assert overlap.kappa(5, 5, 5, 10) == 1
    assert overlap.odds_ratio(5, 5, 5, 10) == math.inf
    assert overlap.lift(8, 10 * 8 / 100) == overlap.max_lift(10, 8, 100)


def test_measures_of_empty_masks_are_nan() -> None:
    empty = [
        overlap.one_sided(0, 0),
        overlap.jaccard(0, 0, 0),
        overlap.kappa(0, 0, 0, 10),
        overlap.kappa(10, 10, 10, 10),
        overlap.kappa(0, 0, 0, 0),
        overlap.odds_ratio(0, 0, 3, 10),
        overlap.odds_ratio(3, 10, 3, 10),
        overlap.lift(0, 0.0),
        overlap.max_lift(0, 0, 10),
    ]
    assert np.isnan(empty).all()
    assert (
        overlap.one_sided(0, 3) == overlap.jaccard(0, 3, 0) == overlap.odds_ratio(0, 3, 3, 9) == 0
    )


def test_published_pairs_are_reproduced() -> None:
    """2505.11711 Table 4: o1, o2 and chance of seeds 42 / 123, of two data sets, of all changed."""
    for o1, o2, chance, found in (
        (0.605, 0.606, 0.367, (0.434, 0.38, 5.2, 1.65, 2.72)),
        (0.267, 0.671, 0.146, (0.236, 0.22, 4.4, 1.83, 2.72)),
        (0.591, 0.332, 0.230, (0.270, 0.31, 6.8, 2.57, 4.35)),
    ):
        # `chance` is the other mask's density: that of b for o1.
        n, b = 10_000_000, chance * 10_000_000
        a = b * o2 / o1
        both = o1 * a
        measures = (
            overlap.jaccard(both, a, b),
            overlap.kappa(both, a, b, n),
            overlap.odds_ratio(both, a, b, n),
            overlap.lift(both, a * b / n),
            overlap.max_lift(a, b, n),
        )
        for value, published in zip(measures, found, strict=True):
            assert value == pytest.approx(published, rel=0.02, abs=0)
