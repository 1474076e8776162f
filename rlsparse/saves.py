"""Saves a trial while it trains, so that it can go on after a kill and end with the same bits.

A save is a folder. In it lies what a trainer of transformers reads when it resumes (weights,
optimizer, schedule, random states, position in the data), ``rlsparse.pt`` with what it would lose
(models trained beside the policy and their optimizers, the rollout that is being used up, what the
probe remembers), and ``save.json``, written last: whose it is, and a hash of every file. The files
that the trial has left so far are named in it, too, but stay where they are.

All else is made again as it was made at first, from the base: reference policy, sampled data.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import WEIGHTS_NAME

from rlsparse.algorithms.rollouts import Companion
from rlsparse.errors import CheckpointError, RlsparseWarning
from rlsparse.probe import Probe
from rlsparse.tasks.generate import Score
from rlsparse.tasks.rewards import Seeded
from rlsparse.trajectory import StepChanges

INFO = "save.json"
_STATE = "rlsparse.pt"
_FORMAT = 1
_OF_TRL = ("_step", "_buffered_inputs", "_total_train_tokens")
"""Attributes of TRL's trainers that outlive a step but that resuming does not restore."""


def _warn(text: str) -> None:
    warnings.warn(text, RlsparseWarning, stacklevel=2)


@dataclass(frozen=True)
class Saving:
    """How a trial is saved, and from where it goes on.

    Attributes:
        interval_s: seconds of training between saves; 0 saves after every step but the last.
        put: called with the folder of a save and the folder of the trial, to copy the one and what
            ``trial_files`` names in the other to where they outlive this process.
        resume_from: folder of a save that ``check`` accepted; None begins with the base.
        warn: called with one line when a save fails; the trial goes on.
    """

    interval_s: float
    put: Callable[[Path, Path], None]
    resume_from: Path | None = None
    warn: Callable[[str], None] = _warn


def check(folder: Path, trial_dir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What a save says of itself, once that was found to be true.

    Args:
        folder: of the save.
        trial_dir: holds the files that the trial had left then.
        identity: of the trial that would go on from it, see ``train.identity``.

    Raises:
        CheckpointError: it is damaged, or another trial's or other versions'.
    """
    try:
        info: dict[str, Any] = json.loads((folder / INFO).read_bytes())
        there, here = info["identity"], _plain(identity)
        if others := sorted(k for k in {*there, *here} if there.get(k) != here.get(k)):
            raise CheckpointError(f"it was made with other {', '.join(others)}")
        for place, key in ((folder, "files"), (trial_dir, "trial_files")):
            for name, digest in info[key].items():
                if _digest(place / name) != digest:
                    raise CheckpointError(f"{name} is damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"cannot continue from the save in {folder}: {error}; continue from another one, or "
            "begin again"
        ) from error
    return info


def spent(saving: Saving | None) -> dict[str, float]:
    """Seconds ``wall_s`` and ``cpu_s`` that a trial had taken when it was saved."""
    if saving is None or saving.resume_from is None:
        return {"wall_s": 0.0, "cpu_s": 0.0}
    info = json.loads((saving.resume_from / INFO).read_bytes())
    return {key: info["spent"][key] for key in ("wall_s", "cpu_s")}


class Saver(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that saves a trial and, at the start, puts back what a save holds.

    To be added after the probe, whose row of a step belongs to the save of that step.

    Args:
        trainer: of the trial, as it was built on the base.
        probe: of the trial.
        reward: what the trainer rewards with.
        saving: how to save.
        identity: written into saves.
        clock: the seconds that the trial has taken, as ``spent`` gives them back.
    """

    def __init__(
        self,
        trainer: Any,
        probe: Probe,
        reward: Any,
        *,
        saving: Saving,
        identity: dict[str, Any],
        clock: Callable[[], dict[str, float]],
    ) -> None:
        self._trainer = trainer
        self._probe = probe
        self._reward = reward
        self._saving = saving
        self._identity = _plain(identity)
        self._clock = clock
        self._digests: dict[str, str] = {}
        self._saved_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Restore what the trainer itself has not."""
        if self._saving.resume_from is not None:
            self._restore(self._saving.resume_from)
            batches = given["train_dataloader"].batch_sampler
            sampler = getattr(batches, "batch_sampler", batches).sampler
            for _ in range(int(state.epoch)):  # its generator goes on from epoch to epoch
                deque(sampler, maxlen=0)
        self._saved_at = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Save after a step, if it is time to.

        The row of a step is the last that is made of it; what is drawn next belongs to the next.
        """
        is_due = time.monotonic() - self._saved_at >= self._saving.interval_s
        if "loss" not in logs or not is_due or state.global_step == state.max_steps:
            return
        folder = Path(self._trainer.args.output_dir) / "save"
        try:
            self._write(folder)
            self._saving.put(folder, self._probe.out_dir)
        except (OSError, RuntimeError) as error:  # the second is torch.save's
            reason = str(error).partition("\n")[0]
            self._saving.warn(
                f"step {state.global_step} could not be saved ({reason}); training goes on, but "
                "after a kill it would go on from an earlier step: free space"
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._saved_at = time.monotonic()

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        trainer = self._trainer
        # Not ``save_model``: that may rename weights to how a hub has them.
        torch.save(trainer.model.state_dict(), folder / WEIGHTS_NAME)
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_rng_state(str(folder))
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        torch.save(self._beyond(), folder / _STATE)
        info = {
            "step": trainer.state.global_step,
            "identity": self._identity,
            "spent": self._clock(),
            "files": {file.name: _digest(file) for file in sorted(folder.iterdir())},
            "trial_files": self._trial_files(),
        }
        (folder / INFO).write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")

    def _trial_files(self) -> dict[str, str]:
        """Files that the trial has left so far, with their hashes; none is ever changed."""
        trial_dir, scratch = self._probe.out_dir, Path(self._trainer.args.output_dir)
        for file in sorted(trial_dir.rglob("*")):
            name = file.relative_to(trial_dir).as_posix()
            if name not in self._digests and file.is_file() and scratch not in file.parents:
                self._digests[name] = _digest(file)
        return self._digests

    def _beyond(self) -> dict[str, Any]:
        """What a trainer of transformers does not save, as plain data and tensors."""
        trainer = self._trainer
        of_trl = {name: getattr(trainer, name) for name in _OF_TRL if hasattr(trainer, name)}
        if "_buffered_inputs" in of_trl:
            reused = trainer.args.steps_per_generation * trainer.num_iterations
            if trainer._step % reused == 0:  # used up
                of_trl["_buffered_inputs"] = None
        return {
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
        for name, value in send_to_device(state["trl"], self._trainer.args.device).items():
            setattr(self._trainer, name, value)
        for name, companion in self._companions():
            companion.load_state_dict(state["companions"][name])
        self._probe.load_state_dict(state["probe"])
        if isinstance(self._reward, Seeded):
            self._reward.num_calls = state["reward_calls"]


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps({**identity, "format of saves": _FORMAT}))
    return plain


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
