"""Real faults: a killed worker, a killed driver and an interrupt cost time and change no result."""

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from command import Command, StudyRun, run_study, wait_until
from mlflow.tracking import MlflowClient

from pipelines.plan import Plan, make_plan
from pipelines.tracking import tracking_uri
from rlsparse import tables
from rlsparse.study_file import load_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STUDY = """
question: Do faults change results?
baseline:
  task: {num_train_problems: 64, num_eval_problems: 32}
  algorithm: {name: grpo}
  train: {num_steps: 24, batch_size: 16, learning_rate: 1.0e-5}
  probe: {snapshots: [2], score_snapshots: false}
factors:
  algorithm.name: [grpo, sft]
seeds: [0, 1]
resources: {save_interval_s: 0}
claims:
  - {id: grpo-sparser-than-sft, kind: greater, a: {algorithm: grpo}, b: {algorithm: sft}}
"""
MAY_DIFFER = ("wall_s", "cpu_s", "peak_bytes", "attempts", "host")  # or end so


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyRun]:
    command = Command(tmp_path_factory.mktemp("undisturbed"))
    try:
        run = run_study(command, STUDY.replace("save_interval_s: 0", "save_interval_s: null"))
        assert run.result.returncode == 0, run.result.stderr
        yield run
    finally:
        command.close()


class Disturbed:
    """A study whose command is running."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.yaml, self.storage = command.cwd / "study.yaml", command.cwd / "runs"
        self.yaml.write_text(STUDY)
        self.plan: Plan = make_plan(load_study(self.yaml), str(self.storage))
        self.driver = self.start()

    def start(self) -> subprocess.Popen[str]:
        process = self.command.start("run", self.yaml, "--storage", self.storage)
        self.driver = process
        return process

    def scratch(self) -> dict[tuple[str, int], Path]:
        """(trial, worker) -> its folder, of the trials that are past their first snapshot."""
        found = {}
        for trial in self.plan.trials:
            entry = self.plan.ledger.get(trial.trial_id)
            folder = self.command.temporary / f"rlsparse-trial-{trial.trial_id}-{entry.pid}"
            first = folder / "snapshots" / "step-000002" / "weights.patch.safetensors"
            if entry.status == "running" and entry.pid and first.exists():
                found[trial.trial_id, entry.pid] = folder
        return found

    def in_mid_run(self) -> bool:
        """A trial is done, and another one in the middle."""
        assert self.driver.poll() is None, self.driver.communicate()
        return bool(self.plan.finished() and self.scratch())

    def finish(self) -> tuple[str, str]:
        out, err = self.driver.communicate(timeout=500)
        assert self.driver.returncode == 0, err
        return out, err


@pytest.fixture
def disturbed(tmp_path: Path) -> Iterator[Disturbed]:
    command = Command(tmp_path)
    try:
        yield Disturbed(command)
    finally:
        command.close()


def table(folder: Path, name: str) -> pa.Table:
    read = tables.read(folder / "tables" / f"{name}.parquet", name)
    return read.drop_columns(
        [column for column in read.column_names if column.endswith(MAY_DIFFER)]
    )


def assert_same_results(run: Disturbed, undisturbed: StudyRun) -> None:
    folder = run.storage / "study"
    names = [path.stem for path in undisturbed.folder.glob("tables/*.parquet")]
    assert len(names) >= 8
    for name in names:
        assert table(folder, name).equals(table(undisturbed.folder, name)), name
    patches = sorted(undisturbed.folder.glob("trials/*/snapshots/*/*"))
    assert len(patches) == 8
    for file in [*patches, *undisturbed.folder.glob("trials/*/e*")]:  # eval, ever_changed
        ours = folder / file.relative_to(undisturbed.folder)
        assert ours.read_bytes() == file.read_bytes(), ours


def assert_tidy(run: Disturbed) -> None:
    assert run.command.processes() == []
    assert list(run.command.temporary.glob("rlsparse-trial-*")) == []
    assert not (run.storage / "study" / "driver.lock").exists()
    assert list((run.storage / "study").glob("saves/*")) == []


def assert_one_mlflow_run_each(run: Disturbed) -> None:
    client = MlflowClient(tracking_uri(run.plan))
    experiment = client.get_experiment_by_name("study")
    runs = client.search_runs([experiment.experiment_id])
    names = sorted(r.data.tags.get("rlsparse.trial_id", "") for r in runs)
    assert names == sorted(["", *(trial.trial_id for trial in run.plan.trials)])
    assert {r.info.status for r in runs} == {"FINISHED"}


def test_a_killed_worker_is_replaced(disturbed: Disturbed, undisturbed: StudyRun) -> None:
    wait_until(disturbed.scratch, 200)
    (victim, pid), *_ = disturbed.scratch()
    worker = psutil.Process(pid)
    assert worker in disturbed.command.processes()
    worker.kill()
    _, err = disturbed.finish()
    assert re.search(rf"\({victim}\): goes on from step \d+$", err, re.MULTILINE), err
    attempts = {t.trial_id: disturbed.plan.ledger.get(t.trial_id).attempts
                for t in disturbed.plan.trials}  # fmt: skip
    assert attempts == dict.fromkeys(attempts, 1) | {victim: 2}
    assert_same_results(disturbed, undisturbed)
    assert_one_mlflow_run_each(disturbed)
    assert_tidy(disturbed)


def test_a_killed_driver_resumes(disturbed: Disturbed, undisturbed: StudyRun) -> None:
    wait_until(disturbed.in_mid_run, 300)
    disturbed.driver.kill()
    disturbed.driver.communicate()
    wait_until(lambda: not disturbed.command.processes(), 30)
    assert (disturbed.storage / "study" / "driver.lock").exists()
    done = {trial.trial_id for trial in disturbed.plan.finished()}
    assert 0 < len(done) < 4
    saved = {file.parts[-3] for file in disturbed.storage.glob("study/saves/*/step-*/save.json")}

    disturbed.start()
    _, err = disturbed.finish()
    assert f"4 trials: {len(done)} done, {4 - len(done)} to run" in err
    for name in saved - done:  # none if just then the trials in the middle ended
        assert f"({name}): goes on from step" in err
    for trial in disturbed.plan.trials:
        attempts = disturbed.plan.ledger.get(trial.trial_id).attempts
        assert attempts == 1 if trial.trial_id in done else attempts in (1, 2)
    assert_same_results(disturbed, undisturbed)
    assert_one_mlflow_run_each(disturbed)
    assert_tidy(disturbed)


def test_an_interrupted_driver_resumes(disturbed: Disturbed, undisturbed: StudyRun) -> None:
    wait_until(disturbed.in_mid_run, 300)
    disturbed.driver.send_signal(signal.SIGINT)
    out, err = disturbed.driver.communicate(timeout=60)
    assert disturbed.driver.returncode == 130, err
    assert out == ""
    assert "interrupted; run the same command again to continue" in err
    assert not re.search("Traceback|Exception|WARNING|ERROR", err), err
    wait_until(lambda: not disturbed.command.processes(), 30)
    assert not (disturbed.storage / "study" / "driver.lock").exists()

    disturbed.start()
    disturbed.finish()
    assert_same_results(disturbed, undisturbed)
    assert_one_mlflow_run_each(disturbed)
    assert_tidy(disturbed)
