"""Saves of the trials of a study, in its storage: a trial that was killed goes on from there.

``saves/<trial_id>/step-000010/`` is one save, complete when its ``save.json`` is there, which is
written last; ``saves/<trial_id>/trial/`` holds the files that the trial had left by then, each
written once. Only the newest save is kept, and none of a trial that is done.
"""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from pipelines.storage import Storage
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

    def put(self, save: Path, trial_dir: Path) -> None:
        """Store a save with the files of the trial, then delete those before it.

        Raises:
            StorageError: it cannot be written; what was there before still is.
        """
        info = json.loads((save / _INFO).read_bytes())
        for name in info["trial_files"]:
            if name not in self._stored:
                self._storage.put(trial_dir / name, f"{self._root}/trial/{name}")
                self._stored.add(name)
        folder = f"step-{info['step']:06d}"
        self._storage.delete(f"{self._root}/{folder}/{_INFO}")  # of a save that was of no use
        for name in [*info["files"], _INFO]:
            self._storage.put(save / name, f"{self._root}/{folder}/{name}")
        for other in self._storage.list(self._root):
            if other not in (folder, "trial"):
                self._storage.delete_folder(f"{self._root}/{other}")

    def newest(
        self, save: Path, trial_dir: Path, check: Callable[[], object], note: Callable[[str], None]
    ) -> Path | None:
        """Copy the newest save that ``check`` accepts to this machine.

        Args:
            save: folder for the save.
            trial_dir: folder for the files of the trial; both are deleted if there is no save.
            check: called when they are there; raises CheckpointError if they cannot be used.
            note: called with one line that says what is used, or why a save is not.

        Returns:
            ``save``, or None: the trial has to begin with the base.
        """
        for step in reversed(self.steps()):
            try:
                self._copy(step, save, trial_dir)
                check()
            except (CheckpointError, StorageError) as error:
                note(f"the save after step {step} is not used: {error}")
                shutil.rmtree(save, ignore_errors=True)
                shutil.rmtree(trial_dir, ignore_errors=True)
            else:
                note(f"goes on from step {step}")
                return save
        return None

    def _copy(self, step: int, save: Path, trial_dir: Path) -> None:
        folder = f"{self._root}/step-{step:06d}"
        info = self._storage.read_json(f"{folder}/{_INFO}")
        try:
            names, trial_names = list(info["files"]), list(info["trial_files"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self._storage.url}/{folder}/{_INFO} is damaged") from error
        for name in [*names, _INFO]:
            self._storage.get(f"{folder}/{name}", save / name)
        for name in trial_names:
            self._storage.get(f"{self._root}/trial/{name}", trial_dir / name)

    def delete(self) -> None:
        """Delete all saves of the trial."""
        self._storage.delete_folder(self._root)


def prune(storage: Storage, keep: Collection[str]) -> None:
    """Delete the saves of all trials but ``keep``, by trial id."""
    for trial_id in storage.list(_FOLDER):
        if trial_id not in keep:
            Saves(storage, trial_id).delete()
