"""The ledger agrees with the markers, whatever died in between."""

from pathlib import Path

import pytest

from pipelines.ledger import Entry, Ledger
from pipelines.storage import MARKER, Storage

TRIAL = "0123456789ab"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Storage(str(tmp_path)))


def start(ledger: Ledger) -> Entry:
    return ledger.start(TRIAL, host="here", pid=7, versions={"torch": "1"})


def publish(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir(exist_ok=True)
    (tmp_path / "made" / "file").write_bytes(b"123")
    ledger.storage.publish(tmp_path / "made", f"trials/{TRIAL}")


def test_life_of_a_trial(ledger: Ledger) -> None:
    assert ledger.get(TRIAL) == Entry(TRIAL)
    assert ledger.get(TRIAL).status == "planned"
    first = start(ledger)
    assert (first.status, first.attempts, first.pid) == ("running", 1, 7)
    ledger.fail(TRIAL, "it broke")
    failed = ledger.get(TRIAL)
    assert (failed.status, failed.error, failed.attempts) == ("failed", "it broke", 1)
    again = start(ledger)
    assert (again.status, again.error, again.attempts) == ("running", None, 2)
    assert again.ended_at is None
    ledger.finish(TRIAL)
    done = ledger.get(TRIAL)
    assert (done.status, done.error, done.attempts) == ("finished", None, 2)
    assert done.versions == {"torch": "1"}
    assert done.ended_at is not None
    assert again.started_at is not None
    assert done.ended_at >= again.started_at


def test_marker_but_running_is_finished(ledger: Ledger, tmp_path: Path) -> None:
    start(ledger)
    publish(ledger, tmp_path)
    settled = ledger.settle(TRIAL)
    assert (settled.status, settled.attempts) == ("finished", 1)
    assert ledger.get(TRIAL) == settled


def test_marker_but_no_entry_is_finished(ledger: Ledger, tmp_path: Path) -> None:
    publish(ledger, tmp_path)
    assert ledger.settle(TRIAL).status == "finished"


def test_finished_without_marker_is_to_do(ledger: Ledger, tmp_path: Path) -> None:
    start(ledger)
    publish(ledger, tmp_path)
    ledger.finish(TRIAL)
    ledger.storage.delete(f"trials/{TRIAL}/{MARKER}")
    settled = ledger.settle(TRIAL)
    assert (settled.status, settled.attempts) == ("planned", 1)
    assert ledger.get(TRIAL) == settled


def test_finished_with_a_truncated_file_is_to_do(ledger: Ledger, tmp_path: Path) -> None:
    start(ledger)
    publish(ledger, tmp_path)
    ledger.finish(TRIAL)
    (tmp_path / "trials" / TRIAL / "file").write_bytes(b"12")
    assert ledger.settle(TRIAL).status == "planned"


def test_running_and_dead_is_to_do(ledger: Ledger) -> None:
    start(ledger)
    assert ledger.settle(TRIAL).status == "planned"


def test_what_agrees_is_left_alone(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.settle(TRIAL) == Entry(TRIAL)
    start(ledger)
    ledger.fail(TRIAL, "it broke")
    failed = ledger.get(TRIAL)
    assert ledger.settle(TRIAL) == failed
    start(ledger)
    publish(ledger, tmp_path)
    ledger.finish(TRIAL)
    done = ledger.get(TRIAL)
    assert ledger.settle(TRIAL) == done
