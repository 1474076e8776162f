"""Several workers of one trial through Ray Train: what they occupy, and when they fail together."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from command import Command, StudyRun, run_study, wait_until
from shelf import files

from pipelines import sweep
from pipelines.plan import make_plan
from pipelines.saves import Saves
from pipelines.workers import occupied
from rlsparse import tables
from rlsparse.resources import Resources
from rlsparse.study_file import load_study

STUDY = """
question: Do two workers train a trial?
baseline:
  task: {num_train_problems: 32, num_eval_problems: 16}
  algorithm: {name: sft}
  train: {num_steps: 24, batch_size: 8, learning_rate: 1.0e-4, precision: fp32}
  probe: {snapshots: [2], score_snapshots: false}
seeds: [0]
resources: {num_workers: 2, strategy: fsdp, save_interval_s: 0}
"""


@pytest.mark.parametrize(
    ("resources", "slots", "reserved"),
    [
        (Resources(num_threads=2), 8, {"cpu": 2}),
        (Resources(num_threads=2, gpus_per_worker=1), 5, {"cpu": 2, "gpu": 1}),
        (Resources(num_threads=1, gpus_per_worker=0.25), 16, {"cpu": 1, "gpu": 0.25}),
        (Resources(num_threads=2, num_workers=3), 2, {"cpu": 0, "memory": 1}),
        (Resources(num_workers=2, gpus_per_worker=1), 2, {"cpu": 0, "memory": 1}),
        (Resources(num_workers=100), 1, {"cpu": 0, "memory": 1}),
    ],
)
def test_as_many_trials_run_as_there_is_room_for_all_their_workers(
    resources: Resources,
    slots: int,
    reserved: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 5.0})
    assert sweep.num_slots(resources) == slots
    assert sweep._reserved(resources, memory_bytes=0) == reserved
    assert occupied(resources)["CPU"] == resources.num_threads


# --- through the command ---------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    try:
        yield command
    finally:
        command.close()


def folder_of(run: StudyRun) -> Path:
    (trial,) = run.plan.trials
    return run.folder / "trials" / trial.trial_id


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_trial_whose_worker_is_killed_goes_on_to_the_same_end(
    command: Command, tmp_path: Path
) -> None:
    first = run_study(command, STUDY)
    assert first.result.returncode == 0, first.result.stderr
    (trial,) = first.plan.trials
    assert first.plan.ledger.get(trial.trial_id).attempts == 1
    storage = tmp_path / "again"
    plan = make_plan(load_study(first.yaml), str(storage))
    driver = command.start("run", first.yaml, "--storage", storage)

    def is_saved() -> bool:
        assert driver.poll() is None, driver.communicate()
        return max(Saves(plan.storage, trial.trial_id).steps(), default=0) > 2

    wait_until(is_saved, 300)
    first_worker = plan.ledger.get(trial.trial_id).pid
    assert first_worker is not None
    workers = [p for p in command.processes() if "RayTrainWorker" in p.name() + str(p.cmdline())]
    assert len(workers) == 2
    (other,) = [worker for worker in workers if worker.pid != first_worker]
    psutil.Process(other.pid).send_signal(signal.SIGKILL)
    _, err = driver.communicate(timeout=500)
    assert driver.returncode == 0, err
    assert re.search(r"goes on from step \d", err), err
    assert plan.storage.list("saves") == []
    assert plan.ledger.get(trial.trial_id).attempts == 2
    again = StudyRun(first.yaml, storage, plan, first.result, command)
    assert files(folder_of(again)) == files(folder_of(first))


REWARD = """
import os

def reward(prompts, completions, answers):
    if os.environ["RANK"] == "1":
        raise ValueError("no reward here")
    return [float(text == answer) for text, answer in zip(completions, answers)]
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_our_own_error_in_one_worker_fails_the_trial_at_once_in_its_own_words(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one waits for it meanwhile, in the middle of a step."""
    monkeypatch.syspath_prepend(command.cwd)  # for the plan that is made here
    (command.cwd / "lone_reward.py").write_text(REWARD)
    grpo = '{name: grpo, reward: "lone_reward:reward"}'
    text = STUDY.replace("{name: sft}", grpo).replace(", strategy: fsdp", "")
    run = run_study(command, text.replace("batch_size: 8", "batch_size: 16"))
    assert run.result.returncode == 1
    entry = run.plan.ledger.get(run.plan.trials[0].trial_id)
    assert (entry.status, entry.attempts) == ("failed", 1)
    assert entry.error is not None
    assert entry.error.startswith("TrialError: reward function lone_reward:reward")
    assert "no reward here" in entry.error
    (row,) = tables.read(run.folder / "tables" / "trials.parquet", "trials").to_pylist()
    assert row["error"] == entry.error
