"""Runs the unfinished trials of a study with Ray Tune.

Tune gets the explicit list of trials and restarts those whose worker died; what is done is known
from our own ledger, so that a later run of the same command continues after anything. Workers are
reused from trial to trial, because importing torch and TRL takes longer than a small trial. A
trial on several workers is one that only starts them (``workers``).
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback

from pipelines.ledger import Ledger
from pipelines.plan import Plan, load_base
from pipelines.saves import Saves
from pipelines.storage import Storage
from pipelines.subnetworks import load_subnetwork
from pipelines.workers import occupied, run_on_workers
from rlsparse.config import TrialConfig
from rlsparse.errors import ConfigError, RlsparseError
from rlsparse.mask_config import Origin
from rlsparse.resources import Resources
from rlsparse.study import Trial

_REPORT_INTERVAL_S = 0.5
_OUT_OF_MEMORY = ("OOM killer", "low on memory", "OutOfMemoryError")
"""In what Ray says of a worker that the kernel or Ray's own monitor may have killed for memory."""
_LESS_MEMORY = (
    "`rlsparse run STUDY --dry-run` says what a trial takes, and more resources.num_threads let "
    "fewer run at once"
)


class Listener(Protocol):
    """What the driver does as trials come and go."""

    def started(self, trial_id: str) -> None:
        """A worker begins the trial."""

    def stepped(self, trial_id: str, row: dict[str, Any]) -> None:
        """The trial made a step; ``row`` is of table ``steps``."""

    def noted(self, trial_id: str, text: str) -> None:
        """The trial's worker has something to tell."""

    def retried(self, trial_id: str, attempt: int, reason: str) -> None:
        """The trial's worker died or raised; it will run again."""

    def ended(self, trial_id: str) -> None:
        """The trial finished or failed; the ledger says which."""


def run_trials(
    plan: Plan, trials: Sequence[Trial], listener: Listener, memory_bytes: int = 0
) -> None:
    """Run ``trials`` to the end, each finished or failed in the ledger.

    Those whose masks are of other trials follow when all others have ended; one of a trial that is
    not done then fails without being run. Each worker reserves ``memory_bytes`` of its machine, as
    many for all trials, so that processes are reused.

    Needs a Ray session. A trial that raises one of our own errors fails at once (running it again
    would not help); one whose worker dies, or that raises anything else, is tried again up to
    ``resources.max_failures`` times.
    """
    for phase in phases(trials):
        if ready := [trial for trial in phase if not _is_in_vain(plan, trial, listener)]:
            _run_phase(plan, ready, listener, memory_bytes)


