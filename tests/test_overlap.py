"""Overlap and its nulls against plain loops over unpacked masks, and planted dependence."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from rlsparse import overlap, tables
from rlsparse.definitions import NUM_MAGNITUDE_BINS
from rlsparse.errors import TableError

CHUNK = 192
TENSORS = {"a.q": ("q", 500), "a.k": ("k", 300), "b.q": ("q", 100)}
Masks = dict[overlap.Run, dict[str, np.ndarray]]


def base_bins(seed: int = 0, low: int = 30, high: int = 34) -> dict[str, np.ndarray]:
    """Magnitude bin of every weight; -1 stands for a non-finite one."""
    rng = np.random.default_rng(seed)
    bins = {name: rng.integers(low, high, size) for name, (_, size) in TENSORS.items()}
    bins["a.q"][7] = -1
    return bins


def histogram(bins: np.ndarray) -> list[int]:
    return np.bincount(bins[bins >= 0], minlength=NUM_MAGNITUDE_BINS).tolist()


def build(masks: Masks, bins: dict[str, np.ndarray]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Tables masks, tensor_deltas and base_tensors of boolean masks."""
    mask_rows: list[dict[str, object]] = []
    delta_rows: list[dict[str, object]] = []
    base_rows: list[dict[str, object]] = []
    for name, (module, size) in TENSORS.items():
        for chunk, start in enumerate(range(0, size, CHUNK)):
            part = slice(start, min(start + CHUNK, size))
            key = {"tensor": name, "module": module, "chunk": chunk, "start": start}
            key |= {"num_elements": part.stop - start}
            base_rows.append(
                key | {"base": "x", "magnitude_histogram": histogram(bins[name][part])}
            )
            for (trial, step, view), mask in masks.items():
                changed = mask[name][part]
                packed = np.packbits(changed, bitorder="little").tobytes()
                ids = {"trial_id": trial, "view": view}
                mask_rows.append(key | ids | {"step": step, "kind": "snapshot", "mask": packed})
                mask_rows.append(mask_rows[-1] | {"kind": "ever_changed", "mask": b"\xff"})
                delta_rows.append(
                    key
                    | ids
                    | {
                        "step_after": step,
                        "num_changed_bitwise": int(changed.sum()),
                        "magnitude_histogram_changed": histogram(bins[name][part][changed]),
                    }
                )
    return (
        tables.from_rows(mask_rows, "masks"),
        tables.from_rows(delta_rows, "tensor_deltas"),
        tables.from_rows(base_rows, "base_tensors"),
    )


def random_masks(seed: int = 1) -> Masks:
    rng = np.random.default_rng(seed)
    runs = [
        ("r1", 5, "bf16"),
        ("r2", 5, "bf16"),
        ("r3", 9, "bf16"),
        ("r1", 5, "fp32"),
        ("r2", 5, "fp32"),
    ]
    return {
        run: {
            name: rng.random(size) < rng.uniform(0.05, 0.6) for name, (_, size) in TENSORS.items()
        }
        for run in runs
    }


