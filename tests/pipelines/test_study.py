"""Stages run when their inputs changed, and only then; other versions are refused."""

import io
import json

import pytest
from command import StudyRun
from rich.console import Console

from pipelines import study
from rlsparse.errors import ConfigError


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_stage_runs_once_for_the_same_inputs(study_copy: StudyRun) -> None:
    plan, calls = study_copy.plan, list[int]()

    def stage(inputs: dict[str, object], written: list[str]) -> int:
        study._stage(plan, "mine", inputs, written, lambda: calls.append(1))
        return len(calls)

    assert stage({"a": 1}, ["tables/overlaps.parquet"]) == 1
    assert stage({"a": 1}, ["tables/overlaps.parquet"]) == 1
    assert stage({"a": 2}, ["tables/overlaps.parquet"]) == 2
    plan.storage.delete("tables/overlaps.parquet")
    assert stage({"a": 2}, ["tables/overlaps.parquet"]) == 3


def test_a_stage_that_breaks_is_not_done(study_copy: StudyRun) -> None:
    def break_off() -> None:
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011  (any will do)
            study._stage(study_copy.plan, "mine", {}, [], break_off)


def test_trials_of_other_versions_are_not_mixed(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    study._check_environment(plan)
    file = study_copy.folder / "ledger" / f"{plan.trials[0].trial_id}.json"
    entry = json.loads(file.read_text())
    entry["versions"]["torch"] = "0.4"
    file.write_text(json.dumps(entry))
    plan.storage.delete(f"trials/{plan.trials[1].trial_id}/_SUCCESS")
    before = plan.storage.read_bytes("study.json")
    with pytest.raises(ConfigError, match=r"torch 0\.4 -> .*--allow-mixed"):
        study.run_study(plan, console=quiet())
    assert plan.storage.read_bytes("study.json") == before
    assert not plan.storage.exists("driver.lock")


def test_an_interrupt_says_how_to_go_on() -> None:
    console = quiet()
    with pytest.raises(SystemExit) as end, study.interrupted_says_how_to_resume(console):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "run the same command again" in console.file.getvalue()
