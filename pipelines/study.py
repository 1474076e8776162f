"""Runs the stages of a study in order; each is skipped when its marker says that it is done.

Stages: sweep (``trials/``), diff, agreement, syncs, overlap and aggregate (``tables/``),
report (``report/``), MLflow. They speak through files only, so that the same command, given again,
continues after anything.
"""

import _thread
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from pipelines import aggregate, capacity, collect, record, saves
from pipelines.aggregate import Tables
from pipelines.ledger import Entry
from pipelines.plan import Plan
from pipelines.progress import Progress
from pipelines.session import RaySession
from pipelines.stages import conclude_study, run_stage
from rlsparse.errors import ConfigError
from rlsparse.identity import canonical_json
from rlsparse.study import Trial

_RESEND_S = 0.1


def run_study(
    plan: Plan,
    *,
    console: Console,
    command: str | None = None,
    address: str | None = None,
    only: str | None = None,
    allow_missing: bool = False,
    allow_mixed: bool = False,
    allow_oversize: bool = False,
) -> Tables:
    """Run what is left of a study, and bring its tables, report and MLflow up to date.

    Args:
        plan: the study.
        console: for progress; standard error by convention.
        command: what the user typed, for the record; None keeps what is recorded.
        address: a Ray cluster; None starts Ray on this machine.
        only: prefix of a trial id: run just that trial, and before it those that its mask is of
            and that are not done, without the analysis.
        allow_missing: judge claims although trials of theirs failed or were not run.
        allow_mixed: go on although other versions or hardware made the trials that are done.
        allow_oversize: run trials although by estimate they do not fit into memory.

    Returns:
        All tables; empty with ``only``.

    Raises:
        ConfigError: the trials that are done were made with other versions or hardware, or one
            that is left does not fit into memory.
        StorageError: the storage is not writable, or another driver is at work on the study.
        TrialError: trials of different seeds are alike; tables and report are there all the same.
    """
    plan.storage.check_writable()
    with plan.storage.lock():
        before = plan.entries()
        entries = {trial.trial_id: plan.ledger.settle(trial.trial_id) for trial in plan.trials}
        for name, entry in entries.items():
            if before[name].status == "finished" != entry.status:
                console.print(
                    f"trial {name} is incomplete in {plan.storage.url}: it runs again",
                    soft_wrap=True,
                )
        todo = [
            trial
            for trial in plan.trials
            if not _is_done(entries, trial) and (only is None or trial.trial_id.startswith(only))
        ]
        todo = _with_sources(plan, todo, entries, console)
        if others := set(saves.prune(plan.storage)) - entries.keys():
            console.print(
                f"saves of {len(others)} unfinished trials of other settings stay in "
                f"{plan.storage.url}/saves; delete {', '.join(sorted(others))} there to free space",
                soft_wrap=True,
            )
        if todo and not allow_mixed:
            _check_environment(plan)
        with RaySession(address) as session:
            if todo:
                session.start()
                machines = capacity.of_session()
                if reason := capacity.shortage(plan, machines):
                    if address is None:
                        raise ConfigError(reason)
                    console.print(f"waiting for more machines to join: {reason}", soft_wrap=True)
                memory_bytes = capacity.admit(plan, todo, machines, allow_oversize=allow_oversize)
            write_study(plan, command if only is None else None)
            record.tell(record.registration(plan.storage, plan.study, plan.study.seeds), console)
            if todo:
                _sweep(plan, todo, console, memory_bytes)
            elif only is None:
                console.print(f"all {len(plan.trials)} trials are done", highlight=False)
            else:
                console.print(f"trial {only} is done", highlight=False)
            if only is not None:
                return {}
            tables = _analyse(plan, session, console, allow_missing=allow_missing)
    collect.check_seeds(plan)
    return tables


def _with_sources(
    plan: Plan, todo: list[Trial], entries: Mapping[str, Entry], console: Console
) -> list[Trial]:
    """Trials to run, with those that their masks are of and that are not done."""
    asked = {trial.trial_id for trial in todo}
    needed = {name for trial in todo for name in trial.needs} - asked
    added = [t for t in plan.trials if t.trial_id in needed and not _is_done(entries, t)]
    for trial in added:
        console.print(
            f"{trial.label} ({trial.trial_id}) runs first: a mask is of it",
            markup=False,
            soft_wrap=True,
        )
    return [*added, *todo]


