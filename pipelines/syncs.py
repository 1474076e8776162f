"""What syncing weights would have taken, one Ray Data task per trial that kept its steps.

Each task writes its own part of table ``syncs``. The serial reference, ``rlsparse.sync_costs``, is
what the tasks call.
"""

import platform
import tempfile
from pathlib import Path

from pipelines import parts
from pipelines.aggregate import forget_conclusions
from pipelines.parts import Item
from pipelines.plan import Plan, load_base
from pipelines.storage import MARKER, Storage
from pipelines.table_files import write_table
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.schemas import SCHEMA_VERSION
from rlsparse.sync_costs import WAYS, sync_rows
from rlsparse.tables import STEP_PATCHES

TABLE = "syncs"


def pending(plan: Plan) -> list[Item]:
    """Finished trials with patches of their steps that were not measured yet, or were others."""
    trials = [trial for trial in plan.trials if trial.config.probe.step_patches]
    finished = {trial.trial_id for trial in plan.finished()} if trials else set()
    items = []
    for trial in trials:
        if trial.trial_id not in finished:
            continue
        files = plan.storage.read_json(f"trials/{trial.trial_id}/{MARKER}")["files"]
        item = {
            "storage": plan.storage.url,
            "source": trial.config.model.source,
            "base": plan.base(trial).fingerprint,
            "schema": SCHEMA_VERSION,
            "part": trial.trial_id,
            "num_steps": trial.config.train.num_steps,
            "dtype": trial.config.stored_dtype,
            "ways": [*WAYS],
            "sha256": {
                name: entry["sha256"]
                for name, entry in files.items()
                if name.startswith(f"{STEP_PATCHES}/")
            },
        }
        if not parts.is_done(TABLE, item, [TABLE]):
            items.append(item)
    return items


def run(plan: Plan, items: list[Item]) -> None:
    """Measure these trials, on all nodes; needs a Ray session.

    Raises:
        PatchError: files of trials are damaged, one line each; the other trials are done.
    """
    forget_conclusions(plan.storage)
    parts.run(measure, items)


def measure(item: Item) -> None:
    """The part of one trial.

    Raises:
        PatchError: a patch is missing or damaged; names its trial.
    """
    storage, trial = Storage(item["storage"]), item["part"]
    base = load_base(ModelConfig(source=item["source"]), weights=item["base"])
    place = f"trials/{trial}/{STEP_PATCHES}"
    with storage.local_copy(place) as folder, tempfile.TemporaryDirectory() as scratch:
        try:
            rows = sync_rows(
                Checkpoint.open(base.path),
                folder,
                num_steps=item["num_steps"],
                dtype=item["dtype"],
                scratch=Path(scratch),
            )
            named = {"trial_id": trial, "host": platform.node()}
            table = tables.from_rows([named | row for row in rows], TABLE)
        except (PatchError, CheckpointError) as error:
            raise PatchError(
                f"trial {trial}: {error}; delete {storage.url}/trials/{trial} and run again"
            ) from error
    write_table(storage, table, TABLE, trial)
    parts.mark_done(TABLE, item)
