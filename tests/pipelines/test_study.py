"""Stages run when their inputs changed, and only then; other versions are refused."""

import io
import json
import time
from pathlib import Path

import pytest
from command import StudyRun
from rich.console import Console

from pipelines import collect, study
from pipelines.plan import Plan, make_plan
from pipelines.sweep import _spec, run_trial
from rlsparse.config import TrialConfig
from rlsparse.errors import ConfigError, TrialError
from rlsparse.study import Study


def quiet() -> Console:
    return Console(file=io.StringIO())


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


def test_an_interrupt_in_a_finalizer_is_not_lost() -> None:
    class Unlucky:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def work() -> None:
        begun = time.monotonic()
        with study.interrupted_says_how_to_resume(quiet()):
            Unlucky()
            while time.monotonic() < begun + 5:
                pass

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 130


# --- seeds -----------------------------------------------------------------------------------

SEEDS = {
    "name": "seeds",
    "question": "Does the seed reach training?",
    "baseline": {
        "task": {"num_train_problems": 16, "num_eval_problems": 4},
        "algorithm": {"name": "sft"},
        "train": {"num_steps": 1, "batch_size": 8, "learning_rate": 1e-4},
    },
    "factors": {"train.learning_rate": [1e-4, 0.0]},
    "seeds": [0, 1],
    "controls": ["same_seed"],
}


def finished(storage: Path) -> Plan:
    """A study with all its trials, run in this process."""
    plan = make_plan(Study.model_validate(SEEDS), str(storage))
    study.write_study(plan)
    for trial in plan.trials:
        run_trial(_spec(plan, trial))
    assert len(plan.finished()) == len(plan.trials) == 5
    return plan


def test_seeds_that_make_a_difference_pass(tmp_path: Path) -> None:
    """Replicates and trials that change nothing are alike, and may be."""
    collect.check_seeds(finished(tmp_path))


def test_a_seed_that_reaches_nothing_fails_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrialConfig, "data_seed", 7)
    monkeypatch.setattr(TrialConfig, "sampling_seed", 7)
    plan, analysed = finished(tmp_path), list[Plan]()
    monkeypatch.setattr(study, "_analyse", lambda plan, *_, **__: analysed.append(plan) or {})
    with pytest.raises(TrialError, match="seed not plumbed") as raised:
        study.run_study(plan, console=quiet())
    text = str(raised.value)
    named = {trial.trial_id for trial in plan.trials if trial.trial_id in text}
    assert named == {plan.trials[0].trial_id, plan.trials[1].trial_id}
    assert "sft s0 learning_rate=0.0001" in text
    assert "sft s1 learning_rate=0.0001" in text
    assert analysed == [plan]  # tables and report are written all the same
    assert not plan.storage.exists("driver.lock")
