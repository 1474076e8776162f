"""Counts the overlap of all pairs of masks: one Ray Data task per tensor, all masks of it at once.

No shuffle: a task reads the same tensor of every trial, chunk by chunk, and returns counts. The
serial reference is ``rlsparse.overlap``, whose two halves run here in tasks and driver.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipelines.diff import read_parts
from pipelines.plan import Plan
from pipelines.storage import Storage
from rlsparse.claim_config import AboveNullClaim
from rlsparse.overlap import Run, chunk_overlaps, combine
from rlsparse.schemas import SCHEMAS
from rlsparse.study import Trial


def runs_of(plan: Plan, trials: list[Trial]) -> list[Run]:
    """The masks to compare: last snapshots, and those at steps that an overlap claim names."""
    named = {
        claim.at.step
        for claim in plan.study.claims
        if isinstance(claim, AboveNullClaim) and claim.at is not None
    }
    return [
        (trial.trial_id, step, view)
        for trial in trials
        for step in trial.config.snapshot_steps
        if step == trial.config.train.num_steps or step in named
        for view in plan.study.measured_views
    ]


def run(plan: Plan) -> pa.Table:
    """Table ``overlaps`` of all finished trials, base by base; needs a Ray session."""
    by_base: dict[str, list[Trial]] = {}
    for trial in plan.finished():
        by_base.setdefault(plan.base(trial).fingerprint, []).append(trial)
    parts = [_run_base(plan, base, trials) for base, trials in sorted(by_base.items())]
    return pa.concat_tables([SCHEMAS["overlaps"].empty_table(), *parts])


def _run_base(plan: Plan, base: str, trials: list[Trial]) -> pa.Table:
    base_tensors = read_parts(plan.storage, "base_tensors", [base[:12]])
    names = [trial.trial_id for trial in trials]
    runs = runs_of(plan, trials)
    items = [
        {"storage": plan.storage.url, "tensor": tensor, "trials": names, "steps": steps}
        for tensor in sorted(set(base_tensors["tensor"].to_pylist()))
        for steps in [sorted({step for _, step, _ in runs})]
    ]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    counted = data.map_batches(count_tensor, batch_size=1, batch_format="pyarrow")
    partials = [ray.get(block) for block in counted.to_arrow_refs()]
    deltas = read_parts(plan.storage, "tensor_deltas", names)
    return combine([p for p in partials if p.num_rows], deltas, base_tensors, runs)


def count_tensor(batch: pa.Table) -> pa.Table:
    """One task: partial counts of every chunk of one tensor."""
    (item,) = batch.to_pylist()
    rows = _masks(Storage(item["storage"]), item)
    chunks = sorted(set(rows["chunk"].to_pylist()))
    counts = [chunk_overlaps(rows.filter(pc.equal(rows["chunk"], chunk))) for chunk in chunks]
    return pa.concat_tables(counts)


def _masks(storage: Storage, item: dict[str, Any]) -> pa.Table:
    filters = [
        ("tensor", "==", item["tensor"]),
        ("kind", "==", "snapshot"),
        ("step", "in", item["steps"]),
    ]
    parts = []
    for trial_id in item["trials"]:
        with storage.local_copy(f"tables/masks.parquet/{trial_id}.parquet") as path:
            parts.append(pq.read_table(path, filters=filters, partitioning=None))
    return pa.concat_tables(parts)
