"""MLflow shows what the files say, however often and wherever it is brought up to date."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from command import StudyRun, wait_until
from mlflow.tracking import MlflowClient

from pipelines.plan import Plan
from pipelines.tracking import Tracker, tracking_uri
from rlsparse import tables


@pytest.fixture(autouse=True)
def _own_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow needs seconds to make one; each test takes a copy."""
    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of this test, given by the environment."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'own.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def records(uri: str, study: str) -> dict[str, dict[str, Any]]:
    """Trial (``""``: the parent) -> all that MLflow holds of it, without its own random names."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    result = {}
    for run in found:
        tags = dict(run.data.tags)
        assert tags.pop("mlflow.parentRunId", parent.info.run_id) == parent.info.run_id
        name = tags.get("rlsparse.trial_id", "")
        assert name not in result, "a duplicate run"
        result[name] = {
            "status": run.info.status,
            "params": run.data.params,
            "tags": tags,
            "metrics": {
                key: sorted(
                    (m.step, m.value, m.timestamp)
                    for m in client.get_metric_history(run.info.run_id, key)
                )
                for key in run.data.metrics
            },
        }
    return result


def sync(plan: Plan) -> None:
    tracker = Tracker(plan)
    tracker.sync()
    tracker.sync_results()


def test_one_parent_and_a_child_for_every_trial(study_run: StudyRun) -> None:
    uri = tracking_uri(study_run.plan)
    assert uri == f"sqlite:///{study_run.storage}/mlflow.db"
    runs = records(uri, "study")
    assert runs.keys() == {"", *(trial.trial_id for trial in study_run.plan.trials)}
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert runs[""]["tags"]["verdict.lr-zero-changes-nothing"] == "supported"
    deltas = tables.read(study_run.folder / "tables" / "tensor_deltas.parquet", "tensor_deltas")
    rows = deltas.to_pylist()
    for trial in study_run.plan.trials:
        run = runs[trial.trial_id]
        assert run["params"]["factor.algorithm.name"] == trial.config.algorithm.name
        assert run["params"]["seed"] == str(trial.config.seed)
        assert run["params"]["train.num_steps"] == "2"
        assert [step for step, *_ in run["metrics"]["loss"]] == [1, 2]
        assert [step for step, *_ in run["metrics"]["score"]] == [0, 1, 2]
        for step, value, _ in run["metrics"]["sparsity/bitwise"]:
            ours = [
                row
                for row in rows
                if row["trial_id"] == trial.trial_id and row["step_after"] == step
            ]
            changed = sum(row["num_changed_bitwise"] for row in ours)
            assert value == 1 - changed / sum(row["num_elements"] for row in ours)


def test_sync_is_idempotent_and_rebuilds_from_the_files(study_run: StudyRun, database: str) -> None:
    assert tracking_uri(study_run.plan) == database
    sync(study_run.plan)
    rebuilt = records(database, "study")
    assert rebuilt == records(f"sqlite:///{study_run.storage}/mlflow.db", "study")
    sync(study_run.plan)
    assert records(database, "study") == rebuilt


def test_a_failed_trial_is_failed_with_its_error_until_it_is_done(
    study_copy: StudyRun, database: str
) -> None:
    plan, trial = study_copy.plan, study_copy.plan.trials[0]
    finished = plan.ledger.get(trial.trial_id)
    plan.ledger.fail(trial.trial_id, "no pairs")
    sync(plan)
    runs = records(database, "study")
    assert runs[trial.trial_id]["status"] == "FAILED"
    assert runs[trial.trial_id]["tags"]["error"] == "no pairs"
    assert runs[""]["status"] == "FAILED"

    plan.ledger.start(trial.trial_id, host="here", pid=1, versions=finished.versions)
    Tracker(plan).sync([trial])
    assert records(database, "study")[trial.trial_id]["status"] == "RUNNING"
    plan.ledger.finish(trial.trial_id)
    sync(plan)
    runs = records(database, "study")
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert "error" not in runs[trial.trial_id]["tags"]
    assert len(runs) == len(plan.trials) + 1


def test_planned_trials_have_no_run(study_copy: StudyRun, database: str) -> None:
    for file in study_copy.folder.glob("ledger/*"):
        file.unlink()
    Tracker(study_copy.plan).sync()
    assert records(database, "study").keys() == {""}


def test_a_run_id_of_the_environment_is_not_written_into(
    study_run: StudyRun, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    Tracker(study_run.plan)
    assert "MLFLOW_RUN_ID" not in os.environ


@pytest.mark.browser
def test_the_mlflow_page_lists_parent_and_children(study_run: StudyRun, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        assert "CI" not in os.environ, "CI must have Chromium"
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import expect, sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri, url = tracking_uri(study_run.plan), f"http://127.0.0.1:{port}"
    experiment = MlflowClient(uri).get_experiment_by_name("study").experiment_id
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(port),
         "--backend-store-uri", uri],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def answers() -> bool:
        assert server.poll() is None, "mlflow ui ended"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_until(answers, 90)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium,
                args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                      "--disable-background-networking", "--disable-component-update",
                      "--disable-sync"],
            )  # fmt: skip
            page = browser.new_page(viewport={"width": 2600, "height": 900})
            expect.set_options(timeout=60_000)
            page.goto(f"{url}/#/experiments/{experiment}/runs")
            try:
                grid = page.locator("[role=grid], [role=treegrid]").first
                expect(grid.get_by_text("study", exact=True)).to_be_visible()
                expect(page.get_by_text("13 matching runs")).to_be_visible()
                grid.locator("button").nth(1).click()  # unfolds the parent
                for trial in study_run.plan.trials:
                    expect(grid.get_by_text(trial.trial_id)).to_be_visible()
                page.get_by_role("button", name="Columns", exact=True).click()
                page.get_by_placeholder("Search columns").fill("factor.algorithm.name")
                choices = page.get_by_test_id("column-selector-tree")
                expect(choices.get_by_text("Parameters (1)")).to_be_visible()
                choices.locator("[class*=tree-checkbox]").last.click()
                page.keyboard.press("Escape")
                for text in ("factor.algorithm.name", "grpo", "dpo", "sft"):
                    expect(grid.get_by_text(text, exact=True).first).to_be_visible()
            finally:
                page.screenshot(path=os.environ.get("MLFLOW_SHOT", tmp_path / "page.png"))
                browser.close()
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
