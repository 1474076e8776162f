"""From a study file to what has to run: trials, base, what is done already, what it would cost."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pipelines.ledger import Entry, Ledger
from pipelines.storage import Storage
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import ModelConfig, TrialConfig
from rlsparse.costs import ModelSize, cpu_seconds
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.identity import canonical_json
from rlsparse.models import companion_hash, resolve
from rlsparse.study import Study, Trial, expand
from rlsparse.tasks import data_version

_STARTUP_S = 25.0
_WORKERS_STARTUP_S = 15.0
"""Of each trial on several workers, which begin anew and import torch and TRL."""


@dataclass(frozen=True)
class Base:
    """A base model on this machine.

    Attributes:
        fingerprint: content hash of its tensors, which patches name.
        identity: content hash of all that training reads of it: tensors, configuration, tokenizer.
    """

    path: Path
    fingerprint: str
    num_weights: int
    identity: str


@dataclass(frozen=True)
class Inputs:
    """What identifies trials outside their configuration: as recorded, else as found here.

    Attributes:
        bases: recorded bases, by the JSON of ``model``.
        data_versions: recorded versions of data, by the JSON of ``task``, ``algorithm`` and mask.
    """

    bases: dict[str, Base] = field(default_factory=dict)
    data_versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Inputs":
        """Inverse of ``record``; an empty one records nothing.

        Raises:
            KeyError, TypeError: it is damaged.
        """
        if not record:
            return cls()
        bases = {
            key: Base(**{**base, "path": Path(base["path"])})
            for key, base in dict(record["bases"]).items()
        }
        return cls(bases, dict(record["data_versions"]))

    def record(self, trials: Iterable[Trial]) -> dict[str, Any]:
        """What trials were planned with, as plain data for ``study.json``."""
        models = {_model_key(trial.config.model): trial.config.model for trial in trials}
        bases = {key: self.base(model) for key, model in models.items()}
        return {
            "bases": {key: {**asdict(base), "path": str(base.path)} for key, base in bases.items()},
            "data_versions": {_data_key(trial.config): trial.data_version for trial in trials},
        }

    def base(self, model: ModelConfig) -> Base:
        """The base of a configuration."""
        return self.bases.get(_model_key(model)) or load_base(model)

    def data_version(self, config: TrialConfig) -> str:
        """Version of a trial's task, reward, data and mask files."""
        recorded = self.data_versions.get(_data_key(config))
        return data_version(config) if recorded is None else recorded


def _model_key(model: ModelConfig) -> str:
    return canonical_json(model.model_dump(mode="json"))


def _data_key(config: TrialConfig) -> str:
    key = config.model_dump(mode="json", include={"task", "algorithm"})
    if config.train.mask is not None:
        key["mask"] = config.train.mask.model_dump(mode="json")
    return canonical_json(key)


@dataclass(frozen=True)
class Plan:
    """A study, its trials, and where its files lie."""

    study: Study
    trials: tuple[Trial, ...]
    storage: Storage
    inputs: Inputs = Inputs()

    @cached_property
    def ledger(self) -> Ledger:
        """State of the trials."""
        return Ledger(self.storage)

    def base(self, trial: Trial) -> Base:
        """Base model of a trial."""
        return self.inputs.base(trial.config.model)

    def entries(self) -> dict[str, Entry]:
        """Ledger entry of every trial of the plan."""
        return {trial.trial_id: self.ledger.get(trial.trial_id) for trial in self.trials}

    def finished(self) -> list[Trial]:
        """Trials that are done."""
        entries = self.entries()
        return [t for t in self.trials if entries[t.trial_id].status == "finished"]


def load_base(model: ModelConfig, expect: str | None = None, weights: str | None = None) -> Base:
    """Find a base model on this machine and hash its content (once per process).

    Args:
        model: where it lies.
        expect: identity that it must have, for workers on other machines than the driver's.
        weights: fingerprint that its tensors must have, where nothing else of it is read.

    Raises:
        CheckpointError: not there, damaged, or with another content than expected.
    """
    base = _load_base(model)
    for what, found, planned in (
        ("weights", base.fingerprint, weights),
        ("weights, configuration and tokenizer", base.identity, expect),
    ):
        if planned is not None and found != planned:
            raise CheckpointError(
                f"base {model.source} at {base.path} has {what} with hash {found[:12]} on this "
                f"machine, the study was planned with {planned[:12]}; pin a revision, or put the "
                "same files on every node"
            )
    return base


@lru_cache(maxsize=16)
def _load_base(model: ModelConfig) -> Base:
    path = resolve(model)
    checkpoint = Checkpoint.open(path)
    total = sum(info.num_elements for info in checkpoint.counted)
    weights = fingerprint(checkpoint)
    identity = hashlib.sha256(f"{weights} {companion_hash(path)}".encode()).hexdigest()
    return Base(path, weights, total, identity)


def make_plan(
    study: Study, storage_url: str, only: str | None = None, *, inputs: Inputs | None = None
) -> Plan:
    """Expand a study into its trials.

    Args:
        study: a checked study.
        storage_url: where studies lie; this one is the folder of its name in it.
        only: run just the trials whose id begins with this.
        inputs: bases and data of a study that has run; by default, those that are found here.

    Raises:
        ConfigError: ``only`` matches no trial, or the data of a trial are not there.
        CheckpointError: a base is not there, or damaged.
    """
    inputs = inputs or Inputs()
    trials = expand(
        study,
        fingerprint=lambda model: inputs.base(model).identity,
        data_version=inputs.data_version,
    )
    storage = Storage(storage_url).sub(study.name)
    if only is not None and not any(trial.trial_id.startswith(only) for trial in trials):
        raise ConfigError(
            f"--only {only}: no such trial in this study; `rlsparse run STUDY --dry-run` lists them"
        )
    return Plan(study, tuple(trials), storage, inputs)


@lru_cache(maxsize=16)
def model_size(path: Path) -> ModelSize:
    """Dimensions of a base in a folder of this machine."""
    return ModelSize.of(Checkpoint.open(path))


def wall_seconds(plan: Plan, num_slots: int) -> float:
    """Rough wall time of all trials on a CPU, so many at a time."""
    num_workers = plan.study.resources.num_workers
    each = _WORKERS_STARTUP_S if num_workers > 1 else 0.0
    total = sum(cpu_seconds(t.config, plan.base(t).num_weights) for t in plan.trials)
    return _STARTUP_S + (total / num_workers + each * len(plan.trials)) / num_slots
