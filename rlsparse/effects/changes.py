"""What changed in a run as a whole: sums of table ``tensor_deltas``, small enough for any study.

Trials may be summed one by one and put together with ``pyarrow.concat_tables``, so that a study's
``tensor_deltas`` never lie in memory at once.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.errors import TableError

_SUMS = (
    "num_elements",
    *(f"num_changed_{name}" for name in DEFINITIONS),
    "sum_sq_before",
    "sum_sq_delta",
)
_KEYS = ("trial_id", "step_after", "view", "layer", "module")
_HISTOGRAMS = ("magnitude_histogram_changed", "ulp_histogram")

CHANGES_COLUMNS = (*_KEYS, *_SUMS)
"""Columns of ``tensor_deltas`` that ``sum_changes`` reads."""
MAGNITUDES_COLUMNS = ("trial_id", "step_after", "view", "tensor", "chunk", *_HISTOGRAMS)
"""Columns of ``tensor_deltas`` that ``sum_magnitudes`` reads."""


def sum_changes(tensor_deltas: pa.Table) -> pa.Table:
    """Table ``changes``: per run, snapshot, view, layer and module; in order of these.

    Args:
        tensor_deltas: table of that name, with at least ``CHANGES_COLUMNS``.
    """
    summed = (
        tensor_deltas.select(CHANGES_COLUMNS)
        .group_by(list(_KEYS), use_threads=False)
        .aggregate([(name, "sum") for name in _SUMS])
        .rename_columns(["trial_id", "step", "view", "layer", "module", *_SUMS])
    )
    order = [(name, "ascending") for name in ("trial_id", "step", "view", "layer", "module")]
    return tables.check(summed.sort_by(order), "changes")


def sum_magnitudes(tensor_deltas: pa.Table, base_tensors: pa.Table) -> pa.Table:
    """Table ``magnitudes`` of the last snapshot of each run in ``tensor_deltas``.

    Args:
        tensor_deltas: table of that name, with at least ``MAGNITUDES_COLUMNS``.
        base_tensors: table of that name, of the base of all these runs.

    Raises:
        TableError: the runs have weights that the base has not.
    """
    ids, steps = (tensor_deltas[name].to_pylist() for name in ("trial_id", "step_after"))
    last: dict[str, int] = {}
    for trial, step in zip(ids, steps, strict=True):
        last[trial] = max(step, last.get(trial, 0))
    is_last = [last[trial] == step for trial, step in zip(ids, steps, strict=True)]
    deltas = tensor_deltas.filter(pa.array(is_last, pa.bool_()))
    of_base = _stacked(base_tensors, "magnitude_histogram")
    bases = {
        key: row
        for row, key in enumerate(
            zip(base_tensors["tensor"].to_pylist(), base_tensors["chunk"].to_pylist(), strict=True)
        )
    }
    runs = deltas.select(["trial_id", "step_after", "view"]).to_pandas()
    keys = list(zip(deltas["tensor"].to_pylist(), deltas["chunk"].to_pylist(), strict=True))
    unknown = sorted(set(keys) - bases.keys())
    if unknown:
        raise TableError(f"base_tensors lacks chunks of tensor_deltas: {unknown[:3]} ...")
    found = {name: _stacked(deltas, name) for name in _HISTOGRAMS}
    rows: list[dict[str, object]] = []
    for (trial, step, view), of_run in sorted(runs.groupby(list(runs.columns)).indices.items()):
        own = of_base[[bases[keys[i]] for i in of_run]].sum(axis=0)
        row = {"trial_id": trial, "step": step, "view": view, "magnitude_histogram": own.tolist()}
        rows.append(row | {n: bins[of_run].sum(axis=0).tolist() for n, bins in found.items()})
    return tables.from_rows(rows, "magnitudes")


def _stacked(table: pa.Table, column: str) -> np.ndarray:
    """A list column whose lists have one length, as an array [rows, length]."""
    flat = pc.list_flatten(table[column]).to_numpy()
    return flat.reshape(table.num_rows, -1) if table.num_rows else np.zeros((0, 1), np.int64)
