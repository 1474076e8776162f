"""What changed between two checkpoints: streamed in pieces, by several threads, exactly.

Each thread holds one piece of either side, whatever the size of the model. ``plan_diff``,
``measure_chunk`` and ``assemble`` are the three steps of ``diff_checkpoints``; whoever spreads the
chunks over machines (``pipelines.diff``) uses the same three and so gets the same rows.
"""

import itertools
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlsparse.checkpoint import Checkpoint, Chunk, chunks
from rlsparse.definitions import DEFINITIONS, NUM_MAGNITUDE_BINS, VIEWS
from rlsparse.errors import CheckpointError
from rlsparse.kernels import FLOATS, ChunkCounts, magnitude_histogram, new_workspace, stripe_counts
from rlsparse.matching import Matching, TensorPair, match_tensors
from rlsparse.names import layer_and_module
from rlsparse.patch import METADATA_KEY, Patch, verify_patch
from rlsparse.patch.side import open_side
from rlsparse.tensor_file import bits_dtype
from rlsparse.views import ViewScan, check_view

Row = dict[str, Any]
Tables = dict[str, list[Row]]

PIECE_BYTES = 2**19  # of the wider side: both pieces and the scratch stay in a core's cache
EXTRA_TABLES = ("base_tensors", "stripes", "masks")
_MAX_THREADS = 8  # more only wait for memory or the disk


@dataclass(frozen=True)
class DiffPlan:
    """What is to be compared, and how.

    Attributes:
        before: one checkpoint.
        after: the other.
        matching: their corresponding tensors, and the accounting.
        views: number formats in which they are compared, the primary one first.
        extra_tables: of ``EXTRA_TABLES``: what to make besides ``tensor_deltas``.
        patch: what ``after`` is made of, if it is not stored; whoever runs the jobs verifies it
            once, with ``verify_patch``.
    """

    before: Checkpoint
    after: Checkpoint
    matching: Matching
    views: tuple[str, ...]
    extra_tables: frozenset[str]
    patch: Patch | None = None

    def jobs(self) -> Iterator["Job"]:
        """All chunks to compare, in the order of the rows."""
        for pair in self.matching.pairs:
            for chunk in chunks(pair.shape):
                yield Job(pair, chunk, self.views, self.extra_tables)


class Job(NamedTuple):
    """One chunk of one pair of tensors; pickles, and holds no weights."""

    pair: TensorPair
    chunk: Chunk
    views: tuple[str, ...]
    extra_tables: frozenset[str]

    @property
    def size_bytes(self) -> int:
        """Bytes to read, of both sides."""
        item = sum(bits_dtype(side.dtype).itemsize for side in (self.pair.before, self.pair.after))
        return item * self.chunk.num_elements


@dataclass(frozen=True)
class Diff:
    """What changed between two checkpoints.

    Attributes:
        before: path, number of tensors and of elements, and elements by format, of one side.
        after: likewise.
        accounting: as in ``matching.Matching``.
        views: number formats of the comparison, the primary one first.
        tensors: per compared tensor, as in the JSON; in the primary view.
        tables: name of a table -> its rows; trial and steps are None. ``tensor_deltas`` always.
        pairs: the tensors compared.
    """

    before: Row
    after: Row
    accounting: Row
    views: tuple[str, ...]
    tensors: list[Row]
    tables: Tables
    pairs: list[TensorPair]

    @property
    def num_elements(self) -> int:
        """Compared weights."""
        return int(self.accounting["compared"])

    @property
    def sparsity(self) -> dict[str, float]:
        """Fraction of the compared weights that is unchanged in the primary view."""
        return self.sparsity_in(self.views[0])

    def sparsity_in(self, view: str) -> dict[str, float]:
        """Fraction of the compared weights that is unchanged in a view, by definition."""
        return _sparsity(row for row in self.tables["tensor_deltas"] if row["view"] == view)

    def to_json(self) -> Row:
        """The content of ``rlsparse diff --json``."""
        return {
            "before": self.before,
            "after": self.after,
            "num_elements": self.num_elements,
            "accounting": self.accounting,
            "view": self.views[0],
            "sparsity": self.sparsity,
            "views": {view: {"sparsity": self.sparsity_in(view)} for view in self.views},
            "tensors": self.tensors,
        }


