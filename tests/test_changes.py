"""Sums of ``tensor_deltas``: nothing is lost or counted twice, whatever the order of the rows."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS, NUM_MAGNITUDE_BINS, ULP_BINS
from rlsparse.effects.changes import (
    CHANGES_COLUMNS,
    MAGNITUDES_COLUMNS,
    sum_changes,
    sum_magnitudes,
)
from rlsparse.errors import TableError

Row = dict[str, Any]

PLACES = (  # tensor, layer, module, chunk, num_elements; q of layer 0 are two tensors
    ("embed", None, "embed", 0, 100), ("embed", None, "embed", 1, 40), ("q0", 0, "q", 0, 64),
    ("q0b", 0, "q", 0, 6), ("q1", 1, "q", 0, 64), ("v1", 1, "v", 0, 32),
)  # fmt: skip
COUNTS = [f"num_changed_{name}" for name in DEFINITIONS]


def base_rows(rng: np.random.Generator) -> list[Row]:
    return [
        {
            "base": "b", "tensor": tensor, "layer": layer, "module": module, "chunk": chunk,
            "num_elements": n,
            "magnitude_histogram": rng.integers(0, n, NUM_MAGNITUDE_BINS).tolist(),
        }
        for tensor, layer, module, chunk, n in PLACES
    ]  # fmt: skip


def delta_rows(rng: np.random.Generator) -> list[Row]:
    """Run a has steps 2 and 10 (which sorts first as text), run b 2 alone; two views."""
    return [
        {
            "trial_id": trial, "step_before": 0, "step_after": step, "view": view,
            "tensor": tensor, "layer": layer, "module": module, "chunk": chunk,
            "num_elements": n, "dtype": "bf16",
            **{name: int(rng.integers(0, n)) for name in COUNTS},
            "magnitude_histogram_changed": rng.integers(0, n, NUM_MAGNITUDE_BINS).tolist(),
            "ulp_histogram": rng.integers(0, n, len(ULP_BINS)).tolist(),
            "sum_sq_before": float(rng.integers(1, 9)), "sum_sq_delta": float(rng.integers(1, 9)),
        }
        for trial, step in (("a", 2), ("a", 10), ("b", 2))
        for view in ("bf16", "stored")
        for tensor, layer, module, chunk, n in PLACES
    ]  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    return delta_rows(np.random.default_rng(0))


def deltas(rows: list[Row], columns: tuple[str, ...]) -> pa.Table:
    """Shuffled, and with no other columns than those that are read."""
    order = np.random.default_rng(1).permutation(len(rows))
    return tables.from_rows([rows[i] for i in order], "tensor_deltas").select(columns)


def test_changes_are_sums_by_run_step_view_layer_and_module(rows: list[Row]) -> None:
    expected: dict[tuple[object, ...], Counter[str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("trial_id", "step_after", "view", "layer", "module"))
        sums = expected.setdefault(key, Counter())
        for name in ("num_elements", *COUNTS, "sum_sq_before", "sum_sq_delta"):
            sums[name] += row[name]
    found = sum_changes(deltas(rows, CHANGES_COLUMNS))
    keys = ("trial_id", "step", "view", "layer", "module")
    by_key = {tuple(row.pop(name) for name in keys): row for row in found.to_pylist()}
    assert by_key == expected
    assert len(by_key) == found.num_rows == 3 * 2 * 4
    assert by_key["a", 10, "stored", None, "embed"]["num_elements"] == 140
    assert by_key["a", 10, "stored", 0, "q"]["num_elements"] == 70


def test_changes_are_in_order_whatever_that_of_the_rows(rows: list[Row]) -> None:
    one = sum_changes(deltas(rows, CHANGES_COLUMNS))
    assert one.equals(sum_changes(tables.from_rows(rows, "tensor_deltas")))
    steps = one.filter(pc.equal(one["trial_id"], "a"))["step"].to_pylist()
    assert steps == sorted(steps)


def test_runs_may_be_summed_one_by_one(rows: list[Row]) -> None:
    base = tables.from_rows(base_rows(np.random.default_rng(2)), "base_tensors")
    parts = [[row for row in rows if row["trial_id"] == trial] for trial in "ab"]
    one_by_one = [sum_changes(deltas(part, CHANGES_COLUMNS)) for part in parts]
    assert pa.concat_tables(one_by_one).equals(sum_changes(deltas(rows, CHANGES_COLUMNS)))
    one_by_one = [sum_magnitudes(deltas(part, MAGNITUDES_COLUMNS), base) for part in parts]
    whole = sum_magnitudes(deltas(rows, MAGNITUDES_COLUMNS), base)
    assert pa.concat_tables(one_by_one).equals(whole)


@pytest.mark.parametrize("order", [1, -1])
def test_magnitudes_are_of_last_snapshots(rows: list[Row], order: int) -> None:
    base = base_rows(np.random.default_rng(2))
    found = sum_magnitudes(
        tables.from_rows(rows[::order], "tensor_deltas").select(MAGNITUDES_COLUMNS),
        tables.from_rows(base[::-1], "base_tensors"),
    ).to_pylist()
    keys = [(row["trial_id"], row["step"], row["view"]) for row in found]
    assert keys == [("a", 10, "bf16"), ("a", 10, "stored"), ("b", 2, "bf16"), ("b", 2, "stored")]
    for key, row in zip(keys, found, strict=True):
        ours = [r for r in rows if (r["trial_id"], r["step_after"], r["view"]) == key]
        assert len(ours) == len(PLACES)
        for name in ("magnitude_histogram_changed", "ulp_histogram"):
            assert row[name] == [sum(bins) for bins in zip(*(r[name] for r in ours), strict=True)]
        of_base = zip(*(r["magnitude_histogram"] for r in base), strict=True)
        assert row["magnitude_histogram"] == [sum(bins) for bins in of_base]


def test_weights_that_the_base_lacks_are_an_error(rows: list[Row]) -> None:
    base = tables.from_rows(base_rows(np.random.default_rng(2))[1:], "base_tensors")
    with pytest.raises(TableError, match=r"base_tensors lacks chunks .*embed"):
        sum_magnitudes(deltas(rows, MAGNITUDES_COLUMNS), base)


def test_no_rows_make_empty_tables() -> None:
    nothing = tables.from_rows([], "tensor_deltas")
    base = tables.from_rows([], "base_tensors")
    assert sum_changes(nothing).equals(tables.from_rows([], "changes"))
    assert sum_magnitudes(nothing, base).equals(tables.from_rows([], "magnitudes"))
