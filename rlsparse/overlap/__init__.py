"""How much the changed weights of two runs coincide, and how much chance alone would explain.

Here are the measures, as functions of counts, and table ``overlaps`` made of the counts of all
chunks; what chance would give is in ``nulls``, what is counted of a chunk in ``mask_counts``.
``count_masks`` counts on one machine and is the reference for the distributed stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.overlap.comparison import Comparison
from rlsparse.overlap.mask_counts import (
    MaskCounts,
    Sums,
    Totals,
    Weights,
    add_up,
    count_job,
    jobs,
    weights_of,
)
from rlsparse.overlap.nulls import random_in_both
from rlsparse.schemas import SCHEMAS

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

MAX_ROWS = 2_000_000

# --- measures ----------------------------------------------------------------------------------


def one_sided(num_both: npt.ArrayLike, num_a: npt.ArrayLike) -> Floats:
    """Fraction of what changed in a that also changed in b (o1 of 2505.11711); nan if a is empty.

    Like the other measures, takes scalars or arrays that broadcast.
    """
    return _ratio(num_both, num_a)


def jaccard(num_both: npt.ArrayLike, num_a: npt.ArrayLike, num_b: npt.ArrayLike) -> Floats:
    """Changed in both / changed in either; nan if both masks are empty."""
    both = np.asarray(num_both, np.float64)
    return _ratio(both, np.asarray(num_a) + np.asarray(num_b) - both)


def kappa(
    num_both: npt.ArrayLike, num_a: npt.ArrayLike, num_b: npt.ArrayLike, num_elements: npt.ArrayLike
) -> Floats:
    """Cohen's kappa: agreement beyond chance, 1 at equal masks, 0 at independent ones.

    nan where chance already agrees fully: both masks empty, both full, or no elements.
    """
    both = np.asarray(num_both, np.float64)
    n = np.asarray(num_elements, np.float64)
    density_a, density_b = _ratio(num_a, n), _ratio(num_b, n)
    agreed = 2 * _ratio(both, n) + 1 - density_a - density_b
    expected = density_a * density_b + (1 - density_a) * (1 - density_b)
    return _ratio(agreed - expected, 1 - expected)


def odds_ratio(
    num_both: npt.ArrayLike, num_a: npt.ArrayLike, num_b: npt.ArrayLike, num_elements: npt.ArrayLike
) -> Floats:
    """Odds of change in a where b changed, over those where b did not: 1 at independent masks.

    Infinite where one mask holds the other or both cover all weights; nan where a mask is empty or
    full.
    """
    both = np.asarray(num_both, np.float64)
    only_a, only_b = np.asarray(num_a) - both, np.asarray(num_b) - both
    neither = np.asarray(num_elements) - both - only_a - only_b
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = np.divide(both * neither, only_a * only_b)[()]
    return result


def lift(num_both: npt.ArrayLike, expected: npt.ArrayLike) -> Floats:
    """Observed / expected number changed in both; nan if none is expected (an empty mask)."""
    return _ratio(num_both, expected)


def max_lift(num_a: npt.ArrayLike, num_b: npt.ArrayLike, num_elements: npt.ArrayLike) -> Floats:
    """The largest lift over ``uniform`` that two densities allow: one mask holds the other.

    num_elements / max(num_a, num_b); nan if both masks are empty.
    """
    return _ratio(num_elements, np.maximum(num_a, num_b))


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    result: Floats = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)[()]
    return result


# --- tables ------------------------------------------------------------------------------------


def overlaps(totals: Totals) -> pa.Table:
    """Table ``overlaps`` of one base and view.

    Per pair a row of all weights (module null) and one of each module, then rows of the tensors
    that claims name; then pairs of snapshots within a trial, all weights only and under the nulls
    up to ``magnitude``. If that made more than ``MAX_ROWS`` rows, of the modules only those that
    claims name are kept.
    """
    comparison = totals.comparison
    if not totals.tensors:
        return SCHEMAS["overlaps"].empty_table()
    first, second = comparison.pairs
    _, kept = np.unique(first * len(comparison.runs) + second, return_index=True)
    modules = dict(sorted(totals.modules.items()))
    if len(kept) * (1 + len(modules) + len(totals.named)) > MAX_ROWS:
        modules = {name: sums for name, sums in modules.items() if name in comparison.modules}
    parts = [_Part(None, None, totals.overall)]
    parts += [_Part(module, None, sums) for module, sums in modules.items()]
    parts += [_Part(module, name, sums) for name, (module, sums) in sorted(totals.named.items())]
    random = _random(totals, kept, parts)
    found = [_rows(comparison, *pair, kept) for pair in zip(parts, random, strict=True)]
    # Pair after pair, and of each the parts in order.
    order = np.arange(len(kept) * len(parts)).reshape(len(parts), -1).T.reshape(-1)
    between = pa.concat_tables(found).take(pa.array(order))
    return pa.concat_tables([between, _rows_within(comparison, totals.overall)]).combine_chunks()


class _Part(NamedTuple):
    """Some weights: a module, a tensor, or (both None) all."""

    module: str | None
    tensor: str | None
    sums: Sums

    def holds(self, tensor: str, module: str) -> bool:
        return self.module in (None, module) and self.tensor in (None, tensor)


def _random(totals: Totals, kept: Counts, parts: Sequence[_Part]) -> Counts:
    """Overlap of a with a random mask of b's count in each tensor; shape [parts, pairs]."""
    comparison = totals.comparison
    changed = np.ascontiguousarray(np.array(totals.num_changed).T)
    sizes = np.array(totals.num_elements)
    holds = np.array([[part.holds(*tensor) for tensor in totals.tensors] for part in parts])
    found = np.zeros((len(kept), len(parts)), np.int64)
    for row, (a, b) in enumerate(comparison.pairs[:, kept].T.tolist()):
        key = (*comparison.runs[a], *comparison.runs[b], comparison.view)
        found[row] = holds @ random_in_both(key, changed[a], changed[b], sizes)
    return found.T


