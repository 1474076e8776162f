"""Compares many pairs of checkpoints on all nodes, with Ray Data; the rows of ``diff_checkpoints``.

The driver reads headers and cuts the chunks of all pairs into tasks of a bounded number of bytes
to read. A task reads its weights where it runs, and gives back one Arrow row of counts. What
travels, per weight: below 0.001 bytes for each view (1.3 KB per chunk of up to 2^22 weights); for
``base_tensors`` the same again; for ``stripes`` 8 bytes per row and per column of each chunk and
view; for ``masks``, only if they are asked for, 1/8 byte for each view. Towards a worker go some
0.3 KB per chunk. The serial reference is ``rlsparse.diff``, whose three steps run here in driver,
tasks and driver.
"""

import os
import pickle
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rlsparse.diff import (
    EXTRA_TABLES,
    Diff,
    DiffPlan,
    Job,
    Scratch,
    Tables,
    assemble,
    measure_chunk,
    plan_diff,
)
from rlsparse.errors import CheckpointError, RlsparseError
from rlsparse.patch import verify_patch
from rlsparse.schemas import SCHEMAS
from rlsparse.tensor_file import TensorInfo

Place = str | Path
Item = dict[str, Any]
Planned = DiffPlan | RlsparseError
OnProgress = Callable[[int, int], None]

TASK_BYTES = 2**29
"""What a task reads, of both sides together; more only where a single chunk is larger. Ray Data
spends 0.2 s per task, so smaller ones would not keep a worker with a fast disk busy."""

_TABLES = ("tensor_deltas", *EXTRA_TABLES)
_NUM_PLANNERS = 16  # threads that wait for the headers of remote files
_LARGE = {
    pa.int32(): pa.int64(),
    pa.string(): pa.large_string(),
    pa.list_(pa.int64()): pa.large_list(pa.int64()),
}


def diff_pairs(
    pairs: Sequence[tuple[Place, Place]],
    *,
    casts: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    extra_tables: Collection[str] = (),
    task_bytes: int = TASK_BYTES,
    on_progress: OnProgress | None = None,
) -> Iterator[Diff | RlsparseError]:
    """Compare pairs of checkpoints on all nodes; needs a Ray session.

    All nodes must reach the checkpoints under the same names: in a shared folder, or by a URL. A
    patch is first verified in a task of its own, which reads its base twice. The driver holds
    about 1 KB per tensor of every pair, and the counts of pairs that wait for an earlier one.

    Args:
        pairs: (before, after), as ``diff_checkpoints`` takes them; local paths are made absolute.
        casts: as in ``diff_checkpoints``; likewise the next two.
        aliases: see there.
        extra_tables: see there.
        task_bytes: what one task may read.
        on_progress: told bytes compared and bytes in all, in the driver.

    Yields:
        For each pair, in order, what ``diff_checkpoints`` gives, or the error that it raises: an
        error concerns its pair alone.
    """
    plan = partial(_try_plan, casts=casts, aliases=aliases, extra_tables=extra_tables)
    with ThreadPoolExecutor(_NUM_PLANNERS) as pool:
        plans = _verified(list(pool.map(plan, pairs)))
    tasks: list[list[Job]] = []
    places: list[range] = []
    for planned in plans:
        start = len(tasks)
        if isinstance(planned, DiffPlan):
            tasks += _cut(planned.jobs(), task_bytes)
        places.append(range(start, len(tasks)))
    arriving = _measured(tasks, on_progress)
    parts: dict[int, pa.Table] = {}
    for planned, place in zip(plans, places, strict=True):
        for number in place:
            while number not in parts:
                finished, part = next(arriving)
                parts[finished] = part
        yield _outcome(planned, [_rows(parts.pop(number)) for number in place])


# --- driver ----------------------------------------------------------------------------------


def _try_plan(pair: tuple[Place, Place], **options: Any) -> Planned:
    before, after = (Path(side).absolute() if os.path.exists(side) else side for side in pair)
    try:
        return plan_diff(before, after, **options)
    except RlsparseError as error:
        return error


def _verified(plans: Sequence[Planned]) -> list[Planned]:
    """The plans, with errors in place of those whose patch is of another base, or damaged."""
    items = [
        {"number": number, "work": pickle.dumps((plan.before, plan.patch))}
        for number, plan in enumerate(plans)
        if isinstance(plan, DiffPlan) and plan.patch
    ]
    found = list(plans)
    for number, part in _on_all_nodes(verify, items):
        (error,) = part["error"].to_pylist()
        if error is not None:
            found[number] = pickle.loads(error)
    return found


