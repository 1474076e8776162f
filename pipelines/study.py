"""Runs the stages of a study in order; each is skipped when its marker says that it is done.

Stages: sweep (``trials/``), diff and overlap (``tables/``), aggregate (``tables/``), report
(``report/``), MLflow. They speak through files only, so that the same command, given again,
continues after anything.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from pipelines import aggregate
from pipelines.plan import Plan
from pipelines.progress import Progress
from pipelines.session import RaySession
from rlsparse.errors import ConfigError
from rlsparse.identity import canonical_json
from rlsparse.report.study_page import build_report
from rlsparse.schemas import SCHEMA_VERSION
from rlsparse.study import Trial

Tables = dict[str, pa.Table]
REPORT_FILES = ("index.html", "report.json")


def run_study(
    plan: Plan,
    *,
    console: Console,
    address: str | None = None,
    only: str | None = None,
    allow_mixed: bool = False,
) -> Tables:
    """Run what is left of a study, and bring its tables, report and MLflow up to date.

    Args:
        plan: the study.
        console: for progress; standard error by convention.
        address: a Ray cluster; None starts Ray on this machine.
        only: prefix of a trial id: run just that trial, without the analysis.
        allow_mixed: go on although other versions or hardware made the trials that are done.

    Returns:
        All tables; empty with ``only``.

    Raises:
        ConfigError: the trials that are done were made with other versions or hardware.
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
            if entries[trial.trial_id].status != "finished"
            and (only is None or trial.trial_id.startswith(only))
        ]
        if todo and not allow_mixed:
            _check_environment(plan)
        with RaySession(address) as session:
            if todo:
                session.start()
            _write_study(plan)
            if "post hoc" in aggregate.registration(plan).values():
                console.print(
                    "study.json holds claims that were registered with other settings or another "
                    "wording: those given now are post hoc; another `name` keeps both studies",
                    soft_wrap=True,
                )
            if todo:
                _sweep(plan, todo, console)
            elif only is None:
                console.print(f"all {len(plan.trials)} trials are done", highlight=False)
            else:
                console.print(f"trial {only} is done", highlight=False)
            if only is not None:
                return {}
            tables = _analyse(plan, session, console)
    aggregate.check_seeds(plan)
    return tables


def rebuild(plan: Plan, *, console: Console) -> Tables:
    """Build tables and report again from the trials that are done, without running any."""
    with plan.storage.lock():
        for trial in plan.trials:
            plan.ledger.settle(trial.trial_id)
        _write_study(plan)
        for name in ("overlap", "aggregate"):
            plan.storage.delete(f"stages/{name}.json")
        with RaySession(None) as session:
            return _analyse(plan, session, console)


# --- stages ----------------------------------------------------------------------------------


def _sweep(plan: Plan, todo: list[Trial], console: Console) -> None:
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
        num_slots=num_slots(plan.study.resources),
    ) as progress:
        run_trials(plan, todo, progress)


def _analyse(plan: Plan, session: RaySession, console: Console) -> Tables:
    """Diff, overlap, aggregate with report, MLflow; a stage whose inputs are as before is kept."""
    from pipelines import diff

    items = diff.pending(plan)
    if items:
        session.start()
        num_trials = sum(item["trial_id"] is not None for item in items)
        console.print(f"diffing {num_trials} trials against their base", highlight=False)
        diff.run(plan, items)
    inputs = {
        "study": plan.study.model_dump(mode="json"),
        "trials": {name: [e.status, e.attempts, e.error] for name, e in plan.entries().items()},
        "rlsparse": version("rlsparse"),
        "schema": SCHEMA_VERSION,
    }

    def overlap() -> None:
        from pipelines import overlap as stage

        session.start()
        console.print("counting overlaps", highlight=False)
        diff.write_table(plan.storage, stage.run(plan), "overlaps", "overlaps.parquet")

    _stage(plan, "overlap", inputs, ["tables/overlaps.parquet"], overlap)
    registered = aggregate.registration(plan)

    def conclude() -> None:
        console.print("judging claims, drawing the report", highlight=False)
        _write_report(plan, aggregate.run(plan, registered))

    inputs |= {"registered": registered}
    small = [f"tables/{name}.parquet" for name in aggregate.SMALL_TABLES]
    reports = [f"report/{name}" for name in REPORT_FILES]
    _stage(plan, "aggregate", inputs, [*small, *reports], conclude)

    def track() -> None:
        from pipelines.tracking import Tracker

        tracker = Tracker(plan)
        tracker.sync()
        tracker.sync_results()

    _stage(plan, "mlflow", inputs, [], track)
    return aggregate.load(plan)


def _stage(
    plan: Plan, name: str, inputs: dict[str, Any], written: list[str], work: Callable[[], None]
) -> None:
    """Do ``work`` unless the marker of this stage has the same inputs and its files are there."""
    marker = f"stages/{name}.json"
    digest = hashlib.sha256(canonical_json(inputs).encode()).hexdigest()
    there = all(plan.storage.exists(file) for file in written)
    if there and plan.storage.exists(marker) and plan.storage.read_json(marker) == digest:
        return
    work()
    plan.storage.write_json(marker, digest)


def _write_report(plan: Plan, tables: Tables) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_report(plan.study, tables, Path(folder), versions=_versions())
        for name in REPORT_FILES:
            plan.storage.write_bytes(f"report/{name}", (Path(folder) / name).read_bytes())


# --- records ---------------------------------------------------------------------------------


def _write_study(plan: Plan) -> None:
    """Write ``study.json``; once a trial has begun, its registered claims and seeds stay."""
    frozen = {
        "claims": {claim.id: claim.model_dump(mode="json") for claim in plan.study.claims},
        "seeds": list(plan.study.seeds),
        "settings": aggregate.settings(plan.study),
    }
    if plan.storage.list("ledger"):
        frozen = plan.storage.read_json("study.json")["registered"]
    plan.storage.write_json(
        "study.json",
        {
            "study": plan.study.model_dump(mode="json"),
            "registered": frozen,
            "registered_sha256": hashlib.sha256(canonical_json(frozen).encode()).hexdigest(),
            "trials": {trial.trial_id: trial.label for trial in plan.trials},
            "inputs": plan.inputs.record(plan.trials),
            "versions": _versions(),
        },
    )


def _versions() -> dict[str, str]:
    packages = ("rlsparse", "torch", "transformers", "trl", "ray", "mlflow", "pyarrow", "numpy")
    found = {package: version(package) for package in packages}
    commit = _git_commit()
    return {**found, "git_commit": commit} if commit else found


def _git_commit() -> str | None:
    """Commit of the working directory, marked if it is dirty; None where there is no git."""
    if shutil.which("git") is None:
        return None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.getcwd(),
    )
    return commit.stdout.strip() or None


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
    """Turn Ctrl-C into one line."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to continue", highlight=False)
        raise SystemExit(130) from None
