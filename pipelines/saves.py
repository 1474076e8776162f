"""Saves of the trials of a study, in its storage: a trial that was killed goes on from there.

``saves/<trial_id>/step-000010/`` is one save, with a folder for the part of each worker,
``worker-0`` and so on; it is complete when its ``save.json`` is there, which is written last. In
``saves/<trial_id>/trial/`` lie the files that the trial had left by then, each written once. Only
the newest save is kept, and none of a trial that is done; those of trials of other settings stay.
"""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipelines.storage import Storage
from rlsparse import distributed
from rlsparse.errors import CheckpointError, StorageError

_FOLDER = "saves"
_INFO = "save.json"


class Saves:
    """Saves of one trial.

    Args:
        storage: of the study.
        trial_id: of the trial.
    """

    def __init__(self, storage: Storage, trial_id: str) -> None:
        self._storage = storage
        self._root = f"{_FOLDER}/{trial_id}"
        self._stored: set[str] = set()  # of the trial's files, by this attempt

    def steps(self) -> list[int]:
        """Steps after which there is a complete save, ascending."""
        names = [name for name in self._storage.list(self._root) if name.startswith("step-")]
        complete = [n for n in names if self._storage.exists(f"{self._root}/{n}/{_INFO}")]
        return [int(name.removeprefix("step-")) for name in complete]

    def put(self, step: int, part: Path, trial_dir: Path, trial_files: Collection[str]) -> None:
        """Store one worker's part of a save, and the files of the trial that are not there yet.

        Raises:
            StorageError: it cannot be written; what was there before still is.
        """
        for name in trial_files:
            if name not in self._stored:
                self._storage.put(trial_dir / name, f"{self._root}/trial/{name}")
                self._stored.add(name)
        for file in sorted(part.iterdir()):
            self._storage.put(file, f"{self._folder(step)}/{part.name}/{file.name}")

    def complete(self, info: dict[str, Any]) -> None:
        """Make the parts of all workers, stored before, a save; then delete those before it.

        Raises:
            StorageError: it cannot be written; what was there before still is.
        """
        folder = self._folder(info["step"])
        self._storage.write_json(f"{folder}/{_INFO}", info)
        for other in self._storage.list(self._root):
            if f"{self._root}/{other}" not in (folder, f"{self._root}/trial"):
                self._storage.delete_folder(f"{self._root}/{other}")

    def newest(
        self, save: Path, trial_dir: Path, check: Callable[[], object], note: Callable[[str], None]
    ) -> Path | None:
        """Copy the newest save that ``check`` accepts to this machine.

        To be called by all workers of the trial: they use the same save, or none.

        Args:
            save: folder for the save, of which this worker gets its own part.
            trial_dir: folder for the files of the trial, which the first worker gets; both are
                deleted if there is no save.
            check: called when they are there; raises CheckpointError if they cannot be used.
            note: called with one line that says what is used, or why a save is not; by every
                worker with the same.

        Returns:
            ``save``, or None: the trial has to begin with the base.
        """
        reason = None
        for step in reversed(distributed.from_first(self.steps())):
            reason = None
            try:
                self._copy(step, save, trial_dir)
                check()
            except (CheckpointError, StorageError) as error:
                reason = str(error)
            reason = distributed.first_given(reason)
            if reason is None:
                note(f"goes on from step {step}")
                return save
            note(f"the save after step {step} is not used: {reason}")
            shutil.rmtree(save, ignore_errors=True)
            shutil.rmtree(trial_dir, ignore_errors=True)
        if reason:
            note("begins again")
        return None

    def _copy(self, step: int, save: Path, trial_dir: Path) -> None:
        folder = self._folder(step)
        info = self._storage.read_json(f"{folder}/{_INFO}")
        try:
            own = info["workers"][distributed.rank()]
            names, trial_names = list(own["files"]), list(own["trial_files"])
        except (LookupError, TypeError) as error:
            raise CheckpointError(f"{self._storage.url}/{folder}/{_INFO} is damaged") from error
        for name in [_INFO, *names]:
            self._storage.get(f"{folder}/{name}", save / name)
        for name in trial_names:
            self._storage.get(f"{self._root}/trial/{name}", trial_dir / name)

    def _folder(self, step: int) -> str:
        return f"{self._root}/step-{step:06d}"

    def delete(self) -> None:
        """Delete all saves of the trial."""
        self._storage.delete_folder(self._root)


def prune(storage: Storage) -> list[str]:
    """Delete the saves of trials that are done; returns the ids of trials whose saves are left."""
    left = []
    for trial_id in storage.list(_FOLDER):
        if storage.is_done(f"trials/{trial_id}"):
            Saves(storage, trial_id).delete()
        else:
            left.append(trial_id)
    return left
