"""Saves a trial while it trains, so that it can go on after a kill and end with the same bits.

A save is a folder with one for the part of each worker, ``worker-0`` and so on. In that lies what a
trainer of transformers reads when it resumes (random states, position in the data) and
``rlsparse.pt`` with all else: weights and optimizer, as far as this worker holds them (under DDP
each keeps all), schedule, models trained beside the policy and their optimizers, the rollout that
is being used up, what the probe remembers. ``save.json`` is written last, when the parts of all
workers are there: whose they are, and a hash of every file. The files that the trial has left so
far are named in it, too, but kept once.

All else is made again as it was made at first, from the base: reference policy, sampled data.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from rlsparse import distributed
from rlsparse.algorithms.rollouts import Companion
from rlsparse.errors import CheckpointError, RlsparseWarning
from rlsparse.sharded import load_own_state, own_state
from rlsparse.tasks.generate import Score
from rlsparse.tasks.rewards import Seeded
from rlsparse.trajectory import StepChanges

_Result = TypeVar("_Result")

INFO = "save.json"
_STATE = "rlsparse.pt"
_FORMAT = 2
_OF_TRL = ("_step", "_buffered_inputs", "_total_train_tokens")
"""Attributes of TRL's trainers that outlive a step but that resuming does not restore."""


def _warn(text: str) -> None:
    if distributed.rank() == 0:
        warnings.warn(text, RlsparseWarning, stacklevel=2)


class Keeper(Protocol):
    """Where the saves of a trial outlive the processes that train it."""

    def put(self, step: int, part: Path, trial_dir: Path, trial_files: Collection[str]) -> None:
        """Keep this worker's folder of a save, and the named files of the trial's folder."""

    def complete(self, info: dict[str, Any]) -> None:
        """Make the parts of ``info["step"]``, all being there, a save; the first worker's to do."""


@dataclass(frozen=True)
class Saving:
    """How a trial is saved, and from where it goes on.

    Attributes:
        interval_s: seconds of training between saves; 0 saves after every step but the last.
        keeper: keeps the saves.
        resume_from: folder of a save that ``check`` accepted on every worker, with this worker's
            part; None begins with the base.
        warn: called by every worker with the same line when a save fails; the trial goes on.
    """

    interval_s: float
    keeper: Keeper
    resume_from: Path | None = None
    warn: Callable[[str], None] = _warn


