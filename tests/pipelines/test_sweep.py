"""A worker publishes all of a trial, or says in the ledger why not; the study goes on."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, StudyRun, run_study

from pipelines.plan import Plan, _load_base, make_plan
from pipelines.sweep import run_trial
from rlsparse import tables
from rlsparse.errors import StorageError
from rlsparse.models import TINY
from rlsparse.study import Study
from rlsparse.study_file import load_study

# At this temperature the samples of a prompt are all alike: no pair of right and wrong.
TEXT = """
question: Does a failed trial stay visible?
baseline:
  task: {num_train_problems: 8, num_eval_problems: 8}
  algorithm: {name: sft}
  train: {num_steps: 1, batch_size: 8}
factors:
  algorithm: [{name: sft}, {name: dpo, temperature: 1.0e-4, num_samples_per_prompt: 2}]
seeds: [0]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    file = tmp_path_factory.mktemp("study") / "failing.yaml"
    file.write_text(TEXT)
    return load_study(file)


def spec(plan: Plan, number: int, **changes: Any) -> dict[str, Any]:
    trial = plan.trials[number]
    return {
        "trial_id": trial.trial_id,
        "config": trial.config.model_dump(mode="json"),
        "storage": plan.storage.url,
        "base_identity": plan.base(trial).identity,
        "data_version": trial.data_version,
        "origins": [],
        "resources": plan.study.resources.model_dump(mode="json"),
        "memory_bytes": 0,
    } | changes


def scratch_folders() -> list[str]:
    return [
        name
        for name in os.listdir(tempfile.gettempdir())
        if name.startswith("rlsparse-trial-") and name.endswith(f"-{os.getpid()}")
    ]


def test_a_trial_leaves_all_its_files(study: Study, tmp_path: Path) -> None:
    plan, seen = make_plan(study, str(tmp_path)), []
    run_trial(spec(plan, 0), seen.append)
    name = plan.trials[0].trial_id
    entry = plan.ledger.get(name)
    assert (entry.status, entry.attempts, entry.pid) == ("finished", 1, os.getpid())
    assert "torch" in entry.versions
    assert plan.storage.is_done(f"trials/{name}")
    found = {
        path.relative_to(tmp_path / "failing" / "trials" / name).as_posix()
        for path in (tmp_path / "failing" / "trials" / name).rglob("*")
        if path.is_file()
    }
    assert found >= {
        "config.json", "summary.json", "steps.parquet", "ever_changed.mask.safetensors",
        "snapshots/step-000001/weights.patch.safetensors", "_SUCCESS",
    }  # fmt: skip
    assert [row["step"] for row in seen if "step" in row]
    assert scratch_folders() == []


def test_what_cannot_be_trained_fails_with_its_reason(study: Study, tmp_path: Path) -> None:
    plan = make_plan(study, str(tmp_path))
    run_trial(spec(plan, 1))
    entry = plan.ledger.get(plan.trials[1].trial_id)
    assert (entry.status, entry.attempts) == ("failed", 1)
    assert entry.error is not None
    assert entry.error.startswith("TrialError: dpo found no pair")
    assert not plan.storage.exists(f"trials/{plan.trials[1].trial_id}")
    assert scratch_folders() == []


def test_another_base_than_planned_fails(study: Study, tmp_path: Path) -> None:
    plan = make_plan(study, str(tmp_path))
    run_trial(spec(plan, 0, base_identity="f" * 64))
    entry = plan.ledger.get(plan.trials[0].trial_id)
    assert entry.status == "failed"
    assert entry.error is not None
    assert "the study was planned with ffffffffffff" in entry.error