def _is_done(entries: Mapping[str, Entry], trial: Trial) -> bool:
    return entries[trial.trial_id].status == "finished"


# --- stages ----------------------------------------------------------------------------------


def _sweep(plan: Plan, todo: list[Trial], console: Console, memory_bytes: int) -> None:
    from pipelines.sweep import num_slots, run_trials
    from pipelines.tracking import Tracker

    tracker = Tracker(plan)
    by_id = {trial.trial_id: trial for trial in plan.trials}

    class Tracked(Progress):
        """Progress that also brings MLflow up to date."""

        def stepped(self, trial_id: str, row: dict[str, Any]) -> None:
            if not self.running[trial_id]:  # now the worker has told the ledger that it runs
                tracker.sync([by_id[trial_id]])
            super().stepped(trial_id, row)

        def ended(self, trial_id: str) -> None:
            super().ended(trial_id)
            tracker.sync([by_id[trial_id]])

    num_done = len(plan.finished())
    console.print(
        f"{len(plan.trials)} trials: {num_done} done, {len(todo)} to run", highlight=False
    )
    with Tracked(
        todo,
        num_done=num_done,
        ledger=plan.ledger,
        console=console,
        num_slots=num_slots(plan.study.resources, memory_bytes),
    ) as progress:
        run_trials(plan, todo, progress, memory_bytes)


def _analyse(plan: Plan, session: RaySession, console: Console, *, allow_missing: bool) -> Tables:
    """All stages after the sweep; what has the same inputs is kept."""
    from pipelines import agreement, diff, overlap, syncs

    storage, study = plan.storage, plan.study
    items = diff.pending(plan)
    if items:
        session.start()
        num_trials = sum(item["trial_id"] is not None for item in items)
        console.print(f"diffing {num_trials} trials against their base", highlight=False)
        diff.run(plan, items)
    agreement.drop_stale(plan)
    if pairs := agreement.pending(plan):
        session.start()
        console.print(f"comparing the weights of {len(pairs)} pairs of trials", highlight=False)
        agreement.run(plan, pairs)
    if trials := syncs.pending(plan):
        session.start()
        console.print(f"sending the steps of {len(trials)} trials again", highlight=False)
        syncs.run(plan, trials)
    inputs = conclude_study(
        study,
        storage,
        session,
        console,
        states={name: [e.status, e.attempts, e.error] for name, e in plan.entries().items()},
        seeds=study.seeds,
        measured=lambda: overlap.measured_runs(plan),
        collect=lambda: collect.collect(plan),
        allow_missing=allow_missing,
    )

    def track() -> None:
        from pipelines.tracking import Tracker

        Tracker(plan).sync_all()

    run_stage(storage, "mlflow", inputs, [], track)
    return aggregate.load(storage)


# --- records ---------------------------------------------------------------------------------


def write_study(plan: Plan, command: str | None = None) -> None:
    """Write ``study.json``; see ``record.write``."""
    record.write(
        plan.storage,
        plan.study,
        plan.study.seeds,
        command=command,
        has_begun=bool(plan.storage.list("ledger")),
        more={
            "trials": {trial.trial_id: trial.label for trial in plan.trials},
            "inputs": plan.inputs.record(plan.trials),
        },
    )


def _check_environment(plan: Plan) -> None:
    """Refuse to add trials to a study whose other trials were made elsewhere.

    Raises:
        ConfigError: versions or hardware differ.
    """
    made = {canonical_json(plan.ledger.get(t.trial_id).versions) for t in plan.finished()}
    if not made:
        return
    from rlsparse.train import environment

    here = environment()
    for text in sorted(made):
        there = json.loads(text)
        other = {
            k: (there.get(k), here.get(k)) for k in {*there, *here} if there.get(k) != here.get(k)
        }
        if other:
            changes = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in sorted(other.items()))
            raise ConfigError(
                f"the trials that are done were made with other versions or hardware ({changes}); "
                "bits may differ: use the same ones, another --storage, or --allow-mixed"
            )


@contextmanager
def interrupted_says_how_to_resume(console: Console) -> Iterator[None]:
    """Turn Ctrl-C into one line.

    Python drops what is raised in a finalizer; an interrupt that hits one is sent again.
    """
    usual = sys.unraisablehook

    def resend(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(_RESEND_S, _thread.interrupt_main).start()
        else:
            usual(dropped)

    sys.unraisablehook = resend
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to continue", highlight=False)
        raise SystemExit(130) from None
    finally:
        sys.unraisablehook = usual
