"""Pairs of runs and what they differ in, of table ``overlaps``.

The table may have millions of rows: it stays in Arrow, and only pairs of last snapshots come out.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlsparse.definitions import NULLS
from rlsparse.report.rows import Row, Tables, codes, numbers
from rlsparse.schemas import SCHEMAS
from rlsparse.study import StudyBase

AGAIN = "same seed again"
DIMENSIONS = ("seed", "data", "algorithm", "setting")
"""What two runs may differ in."""

_COUNTS = ("num_elements", "num_a", "num_b", "num_both", "num_both_random")
_EXPECTED = tuple(f"expected_{null}" for null in NULLS)

Floats = NDArray[np.float64]


class _Overlaps(NamedTuple):
    """Table ``overlaps`` with the places of both trials of each row, and which rows are wanted."""

    table: pa.Table
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    wanted: NDArray[np.bool_]

    def floats(self, column: str) -> Floats:
        return numbers(self.table, [column])[column]


def _overlaps(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> _Overlaps:
    """Wanted: bitwise rows of finished trials in the study's view, of no single tensor."""
    table = tables.get("overlaps", SCHEMAS["overlaps"].empty_table())
    names = [t["trial_id"] for t in trials]
    finished = np.array([*(t["status"] == "finished" for t in trials), False])
    a, b = (codes(table[end], names) for end in ("trial_a", "trial_b"))
    of_view = pc.and_(
        pc.equal(table["definition"], "bitwise"), pc.equal(table["view"], study.default_view)
    )
    whole = pc.fill_null(pc.and_(of_view, pc.is_null(table["tensor"])), False).to_numpy()
    return _Overlaps(table, a, b, whole & finished[a] & finished[b])


def pairs_of(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> pd.DataFrame:
    """Bitwise overlap of all pairs of finished trials at their last snapshots.

    Args:
        study: gives the view.
        tables: ``overlaps`` is read.
        trials: result of ``rows.trial_rows``.

    Returns:
        A row per unordered pair of runs: ``a``, ``b`` (places in ``trials``), the counts,
        ``log_<null>`` (log of observed over expected, NaN where either is none) and ``relation``
        (``relations``, "" where the pair says nothing).
    """
    overlaps = _overlaps(study, tables, trials)
    of_all = pc.is_null(overlaps.table["module"]).to_numpy()
    return _frame(overlaps, overlaps.wanted & of_all, trials)


def module_pairs(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> pd.DataFrame:
    """As ``pairs_of``, but a row per ``module``, and only pairs that differ in the seed alone."""
    overlaps = _overlaps(study, tables, trials)
    names, kinds, seeds = relations(trials)
    kind_a, kind_b = kinds[overlaps.a], kinds[overlaps.b]
    alike = (kind_a == kind_b) & (names[kind_a, kind_b, 0] == "other seed")
    alike &= seeds[overlaps.a] != seeds[overlaps.b]
    is_module = pc.is_valid(overlaps.table["module"]).to_numpy()
    return _frame(overlaps, overlaps.wanted & is_module & alike, trials)


def _frame(overlaps: _Overlaps, wanted: NDArray[np.bool_], trials: Sequence[Row]) -> pd.DataFrame:
    steps = overlaps.floats("step_a"), overlaps.floats("step_b")
    last = np.zeros(len(trials) + 1)
    for ends, step in zip((overlaps.a, overlaps.b), steps, strict=True):
        np.maximum.at(last, ends[overlaps.wanted], step[overlaps.wanted])
    a, b = overlaps.a, overlaps.b
    keep = wanted & (a != b) & (steps[0] == last[a]) & (steps[1] == last[b])
    rows, a, b = overlaps.table.filter(pa.array(keep)), a[keep], b[keep]
    frame = pd.DataFrame(numbers(rows, (*_COUNTS, *_EXPECTED)))
    for null in NULLS:
        frame[f"log_{null}"] = log_ratio(frame["num_both"], frame[f"expected_{null}"])
    names, kinds, seeds = relations(trials)
    same = (seeds[a] == seeds[b]).astype(np.int64)
    modules = rows["module"].to_numpy(zero_copy_only=False)
    return frame.assign(a=a, b=b, module=modules, relation=names[kinds[a], kinds[b], same])


def log_ratio(observed: pd.Series, expected: pd.Series) -> Floats:
    """Log of observed over expected counts; NaN where either is none."""
    known = (observed > 0) & (expected > 0)
    ratio = np.where(known, observed, np.nan) / np.where(known, expected, np.nan)
    return np.log(np.asarray(ratio, np.float64))


def relations(
    trials: Sequence[Row],
) -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.int64]]:
    """What the runs of two kinds differ in.

    Kinds are groups of trials (``rows.trial_rows``) with their replicates apart. Runs differ in
    seed, data (fields of the task and the data seed), algorithm, setting (any other factor that
    both have) or in a reward that carries no information; replicates and surrogates are compared
    with what they vary alone, other controls with nothing.

    Returns:
        Names [K, K, 2] for runs of other and of equal seeds, the kind of each trial, its seed.
    """
    kinds: dict[tuple[str, int], int] = {}
    first: list[Row] = []
    of_trial = []
    for trial in trials:
        key = trial["group"], int(trial["replicate"] or 0)
        if key not in kinds:
            kinds[key] = len(first)
            first.append(trial)
        of_trial.append(kinds[key])
    names = np.full((len(first), len(first), 2), "", object)
    for (i, a), (j, b) in itertools.product(enumerate(first), repeat=2):
        differences = _cell_differences(a, b)
        names[i, j] = (_relation(a, b, ["seed", *differences]), _relation(a, b, differences))
    seeds = np.array([*(t["seed"] for t in trials), 0], np.int64)
    return names, np.array([*of_trial, 0], np.int64), seeds