def _cut(jobs: Iterable[Job], task_bytes: int) -> Iterator[list[Job]]:
    """Runs of consecutive jobs, each of at most ``task_bytes``, but of at least one job."""
    run: list[Job] = []
    size = 0
    for job in jobs:
        if run and size + job.size_bytes > task_bytes:
            yield run
            run, size = [], 0
        run.append(job)
        size += job.size_bytes
    if run:
        yield run


def _measured(
    tasks: Sequence[list[Job]], on_progress: OnProgress | None
) -> Iterator[tuple[int, pa.Table]]:
    """The number and the row of each task, as they come."""
    sizes = {n: sum(job.size_bytes for job in jobs) for n, jobs in enumerate(tasks)}
    total = left = sum(sizes.values())
    for number, part in _on_all_nodes(measure, _items(tasks)):
        left -= sizes.pop(number, 0)
        if on_progress is not None:
            on_progress(total - left, total)
        yield number, part


def _items(tasks: Sequence[list[Job]]) -> list[Item]:
    return [{"number": number, "work": pickle.dumps(jobs)} for number, jobs in enumerate(tasks)]


def _on_all_nodes(
    task: Callable[[pa.Table], pa.Table], items: Sequence[Item]
) -> Iterator[tuple[int, pa.Table]]:
    """One Ray Data task per item; what they give arrives in any order."""
    if not items:
        return
    data = ray.data.from_items(items, override_num_blocks=len(items))
    results = data.map_batches(task, batch_size=1, batch_format="pyarrow", num_cpus=1)
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row, number in enumerate(block["number"].to_pylist()):
            yield number, block.slice(row, 1)


def _rows(part: pa.Table) -> Tables | RlsparseError:
    """What a task found, with values of the types that ``measure_chunk`` gives."""
    (row,) = part.to_pylist()
    if row["error"] is not None:
        error: RlsparseError = pickle.loads(row["error"])
        return error
    for stripe in row["stripes"] or ():
        for counts in ("row_counts", "column_counts"):
            stripe[counts] = np.array(stripe[counts], np.int64)
    return {name: row[name] for name in _TABLES if row[name] is not None}


def _outcome(planned: Planned, parts: Sequence[Tables | RlsparseError]) -> Diff | RlsparseError:
    if isinstance(planned, RlsparseError):
        return planned
    tables: list[Tables] = []
    for part in parts:
        if isinstance(part, RlsparseError):
            return part
        tables.append(part)
    return assemble(planned, tables)


# --- tasks -----------------------------------------------------------------------------------


def measure(batch: pa.Table) -> pa.Table:
    """One task: the rows of consecutive chunks of one pair, or why they cannot be read."""
    (item,) = batch.to_pylist()
    jobs: list[Job] = pickle.loads(item["work"])
    scratch = Scratch()
    row: Item = {"number": item["number"]}
    try:
        for job in jobs:
            for name, rows in measure_chunk(job, scratch).items():
                row.setdefault(name, []).extend(rows)
    except RlsparseError as error:
        row["error"] = _as_data(error, (side for job in jobs for side in job.pair[1:3]))
    return pa.Table.from_pylist([row], schema=_schema())


def verify(batch: pa.Table) -> pa.Table:
    """One task: what is wrong with a patch, if anything."""
    (item,) = batch.to_pylist()
    base, patch = pickle.loads(item["work"])
    row: Item = {"number": item["number"]}
    try:
        verify_patch(base, patch)
    except RlsparseError as error:
        row["error"] = _as_data(error, [*base.tensors.values(), *patch.data.values()])
    return pa.Table.from_pylist([row], schema=_schema())


def _as_data(error: RlsparseError, infos: Iterable[TensorInfo]) -> bytes:
    """The error for the driver (Ray would wrap it in tracebacks), or that a file is not here."""
    for file in {info.file for info in infos}:
        if isinstance(file, Path) and not os.path.exists(file):
            error = CheckpointError(
                f"{file} is not there on node {socket.gethostname()}: give a shared folder or a URL"
            )
    return pickle.dumps(error)


def _schema() -> pa.Schema:
    """One row per task, so that nothing can split or double what it gives."""
    tables = [(name, pa.large_list(pa.struct([
        (field.name, _LARGE.get(field.type, field.type)) for field in SCHEMAS[name]
    ]))) for name in _TABLES]  # fmt: skip
    return pa.schema([("number", pa.int64()), ("error", pa.large_binary()), *tables])
