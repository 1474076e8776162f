"""A study of pairs: its runs, where their checkpoints are, and which have been measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelines import record
from pipelines.ledger import Entry, Ledger
from pipelines.storage import Storage
from rlsparse.errors import ConfigError
from rlsparse.levels import under_mask
from rlsparse.models import NAMES
from rlsparse.overlap.comparison import MeasuredRun
from rlsparse.pair_runs import PairRun, pair_runs
from rlsparse.pair_table import read_pairs
from rlsparse.study import PairStudy

PAIRS_FILE = "pairs.csv"
"""In the folder of a study: the CSV file as it was."""


@dataclass(frozen=True)
class PairPlan:
    """A study of pairs, its runs, and where its files lie."""

    study: PairStudy
    trials: tuple[PairRun, ...]
    storage: Storage

    @cached_property
    def ledger(self) -> Ledger:
        """Which runs were measured, and why others could not be."""
        return Ledger(self.storage)

    def entries(self) -> dict[str, Entry]:
        """Ledger entry of every run."""
        return {run.trial_id: self.ledger.get(run.trial_id) for run in self.trials}

    def finished(self) -> list[PairRun]:
        """Runs that have been measured."""
        entries = self.entries()
        return [run for run in self.trials if entries[run.trial_id].status == "finished"]

    def place(self, checkpoint: str) -> str:
        """A checkpoint of the CSV file for any working directory.

        A path is relative to that file; what is no path there is a hub id, a URL, or one of
        ``models.NAMES``.
        """
        if "://" in checkpoint:
            return checkpoint
        path = Path(self.study.pairs).parent / Path(checkpoint).expanduser()
        if checkpoint in NAMES and not path.exists():
            return checkpoint
        name, _, _ = checkpoint.partition("@")
        like_an_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
        return checkpoint if like_an_id and not path.parent.is_dir() else str(path)


def make_pair_plan(study: PairStudy, storage_url: str) -> PairPlan:
    """Read the runs of a study.

    Args:
        study: result of ``load_study``.
        storage_url: where studies lie; this one is the folder of its name in it.

    Raises:
        ConfigError: the CSV file is not there or wrong.
    """
    runs = pair_runs(study, read_pairs(Path(study.pairs)))
    return PairPlan(study, runs, Storage(storage_url).sub(study.name))


def load_pair_plan(storage: Storage) -> PairPlan:
    """The plan of the study whose folder this is.

    Raises:
        ConfigError: it is no study of pairs.
    """
    study, _ = record.read(storage)
    if not isinstance(study, PairStudy):
        raise ConfigError(f"{storage.url} is no study of pairs")
    with storage.local_copy(PAIRS_FILE) as path:
        return PairPlan(study, pair_runs(study, read_pairs(path)), storage)


def measured_runs(plan: PairPlan, bases: Mapping[str, str]) -> list[MeasuredRun]:
    """The runs that have been measured, for the comparison of their masks.

    Args:
        plan: the study.
        bases: trial_id -> fingerprint of its base, of these runs.
    """
    return [
        MeasuredRun(
            trial_id=run.trial_id,
            base=bases[run.trial_id],
            source=plan.place(run.before),
            cell=run.cell,
            algorithm=run.algorithm,
            seed=run.seed,
            replicate=run.replicate,
            role=run.role,
            control=run.control,
            num_steps=run.steps[-1],
            steps=run.steps,
            after={row.step: plan.place(row.after) for row in run.rows},
            masked=under_mask(run.config),
        )
        for run in plan.trials
        if run.trial_id in bases
    ]
