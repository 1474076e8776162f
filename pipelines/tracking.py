"""MLflow as a projection of the files: one parent run per study, one child per trial.

``sync`` may be called at any time, any number of times; runs are found by tag, never by memory, so
a resumed study makes no duplicates, and everything can be rebuilt from the files. MLflow cannot
take a logged value back: a run that says something else than the files do is replaced. Only the
driver writes. The only module that imports mlflow.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from pipelines import record
from pipelines.aggregate import CONCLUDED, GIVEN, REPORT_FILES
from pipelines.ledger import Entry
from pipelines.plan import Plan
from pipelines.scalars import Scalars, final_scalars, measured_scalars, step_scalars
from pipelines.table_files import read_table, table_file
from rlsparse import tables
from rlsparse.identity import canonical_json
from rlsparse.study import Trial
from rlsparse.tables import SUMMARY

_STUDY, _TRIAL, _STATE = "rlsparse.study", "rlsparse.trial_id", "rlsparse.state"
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # MLflow's limits of one batch
_STATUS = {"planned": "SCHEDULED", "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED"}


def tracking_uri(plan: Plan) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else a SQLite file beside the studies.

    With a storage that is not on a local disk, the file is ``mlflow.db`` in the working directory.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    return f"sqlite:///{_folder(plan) / 'mlflow.db'}"


class Tracker:
    """Brings MLflow up to date with the files of one study."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.client = _client(tracking_uri(plan))
        self.experiment_id = self._experiment()
        self.parent = self._find(f"tags.`{_STUDY}` = '{plan.study.name}'") or self._make_parent()
        self._known = self._children()

    def sync(self, trials: Sequence[Trial]) -> None:
        """Project how far trials are, and what they logged while training."""
        for trial in trials:
            self._sync_trial(trial, [])

    def sync_all(self) -> None:
        """Project all trials, what the tables say of them, the report and the verdicts."""
        storage, names = self.plan.storage, ("trials", "changes", "overlaps")
        measured: dict[str, Scalars] = {}
        if all(storage.exists(table_file(name)) for name in names):
            found = {name: read_table(storage, name) for name in names}
            measured = measured_scalars(self.plan.study, found)
        for trial in self.plan.trials:
            self._sync_trial(trial, measured.get(trial.trial_id, []))
        self._sync_parent()

    # --- trials --------------------------------------------------------------------------------

    def _sync_trial(self, trial: Trial, measured: Scalars) -> None:
        """Make the run of a trial say what the files say.

        ``rlsparse.state`` holds a digest of all that has been logged, part by part.

        Args:
            trial: the trial.
            measured: what tables say of it; without any, that part is left as it is.
        """
        entry = self.plan.ledger.get(trial.trial_id)
        if entry.status == "planned":
            return
        wanted: dict[str, Scalars] = {}
        if entry.status == "finished":
            parts = {"tables": measured, "training": self._training(trial)}
            wanted = {part: scalars for part, scalars in parts.items() if scalars}
        digests = {part: _digest(entry, scalars) for part, scalars in wanted.items()}
        params = _params(trial)
        run = self._known.get(trial.trial_id)
        logged = _logged(run) if run else {}
        if run and (
            (logged and not digests)
            or any(logged.get(part, digest) != digest for part, digest in digests.items())
            or any(run.data.params.get(name) != value for name, value in params.items())
        ):
            self.client.delete_run(run.info.run_id)
            run, logged = None, {}
        run_id = (run or self._make_child(trial, entry, params)).info.run_id
        for part, scalars in wanted.items():
            if part not in logged:
                self._log(run_id, scalars, entry)
        self._mark(run_id, trial, entry, logged | digests)

    def _mark(self, run_id: str, trial: Trial, entry: Entry, logged: dict[str, str]) -> None:
        """Status, error and tags of a run, as far as they are not there yet."""
        parts = [f"{part}={digest}" for part, digest in sorted(logged.items())]
        wanted = self._tags(trial)
        wanted[_STATE] = " ".join([entry.status, str(entry.attempts), *parts])
        if entry.error:
            wanted["error"] = entry.error[:5000]
        run = self.client.get_run(run_id)
        changed = {key: value for key, value in wanted.items() if run.data.tags.get(key) != value}
        if changed:
            if "error" in run.data.tags and not entry.error:
                self.client.delete_tag(run_id, "error")
            if entry.status == "running":
                self.client.update_run(run_id, _STATUS["running"])
            else:
                end = None if entry.ended_at is None else int(entry.ended_at * 1000)
                self.client.set_terminated(run_id, _STATUS[entry.status], end_time=end)
            tags = [RunTag(key, value) for key, value in changed.items()]
            self.client.log_batch(run_id, tags=tags)
            run = self.client.get_run(run_id)
        self._known[trial.trial_id] = run

    def _training(self, trial: Trial) -> Scalars:
        folder = f"trials/{trial.trial_id}"
        summary = self.plan.storage.read_json(f"{folder}/{SUMMARY}")
        with self.plan.storage.local_copy(f"{folder}/steps.parquet") as path:
            steps = tables.read(path, "steps")
        return step_scalars(steps) + final_scalars(summary, trial.config.train.num_steps)

    def _log(self, run_id: str, scalars: Scalars, entry: Entry) -> None:
        """Log metrics; all with the time of the start, so that those of equal value are one."""
        at = int((entry.started_at or 0) * 1000)
        metrics = [Metric(key, value, at, step) for key, step, value in scalars]
        for first in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(run_id, metrics=metrics[first : first + _MAX_METRICS])

    def _tags(self, trial: Trial) -> dict[str, str]:
        return {
            _TRIAL: trial.trial_id,
            "mlflow.parentRunId": self.parent.info.run_id,
            "mlflow.runName": trial.label.replace(" ", "-"),
            "rlsparse.cell": canonical_json(trial.cell),
            "rlsparse.algorithm": trial.config.algorithm.name,
            "rlsparse.seed": str(trial.config.seed),
            "rlsparse.role": trial.role,
            "rlsparse.plan_hash": record.study_hash(self.plan.study)[:12],
            **({"rlsparse.control": trial.control} if trial.control else {}),
        }

    def _make_child(self, trial: Trial, entry: Entry, params: dict[str, str]) -> Run:
        start = None if entry.started_at is None else int(entry.started_at * 1000)
        run = self.client.create_run(self.experiment_id, start_time=start, tags=self._tags(trial))
        logged = [Param(key, value) for key, value in sorted(params.items())]
        for first in range(0, len(logged), _MAX_PARAMS):
            self.client.log_batch(run.info.run_id, params=logged[first : first + _MAX_PARAMS])
        return run

    def _children(self) -> dict[str, Run]:
        condition = f"tags.`mlflow.parentRunId` = '{self.parent.info.run_id}'"
        runs, token = [], None
        while True:
            page = self.client.search_runs([self.experiment_id], condition, page_token=token)
            runs += page
            token = page.token
            if not token:
                return {run.data.tags[_TRIAL]: run for run in runs}

    # --- the study -----------------------------------------------------------------------------

    def _sync_parent(self) -> None:
        """Tables, report and verdicts onto the parent run, and close it."""
        run_id, storage, study = self.parent.info.run_id, self.plan.storage, self.plan.study
        artifacts = [("tables", table_file(name)) for name in (*GIVEN, *CONCLUDED)]
        artifacts += [("report", f"report/{name}") for name in REPORT_FILES]
        for folder, file in artifacts:
            if storage.exists(file):
                with storage.local_copy(file) as path:
                    self.client.log_artifact(run_id, str(path), folder)
        claims: list[dict[str, Any]] = []
        if storage.exists(table_file("claims")):
            claims = read_table(storage, "claims").to_pylist()
        tags = {f"verdict.{row['id']}": row["verdict"] for row in claims} | {
            "question": study.question,
            "rlsparse.plan_hash": record.study_hash(study)[:12],
            "mlflow.note.content": _note(study.question, claims),
        }
        there = self.client.get_run(run_id).data.tags
        for key in there.keys() - tags.keys():
            if key.startswith("verdict."):
                self.client.delete_tag(run_id, key)
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        done = all(entry.status == "finished" for entry in self.plan.entries().values())
        self.client.set_terminated(run_id, "FINISHED" if done else "FAILED")

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.plan.study.name)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder = _folder(self.plan) / "mlflow-artifacts" / self.plan.study.name
            location = folder.resolve().as_uri()
        return str(self.client.create_experiment(self.plan.study.name, location))

    def _find(self, condition: str) -> Run | None:
        found = self.client.search_runs([self.experiment_id], condition, max_results=1)
        return found[0] if found else None

    def _make_parent(self) -> Run:
        study = self.plan.study
        tags = {_STUDY: study.name, "mlflow.runName": study.name, "question": study.question}
        return self.client.create_run(self.experiment_id, tags=tags)


