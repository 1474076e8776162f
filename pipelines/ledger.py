"""What is done: one small file per trial, written by whoever runs it."""

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from pipelines.storage import Storage

Status = Literal["planned", "running", "finished", "failed"]


@dataclass(frozen=True)
class Entry:
    """State of one trial. Times are seconds since the epoch."""

    trial_id: str
    status: Status = "planned"
    attempts: int = 0
    error: str | None = None
    host: str | None = None
    pid: int | None = None
    started_at: float | None = None
    ended_at: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Ledger:
    """The trials of a study and how far each one is.

    A trial is done when its folder has its marker; the ledger says who ran it, and why it failed.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def get(self, trial_id: str) -> Entry:
        """Entry of a trial; ``planned`` if it never ran."""
        name = f"ledger/{trial_id}.json"
        if not self.storage.exists(name):
            return Entry(trial_id)
        return Entry(**self.storage.read_json(name))

    def start(self, trial_id: str, *, host: str, pid: int, versions: dict[str, str]) -> Entry:
        """Note that an attempt begins."""
        entry = Entry(
            trial_id,
            "running",
            attempts=self.get(trial_id).attempts + 1,
            host=host,
            pid=pid,
            started_at=time.time(),
            versions=versions,
        )
        self._put(entry)
        return entry

    def finish(self, trial_id: str) -> None:
        """Note that a trial is done."""
        self._put(replace(self.get(trial_id), status="finished", error=None, ended_at=time.time()))

    def fail(self, trial_id: str, error: str) -> None:
        """Note that a trial failed, and why."""
        self._put(replace(self.get(trial_id), status="failed", error=error, ended_at=time.time()))

    def settle(self, trial_id: str) -> Entry:
        """Entry of a trial in agreement with its marker; nobody may be running it.

        A worker that died between marker and ledger left ``running`` behind; so did one that died
        before its marker.
        """
        entry = self.get(trial_id)
        if self.storage.is_done(f"trials/{trial_id}"):
            if entry.status != "finished":
                self.finish(trial_id)
        elif entry.status in ("finished", "running"):
            self._put(replace(entry, status="planned"))
        return self.get(trial_id)

    def _put(self, entry: Entry) -> None:
        self.storage.write_json(f"ledger/{entry.trial_id}.json", asdict(entry))
