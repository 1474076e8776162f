"""Compares all masks of a study: one Ray Data task per chunk, all masks of it read once.

No shuffle: a task reads one chunk of every run's masks and of the base, and gives back counts, one
Arrow row. The driver adds them up, tensor after tensor; it holds the counts of those that wait for
an earlier one. The serial reference is ``rlsparse.overlap.count_masks``, whose steps run here in
tasks and driver. All nodes must reach bases and patches under the same names.
"""

import itertools
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.plan import Plan
from pipelines.storage import Storage
from pipelines.table_files import read_table
from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import RlsparseError
from rlsparse.models import NAMES, named
from rlsparse.overlap import overlaps
from rlsparse.overlap.comparison import Comparison, compare
from rlsparse.overlap.comparison import MeasuredRun as MeasuredRun
from rlsparse.overlap.consensus import consensus
from rlsparse.overlap.mask_counts import (
    Job,
    MaskCounts,
    Totals,
    Weights,
    count_job,
    jobs,
    weights_of,
)
from rlsparse.patch import PATCH_FILE
from rlsparse.patch.side import open_side
from rlsparse.schemas import SCHEMAS
from rlsparse.study import StudyBase
from rlsparse.tables import snapshot_folder

_COLUMNS = ("trial_id", "step", "kind", "view", "tensor", "chunk", "mask")


def measured_runs(plan: Plan) -> list[MeasuredRun]:
    """The finished trials of a plan, in its order."""
    return [
        MeasuredRun(
            trial_id=trial.trial_id,
            base=plan.base(trial).fingerprint,
            source=_absolute(trial.config.model.source),
            cell=dict(trial.cell),
            algorithm=trial.config.algorithm.name,
            seed=trial.config.seed,
            replicate=trial.replicate,
            role=trial.role,
            control=trial.control,
            num_steps=trial.config.train.num_steps,
            steps=tuple(sorted(trial.config.snapshot_steps)),
            after={
                step: f"{plan.storage.url}/trials/{trial.trial_id}/{snapshot_folder(step)}/"
                f"{PATCH_FILE}"
                for step in trial.config.snapshot_steps
            },
            masked=trial.config.train.mask is not None,
        )
        for trial in plan.finished()
    ]


def _absolute(source: str) -> str:
    """A model source that does not depend on the working folder."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source not in NAMES and folder.is_dir() else source


def run(
    storage: Storage, study: StudyBase, runs: Sequence[MeasuredRun]
) -> tuple[pa.Table, pa.Table]:
    """Tables ``overlaps`` and ``consensus`` of all runs; needs a Ray session.

    Masks of different bases never pair.

    Args:
        storage: of the study; holds the masks.
        study: its claims and views.
        runs: the finished runs, all of which have masks.

    Raises:
        RlsparseError: masks or weights are missing or damaged.
    """
    found = [SCHEMAS["overlaps"].empty_table()], [SCHEMAS["consensus"].empty_table()]
    of_base = {run.base: [other for other in runs if other.base == run.base] for run in runs}
    for _, same in sorted(of_base.items()):
        for totals in _count(storage, study, same):
            found[0].append(overlaps(totals))
            found[1].append(consensus(totals))
    together, agreeing = (pa.concat_tables(parts) for parts in found)
    return together, agreeing


# --- driver ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What all tasks of one base share."""

    storage: Storage
    trials: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    base: str
    references: tuple[str, ...]
    like: str | None

    @property
    def weights(self) -> dict[str, Weights]:
        """The tensors that are compared, opened once per process."""
        return _weights(self.base, self.references, self.like)


def _count(storage: Storage, study: StudyBase, runs: Sequence[MeasuredRun]) -> list[Totals]:
    """Totals of one base, a view after the other."""
    comparisons = tuple(compare(study, runs, view) for view in study.measured_views)
    ends = {run.trial_id: run.after.get(run.steps[-1]) for run in runs}
    work = _Work(
        storage,
        tuple(run.trial_id for run in runs),
        comparisons,
        runs[0].source,
        tuple(str(ends[trial]) for trial in comparisons[0].references),
        ends[runs[0].trial_id],
    )
    totals = [Totals(comparison) for comparison in comparisons]
    if not comparisons[0].runs:
        return totals
    todo = list(jobs(work.weights))
    counted = _in_order(_on_all_nodes(work, todo))
    for _, chunks in itertools.groupby(counted, lambda parts: parts[0].place.tensor):
        for one, parts in zip(totals, zip(*chunks, strict=True), strict=True):
            one.add(parts)
    return totals


def _on_all_nodes(work: _Work, todo: Sequence[Job]) -> Iterator[tuple[int, list[MaskCounts]]]:
    """Number and counts of each chunk, as they come."""
    items = [
        {"number": number, "tensor": job.place.tensor, "chunk": job.place.chunk}
        for number, job in enumerate(todo)
    ]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    results = data.map_batches(
        count, batch_size=1, batch_format="pyarrow", num_cpus=1, fn_kwargs={"work": work}
    )
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in block.to_pylist():
            found = pickle.loads(row["found"])
            if isinstance(found, RlsparseError):
                raise found
            yield row["number"], found


def _in_order(arriving: Iterator[tuple[int, list[MaskCounts]]]) -> Iterator[list[MaskCounts]]:
    """What arrives with its number, in order of the numbers."""
    waiting: dict[int, list[MaskCounts]] = {}
    following = itertools.count()
    turn = next(following)
    for number, found in arriving:
        waiting[number] = found
        while turn in waiting:
            yield waiting.pop(turn)
            turn = next(following)


# --- tasks -----------------------------------------------------------------------------------


def count(batch: pa.Table, work: _Work) -> pa.Table:
    """One task: the counts of one chunk, one of each view, or why they cannot be made."""
    (item,) = batch.to_pylist()
    found: list[MaskCounts] | RlsparseError
    try:
        weights = {item["tensor"]: work.weights[item["tensor"]]}
        (job,) = (job for job in jobs(weights) if job.place.chunk == item["chunk"])
        found = count_job(work.comparisons, job, _masks(work, job))
    except RlsparseError as error:  # handed back, because Ray would wrap it in tracebacks
        found = error
    schema = pa.schema([("number", pa.int64()), ("found", pa.large_binary())])
    row = {"number": item["number"], "found": pickle.dumps(found)}
    return pa.Table.from_pylist([row], schema=schema)


def _masks(work: _Work, job: Job) -> pa.Table:
    """The masks of one chunk, of all runs."""
    here = (
        (pc.field("tensor") == job.place.tensor)
        & (pc.field("chunk") == job.place.chunk)
        & (pc.field("kind") == "snapshot")
    )
    parts = [read_table(work.storage, "masks", trial, _COLUMNS, here) for trial in work.trials]
    return pa.concat_tables(parts)


@lru_cache(maxsize=4)
def _weights(source: str, references: tuple[str, ...], like: str | None) -> dict[str, Weights]:
    base = Checkpoint.open(named(source) or source)
    sides = [open_side(_local(place), base)[0] for place in references]
    return weights_of(base, sides, None if like is None else open_side(_local(like), base)[0])


def _local(place: str) -> str:
    """A patch behind a URL, read at random, is copied here until this process ends."""
    if "://" not in place or not place.endswith(PATCH_FILE):
        return place
    return str(Path(_copied(place).name, PATCH_FILE))


@lru_cache(maxsize=16)
def _copied(url: str) -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory()
    home, _, name = url.rpartition("/")
    Path(folder.name, PATCH_FILE).write_bytes(Storage(home).read_bytes(name))
    return folder
