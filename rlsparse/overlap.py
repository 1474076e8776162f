"""How much the changed weights of two runs coincide, and how much chance alone would explain.

Three nulls, each stronger than the one before: ``uniform`` (any weight may change), ``tensor``
(each tensor keeps its own density) and ``magnitude`` (each power of two of |before| within each
tensor keeps its own density: in bf16 small weights flip more readily, so two runs overlap merely
by starting from the same weights). Under a null, masks are independent within a stratum, so the
expected number of weights changed in both is the sum over strata of a_s * b_s / n_s, the
hypergeometric mean.

A run is here a (trial, step, view): the mask of one snapshot. Work splits by tensor chunk:
``chunk_overlaps`` counts one chunk of all masks, ``combine`` adds the chunks up; ``overlaps``
composes them on one machine and is the reference for the distributed stage.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rlsparse.definitions import NUM_MAGNITUDE_BINS
from rlsparse.errors import TableError
from rlsparse.kernels import popcount_and
from rlsparse.schemas import SCHEMAS

Run = tuple[str, int, str]
"""(trial_id, step, view)."""

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_SIDES = ["trial_a", "step_a", "trial_b", "step_b"]


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


def lift(num_both: npt.ArrayLike, expected: npt.ArrayLike) -> Floats:
    """Observed / expected number changed in both; nan if none is expected (an empty mask)."""
    return _ratio(num_both, expected)


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    result: Floats = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)[()]
    return result


# --- counting ----------------------------------------------------------------------------------


def pair_counts(masks: Sequence[npt.NDArray[np.uint8]]) -> Counts:
    """Number of weights changed in both, for every pair of masks of one chunk.

    Args:
        masks: R >= 1 packed masks of equal length (uint8, bits past the last element zero).

    Returns:
        int64 [R, R], symmetric; the diagonal is the number changed.

    Raises:
        TableError: the masks differ in length.
    """
    lengths = {mask.size for mask in masks}
    if len(lengths) > 1:
        raise TableError(
            f"masks of one chunk have {sorted(lengths)} bytes, all must have the same; were the "
            "trials diffed against the same base?"
        )
    return popcount_and(np.stack(masks))


def chunk_overlaps(masks: pa.Table) -> pa.Table:
    """Count one chunk: every pair of the snapshot masks in ``masks``.

    Args:
        masks: rows of table ``masks`` that share (tensor, chunk); kinds other than ``snapshot``
            are left out, and only masks of the same view are paired.

    Returns:
        Partial counts for ``combine``: trial_a, step_a, trial_b, step_b, view, tensor, module,
        num_both; with (trial_a, step_a) <= (trial_b, step_b), a run with itself included.

    Raises:
        TableError: the rows are of several chunks, or their masks differ in length.
    """
    masks = masks.filter(pc.equal(masks["kind"], "snapshot"))
    rows = masks.select(["trial_id", "step", "view", "tensor", "module", "chunk"]).to_pandas()
    chunks = sorted(set(zip(rows["tensor"], rows["chunk"], strict=True)))
    if len(chunks) > 1:
        raise TableError(f"masks of one chunk expected, got {len(chunks)}: {chunks[:3]} ...")
    packed = [np.frombuffer(mask.as_buffer(), np.uint8) for mask in masks["mask"]]
    parts = []
    for view, group in rows.groupby("view", sort=True):
        group = group.sort_values(["trial_id", "step"])
        both = pair_counts([packed[row] for row in group.index])
        a, b = np.triu_indices(len(group))
        trials, steps = group["trial_id"].to_numpy(), group["step"].to_numpy()
        parts.append(
            pd.DataFrame(
                {
                    **dict(zip(_SIDES, (trials[a], steps[a], trials[b], steps[b]), strict=True)),
                    "view": view,
                    "tensor": group["tensor"].iloc[0],
                    "module": group["module"].iloc[0],
                    "num_both": both[a, b],
                }
            )
        )
    frame = pd.concat(parts) if parts else pd.DataFrame(columns=_PARTIAL.names)
    return pa.Table.from_pandas(frame, schema=_PARTIAL, preserve_index=False)


_PARTIAL = pa.schema(
    [
        ("trial_a", pa.string()),
        ("step_a", pa.int64()),
        ("trial_b", pa.string()),
        ("step_b", pa.int64()),
        ("view", pa.string()),
        ("tensor", pa.string()),
        ("module", pa.string()),
        ("num_both", pa.int64()),
    ]
)


# --- adding up ---------------------------------------------------------------------------------


def combine(
    partials: Iterable[pa.Table],
    tensor_deltas: pa.Table,
    base_tensors: pa.Table,
    runs: Collection[Run],
) -> pa.Table:
    """Add partial counts up, with the counts that each null expects.

    Args:
        partials: results of ``chunk_overlaps``, one per chunk, in any order.
        tensor_deltas: table of that name; gives each run's changed counts per stratum.
        base_tensors: table of that name, of one base; gives the sizes of the strata, which are
            by |before| in the stored format, whatever the view.
        runs: the runs to compare; all pairs of the same view are.

    Returns:
        Table ``overlaps``: per pair an overall row (module null) and one per module, in order of
        view, pair, module; (trial_a, step_a) < (trial_b, step_b).

    Raises:
        TableError: several bases; a chunk's masks are missing or disagree with tensor_deltas; or
            more weights changed in a stratum than it has.
    """
    bases = pc.unique(base_tensors["base"]).to_pylist()
    if len(bases) > 1:
        raise TableError(f"runs of {len(bases)} bases ({bases}) cannot overlap; pass one base")
    sizes = _strata(base_tensors, "num_elements", "magnitude_histogram")
    counted = pa.concat_tables([_PARTIAL.empty_table(), *partials])
    both = (
        counted.group_by([*_SIDES, "view", "module"], use_threads=False)
        .aggregate([("num_both", "sum")])
        .rename_columns([*_SIDES, "view", "module", "num_both"])
        .to_pandas()
    )
    schema = SCHEMAS["overlaps"]
    parts = [schema.empty_table()]
    for view in sorted({view for _, _, view in runs}):
        ours = sorted({(trial, step) for trial, step, of in runs if of == view})
        deltas = tensor_deltas.filter(pc.equal(tensor_deltas["view"], view))
        changed = [
            _strata(rows, "num_changed_bitwise", "magnitude_histogram_changed")
            for rows in _of_runs(deltas, ours, view)
        ]
        for run in changed:
            unknown = {m: sorted(set(run[m]) - set(sizes.get(m, {}))) for m in sorted(run)}
            if any(unknown.values()):
                raise TableError(f"base_tensors lacks tensors of tensor_deltas: {unknown}")
        seen = both[both["view"] == view]
        modules = [
            _pairs(ours, seen[seen["module"] == module], changed, part, module)
            for module, part in sorted(sizes.items())
        ]
        frame = _with_overall(pd.concat(modules))
        frame = frame.assign(definition="bitwise", view=view, tensor=None)
        parts.append(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
    return pa.concat_tables(parts)


_Strata = dict[str, dict[str, tuple[int, Counts]]]
"""module -> tensor -> (number of elements, magnitude histogram)."""


def _strata(rows: pa.Table, count: str, histogram: str) -> _Strata:
    """Sum the counts of ``rows`` over the chunks of each tensor."""
    bins = pc.list_flatten(rows[histogram]).to_numpy()
    bins = bins.reshape(rows.num_rows, NUM_MAGNITUDE_BINS)
    columns = (rows[name].to_pylist() for name in ("module", "tensor", count))
    strata: _Strata = {}
    for module, tensor, number, row in zip(*columns, bins, strict=True):
        total, summed = strata.setdefault(module, {}).get(tensor, (0, np.zeros_like(row)))
        strata[module][tensor] = (total + number, summed + row)
    return strata


def _of_runs(deltas: pa.Table, runs: Sequence[tuple[str, int]], view: str) -> Iterator[pa.Table]:
    keys = deltas.select(["trial_id", "step_after"]).to_pandas()
    rows = keys.groupby(["trial_id", "step_after"]).indices
    for trial, step in runs:
        if (trial, step) not in rows:
            raise TableError(
                f"tensor_deltas has no rows of trial {trial} step {step} view {view}; run the "
                "diff stage for it, or leave the run out"
            )
        yield deltas.take(pa.array(rows[trial, step]))


def _pairs(
    runs: Sequence[tuple[str, int]],
    both: pd.DataFrame,
    changed: Sequence[_Strata],
    sizes: dict[str, tuple[int, Counts]],
    module: str,
) -> pd.DataFrame:
    """Rows of one view and module: every pair a < b of ``runs``; ``changed`` is per run."""
    tensors = sorted(sizes)
    none = (0, np.zeros(NUM_MAGNITUDE_BINS, np.int64))
    found = [[run.get(module, {}).get(tensor, none) for tensor in tensors] for run in changed]
    num_changed = np.array([[number for number, _ in row] for row in found])
    by_tensor = _expected(num_changed, np.array([sizes[t][0] for t in tensors]), module)
    by_magnitude = _expected(
        np.array([np.concatenate([bins for _, bins in row]) for row in found]),
        np.concatenate([sizes[t][1] for t in tensors]),
        module,
    )
    totals = num_changed.sum(axis=1)
    a, b = np.triu_indices(len(runs))
    trials, steps = np.array([t for t, _ in runs], object), np.array([s for _, s in runs])
    frame = pd.DataFrame(
        {
            **dict(zip(_SIDES, (trials[a], steps[a], trials[b], steps[b]), strict=True)),
            "num_elements": sum(size for size, _ in sizes.values()),
            "num_a": totals[a],
            "num_b": totals[b],
            "expected_tensor": by_tensor[a, b],
            "expected_magnitude": by_magnitude[a, b],
        }
    )
    frame = frame.merge(both[[*_SIDES, "num_both"]], on=_SIDES, how="left", validate="1:1")
    frame["num_both"] = frame["num_both"].fillna(0).astype(np.int64)
    own = frame[a == b]
    wrong = own[own["num_both"] != own["num_a"]]
    if len(wrong):
        row = wrong.iloc[0]
        raise TableError(
            f"trial {row.trial_a} step {row.step_a} module {module}: its masks hold "
            f"{row.num_both} changed weights, tensor_deltas {row.num_a}; chunks are missing or "
            "stale, run the diff stage again"
        )
    return frame[a < b].assign(module=module)


def _expected(changed: Counts, sizes: Counts, module: str) -> Floats:
    """Sum over strata of a_s * b_s / n_s for all pairs; changed [R, S], sizes [S] -> [R, R]."""
    if (changed > sizes).any():
        raise TableError(
            f"module {module}: more weights changed in a tensor or magnitude bin than the base "
            "has there; tensor_deltas and base_tensors are of different bases, diff again"
        )
    weights = np.divide(1.0, sizes, out=np.zeros(sizes.size), where=sizes > 0)
    floats = changed.astype(np.float64)
    result: Floats = (floats * weights) @ floats.T
    return result


def _with_overall(modules: pd.DataFrame) -> pd.DataFrame:
    """Put each pair's overall row (module null) before its module rows; expect uniformly."""
    counts = [name for name in modules.columns if name not in (*_SIDES, "module")]
    overall = modules.groupby(_SIDES, as_index=False)[counts].sum().assign(module=None)
    frame = pd.concat([overall.astype({"module": object}), modules.astype({"module": object})])
    frame = frame.sort_values(_SIDES, kind="stable")
    expected = frame["num_a"].astype(np.float64) * frame["num_b"] / frame["num_elements"]
    return frame.assign(expected_uniform=expected)


def overlaps(
    masks: pa.Table,
    tensor_deltas: pa.Table,
    base_tensors: pa.Table,
    runs: Collection[Run] | None = None,
) -> pa.Table:
    """Overlap of all pairs of snapshot masks: the serial reference of the distributed stage.

    Args:
        masks: table ``masks``; handled one chunk at a time.
        tensor_deltas: table of that name.
        base_tensors: table of that name, of one base.
        runs: the runs to compare; all that have snapshot masks when None.

    Returns:
        Table ``overlaps``; see ``combine``.
    """
    masks = masks.filter(pc.equal(masks["kind"], "snapshot"))
    keys = masks.select(["trial_id", "step", "view", "tensor", "chunk"]).to_pandas()
    if runs is None:
        runs = list(zip(keys["trial_id"], keys["step"], keys["view"], strict=True))
    chosen = set(runs)
    of_row = zip(keys["trial_id"], keys["step"], keys["view"], strict=True)
    wanted = np.array([run in chosen for run in of_row], bool)
    groups = keys[wanted].groupby(["tensor", "chunk"])
    partials = (chunk_overlaps(masks.take(pa.array(rows.index))) for _, rows in groups)
    return combine(partials, tensor_deltas, base_tensors, runs)
