"""A killed trial goes on from the newest save in the storage; one that is done leaves none."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines import study
from pipelines.capacity import Capacity
from pipelines.cli import app
from pipelines.plan import Plan, make_plan
from pipelines.saves import Saves, prune
from pipelines.storage import Storage
from pipelines.sweep import _spec, run_trial
from rlsparse.errors import CheckpointError, StorageError
from rlsparse.study import Study

NUM_STEPS = 4


@pytest.fixture(params=["folder", "url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "folder" else tmp_path.as_uri())


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Saves, int], None]:
    """Makes a save of a step, as the only worker does."""

    def save(saves: Saves, step: int) -> None:
        part, trial = tmp_path / f"save-{step}" / "worker-0", tmp_path / "trial"
        part.mkdir(parents=True)
        trial.mkdir(exist_ok=True)
        (part / "weights").write_bytes(bytes([step]))
        (trial / f"patch-{step}").write_text("a patch")
        own = {
            "files": {"worker-0/weights": ""},
            "trial_files": {file.name: "" for file in trial.iterdir()},
        }
        saves.put(step, part, trial, own["trial_files"])
        saves.complete({"step": step, "workers": [own]})

    return save


def fetch(saves: Saves, to: Path, check: Callable[[], object] = lambda: None) -> tuple[Any, ...]:
    said: list[str] = []
    found = saves.newest(to / "save", to / "files", check, said.append)
    return found, said


def test_the_newest_save_is_kept_and_comes_back(storage, save, tmp_path):
    saves = Saves(storage, "a")
    assert saves.steps() == []
    assert fetch(saves, tmp_path / "none") == (None, [])
    save(saves, 1)
    save(saves, 2)
    assert saves.steps() == [2]
    assert storage.list("saves/a") == ["step-000002", "trial"]
    found, said = fetch(saves, tmp_path / "back")
    assert (found / "worker-0" / "weights").read_bytes() == b"\2"
    assert sorted(p.name for p in (tmp_path / "back" / "files").iterdir()) == ["patch-1", "patch-2"]
    assert said == ["goes on from step 2"]


def test_files_of_the_trial_are_written_once(storage, save, monkeypatch):
    saves, written, put = Saves(storage, "a"), [], Storage.put

    def noted(self: Storage, file: Path, name: str) -> None:
        written.append(file.name)
        put(self, file, name)

    monkeypatch.setattr(Storage, "put", noted)
    save(saves, 1)
    save(saves, 2)
    assert written == ["patch-1", "weights", "patch-2", "weights"]


def test_a_save_that_breaks_off_leaves_the_one_before(storage, save, monkeypatch, tmp_path):
    saves = Saves(storage, "a")
    save(saves, 1)

    def full(*_: object) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(Storage, "write_json", full)
    with pytest.raises(StorageError, match="disk full"):
        save(saves, 2)
    assert saves.steps() == [1]
    found, _ = fetch(saves, tmp_path / "back")
    assert (found / "worker-0" / "weights").read_bytes() == b"\1"


def test_what_cannot_be_used_is_said_and_leaves_no_trace(storage, save, tmp_path):
    saves, back = Saves(storage, "a"), tmp_path / "back"
    save(saves, 1)

    def refuse() -> None:
        raise CheckpointError("it is damaged")

    assert fetch(saves, back, refuse) == (
        None, ["the save after step 1 is not used: it is damaged", "begins again"]
    )  # fmt: skip
    assert list(back.iterdir()) == []
    storage.delete("saves/a/step-000001/worker-0/weights")
    found, said = fetch(saves, back)
    assert found is None
    assert "cannot read" in said[0]
    storage.write_bytes("saves/a/step-000001/save.json", b"[]")
    assert "save.json is damaged" in fetch(saves, back)[1][0]


def test_saves_of_trials_that_are_done_are_deleted_and_no_others(storage, save, tmp_path):
    for name in ("a", "b"):
        save(Saves(storage, name), ord(name))
    (tmp_path / "done").mkdir()
    storage.publish(tmp_path / "done", "trials/a")
    assert prune(storage) == ["b"]
    assert storage.list("saves") == ["b"]


# --- a worker --------------------------------------------------------------------------------


def make_one(storage: Path, save_interval_s: float | None, **train: Any) -> Plan:
    fields = {
        "name": "s",
        "question": "?",
        "seeds": [0],
        "baseline": {
            "algorithm": {"name": "sft"},
            "task": {"num_train_problems": 16, "num_eval_problems": 8},
            "train": {"num_steps": NUM_STEPS, "batch_size": 8, **train},
            "probe": {"snapshots": [1], "score_snapshots": False},
        },
        "resources": {"save_interval_s": save_interval_s},
    }
    return make_plan(Study.model_validate(fields), str(storage))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr("pipelines.sweep._REPORT_INTERVAL_S", 0.0)
    return make_one(tmp_path / "runs", save_interval_s=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same trial leaves that is never saved."""
    plan = make_one(tmp_path_factory.mktemp("undisturbed"), save_interval_s=None)
    run_trial(_spec(plan, plan.trials[0]))
    return left(plan)


