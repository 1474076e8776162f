"""From what trials left to the tables ``trials`` and ``steps``: one row per planned trial.

The last stage that reads the files of trials; all that follows needs the tables alone.
"""

import json
from typing import Any

import pyarrow as pa

from pipelines.plan import Plan
from pipelines.storage import MARKER
from pipelines.table_files import write_table
from rlsparse import tables
from rlsparse.config import TrialConfig
from rlsparse.errors import RlsparseError, TrialError
from rlsparse.identity import canonical_json
from rlsparse.patch import PATCH_FILE, Patch
from rlsparse.schemas import SCHEMAS
from rlsparse.study import Trial
from rlsparse.tables import SUMMARY, snapshot_folder


def collect(plan: Plan) -> None:
    """Write the tables ``trials`` and ``steps``."""
    write_table(plan.storage, trials_table(plan), "trials")
    write_table(plan.storage, steps_table(plan), "steps")


def trials_table(plan: Plan) -> pa.Table:
    """Table ``trials``: every trial of the plan, failed and missing ones too.

    Further columns: ``config`` (JSON of the resolved trial), ``label``, ``base`` (fingerprint), and
    ``factor.<path>`` with the level of each factor that the trial has.
    """
    rows = []
    identical = identical_replicates(plan)
    for trial in plan.trials:
        entry = plan.ledger.get(trial.trial_id)
        row: dict[str, Any] = {
            "trial_id": trial.trial_id,
            "status": entry.status,
            "error": entry.error,
            "cell": canonical_json(trial.cell),
            "algorithm": trial.config.algorithm.name,
            "seed": trial.config.seed,
            "replicate": trial.replicate,
            "role": trial.role,
            "control": trial.control,
            "precision": trial.config.train.precision,
            "learning_rate": trial.config.train.learning_rate,
            "num_steps": trial.config.train.num_steps,
            "attempts": entry.attempts,
            "host": entry.host,
            "versions": canonical_json(entry.versions),
            "config": canonical_json(trial.config.model_dump(mode="json")),
            "label": trial.label,
            "base": plan.base(trial).fingerprint,
            "identical": identical.get(trial.trial_id),
            **{f"factor.{path}": trial.cell.get(path) for path in plan.study.factors},
        }
        if entry.status == "finished":
            row |= plan.storage.read_json(f"trials/{trial.trial_id}/{SUMMARY}")
        rows.append(row)
    return tables.from_rows(rows, "trials")


def steps_table(plan: Plan) -> pa.Table:
    """Table ``steps`` of all finished trials, in the order of the plan."""
    parts = [SCHEMAS["steps"].empty_table()]
    for trial in plan.finished():
        with plan.storage.local_copy(f"trials/{trial.trial_id}/steps.parquet") as path:
            parts.append(tables.read(path, "steps"))
    return pa.concat_tables(parts)


def identical_replicates(plan: Plan) -> dict[str, bool]:
    """Same-seed rerun -> whether all its patches equal the original's, bit for bit."""
    finished = plan.finished()
    originals = {t.config: t for t in finished if t.replicate == 0}
    return {
        trial.trial_id: _weights(plan, trial) == _weights(plan, originals[trial.config])
        for trial in finished
        if trial.replicate > 0 and trial.config in originals
    }


def check_seeds(plan: Plan) -> None:
    """Refuse finished trials that differ in the seed alone and changed the same weights alike.

    Their seed does not reach training, so they are no replications of each other. Trials that
    changed nothing (learning rate 0) are alike in any case.

    Raises:
        TrialError: there are such trials; names them.
    """
    alike: dict[tuple[TrialConfig, int, str], list[Trial]] = {}
    for trial in plan.finished():
        last = f"{snapshot_folder(trial.config.train.num_steps)}/{PATCH_FILE}"
        files = plan.storage.read_json(f"trials/{trial.trial_id}/{MARKER}")["files"]
        rest = trial.config.model_copy(update={"seed": 0})
        # The same weights give the same bytes of the patch.
        alike.setdefault((rest, trial.replicate, files[last]["sha256"]), []).append(trial)
    groups = [group for group in alike.values() if len(group) > 1 and _changed(plan, group[0])]
    if groups:
        named = "; ".join(
            " = ".join(f"{trial.label} ({trial.trial_id})" for trial in group) for group in groups
        )
        raise TrialError(
            "seed not plumbed: trials of different seeds left the same weights, bit for bit: "
            f"{named}; give more train problems than fit a batch, let train.data_seed, "
            "algorithm.sampling_seed or algorithm.init_seed follow the seed (null), or see where "
            "the algorithm loses it"
        )


def _changed(plan: Plan, trial: Trial) -> bool:
    last = snapshot_folder(trial.config.train.num_steps)
    with plan.storage.local_copy(f"trials/{trial.trial_id}/{last}/{PATCH_FILE}") as path:
        return Patch.open(path).num_changed > 0


def _weights(plan: Plan, trial: Trial) -> str:
    """What identifies the weights of all snapshots: checksums of every tensor."""
    sums = []
    for step in trial.config.snapshot_steps:
        name = f"trials/{trial.trial_id}/{snapshot_folder(step)}/{PATCH_FILE}"
        with plan.storage.local_copy(name) as path:
            tensors = Patch.open(path).tensors
            sums.append({tensor: entry.xxh3_after for tensor, entry in tensors.items()})
    if not sums:
        raise RlsparseError(f"trial {trial.trial_id} has no snapshots")
    return json.dumps(sums, sort_keys=True)
