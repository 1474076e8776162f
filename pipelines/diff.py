"""Turns the patches of all finished trials into tables, one Ray Data task per trial.

Each task writes its own parts of ``tensor_deltas``, ``masks`` and ``spectra`` under fixed names, so
that running it twice changes nothing. The serial references, ``rlsparse.deltas`` and
``rlsparse.spectrum``, are what the tasks call.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import parts
from pipelines.parts import Item
from pipelines.plan import Plan, load_base
from pipelines.storage import MARKER, Storage
from pipelines.table_files import write_table
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.deltas import base_rows, mask_rows, measure_patch
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.masks import read_masks
from rlsparse.patch import PATCH_FILE, Patch
from rlsparse.patch.side import patched
from rlsparse.schemas import SCHEMA_VERSION
from rlsparse.spectrum import spectrum_rows
from rlsparse.study import Trial
from rlsparse.tables import EVER_CHANGED, snapshot_folder

_PARTS = ("tensor_deltas", "masks", "spectra")
"""Tables with a part per trial."""


def pending(plan: Plan) -> list[Item]:
    """Tasks whose parts are missing or were made of other inputs; [] if all tables are there."""
    finished = plan.finished()
    items = {item["part"]: item for trial in finished for item in _items(plan, trial)}
    return [item for item in items.values() if not _is_done(item)]


def run(plan: Plan, items: list[Item]) -> None:
    """Do the tasks on all nodes; needs a Ray session.

    Raises:
        PatchError: files of trials are damaged, one line each; the other trials are done.
    """
    _drop_stale(plan)
    parts.run(measure, items)


def measure(item: Item) -> None:
    """The tables of one trial, or of one base."""
    storage = Storage(item["storage"])
    base = load_base(ModelConfig(source=item["source"]), weights=item["base"])
    checkpoint = Checkpoint.open(base.path)
    if item["trial_id"] is None:
        rows = base_rows(checkpoint, base_fingerprint=base.fingerprint)
        made = {"base_tensors": tables.from_rows(rows, "base_tensors")}
    else:
        place = f"trials/{item['trial_id']}"
        try:
            with storage.local_copy(place) as folder:
                made = measure_trial(checkpoint, base.fingerprint, folder, item)
                if "spectrum" in item:
                    made["spectra"] = measure_spectra(checkpoint, folder, item)
        except (PatchError, CheckpointError) as error:
            raise PatchError(
                f"trial {item['trial_id']}: {error}; delete {storage.url}/{place} and run again"
            ) from error
    for name, table in made.items():
        write_table(storage, table, name, item["part"])
    parts.mark_done("diff", item)


def measure_trial(
    base: Checkpoint, base_fingerprint: str, folder: Path, item: Item
) -> dict[str, pa.Table]:
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
    rows = {"tensor_deltas": deltas, "masks": masks}
    return {name: tables.from_rows(of_name, name) for name, of_name in rows.items()}


def measure_spectra(base: Checkpoint, folder: Path, item: Item) -> pa.Table:
    """Table ``spectra`` of the last snapshot of one trial, in the view stored.

    Where the patch is in another format than the base, that is the format of both sides: the patch
    is against the base cast to it.
    """
    step = max(item["steps"])
    after = patched(base, Patch.open(folder / snapshot_folder(step) / PATCH_FILE))
    place = {"trial_id": item["trial_id"], "step_before": 0, "step_after": step, "view": "stored"}
    rows: list[dict[str, Any]] = []
    for before in base.counted:
        end = after.tensors[before.name]
        view = "stored" if before.dtype == end.dtype else end.dtype
        pair = (before.name, before, end, before.shape)
        rows += spectrum_rows([pair], view=view, method=item["spectrum"])
    return tables.from_rows([row | place for row in rows], "spectra")


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
    if plan.study.spectrum != "off" and trial.role != "control":
        of_trial["spectrum"] = plan.study.spectrum
    return [of_base, of_trial]


def _is_done(item: Item) -> bool:
    names = ["base_tensors"]
    if item["trial_id"]:
        names = [name for name in _PARTS if name != "spectra" or "spectrum" in item]
    return parts.is_done("diff", item, names)


def _drop_stale(plan: Plan) -> None:
    """Delete parts of trials that are not of this study any more."""
    parts.drop_stale(plan.storage, _PARTS, {trial.trial_id for trial in plan.trials})