def check(folder: Path, trial_dir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What a save says of itself, once that was found to be true of this worker's part of it.

    Args:
        folder: of the save.
        trial_dir: holds the files that this worker had left then: all that of the trial, if it is
            the first, else none.
        identity: of the trial that would go on from it, see ``train.identity``.

    Raises:
        CheckpointError: it is damaged, or another trial's or other versions'.
    """
    try:
        info: dict[str, Any] = json.loads((folder / INFO).read_bytes())
        own = info["workers"][distributed.rank()]
        there, here = own["identity"], _plain(identity)
        others = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        damaged = [
            name
            for place, key in ((folder, "files"), (trial_dir, "trial_files"))
            for name, digest in own[key].items()
            if _digest(place / name) != digest
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"it cannot be read ({error})") from error
    if others:
        raise CheckpointError(f"it was made with other {', '.join(others)}")
    if damaged:
        raise CheckpointError(f"{', '.join(damaged)} is damaged")
    return info


def spent(saving: Saving | None) -> dict[str, float]:
    """Seconds ``wall_s`` and ``cpu_s`` that a trial had taken when it was saved."""
    if saving is None or saving.resume_from is None:
        return {"wall_s": 0.0, "cpu_s": 0.0}
    info = json.loads((saving.resume_from / INFO).read_bytes())
    return {key: info["spent"][key] for key in ("wall_s", "cpu_s")}


class Saver(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that saves a trial and, at the start, puts back what a save holds.

    To be added after the probe, whose row of a step belongs to the save of that step. Every worker
    has one; all save after the same steps.

    Args:
        trainer: of the trial, as it was built on the base.
        probe: of the trial, or what stands in its place on a worker that measures nothing.
        out_dir: folder of this worker's files of the trial.
        reward: what the trainer rewards with.
        saving: how to save.
        identity: written into saves.
        clock: the seconds that the trial has taken, as ``spent`` gives them back.

    Attributes:
        resume_from: what the trainer is to resume from, or None.
    """

    def __init__(
        self,
        trainer: Any,
        probe: Any,
        *,
        out_dir: Path,
        reward: Any,
        saving: Saving,
        identity: dict[str, Any],
        clock: Callable[[], dict[str, float]],
    ) -> None:
        self._trainer = trainer
        self._probe = probe
        self._out_dir = out_dir
        self._reward = reward
        self._saving = saving
        self._identity = _plain(identity)
        self._clock = clock
        self._digests: dict[str, str] = {}
        self._saved_at = time.monotonic()
        self._part = f"worker-{distributed.rank()}"
        self.resume_from = saving.resume_from and saving.resume_from / self._part
        # It would look for weights in files of its own; here they are put back with all else.
        trainer._load_from_checkpoint = lambda *_: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Restore what the trainer itself has not."""
        if self.resume_from is not None:
            self._restore(self.resume_from)
            batches = given["train_dataloader"].batch_sampler
            sampler = getattr(batches, "batch_sampler", batches).sampler
            for _ in range(int(state.epoch)):  # its generator goes on from epoch to epoch
                deque(sampler, maxlen=0)
        self._saved_at = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Save after a step, if it is time to by the clock of any worker.

        The row of a step is the last that is made of it; what is drawn next belongs to the next.
        """
        if "loss" not in logs or state.global_step == state.max_steps:
            return
        is_due = time.monotonic() - self._saved_at >= self._saving.interval_s
        if not any(distributed.total_counts([is_due])):
            return
        try:
            own = _together(self._put)
            workers = distributed.gathered(own)  # all have put theirs
            _together(lambda: self._complete(workers))
        except OSError as error:
            self._saving.warn(
                f"step {state.global_step} could not be saved ({error}); training goes on, but "
                "after a kill it would go on from an earlier step: free space"
            )
        self._saved_at = time.monotonic()

    def _put(self) -> dict[str, Any]:
        """Put this worker's part where it is kept; returns what ``check`` wants to know of it."""
        folder = Path(self._trainer.args.output_dir) / "save" / self._part
        try:
            own = self._write(folder)
            step = self._trainer.state.global_step
            self._saving.keeper.put(step, folder, self._out_dir, own["trial_files"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return own

    def _complete(self, workers: list[dict[str, Any]]) -> None:
        if distributed.rank() == 0:
            step = self._trainer.state.global_step
            info = {"step": step, "spent": self._clock(), "workers": workers}
            self._saving.keeper.complete(info)

    def _write(self, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True)
        self._trainer._save_rng_state(str(folder))
        self._trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        torch.save(self._state(), folder / _STATE)
        return {
            "identity": self._identity,
            "files": {f"{folder.name}/{f.name}": _digest(f) for f in sorted(folder.iterdir())},
            "trial_files": self._trial_files(),
        }

    def _trial_files(self) -> dict[str, str]:
        """Files that the trial has left so far, with their hashes; none is ever changed."""
        trial_dir, scratch = self._out_dir, Path(self._trainer.args.output_dir)
        for file in sorted(trial_dir.rglob("*")):
            name = file.relative_to(trial_dir).as_posix()
            if name not in self._digests and file.is_file() and scratch not in file.parents:
                self._digests[name] = _digest(file)
        return self._digests

    def _state(self) -> dict[str, Any]:
        """What lives in this worker from step to step, as plain data and tensors."""
        trainer = self._trainer
        of_trl = {name: getattr(trainer, name) for name in _OF_TRL if hasattr(trainer, name)}
        if "_buffered_inputs" in of_trl:
            reused = trainer.args.steps_per_generation * trainer.num_iterations
            if trainer._step % reused == 0:  # used up
                of_trl["_buffered_inputs"] = None
        return {
            **own_state(trainer.model, trainer.optimizer),
            "schedule": trainer.lr_scheduler.state_dict(),
            "trl": of_trl,
            "companions": {name: one.state_dict() for name, one in self._companions()},
            "probe": self._probe.state_dict(),
            "reward_calls": self._reward.num_calls if isinstance(self._reward, Seeded) else 0,
        }

    def _companions(self) -> list[tuple[str, Companion]]:
        return [(k, v) for k, v in vars(self._trainer).items() if isinstance(v, Companion)]

    def _restore(self, folder: Path) -> None:
        with torch.serialization.safe_globals([Score, StepChanges]):
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        load_own_state(self._trainer.model, self._trainer.optimizer, state)
        self._trainer.lr_scheduler.load_state_dict(state["schedule"])
        for name, value in send_to_device(state["trl"], self._trainer.args.device).items():
            setattr(self._trainer, name, value)
        for name, companion in self._companions():
            companion.load_state_dict(state["companions"][name])
        self._probe.load_state_dict(state["probe"])
        if isinstance(self._reward, Seeded):
            self._reward.num_calls = state["reward_calls"]


def _together(attempt: Callable[[], _Result]) -> _Result:
    """What ``attempt`` gives on this worker.

    Raises:
        OSError: on every worker alike, if it failed on one.
    """
    reason = None
    try:
        result = attempt()
    except (OSError, RuntimeError) as error:  # the second is torch.save's
        reason = str(error).partition("\n")[0]
    if (first := distributed.first_given(reason)) is not None:
        raise OSError(first)
    return result


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps({**identity, "format of saves": _FORMAT}))
    return plain


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