def test_a_base_with_another_tokenizer_than_planned_fails(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    plan = make_plan(make_study(model={"source": str(base)}), str(tmp_path))
    planned = spec(plan, 0)
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    _load_base.cache_clear()  # as in a worker's process
    run_trial(planned)
    error = plan.ledger.get(plan.trials[0].trial_id).error
    assert error is not None
    assert error.startswith("CheckpointError: base ")
    assert f"the study was planned with {planned['base_identity'][:12]}" in error


def failure_of(plan: Plan, number: int = 0, **changes: Any) -> str:
    """Run a trial that fails, and what the ledger says of it."""
    run_trial(spec(plan, number, **changes))
    entry = plan.ledger.get(plan.trials[number].trial_id)
    assert entry.status == "failed"
    assert scratch_folders() == []
    return str(entry.error)


def test_other_data_than_planned_fail(tmp_path: Path) -> None:
    data = tmp_path / "own.csv"
    data.write_text("prompt,answer\n1 + 1,2\n")
    task = {"name": "dataset", "source": str(data)}
    plan = make_plan(make_study(task=task), str(tmp_path))
    planned = plan.trials[0].data_version
    data.write_text("prompt,answer\n1 + 1,3\n")
    found = make_plan(plan.study, str(tmp_path)).trials[0].data_version
    said = failure_of(plan)
    assert said == (
        f"ConfigError: data of task dataset and algorithm sft have version {found} on this "
        f"machine, the study was planned with {planned}; put the same files on every node"
    )
    data.unlink()
    assert "own.csv" in failure_of(plan)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ({"task": {"num_train_problems": 100_000}}, "100000 were asked for"),
        ({"train": {"num_steps": 1, "trainable_layers": [9]}}, "this model has layers 0 to 3"),
    ],
)
def test_what_a_trial_cannot_have_fails_with_its_reason(
    baseline: dict[str, Any], said: str, tmp_path: Path
) -> None:
    text = failure_of(make_plan(make_study(**baseline), str(tmp_path)))
    assert text.startswith("ConfigError: ")
    assert said in text
    assert len(text.splitlines()) == 1


def make_study(**baseline: Any) -> Study:
    fields = {"name": "s", "question": "?", "seeds": [0]}
    return Study.model_validate(fields | {"baseline": {"algorithm": {"name": "sft"}, **baseline}})


def test_a_storage_that_breaks_is_not_the_fault_of_the_trial(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(study, str(tmp_path))

    def break_off(*_: object) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr("pipelines.storage.Storage.publish", break_off)
    with pytest.raises(StorageError, match="disk full"):
        run_trial(spec(plan, 0))
    assert plan.ledger.get(plan.trials[0].trial_id).status == "running"
    assert scratch_folders() == []


def test_files_of_a_killed_attempt_are_removed(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, name = make_plan(study, str(tmp_path / "runs")), ""
    name = plan.trials[0].trial_id
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"rlsparse-trial-{name}-1"
    left.mkdir()
    plan.ledger.start(name, host=os.uname().nodename, pid=1, versions={})
    plan.ledger.settle(name)
    run_trial(spec(plan, 0, base_identity="f" * 64))
    assert not left.exists()
    assert plan.ledger.get(name).attempts == 2


# --- through the command ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyRun]:
    command = Command(tmp_path_factory.mktemp("failing"))
    try:
        yield run_study(command, TEXT)
    finally:
        command.close()


@pytest.mark.slow
def test_a_failed_trial_is_a_row_and_the_command_fails(failed_run: StudyRun) -> None:
    assert failed_run.result.returncode == 1
    assert "Traceback" not in failed_run.result.stderr
    assert "Last result" not in failed_run.result.stdout
    good, bad = failed_run.plan.trials
    assert f"failed: {bad.label} ({bad.trial_id}): TrialError: dpo found no pair" in (
        failed_run.result.stderr
    )
    trials = tables.read(failed_run.folder / "tables" / "trials.parquet", "trials").to_pylist()
    assert [(t["trial_id"], t["status"]) for t in trials] == [
        (good.trial_id, "finished"), (bad.trial_id, "failed")
    ]  # fmt: skip
    assert trials[1]["error"].startswith("TrialError: dpo found no pair")
    assert "dpo found no pair" in (failed_run.folder / "report" / "index.html").read_text()


@pytest.mark.slow
def test_only_failed_trials_run_again_and_may_be_allowed(
    failed_run: StudyRun, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    shutil.copytree(failed_run.storage, storage)
    result = failed_run.command.run("run", failed_run.yaml, "--storage", storage, "--allow-missing")
    assert result.returncode == 0, result.stderr
    assert "2 trials: 1 done, 1 to run" in result.stderr
    ledger = make_plan(failed_run.plan.study, str(storage)).ledger
    good, bad = (ledger.get(trial.trial_id) for trial in failed_run.plan.trials)
    assert (good.status, good.attempts) == ("finished", 1)
    assert (bad.status, bad.attempts) == ("failed", 2)