def oracle(masks: Masks, bins: dict[str, np.ndarray]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for a, b in itertools.combinations(sorted(masks, key=lambda run: (run[2], run)), 2):
        if a[2] != b[2]:
            continue
        for module in (None, "k", "q"):
            names = [name for name, (m, _) in TENSORS.items() if module in (None, m)]
            x = np.concatenate([masks[a][name] for name in names])
            y = np.concatenate([masks[b][name] for name in names])
            where = np.concatenate([np.full(TENSORS[n][1], i) for i, n in enumerate(names)])
            of = np.concatenate([bins[name] for name in names])
            tensor = magnitude = 0.0
            for i in range(len(names)):
                here = where == i
                tensor += x[here].sum() * y[here].sum() / here.sum()
                for value in set(of[here]) - {-1}:
                    there = here & (of == value)
                    magnitude += x[there].sum() * y[there].sum() / there.sum()
            rows.append(
                {
                    "trial_a": a[0], "step_a": a[1], "trial_b": b[0], "step_b": b[1],
                    "definition": "bitwise", "view": a[2], "tensor": None, "module": module,
                    "num_elements": x.size, "num_a": x.sum(), "num_b": y.sum(),
                    "num_both": (x & y).sum(), "expected_uniform": x.sum() * y.sum() / x.size,
                    "expected_tensor": tensor, "expected_magnitude": magnitude,
                }
            )  # fmt: skip
    return rows


def test_overlaps_equal_a_plain_loop() -> None:
    masks, bins = random_masks(), base_bins()
    result = overlap.overlaps(*build(masks, bins))
    assert result.schema.equals(tables.SCHEMAS["overlaps"], check_metadata=True)
    expected = oracle(masks, bins)
    assert len(expected) == 12
    for row, wanted in zip(result.to_pylist(), expected, strict=True):
        assert list(row) == list(wanted)
        for name, value in wanted.items():
            exact = not name.startswith("expected")
            assert row[name] == (value if exact else pytest.approx(value, rel=1e-12))


def test_chunks_and_rows_come_in_any_order() -> None:
    masks, deltas, base = build(random_masks(), base_bins())
    rng = np.random.default_rng(0)
    shuffled = [t.take(pa.array(rng.permutation(t.num_rows))) for t in (masks, deltas, base)]
    assert overlap.overlaps(*shuffled).equals(overlap.overlaps(masks, deltas, base))


def test_combine_of_chunks_is_the_serial_reference() -> None:
    masks, deltas, base = build(random_masks(), base_bins())
    frame = masks.to_pandas()
    groups = frame.groupby(["tensor", "chunk"]).indices.values()
    partials = [overlap.chunk_overlaps(masks.take(pa.array(rows))) for rows in groups]
    runs = [("r1", 5, "bf16"), ("r3", 9, "bf16")]
    result = overlap.combine(reversed(partials), deltas, base, runs)
    assert result.equals(overlap.overlaps(masks, deltas, base, runs))
    every = overlap.overlaps(masks, deltas, base).to_pylist()
    assert result.to_pylist() == [r for r in every if (r["trial_a"], r["trial_b"]) == ("r1", "r3")]


def test_pair_counts_of_odd_lengths() -> None:
    rng = np.random.default_rng(2)
    bits = rng.random((4, 77)) < 0.4
    counts = overlap.pair_counts([np.packbits(row, bitorder="little") for row in bits])
    np.testing.assert_array_equal(counts, bits.astype(int) @ bits.T.astype(int))
    with pytest.raises(TableError, match="same base"):
        overlap.pair_counts([np.zeros(8, np.uint8), np.zeros(9, np.uint8)])


def test_damaged_input_is_refused() -> None:
    masks, deltas, base = build(random_masks(), base_bins())
    with pytest.raises(TableError, match="masks of one chunk"):
        overlap.chunk_overlaps(masks)
    with pytest.raises(TableError, match="its masks hold"):
        overlap.overlaps(masks.slice(0, masks.num_rows - 2), deltas, base)
    with pytest.raises(TableError, match="no rows of trial r9"):
        overlap.overlaps(masks, deltas, base, [("r9", 5, "bf16")])
    with pytest.raises(TableError, match="than the base"):
        overlap.overlaps(masks, deltas, build(random_masks(), base_bins(0, 50, 60))[2])
    with pytest.raises(TableError, match="lacks tensors"):
        overlap.overlaps(masks, deltas, base.slice(0, 3))
    other = pa.concat_tables([base, base.set_column(0, "base", pa.array(["y"] * base.num_rows))])
    with pytest.raises(TableError, match="2 bases"):
        overlap.overlaps(masks, deltas, other)


def test_no_masks_give_an_empty_table() -> None:
    empty = [
        tables.SCHEMAS[name].empty_table() for name in ("masks", "tensor_deltas", "base_tensors")
    ]
    assert overlap.overlaps(*empty).equals(tables.SCHEMAS["overlaps"].empty_table())


def test_measures_by_hand() -> None:
    assert overlap.one_sided(6, 10) == 0.6
    assert overlap.jaccard(6, 10, 8) == 0.5
    # 100 weights: 6 both, 4 only a, 2 only b, 88 neither
    chance = 0.1 * 0.08 + 0.9 * 0.92
    assert overlap.kappa(6, 10, 8, 100) == pytest.approx((0.94 - chance) / (1 - chance))
    assert overlap.lift(6, 0.8) == pytest.approx(7.5)
    np.testing.assert_allclose(overlap.jaccard([1, 0], [1, 0], [1, 0]), [1.0, np.nan])
    assert overlap.kappa(5, 5, 5, 10) == 1


def test_measures_of_empty_masks_are_nan() -> None:
    empty = [
        overlap.one_sided(0, 0),
        overlap.jaccard(0, 0, 0),
        overlap.kappa(0, 0, 0, 10),
        overlap.kappa(10, 10, 10, 10),
        overlap.kappa(0, 0, 0, 0),
        overlap.lift(0, 0.0),
    ]
    assert np.isnan(empty).all()
    assert overlap.one_sided(0, 3) == overlap.jaccard(0, 3, 0) == 0


def test_published_pair_is_reproduced() -> None:
    """Seeds 42 / 123 of 2505.11711: o1 .605, o2 .606, chance .367; Jaccard .434, lift 1.65."""
    n, a = 1_000_000, 366_000
    b = round(a * 0.605 / 0.606)
    both = round(a * 0.605)
    assert overlap.jaccard(both, a, b) == pytest.approx(0.434, abs=0.001)
    assert overlap.lift(both, a * b / n) == pytest.approx(1.65, abs=0.01)


def lifts(gate: list[float], seed: int) -> dict[str, float]:
    """Lift of 12 independent masks whose density depends on the magnitude bin as ``gate`` says."""
    rng = np.random.default_rng(seed)
    bins = base_bins(seed)
    density = np.array([*gate, gate[-1]])  # the last entry is reached by the non-finite weight
    masks = {
        (f"r{i:02}", 1, "bf16"): {
            name: rng.random(size) < density[np.where(bins[name] < 0, 4, bins[name] - 30)]
            for name, (_, size) in TENSORS.items()
        }
        for i in range(12)
    }
    rows = [r for r in overlap.overlaps(*build(masks, bins)).to_pylist() if r["module"] is None]
    assert len(rows) == 66
    return {
        null: float(
            overlap.lift(sum(r["num_both"] for r in rows), sum(r[f"expected_{null}"] for r in rows))
        )
        for null in ("uniform", "tensor", "magnitude")
    }


def test_independent_masks_overlap_as_expected() -> None:
    found = [lifts([0.3, 0.3, 0.3, 0.3], seed) for seed in range(8)]
    for null in ("uniform", "tensor", "magnitude"):
        assert np.mean([lift[null] for lift in found]) == pytest.approx(1, abs=0.02)


def test_magnitude_gated_masks_exceed_all_nulls_but_magnitude() -> None:
    found = [lifts([0.8, 0.4, 0.1, 0.02], seed) for seed in range(8)]
    mean = {null: np.mean([lift[null] for lift in found]) for null in found[0]}
    # E[d^2] / E[d]^2 of the four equally frequent gates
    assert mean["uniform"] == pytest.approx(0.2026 / 0.33**2, rel=0.03)
    assert mean["tensor"] == pytest.approx(mean["uniform"], rel=0.03)
    assert mean["magnitude"] == pytest.approx(1, abs=0.02)
