"""MLflow shows what the files say, however often and wherever it is brought up to date."""

import dataclasses
import json
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
from urllib.parse import quote

import mlflow
import pyarrow.compute as pc
import pytest
from command import StudyRun, wait_until
from mlflow.tracking import MlflowClient

from pipelines.plan import Plan
from pipelines.table_files import read_table, write_table
from pipelines.tracking import Tracker, tracking_uri
from rlsparse import tables
from rlsparse.definitions import DEFINITIONS


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
    Tracker(plan).sync_all()


def artifacts(uri: str, folder: str) -> list[str]:
    """Files of the parent run."""
    client = MlflowClient(uri)
    (parent,) = client.search_runs(
        [client.get_experiment_by_name("study").experiment_id], "tags.`rlsparse.study` = 'study'"
    )
    return sorted(Path(f.path).name for f in client.list_artifacts(parent.info.run_id, folder))


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
        assert run["params"]["role"] == trial.role
        assert run["params"]["control"] == (trial.control or "none")
        assert run["params"]["train.num_steps"] == "2"
        assert [step for step, *_ in run["metrics"]["loss"]] == [1, 2]
        assert [step for step, *_ in run["metrics"]["score"]] == [0, 1, 2]
        assert run["metrics"].keys() <= METRICS
        for step, value, _ in run["metrics"]["sparsity/bitwise"]:
            ours = [
                row
                for row in rows
                if row["trial_id"] == trial.trial_id and row["step_after"] == step
            ]
            changed = sum(row["num_changed_bitwise"] for row in ours)
            total = sum(row["num_elements"] for row in ours)
            assert value == 1 - changed / total
            assert (step, changed / total) in [m[:2] for m in run["metrics"]["density/bitwise"]]
        assert [step for step, *_ in run["metrics"]["sparsity/bitwise"]] == [1, 2]


METRICS = {
    *(f"sparsity/{definition}" for definition in DEFINITIONS), "density/bitwise",
    "overlap/jaccard_other_seed", "overlap/kappa_other_seed", "overlap/lift_tensor_other_seed",
    "overlap/lift_magnitude_other_seed",
    "loss", "reward", "kl", "kl_base", "entropy", "grad_norm", "num_tokens", "score",
    "update_sparsity_k1", "ever_changed_fraction", "score_gain_se",
    "score_base", "score_before", "score_after", "kl_final", "gate_ratio", "num_clipped_steps",
    "patch_bytes", "wall_s", "cpu_s", "peak_bytes",
}  # fmt: skip


def test_a_run_says_which_trial_it_is(study_run: StudyRun) -> None:
    runs = records(tracking_uri(study_run.plan), "study")
    written = json.loads((study_run.folder / "study.json").read_text())
    plan_hash = written["provenance"]["study_sha256"][:12]
    assert len(METRICS) <= 33
    assert set().union(*(run["metrics"] for run in runs.values())) == METRICS
    for trial in study_run.plan.trials:
        tags = runs[trial.trial_id]["tags"]
        state = tags.pop("rlsparse.state")
        assert state.startswith("finished 1 tables=")
        expected = {
            "rlsparse.trial_id": trial.trial_id,
            "mlflow.runName": trial.label.replace(" ", "-"),
            "rlsparse.cell": f'{{"algorithm.name":"{trial.config.algorithm.name}"}}',
            "rlsparse.algorithm": trial.config.algorithm.name,
            "rlsparse.seed": str(trial.config.seed),
            "rlsparse.role": trial.role,
            "rlsparse.plan_hash": plan_hash,
        }
        if trial.control:
            expected["rlsparse.control"] = trial.control
        assert tags == expected
    names = [run["tags"]["mlflow.runName"] for run in runs.values()]
    assert len(set(names)) == len(names)


def test_the_parent_has_tables_report_and_verdicts(study_run: StudyRun) -> None:
    uri = tracking_uri(study_run.plan)
    tags = records(uri, "study")[""]["tags"]
    assert tags["question"] == study_run.plan.study.question
    note = tags["mlflow.note.content"]
    assert note.startswith(study_run.plan.study.question)
    assert "**lr-zero-changes-nothing**: " in note
    assert artifacts(uri, "report") == ["index.html", "report.json"]
    assert artifacts(uri, "tables") == sorted(
        f"{name}.parquet"
        for name in ("trials", "steps", "overlaps", "consensus", "changes", "magnitudes",
                     "effects", "terms", "means", "claims")
    )  # fmt: skip


def test_overlap_is_that_of_the_other_seed(study_run: StudyRun) -> None:
    """Two seeds: one pair a cell, so that its measures are those of both runs."""
    runs = records(tracking_uri(study_run.plan), "study")
    overlaps = tables.read(study_run.folder / "tables" / "overlaps.parquet", "overlaps")
    rows = {(r["trial_a"], r["trial_b"]): r for r in overlaps.to_pylist() if r["module"] is None}
    for name in ("grpo", "dpo", "sft"):
        pair = [study_run.trial(f"{name} s{seed}").trial_id for seed in (0, 1)]
        row = rows[min(pair), max(pair)]
        for trial in pair:
            metrics = runs[trial]["metrics"]
            ((step, value, _),) = metrics["overlap/lift_magnitude_other_seed"]
            expected = row["num_both"] / row["expected_magnitude"]
            assert (step, value) == (2, pytest.approx(expected, rel=1e-12, abs=0))
            ((_, value, _),) = metrics["overlap/jaccard_other_seed"]
            either = row["num_a"] + row["num_b"] - row["num_both"]
            assert value == pytest.approx(row["num_both"] / either, rel=1e-12, abs=0)
        assert not any("overlap" in m for m in runs[study_run.trial(f"{name} s0 lr_zero").trial_id][
            "metrics"])  # fmt: skip


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