def phases(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials in the order in which they can run: those that masks are of have none themselves."""
    first = [trial for trial in trials if not trial.needs]
    return [phase for phase in (first, [t for t in trials if t.needs]) if phase]


def _is_in_vain(plan: Plan, trial: Trial, listener: Listener) -> bool:
    """Whether a trial that its mask is of is not done: then it has failed, and that is noted."""
    needed = [plan.ledger.get(name) for name in trial.needs]
    lacking = [entry for entry in needed if entry.status != "finished"]
    if lacking:
        labels = {other.trial_id: other.label for other in plan.trials}
        named = "; ".join(
            f"{labels[entry.trial_id]} ({entry.trial_id}), which is {entry.status}"
            f"{f': {entry.error}' if entry.error else ''}"
            for entry in lacking
        )
        plan.ledger.fail(trial.trial_id, f"TrialError: not run, its mask is of trial {named}")
        listener.ended(trial.trial_id)
    return bool(lacking)


def _run_phase(plan: Plan, trials: Sequence[Trial], listener: Listener, memory_bytes: int) -> None:
    """Run trials that wait for no other."""
    resources = plan.study.resources
    several = resources.num_workers > 1
    specs = [_spec(plan, trial) | {"memory_bytes": memory_bytes} for trial in trials]
    with tempfile.TemporaryDirectory(prefix="rlsparse-tune-") as folder:
        tune.Tuner(
            tune.with_resources(_run_spec, _reserved(resources, memory_bytes)),
            param_space={"spec": tune.grid_search(specs)},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                metric=None,
                # How many fit of those that start no workers, Tune knows itself.
                max_concurrent_trials=num_slots(resources, memory_bytes) if several else None,
            ),
            run_config=tune.RunConfig(
                name=plan.study.name,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
                callbacks=[_Relay(plan.ledger, listener)],
            ),
        ).fit()


def run_trial(spec: dict[str, Any], report: Any = lambda metrics: None) -> None:
    """Run one trial in this process and publish its files; the body of a worker.

    Where several workers train it, each runs this, and the first writes.

    Args:
        spec: made by ``run_trials``; plain data.
        report: called with small dictionaries while it trains: rows of table ``steps``, and
            ``note`` with a line for people.
    """
    from rlsparse import distributed
    from rlsparse.train import environment, train_trial

    storage, name = Storage(spec["storage"]), spec["trial_id"]
    saves = Saves(storage, name)
    config = TrialConfig.model_validate(spec["config"])
    ledger, is_first = Ledger(storage), distributed.rank() == 0
    host, dead = socket.gethostname(), distributed.from_first(ledger.get(name))
    if dead.host == host:  # an attempt that was killed left its files behind
        shutil.rmtree(_scratch(name, dead.pid), ignore_errors=True)
    if is_first:
        ledger.start(name, host=host, pid=os.getpid(), versions=environment())
    # No other goes on before: the first would overwrite that another has failed.
    folder = _scratch(name, distributed.from_first(os.getpid()))

    def on_progress(row: dict[str, Any]) -> None:
        report({key: value for key, value in row.items() if value is not None})

    try:
        try:
            base = load_base(config.model, expect=spec["base_identity"])
            _check_data(config, expect=spec["data_version"])
            origins = [Origin(**origin) for origin in spec["origins"]]
            train_trial(
                config,
                trial_id=name,
                base_dir=base.path,
                base_fingerprint=base.fingerprint,
                out_dir=folder,
                num_threads=spec["resources"]["num_threads"],
                strategy=spec["resources"]["strategy"],
                on_progress=on_progress,
                saving=_saving(spec, config, base.fingerprint, saves, folder, report),
                mask=load_subnetwork(config, origins, storage, base),
            )
        except RlsparseError as error:
            ledger.fail(name, f"{type(error).__name__}: {error}")
            return
        if is_first:
            storage.publish(folder, f"trials/{name}")
            saves.delete()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if is_first:
        ledger.finish(name)


def _saving(
    spec: dict[str, Any],
    config: TrialConfig,
    base_fingerprint: str,
    saves: Saves,
    folder: Path,
    report: Any,
) -> Any:
    """How a trial is saved, if it is, and the newest save that it can go on from, if there is one.

    The save's files of the trial are put into ``folder``. Of several workers, each is to call this;
    all report the same, since no report of Ray Train's returns before that of every worker.
    """
    from rlsparse.saves import Saving, check
    from rlsparse.train import identity

    resources = spec["resources"]
    if resources["save_interval_s"] is None:
        return None
    maker = identity(
        config,
        spec["trial_id"],
        base_fingerprint,
        resources["num_threads"],
        resources["strategy"],
    )

    def note(text: str) -> None:
        report({"note": text})

    save = folder / "scratch" / "newest"
    newest = saves.newest(save, folder, lambda: check(save, folder, maker), note)
    return Saving(resources["save_interval_s"], saves, newest, note)


def _check_data(config: TrialConfig, expect: str) -> None:
    """Refuse data, or code of the user's reward, of another content than the study's plan.

    Raises:
        ConfigError: they are other ones, or not there.
    """
    from rlsparse.tasks import data_version

    found = data_version(config)
    if found != expect:
        raise ConfigError(
            f"data of task {config.task.name} and algorithm {config.algorithm.name} have version "
            f"{found} on this machine, the study was planned with {expect}; put the same files on "
            "every node"
        )


def _scratch(trial_id: str, pid: int | None) -> Path:
    """Where a worker keeps the files of a trial until they are published.

    ``pid`` is that of the first worker, which the ledger remembers.
    """
    from rlsparse.distributed import rank

    of_another = f"-{rank()}" if rank() else ""
    return Path(tempfile.gettempdir()) / f"rlsparse-trial-{trial_id}-{pid}{of_another}"


def _spec(plan: Plan, trial: Trial) -> dict[str, Any]:
    return {
        "trial_id": trial.trial_id,
        "config": trial.config.model_dump(mode="json"),
        "storage": plan.storage.url,
        "base_identity": plan.base(trial).identity,
        "data_version": trial.data_version,
        "origins": [asdict(origin) for origin in trial.origins],
        "resources": plan.study.resources.model_dump(mode="json"),
    }


def _run_spec(config: dict[str, Any]) -> None:
    spec = config["spec"]
    if spec["resources"]["num_workers"] > 1:
        run_on_workers(run_trial, spec, _REPORT_INTERVAL_S)
    else:
        run_trial(spec, _rarely(tune.report))


def _rarely(report: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """``report``, but for steps that follow one too soon: each call costs Tune time."""
    last = 0.0

    def report_rarely(metrics: dict[str, Any]) -> None:
        nonlocal last
        if "note" in metrics:
            report(metrics)
        elif time.monotonic() - last >= _REPORT_INTERVAL_S:
            last = time.monotonic()
            report(metrics)

    return report_rarely


class _Relay(TrialProgressCallback):  # type: ignore[misc]
    """Passes Tune's events on, and writes down trials that Tune gave up.

    It stands in the place of Tune's own, which prints lines about trials that end early.
    """

    def __init__(self, ledger: Ledger, listener: Listener) -> None:
        self._ledger = ledger
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that we never ask for."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._listener.started(trial.config["spec"]["trial_id"])

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        name = trial.config["spec"]["trial_id"]
        if "note" in result:
            self._listener.noted(name, result["note"])
        elif "step" in result:
            self._listener.stepped(name, result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._listener.ended(trial.config["spec"]["trial_id"])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        name = trial.config["spec"]["trial_id"]
        self._listener.retried(name, trial.num_failures, _reason(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        name = trial.config["spec"]["trial_id"]
        self._ledger.fail(name, f"{_reason(trial)} (after {trial.num_failures} attempts)")
        self._listener.ended(name)


def _reason(trial: Any) -> str:
    """Last line of what Tune knows of a trial's failure, and whether it may be for memory."""
    text = str(trial.get_error() or "").strip()
    last = text.splitlines()[-1].strip() if text else "the worker died"
    if any(sign in text for sign in _OUT_OF_MEMORY):
        return f"{last}; memory may have run out: {_LESS_MEMORY}"
    return last


def _reserved(resources: Resources, memory_bytes: int) -> dict[str, float]:
    """What Tune reserves for a trial: as good as nothing for one that only starts its workers.

    A share of a CPU would be missing where the workers need all of them, and Tune refuses nothing.
    """
    if resources.num_workers > 1:
        return {"cpu": 0, "memory": 1}
    return {name.lower(): count for name, count in occupied(resources, memory_bytes).items()}


def num_slots(resources: Resources, memory_bytes: int = 0) -> int:
    """Trials that the Ray session can run at the same time."""
    total = ray.cluster_resources()
    wanted = occupied(resources, memory_bytes)
    slots = [total.get(name, 0) // count for name, count in wanted.items()]
    return max(1, int(min(slots)) // resources.num_workers)
