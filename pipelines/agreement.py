"""Compares the last weights of trials with those of others, one Ray Data task per pair.

Only studies in which a trial has a mask have such pairs. Each task writes its own part of table
``agreement``, named after the first trial of its pair. The serial reference,
``rlsparse.agreement``, is what the tasks call.
"""

import hashlib

from pipelines import parts
from pipelines.aggregate import forget_conclusions
from pipelines.parts import Item
from pipelines.plan import Plan, load_base
from pipelines.storage import MARKER, Storage
from pipelines.table_files import write_table
from rlsparse import tables
from rlsparse.agreement import TrialPair, agreement_rows, trial_pairs
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.patch import PATCH_FILE, Patch
from rlsparse.schemas import SCHEMA_VERSION
from rlsparse.tables import snapshot_folder

TABLE = "agreement"


def pending(plan: Plan) -> list[Item]:
    """Pairs of finished trials that are not compared yet, or were of other weights."""
    items = (_item(plan, pair) for pair in _pairs(plan))
    return [item for item in items if not parts.is_done(TABLE, item, [TABLE])]


def run(plan: Plan, items: list[Item]) -> None:
    """Compare these pairs, on all nodes; needs a Ray session.

    Raises:
        PatchError: files of trials are damaged, one line each; the other pairs are done.
    """
    forget_conclusions(plan.storage)
    parts.run(measure, items)


def drop_stale(plan: Plan) -> None:
    """Delete what was counted of pairs that are not of this study any more."""
    kept = {pair.trial.trial_id for pair in _pairs(plan)}
    if parts.drop_stale(plan.storage, [TABLE], kept):
        forget_conclusions(plan.storage)


def measure(item: Item) -> None:
    """The part of one pair.

    Raises:
        PatchError: a patch is damaged; names its trial.
    """
    storage = Storage(item["storage"])
    base = load_base(ModelConfig(source=item["source"]), weights=item["base"])
    checkpoint = Checkpoint.open(base.path)
    patches = [_patch_file(item, trial) for trial in item["trials"]]
    with storage.local_copy(patches[0]) as one, storage.local_copy(patches[1]) as other:
        try:
            found = agreement_rows(
                checkpoint, Patch.open(one), Patch.open(other), base_fingerprint=base.fingerprint
            )
        except (PatchError, CheckpointError) as error:
            damaged = _damaged(storage, item, patches)
            places = " and ".join(f"{storage.url}/trials/{trial}" for trial in damaged)
            raise PatchError(
                f"trial {' and '.join(damaged)}: {error}; delete {places} and run again"
            ) from error
    names = dict(zip(("trial_id", "reference"), item["trials"], strict=True))
    names["relation"] = item["relation"]
    table = tables.from_rows([names | row for row in found], TABLE)
    write_table(storage, table, TABLE, item["part"])
    parts.mark_done(TABLE, item)


def _damaged(storage: Storage, item: Item, patches: list[str]) -> list[str]:
    """Trials whose patch is not as it was written; both, if that does not tell."""
    sides = zip(item["trials"], patches, item["sha256"], strict=True)
    return [
        trial
        for trial, file, sha256 in sides
        if hashlib.sha256(storage.read_bytes(file)).hexdigest() != sha256
    ] or [*item["trials"]]


def _patch_file(item: Item, trial: str) -> str:
    return f"trials/{trial}/{snapshot_folder(item['step'])}/{PATCH_FILE}"


def _pairs(plan: Plan) -> list[TrialPair]:
    """Those of which both trials are done."""
    pairs = trial_pairs(plan.trials, plan.study.seeds)
    finished = {trial.trial_id for trial in plan.finished()} if pairs else set()
    return [p for p in pairs if {p.trial.trial_id, p.reference.trial_id} <= finished]


def _item(plan: Plan, pair: TrialPair) -> Item:
    trials = [pair.trial.trial_id, pair.reference.trial_id]
    step = pair.trial.config.train.num_steps
    file = f"{snapshot_folder(step)}/{PATCH_FILE}"
    return {
        "storage": plan.storage.url,
        "source": pair.trial.config.model.source,
        "base": plan.base(pair.trial).fingerprint,
        "schema": SCHEMA_VERSION,
        "part": trials[0],
        "trials": trials,
        "relation": pair.relation,
        "step": step,
        "sha256": [
            plan.storage.read_json(f"trials/{trial}/{MARKER}")["files"][file]["sha256"]
            for trial in trials
        ],
    }
