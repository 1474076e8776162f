"""Turns the patches of all finished trials into tables, one Ray Data task per trial.

Each task writes its own part of ``tensor_deltas`` and ``masks`` under a fixed name, so that running
it twice changes nothing. The serial reference is ``rlsparse.diff``, which the tasks call.
"""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.plan import Plan, load_base
from pipelines.storage import MARKER, Storage
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.deltas import base_rows, mask_rows, measure_patch
from rlsparse.errors import CheckpointError, PatchError, RlsparseError
from rlsparse.masks import read_masks
from rlsparse.patch import PATCH_FILE, Patch
from rlsparse.schemas import SCHEMA_VERSION, SCHEMAS
from rlsparse.study import Trial
from rlsparse.tables import EVER_CHANGED, snapshot_folder

Item = dict[str, Any]

_PARTS = ("tensor_deltas", "masks")


def write_table(storage: Storage, table: pa.Table, name: str, file: str) -> None:
    """Write table ``name`` as ``tables/<file>``, all or nothing."""
    buffer = io.BytesIO()
    pq.write_table(tables.check(table, name), buffer, compression="zstd")
    storage.write_bytes(f"tables/{file}", buffer.getvalue())


def read_parts(storage: Storage, name: str, parts: list[str]) -> pa.Table:
    """The parts of table ``name`` that belong to these trials (or bases), concatenated."""
    read = []
    for part in parts:
        with storage.local_copy(f"tables/{name}.parquet/{part}.parquet") as path:
            read.append(tables.read(path, name))
    if not read:
        return SCHEMAS[name].empty_table()
    return pa.concat_tables(read, promote_options="default")


def pending(plan: Plan) -> list[Item]:
    """Tasks whose parts are missing or were made of other inputs; [] if all tables are there."""
    finished = plan.finished()
    items = {item["part"]: item for trial in finished for item in _items(plan, trial)}
    return [item for item in items.values() if not _is_done(plan.storage, item)]


def run(plan: Plan, items: list[Item]) -> None:
    """Do the tasks on all nodes; needs a Ray session.

    Raises:
        PatchError: files of trials are damaged, one line each; the other trials are done.
    """
    _drop_stale(plan)
    parts = ray.data.from_items(items, override_num_blocks=len(items)).map(_try_measure)
    errors = [part["error"] for part in parts.take_all() if part["error"]]
    if errors:
        raise PatchError("\n".join(sorted(errors)))


def _try_measure(item: Item) -> Item:
    """One task; errors are handed back, because Ray would wrap them in tracebacks."""
    try:
        measure(item)
    except RlsparseError as error:
        return {"part": item["part"], "error": str(error)}
    return {"part": item["part"], "error": ""}


def measure(item: Item) -> None:
    """The tables of one trial, or of one base."""
    storage = Storage(item["storage"])
    base = load_base(ModelConfig(source=item["source"]), weights=item["base"])
    checkpoint = Checkpoint.open(base.path)
    if item["trial_id"] is None:
        rows = base_rows(checkpoint, base_fingerprint=base.fingerprint)
        table = tables.from_rows(rows, "base_tensors")
        write_table(storage, table, "base_tensors", f"base_tensors.parquet/{item['part']}.parquet")
    else:
        place = f"trials/{item['trial_id']}"
        try:
            with storage.local_copy(place) as folder:
                parts = measure_trial(checkpoint, base.fingerprint, folder, item)
        except (PatchError, CheckpointError) as error:
            raise PatchError(
                f"trial {item['trial_id']}: {error}; delete {storage.url}/{place} and run again"
            ) from error
        for name, table in zip(_PARTS, parts, strict=True):
            write_table(storage, table, name, f"{name}.parquet/{item['part']}.parquet")
    storage.write_json(f"stages/diff/{item['part']}.json", _inputs(item))


def measure_trial(
    base: Checkpoint, base_fingerprint: str, folder: Path, item: Item
) -> tuple[pa.Table, pa.Table]:
    """Tables ``tensor_deltas`` and ``masks`` of one trial, from the files in its folder."""
    deltas: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    for step in item["steps"]:
        more_deltas, more_masks = measure_patch(
            base,
            Patch.open(folder / snapshot_folder(step) / PATCH_FILE),
            base_fingerprint=base_fingerprint,
            trial_id=item["trial_id"],
            step=step,
            views=item["views"],
            kind="snapshot",
        )
        deltas += more_deltas
        masks += more_masks
    masks += mask_rows(
        base,
        read_masks(folder / EVER_CHANGED),
        trial_id=item["trial_id"],
        step=max(item["steps"]),
        kind="ever_changed",
    )
    return tables.from_rows(deltas, "tensor_deltas"), tables.from_rows(masks, "masks")


def _items(plan: Plan, trial: Trial) -> list[Item]:
    base = plan.base(trial)
    common = {
        "storage": plan.storage.url,
        "source": trial.config.model.source,
        "base": base.fingerprint,
        "schema": SCHEMA_VERSION,
    }
    of_base = {**common, "part": base.fingerprint[:12], "trial_id": None}
    of_trial = {
        **common,
        "part": trial.trial_id,
        "trial_id": trial.trial_id,
        "steps": list(trial.config.snapshot_steps),
        "views": list(plan.study.measured_views),
        "files": plan.storage.read_json(f"trials/{trial.trial_id}/{MARKER}")["files"],
    }
    return [of_base, of_trial]


def _is_done(storage: Storage, item: Item) -> bool:
    names = _PARTS if item["trial_id"] else ("base_tensors",)
    marker = f"stages/diff/{item['part']}.json"
    files = [marker, *(f"tables/{name}.parquet/{item['part']}.parquet" for name in names)]
    return all(map(storage.exists, files)) and bool(storage.read_json(marker) == _inputs(item))


def _inputs(item: Item) -> Item:
    """What the parts depend on: not where they lie, so that a study may be moved."""
    return {key: value for key, value in item.items() if key not in ("storage", "source")}


def _drop_stale(plan: Plan) -> None:
    """Delete parts of trials that are not of this study any more (they can be made again)."""
    planned = {trial.trial_id for trial in plan.trials}
    for name in _PARTS:
        for file in plan.storage.list(f"tables/{name}.parquet"):
            if file.removesuffix(".parquet") not in planned:
                plan.storage.delete(f"tables/{name}.parquet/{file}")
