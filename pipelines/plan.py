"""From a study file to what has to run: trials, base, what is done already, what it would cost."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from pipelines.ledger import Entry, Ledger
from pipelines.storage import Storage
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import STORED_DTYPE, ModelConfig, SampledDataConfig, TrialConfig
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.models import resolve
from rlsparse.study import Study, Trial, expand
from rlsparse.tasks import data_version

_ITEMSIZE = {"bf16": 2, "fp32": 4}
_FLOP_PER_S = 2e10
"""Measured for the tiny base on one core; a rough guide, several-fold off on other hardware."""
_PROMPT_TOKENS = {"simple_equations": 24, "dataset": 128}
"""Rough length of a task's prompts, where it is not that of a line of arithmetic."""
_STARTUP_S = 25.0


@dataclass(frozen=True)
class Base:
    """A base model on this machine."""

    path: Path
    fingerprint: str
    num_weights: int


@dataclass(frozen=True)
class Plan:
    """A study, its trials, and where its files lie."""

    study: Study
    trials: tuple[Trial, ...]
    storage: Storage

    @cached_property
    def ledger(self) -> Ledger:
        """State of the trials."""
        return Ledger(self.storage)

    def base(self, trial: Trial) -> Base:
        """Base model of a trial."""
        return load_base(trial.config.model)

    def entries(self) -> dict[str, Entry]:
        """Ledger entry of every trial of the plan."""
        return {trial.trial_id: self.ledger.get(trial.trial_id) for trial in self.trials}

    def finished(self) -> list[Trial]:
        """Trials that are done."""
        entries = self.entries()
        return [t for t in self.trials if entries[t.trial_id].status == "finished"]


def load_base(model: ModelConfig, expect: str | None = None) -> Base:
    """Find a base model on this machine and fingerprint it (once per process).

    Args:
        model: where it lies.
        expect: fingerprint that it must have, for workers on other machines than the driver's.

    Raises:
        CheckpointError: not there, damaged, or with another content than expected.
    """
    base = _load_base(model)
    if expect is not None and base.fingerprint != expect:
        raise CheckpointError(
            f"base {model.source} at {base.path} has fingerprint {base.fingerprint[:12]} on this "
            f"machine, the study was planned with {expect[:12]}; pin a revision, or put the same "
            "files on every node"
        )
    return base


@lru_cache(maxsize=16)
def _load_base(model: ModelConfig) -> Base:
    path = resolve(model)
    checkpoint = Checkpoint.open(path)
    total = sum(info.num_elements for info in checkpoint.counted)
    return Base(path, fingerprint(checkpoint), total)


def make_plan(study: Study, storage_url: str, only: str | None = None) -> Plan:
    """Expand a study into its trials.

    Args:
        study: a checked study.
        storage_url: where studies lie; this one is the folder of its name in it.
        only: run just the trials whose id begins with this.

    Raises:
        ConfigError: ``only`` matches no trial, or the data of a trial are not there.
        CheckpointError: a base is not there, or damaged.
    """
    trials = expand(
        study,
        fingerprint=lambda model: load_base(model).fingerprint,
        data_version=data_version,
    )
    storage = Storage(storage_url).sub(study.name)
    if only is not None and not any(trial.trial_id.startswith(only) for trial in trials):
        raise ConfigError(
            f"--only {only}: no such trial in this study; `rlsparse run STUDY --dry-run` lists them"
        )
    return Plan(study, tuple(trials), storage)


def patch_bytes(config: TrialConfig, num_weights: int) -> int:
    """Largest size of the patches that a trial can leave: dense, one per snapshot."""
    itemsize = _ITEMSIZE[STORED_DTYPE[config.train.precision]]
    return len(config.snapshot_steps) * num_weights * itemsize


def cpu_seconds(config: TrialConfig, num_weights: int) -> float:
    """Rough CPU time of a trial: floating-point operations over a measured rate."""
    task, algorithm = config.task, config.algorithm
    prompt = _PROMPT_TOKENS.get(task.name, 12) * (1 + task.num_shots)
    length = prompt + task.max_completion_tokens
    steps = config.train.num_steps * config.train.batch_size
    work = steps * algorithm.FLOP_PER_WEIGHT_TOKEN
    num_scores = len(config.snapshot_steps) + 1 if config.probe.score_snapshots else 2
    work += 2.0 * num_scores * task.num_eval_problems
    samples_first = getattr(algorithm, "data", "sampled") == "sampled"
    if isinstance(algorithm, SampledDataConfig) and samples_first:
        work += 2.0 * task.num_train_problems * algorithm.num_samples_per_prompt
    return work * length * num_weights / _FLOP_PER_S


def wall_seconds(plan: Plan, num_cpus: int) -> float:
    """Rough wall time of all trials on this many cores."""
    total = sum(cpu_seconds(t.config, plan.base(t).num_weights) for t in plan.trials)
    workers = max(1, num_cpus // plan.study.resources.num_threads)
    return _STARTUP_S + total / workers