def _note(question: str, claims: Sequence[dict[str, Any]]) -> str:
    """What MLflow shows as the description of a study, in Markdown."""
    verdicts = [f"- **{row['id']}**: {row['outcome'] or row['verdict']}" for row in claims]
    return "\n".join([question, "", *verdicts])


def _params(trial: Trial) -> dict[str, str]:
    """The resolved configuration, flat, and the level of every factor, as MLflow holds them.

    A control has the levels of the cell that it varies: ``role`` and ``control`` (none for runs
    that are no control) keep it apart where runs are grouped by level.
    """
    params = {**dict(_flat(trial.config.model_dump(mode="json"))), "replicate": trial.replicate}
    params |= {"role": trial.role, "control": trial.control or "none"}
    params |= {f"factor.{path}": level for path, level in trial.cell.items()}
    return {key: str(value)[:6000] for key, value in params.items()}


def _digest(entry: Entry, scalars: Scalars) -> str:
    content = repr((entry.started_at, sorted(scalars)))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _logged(run: Run) -> dict[str, str]:
    """Parts that a run holds -> their digest."""
    words = run.data.tags.get(_STATE, "").split()
    return dict(word.split("=") for word in words if "=" in word)


def _folder(plan: Plan) -> Path:
    return Path(plan.storage.path("")).parent if plan.storage.is_local else Path.cwd()


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _client(uri: str) -> MlflowClient:
    """A client whose database exists and is migrated, without MLflow's chatter."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with contextlib.suppress(KeyError):
        # With this set, MLflow would write into that run instead of ours (mlflow#15713).
        del os.environ["MLFLOW_RUN_ID"]
    return MlflowClient(uri)