def test_a_trial_that_is_run_again_leaves_nothing_of_its_first_run(
    study_copy: StudyRun, database: str
) -> None:
    """Neither values of both runs beside each other, nor old values while it runs."""
    plan, trial, other = study_copy.plan, *study_copy.plan.trials[:2]
    sync(plan)
    before = records(database, "study")
    plan.ledger.start(trial.trial_id, host="here", pid=1, versions={})
    Tracker(plan).sync([trial])
    assert records(database, "study")[trial.trial_id]["metrics"] == {}

    file = study_copy.folder / "trials" / trial.trial_id / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"score_after": summary["score_after"] / 2}))
    plan.ledger.finish(trial.trial_id)
    Tracker(plan).sync([trial])
    sync(plan)
    after = records(database, "study")
    ((_, value, _),) = after[trial.trial_id]["metrics"]["score_after"]
    assert value == summary["score_after"] / 2
    assert after[trial.trial_id]["metrics"].keys() == before[trial.trial_id]["metrics"].keys()
    for name, history in after[trial.trial_id]["metrics"].items():
        assert len(history) == len(before[trial.trial_id]["metrics"][name]), name
    assert after[other.trial_id] == before[other.trial_id]


def test_numbers_of_tables_that_changed_replace_those_that_were_logged(
    study_copy: StudyRun, database: str
) -> None:
    """More seeds change the mean overlap of a trial that is done."""
    plan, trial = study_copy.plan, study_copy.trial("grpo s0")
    sync(plan)
    before = records(database, "study")
    table = read_table(plan.storage, "overlaps")
    halved = pc.floor(pc.divide(table["num_both"], 2.0))
    index = table.column_names.index("num_both")
    write_table(plan.storage, table.set_column(index, "num_both", halved), "overlaps")
    for _ in range(2):
        sync(plan)
        after = records(database, "study")
        name = "overlap/lift_tensor_other_seed"
        ((step, value, _),) = after[trial.trial_id]["metrics"][name]
        ((_, was, _),) = before[trial.trial_id]["metrics"][name]
        assert (step, value) == (2, pytest.approx(was / 2, rel=1e-2, abs=0))
        assert after[trial.trial_id]["metrics"]["loss"] == before[trial.trial_id]["metrics"]["loss"]
    control = study_copy.trial("grpo s0 lr_zero").trial_id
    assert after[control] == before[control]


def test_verdicts_and_tags_follow_the_study(study_copy: StudyRun, database: str) -> None:
    plan = study_copy.plan
    sync(plan)
    renamed = plan.study.model_copy(update={"question": "Why?", "claims": plan.study.claims[:1]})
    kept = pc.equal(read_table(plan.storage, "claims")["id"], plan.study.claims[0].id)
    write_table(plan.storage, read_table(plan.storage, "claims").filter(kept), "claims")
    sync(dataclasses.replace(plan, study=renamed))
    runs = records(database, "study")
    verdicts = [key for key in runs[""]["tags"] if key.startswith("verdict.")]
    assert verdicts == ["verdict.lr-zero-changes-nothing"]
    assert runs[""]["tags"]["question"] == "Why?"
    hashes = {run["tags"]["rlsparse.plan_hash"] for run in runs.values()}
    assert len(hashes) == 1
    assert hashes != {json.loads((study_copy.folder / "study.json").read_text())["provenance"][
        "study_sha256"][:12]}  # fmt: skip


def test_planned_trials_have_no_run(study_copy: StudyRun, database: str) -> None:
    for file in study_copy.folder.glob("ledger/*"):
        file.unlink()
    sync(study_copy.plan)
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
    shots = Path(os.environ.get("SHOTS", tmp_path))  # to look at them
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
                    name = trial.label.replace(" ", "-")
                    expect(grid.get_by_text(name, exact=True)).to_be_visible()
                page.get_by_role("button", name="Columns", exact=True).click()
                choices = page.get_by_test_id("column-selector-tree")
                for column, found in (
                    ("factor.algorithm.name", "Parameters (1)"),
                    ("sparsity/bitwise", "Metrics (1)"),
                ):
                    page.get_by_placeholder("Search columns").fill(column)
                    expect(choices.get_by_text(found)).to_be_visible()
                    choices.locator("[class*=tree-checkbox]").last.click()
                page.keyboard.press("Escape")
                for text in ("factor.algorithm.name", "grpo", "dpo", "sft", "sparsity/bitwise"):
                    expect(grid.get_by_text(text, exact=True).first).to_be_visible()
                page.screenshot(path=shots / "mlflow-runs.png")
                children = MlflowClient(uri).search_runs([experiment], "tags.`rlsparse.seed` = '1'")
                runs = quote(json.dumps([run.info.run_id for run in children]))
                page.goto(f"{url}/#/compare-runs?runs={runs}&experiments=[%22{experiment}%22]")
                expect(page.get_by_text("Comparing 3 Runs from 1 Experiment")).to_be_visible()
                for text in ("grpo-s1", "dpo-s1", "sft-s1", "factor.algorithm.name",
                             "overlap/lift_magnitude_other_seed"):  # fmt: skip
                    expect(page.get_by_text(text, exact=True).first).to_be_visible()
            finally:
                page.screenshot(path=shots / "mlflow-compare.png", full_page=True)
                browser.close()
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