def _relation(a: Row, b: Row, dimensions: Sequence[str]) -> str:
    """Name of the relation of two runs that differ in ``dimensions``."""
    surrogates = [run["role"] == "surrogate" for run in (a, b)]
    controls = {run["control"] for run in (a, b) if run["role"] == "control"}
    if controls == {"same_seed"} and None in (a["control"], b["control"]) and not dimensions:
        return AGAIN
    if controls or all(surrogates) or not (dimensions or any(surrogates)):
        return ""
    if not any(surrogates):
        return f"other {' + '.join(dimensions)}"
    if set(dimensions) - {"seed"}:
        return ""
    return "surrogate reward" + (", other seed" if dimensions else "")


def _cell_differences(a: Row, b: Row) -> list[str]:
    cells = [dict(run["cell"]) for run in (a, b)]
    surrogate = "surrogate" in (a["role"], b["role"])
    shared = [p for p in cells[0] if p in cells[1] and cells[0][p] != cells[1][p]]
    other_algorithm = a["algorithm"] != b["algorithm"]
    found = set()
    for path in shared:
        if path == "task" or path.startswith("task.") or path.endswith("data_seed"):
            found.add("data")
        elif path == "algorithm.name" or (path == "algorithm" and other_algorithm):
            found.add("algorithm")
        elif not (surrogate and path in ("algorithm", "algorithm.reward")):
            found.add("setting")
    if other_algorithm:
        found.add("algorithm")
    return [name for name in DIMENSIONS if name in found]


def outside_rows(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> list[Row]:
    """Share of what had changed by a step that is not changed at the end, per trial and step.

    Keys: ``trial_id, step, outside``: 1 - |early and final| / |early|.
    """
    overlaps = _overlaps(study, tables, trials)
    own = overlaps.wanted & (overlaps.a == overlaps.b)
    rows = overlaps.table.filter(pa.array(own))
    frame = pd.DataFrame(numbers(rows, ("step_a", "step_b", "num_a", "num_both")))
    frame = frame.assign(trial=overlaps.a[own])
    frame = frame[frame["step_b"] == frame.groupby("trial")["step_b"].transform("max")]
    frame = frame[(frame["num_a"] > 0) & (frame["step_a"] < frame["step_b"])]
    return [
        {
            "trial_id": trials[int(row["trial"])]["trial_id"],
            "step": int(row["step_a"]),
            "outside": 1 - row["num_both"] / row["num_a"],
        }
        for row in frame.sort_values(["trial", "step_a"]).to_dict("records")
    ]