class Killed(BaseException):
    """Ends a worker in the midst of a step."""


def kill_after(step: int, plan: Plan) -> None:
    def report(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            raise Killed

    with pytest.raises(Killed):
        run_trial(_spec(plan, plan.trials[0]), report)


def go_on(plan: Plan) -> list[dict[str, Any]]:
    """Run the trial again: what it reported."""
    reported: list[dict[str, Any]] = []
    run_trial(_spec(plan, plan.trials[0]), reported.append)
    assert plan.ledger.get(plan.trials[0].trial_id).status == "finished"
    assert plan.storage.list("saves") == []
    return reported


def left(plan: Plan) -> dict[str, bytes]:
    folder = Path(plan.storage.path(f"trials/{plan.trials[0].trial_id}"))
    return {
        file.name: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("summary.json", "_SUCCESS")
    }


def test_a_killed_worker_s_trial_goes_on(plan: Plan, undisturbed: dict[str, bytes]) -> None:
    kill_after(3, plan)  # between the row of the step and its save
    assert Saves(plan.storage, plan.trials[0].trial_id).steps() == [2]
    reported = go_on(plan)
    assert reported[0] == {"note": "goes on from step 2"}
    assert [row["step"] for row in reported if row.get("step")] == [3, 4]
    assert left(plan) == undisturbed


def test_saves_of_other_settings_stay_and_are_named(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(3, plan)
    name = plan.trials[0].trial_id
    other = make_one(tmp_path / "runs", 0, learning_rate=2e-5)
    monkeypatch.setattr(study.RaySession, "start", lambda self: None)
    monkeypatch.setattr(study.capacity, "of_session", lambda: Capacity((10**11,)))
    monkeypatch.setattr(study, "_sweep", lambda *_: None)
    output = io.StringIO()
    study.run_study(other, console=Console(file=output), only=other.trials[0].trial_id)
    assert f"delete {name} there to free space" in output.getvalue()
    assert Saves(plan.storage, name).steps() == [2]


def test_a_saved_trial_is_interrupted_though_another_was_run_since(plan: Plan) -> None:
    kill_after(3, plan)
    study.write_study(plan)
    assert plan.ledger.settle(plan.trials[0].trial_id).status == "planned"  # by the next driver
    said = CliRunner().invoke(app, ["status", plan.storage.url]).output
    assert "interrupted" in said
    assert "saved at step 2" in said


def test_a_trial_begins_again_where_its_save_is_damaged(
    plan: Plan, undisturbed: dict[str, bytes]
) -> None:
    kill_after(3, plan)
    folder = f"saves/{plan.trials[0].trial_id}/step-000002/worker-0"
    content = bytearray(plan.storage.read_bytes(f"{folder}/rlsparse.pt"))
    content[len(content) // 2] ^= 1
    plan.storage.write_bytes(f"{folder}/rlsparse.pt", bytes(content))
    reported = go_on(plan)
    assert "step 2 is not used" in reported[0]["note"]
    assert "rlsparse.pt is damaged" in reported[0]["note"]
    assert [row["step"] for row in reported if row.get("step")] == [1, 2, 3, 4]
    assert left(plan) == undisturbed


def test_a_trial_goes_on_where_nothing_can_be_saved(
    plan: Plan, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr(Storage, "put", full)
    notes = [row["note"] for row in go_on(plan) if "note" in row]
    assert [note[:6] for note in notes] == ["step 1", "step 2", "step 3"]
    assert "No space left" in notes[0]
    assert left(plan) == undisturbed