def diff_checkpoints(
    before: Path | str,
    after: Path | str,
    *,
    casts: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    extra_tables: Collection[str] = (),
    num_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Diff:
    """Compare two checkpoints, under every definition.

    Args:
        before: what ``Checkpoint.open`` takes: folder, file, hub id, URL.
        after: likewise; or a patch against ``before``, whose checksums are checked first.
        casts: number formats to which both sides are rounded first, the primary one first; needed
            where stored formats differ, and then the view ``stored`` is reported too. ``stored``
            among them asks for that view elsewhere.
        aliases: prefix of names after -> prefix before.
        extra_tables: of ``EXTRA_TABLES``.
        num_threads: None: one per core at hand, at most 8.
        on_progress: told bytes compared and bytes in all, from this thread.

    Raises:
        CheckpointError: unreadable, formats differ without a cast, or nothing in common.
        PatchError: the patch is damaged or of another base.
    """
    if num_threads is not None and num_threads < 1:
        raise CheckpointError(f"num_threads is {num_threads}; give at least 1, or None")
    plan = plan_diff(before, after, casts=casts, aliases=aliases, extra_tables=extra_tables)
    if plan.patch:
        verify_patch(plan.before, plan.patch)
    jobs = list(plan.jobs())
    total, done = sum(job.size_bytes for job in jobs), 0
    parts: list[Tables] = []
    for job, part in zip(jobs, _in_threads(jobs, num_threads), strict=True):
        parts.append(part)
        done += job.size_bytes
        if on_progress is not None:
            on_progress(done, total)
    return assemble(plan, parts)


# --- the three steps -------------------------------------------------------------------------


def plan_diff(
    before: Path | str,
    after: Path | str,
    *,
    casts: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    extra_tables: Collection[str] = (),
) -> DiffPlan:
    """Open both checkpoints and match their tensors; reads headers only.

    Raises:
        CheckpointError: as ``diff_checkpoints``.
        PatchError: likewise, but for bases and results with another checksum.
    """
    casts = [casts] if isinstance(casts, str) else casts
    for cast in casts:
        check_view(cast)
    if unknown := set(extra_tables) - set(EXTRA_TABLES):
        raise CheckpointError(f"no extra tables {sorted(unknown)}; choose of {list(EXTRA_TABLES)}")
    left = Checkpoint.open(before)
    if METADATA_KEY in left.metadata:
        raise CheckpointError(f"{left.path} is a patch; give its base before and the patch after")
    right, patch = open_side(after, left)
    if _files(left) == _files(right):
        raise CheckpointError(f"both sides are the same checkpoint, {left.path}; give another one")
    matching = match_tensors(left, right, aliases)
    mixed = [pair for pair in matching.pairs if pair.before.dtype != pair.after.dtype]
    if mixed and not set(casts) - {"stored"}:
        raise CheckpointError(_needs_cast(mixed[0], left, right))
    views = tuple(dict.fromkeys([*casts, *(["stored"] if mixed else [])]))
    return DiffPlan(left, right, matching, views or ("stored",), frozenset(extra_tables), patch)


def measure_chunk(job: Job, scratch: "Scratch") -> Tables:
    """Rows of all tables that one chunk gives; ``stripes`` hold the part of this chunk.

    Raises:
        CheckpointError: a file cannot be read, or has shrunk.
    """
    pair, chunk, views, extra = job
    scans = [
        ViewScan(chunk.num_elements, pair.before.dtype, pair.after.dtype, view) for view in views
    ]
    magnitudes, sum_sq = np.zeros(NUM_MAGNITUDE_BINS, np.int64), 0.0
    one, other = scratch.buffers(pair.before.dtype, pair.after.dtype)
    for before, after in zip(
        pair.before.pieces(chunk.start, chunk.stop, one),
        pair.after.pieces(chunk.start, chunk.stop, other),
        strict=True,
    ):
        for scan in scans:
            scan.add(before, after, scratch.workspace)
        if "base_tensors" in extra:
            histogram, squares = magnitude_histogram(before, pair.before.dtype)
            magnitudes, sum_sq = magnitudes + histogram, sum_sq + squares
    tables: Tables = {"tensor_deltas": [], **{name: [] for name in extra}}
    layer, module = layer_and_module(pair.name, pair.shape)
    tensor = {"tensor": pair.name, "layer": layer, "module": module}
    place = {"chunk": chunk.index, "start": chunk.start, "num_elements": chunk.num_elements}
    for view, scan in zip(views, scans, strict=True):
        counts = scan.counts()
        row = {"trial_id": None, "view": view, **tensor, **place}
        steps = {"step_before": None, "step_after": None}
        delta = {**row, **steps, "dtype": pair.after.dtype, **counts.columns()}
        tables["tensor_deltas"].append(delta)
        if "masks" in extra:
            mask = {"step": None, "kind": "diff", "mask": counts.mask.tobytes()}
            tables["masks"].append(row | mask)
        if "stripes" in extra and len(pair.shape) > 1:
            stripe = _stripe(counts, math.prod(pair.shape[1:]))
            tables["stripes"].append({"trial_id": None, **steps, "view": view, **tensor} | stripe)
    if "base_tensors" in extra:
        sums = {"sum_sq": sum_sq, "magnitude_histogram": magnitudes.tolist()}
        stored = {"shape": list(pair.shape), "dtype": pair.before.dtype}
        tables["base_tensors"].append({"base": None, **tensor, **stored, **place, **sums})
    return tables


def assemble(plan: DiffPlan, parts: Iterable[Tables]) -> Diff:
    """The result, of what ``measure_chunk`` gave for each of ``plan.jobs()``, in their order."""
    tables: Tables = {"tensor_deltas": [], **{name: [] for name in sorted(plan.extra_tables)}}
    for part in parts:
        for name, rows in part.items():
            tables[name] += rows
    if "stripes" in tables:
        tables["stripes"] = _joined(tables["stripes"])
    primary = [row for row in tables["tensor_deltas"] if row["view"] == plan.views[0]]
    by_tensor = {name: list(rows) for name, rows in itertools.groupby(primary, _tensor)}
    tensors = []
    for pair in plan.matching.pairs:
        layer, module = layer_and_module(pair.name, pair.shape)
        tensors.append(
            {
                "name": pair.name,
                "layer": layer,
                "module": module,
                "shape": list(pair.shape),
                "dtype_before": pair.before.dtype,
                "dtype_after": pair.after.dtype,
                "num_elements": math.prod(pair.shape),
                "sparsity": _sparsity(by_tensor.get(pair.name, [])),
            }
        )
    return Diff(
        before=_side(plan.before),
        after=_side(plan.after),
        accounting=plan.matching.accounting,
        views=plan.views,
        tensors=tensors,
        tables=tables,
        pairs=plan.matching.pairs,
    )


# --- threads ---------------------------------------------------------------------------------


class Scratch:
    """Memory that one thread uses again and again."""

    def __init__(self) -> None:
        self.workspace = new_workspace()
        self._bytes = np.empty((2, PIECE_BYTES), np.uint8)

    def buffers(self, dtype_before: str, dtype_after: str) -> Any:
        """Two arrays of the same number of elements, for a piece of either side."""
        items = bits_dtype(dtype_before), bits_dtype(dtype_after)
        size = PIECE_BYTES // max(item.itemsize for item in items)
        return [
            memory[: size * item.itemsize].view(item)
            for memory, item in zip(self._bytes, items, strict=True)
        ]


def _in_threads(jobs: Sequence[Job], num_threads: int | None) -> Iterator[Tables]:
    """``measure_chunk`` of each job, in order; reading and kernels run without the GIL."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if num_threads is None:
        num_threads = min(len(cores) or os.cpu_count() or 1, _MAX_THREADS)
    mine = threading.local()
    numbers = itertools.count()

    def start() -> None:
        # Left alone, short work of several threads piles up on one core.
        if len(cores) >= num_threads > 1:
            os.sched_setaffinity(threading.get_native_id(), {cores[next(numbers) % len(cores)]})
        mine.scratch = Scratch()

    with ThreadPoolExecutor(num_threads, initializer=start) as pool:
        yield from pool.map(lambda job: measure_chunk(job, mine.scratch), jobs)


# --- small parts -----------------------------------------------------------------------------


def _tensor(row: Row) -> str:
    return str(row["tensor"])


def _files(checkpoint: Checkpoint) -> set[str]:
    """Where the tensors lie, links followed."""
    files = {info.file for info in checkpoint.tensors.values()}
    return {os.path.realpath(file) if isinstance(file, Path) else str(file) for file in files}


def _needs_cast(pair: TensorPair, left: Checkpoint, right: Checkpoint) -> str:
    one, other = pair.before.dtype, pair.after.dtype
    what = f"{pair.name} is {one} in {left.path} and {other} in {right.path}"
    for dtype in (one, other):
        if dtype not in FLOATS:
            return f"{what}; {dtype} has no values to compare: dequantise that side first"
    exact = "fp32" if "fp64" not in (one, other) else "bf16"
    choices = dict.fromkeys(dtype for dtype in (one, other, exact) if dtype in VIEWS)
    return f"{what}; choose the format to compare them in: --cast {' or --cast '.join(choices)}"


def _stripe(counts: ChunkCounts, num_columns: int) -> Row:
    num_rows = counts.num_elements // num_columns
    rows, columns = stripe_counts(counts.mask, num_rows, num_columns)
    return {
        "num_rows": num_rows, "num_columns": num_columns,
        "row_counts": rows, "column_counts": columns,
    }  # fmt: skip


def _joined(stripes: Sequence[Row]) -> list[Row]:
    """One row per matrix and view, of those of its chunks."""
    found: dict[tuple[str, str], Row] = {}
    for part in stripes:
        key = part["tensor"], part["view"]
        if key not in found:
            found[key] = dict(part)
            continue
        row = found[key]
        row["num_rows"] += part["num_rows"]
        row["row_counts"] = np.concatenate([row["row_counts"], part["row_counts"]])
        row["column_counts"] = row["column_counts"] + part["column_counts"]
    return list(found.values())


def _sparsity(rows: Iterable[Row]) -> dict[str, float]:
    """Fraction unchanged by definition; 1 for an empty tensor."""
    total: Counter[str] = Counter()
    for row in rows:
        total["num_elements"] += row["num_elements"]
        for name in DEFINITIONS:
            total[name] += row[f"num_changed_{name}"]
    return {name: 1 - total[name] / max(total["num_elements"], 1) for name in DEFINITIONS}


def _side(checkpoint: Checkpoint) -> Row:
    by_dtype: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        by_dtype[info.dtype] += info.num_elements
    return {
        "path": str(checkpoint.path),
        "num_tensors": len(checkpoint.tensors),
        "num_elements": by_dtype.total(),
        "num_elements_by_dtype": dict(sorted(by_dtype.items())),
    }