def _rows(comparison: Comparison, part: _Part, random: Counts, kept: Counts) -> pa.Table:
    sums = part.sums
    pairs = comparison.pairs[:, kept]
    chosen = comparison.reference_of[kept]
    names = pa.array(comparison.references, pa.string())
    columns = _columns(comparison, pairs, sums) | {
        "tensor": pa.array([part.tensor] * len(kept), pa.string()),
        "module": pa.array([part.module] * len(kept), pa.string()),
        "num_both": sums["both"][kept],
        "num_both_random": random,
        "expected_tensor": sums["tensor"][kept],
        "expected_magnitude": sums["magnitude"][kept],
        "expected_update_size": pa.array(sums["update_size"][kept], from_pandas=True),
        "expected_margins": sums["margins"][kept],
        "update_size_of": names.take(pa.array(chosen, mask=chosen < 0)),
    }
    return _table(columns)


def _rows_within(comparison: Comparison, sums: Sums) -> pa.Table:
    columns = _columns(comparison, comparison.pairs_within, sums) | {
        "num_both": sums["within"],
        "expected_tensor": sums["within_tensor"],
        "expected_magnitude": sums["within_magnitude"],
    }
    return _table(columns)


def _columns(comparison: Comparison, pairs: Counts, sums: Sums) -> dict[str, Any]:
    """What the rows of some pairs have in common."""
    trials = pa.array([trial for trial, _ in comparison.runs], pa.string())
    steps = np.array([step for _, step in comparison.runs], np.int64)
    a, b = (sums["num_changed"][places] for places in pairs)
    size = int(sums["num_elements"])
    return {
        "trial_a": trials.take(pa.array(pairs[0])),
        "step_a": steps[pairs[0]],
        "trial_b": trials.take(pa.array(pairs[1])),
        "step_b": steps[pairs[1]],
        "definition": pa.array(["bitwise"] * len(a), pa.string()),
        "view": pa.array([comparison.view] * len(a), pa.string()),
        "num_elements": np.full(len(a), size, np.int64),
        "num_a": a,
        "num_b": b,
        "expected_uniform": a.astype(np.float64) * b / max(size, 1),
    }


def _table(columns: Mapping[str, Any]) -> pa.Table:
    """Table ``overlaps``; columns that are not given are null."""
    schema, length = SCHEMAS["overlaps"], len(columns["num_a"])
    missing = {f.name: pa.nulls(length, f.type) for f in schema if f.name not in columns}
    return tables.check(pa.table({**columns, **missing}), "overlaps")


# --- the serial reference ----------------------------------------------------------------------


def count_masks(
    comparison: Comparison,
    masks: pa.Table,
    base: Checkpoint,
    after: Mapping[str, Checkpoint] | None = None,
) -> Totals:
    """Count all masks, chunk by chunk on this machine: the reference of the distributed stage.

    Args:
        comparison: what to compare.
        masks: table ``masks``; kinds other than ``snapshot`` are left out.
        base: the base checkpoint of all runs.
        after: trial_id -> the checkpoint after its last step, of each of the comparison's
            ``references``.

    Raises:
        TableError: masks are missing or do not fit the base.
    """
    sides = [(after or {})[trial] for trial in comparison.references]
    rows = masks.select(["tensor", "chunk"]).to_pandas().groupby(["tensor", "chunk"]).indices

    def counted(weights: Mapping[str, Weights]) -> Iterator[MaskCounts]:
        for job in jobs(weights):
            found = rows.get((job.place.tensor, job.place.chunk), np.zeros(0, np.int64))
            (counts,) = count_job([comparison], job, masks.take(pa.array(found)))
            yield counts

    return add_up(comparison, counted(weights_of(base, sides)))
