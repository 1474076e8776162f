"""MLflow as a projection of the files: one parent run per study, one child per trial.

``sync`` may be called at any time, any number of times; runs are found by tag, never by memory, so
a resumed study makes no duplicates, and everything can be rebuilt from the files. Only the driver
writes. The only module that imports mlflow.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from mlflow.entities import Metric, Param, Run
from mlflow.tracking import MlflowClient

from pipelines.aggregate import SMALL_TABLES
from pipelines.ledger import Entry
from pipelines.plan import Plan
from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.study import Trial
from rlsparse.tables import SUMMARY

_STUDY, _TRIAL, _STATE = "rlsparse.study", "rlsparse.trial_id", "rlsparse.state"
_MAX_BATCH = 1000  # MLflow's limit
_STATUS = {"planned": "SCHEDULED", "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED"}
_PER_STEP = ("loss", "reward", "kl", "entropy", "grad_norm", "learning_rate", "num_tokens", "score")
_FINAL = ("score_base", "score_before", "score_after", "gate_ratio", "num_clipped_steps",
          "patch_bytes", "wall_s", "cpu_s", "peak_bytes")  # fmt: skip


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

    def sync(self, trials: list[Trial] | None = None) -> None:
        """Project the trials (all by default); what is there already is left alone."""
        for trial in self.plan.trials if trials is None else trials:
            self._sync_trial(trial)

    def sync_results(self) -> None:
        """Project tables, report and verdicts onto the parent run, and close it."""
        run_id, storage = self.parent.info.run_id, self.plan.storage
        for folder, names in (
            ("tables", [f"{name}.parquet" for name in SMALL_TABLES]),
            ("report", ["index.html", "report.json"]),
        ):
            for name in names:
                if storage.exists(f"{folder}/{name}"):
                    with storage.local_copy(f"{folder}/{name}") as path:
                        self.client.log_artifact(run_id, str(path), folder)
        if storage.exists("tables/claims.parquet"):
            with storage.local_copy("tables/claims.parquet") as path:
                for row in tables.read(path, "claims").to_pylist():
                    self.client.set_tag(run_id, f"verdict.{row['id']}", row["verdict"])
        self._log_sparsity()
        done = all(entry.status == "finished" for entry in self.plan.entries().values())
        self.client.set_terminated(run_id, "FINISHED" if done else "FAILED")

    def _sync_trial(self, trial: Trial) -> None:
        entry = self.plan.ledger.get(trial.trial_id)
        if entry.status == "planned":
            return
        run = self._known.get(trial.trial_id) or self._make_child(trial, entry)
        state = f"{entry.status}:{entry.attempts}"
        if run.data.tags.get(_STATE) == state:
            return
        run_id = run.info.run_id
        if entry.status == "finished":
            self._log(run_id, self._metrics(trial, entry))
        if entry.error:
            self.client.set_tag(run_id, "error", entry.error[:5000])
        elif "error" in run.data.tags:
            self.client.delete_tag(run_id, "error")
        end = None if entry.ended_at is None else int(entry.ended_at * 1000)
        if entry.status == "running":
            self.client.update_run(run_id, _STATUS["running"])
        else:
            self.client.set_terminated(run_id, _STATUS[entry.status], end_time=end)
        self.client.set_tag(run_id, _STATE, state)
        self._known[trial.trial_id] = self.client.get_run(run_id)

    def _metrics(self, trial: Trial, entry: Entry) -> list[Metric]:
        """Metrics of a finished trial; equal times, so that logging them twice changes nothing."""
        storage, name = self.plan.storage, trial.trial_id
        at = int((entry.started_at or 0) * 1000)
        summary = storage.read_json(f"trials/{name}/{SUMMARY}")
        last = trial.config.train.num_steps
        metrics = [Metric(key, float(summary[key]), at, last) for key in _FINAL]
        with storage.local_copy(f"trials/{name}/steps.parquet") as path:
            for row in tables.read(path, "steps").to_pylist():
                metrics += [
                    Metric(key, float(row[key]), at, row["step"])
                    for key in _PER_STEP
                    if row[key] is not None
                ]
        return metrics

    def _log_sparsity(self) -> None:
        """Sparsity of every snapshot, under every definition, in the default view."""
        for trial in self.plan.finished():
            name = f"tables/tensor_deltas.parquet/{trial.trial_id}.parquet"
            if not self.plan.storage.exists(name):
                continue
            with self.plan.storage.local_copy(name) as path:
                deltas = tables.read(path, "tensor_deltas")
            at = int((self.plan.ledger.get(trial.trial_id).started_at or 0) * 1000)
            metrics = [
                Metric(f"sparsity/{definition}", value, at, step)
                for (step, definition), value in sparsity(
                    deltas, self.plan.study.default_view
                ).items()
            ]
            self._log(self._known[trial.trial_id].info.run_id, metrics)

    def _log(self, run_id: str, metrics: list[Metric]) -> None:
        for first in range(0, len(metrics), _MAX_BATCH):
            self.client.log_batch(run_id, metrics=metrics[first : first + _MAX_BATCH])

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

    def _children(self) -> dict[str, Run]:
        condition = f"tags.`mlflow.parentRunId` = '{self.parent.info.run_id}'"
        runs, token = [], None
        while True:
            page = self.client.search_runs([self.experiment_id], condition, page_token=token)
            runs += page
            token = page.token
            if not token:
                return {run.data.tags[_TRIAL]: run for run in runs}

    def _make_child(self, trial: Trial, entry: Entry) -> Run:
        tags = {
            _TRIAL: trial.trial_id,
            "mlflow.parentRunId": self.parent.info.run_id,
            "mlflow.runName": f"{trial.label} {trial.trial_id}".replace(" ", "-"),
            "rlsparse.role": trial.role,
            **({"rlsparse.control": trial.control} if trial.control else {}),
        }
        start = None if entry.started_at is None else int(entry.started_at * 1000)
        run = self.client.create_run(self.experiment_id, start_time=start, tags=tags)
        params = {**dict(_flat(trial.config.model_dump(mode="json"))), "replicate": trial.replicate}
        params |= {f"factor.{path}": level for path, level in trial.cell.items()}
        logged = [Param(key, str(value)[:6000]) for key, value in sorted(params.items())]
        self.client.log_batch(run.info.run_id, params=logged)
        return self.client.get_run(run.info.run_id)


def sparsity(deltas: pa.Table, view: str) -> dict[tuple[int, str], float]:
    """(step, definition) -> fraction unchanged, of one trial in one view."""
    names = [f"num_changed_{definition}" for definition in DEFINITIONS]
    ours = deltas.to_pandas().query("view == @view").groupby("step_after")
    sums = ours[["num_elements", *names]].sum()
    return {
        (int(step), definition): 1 - float(row[f"num_changed_{definition}"] / row["num_elements"])
        for step, row in sums.iterrows()
        for definition in DEFINITIONS
    }


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
