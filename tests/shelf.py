"""Trials that are saved after every step, and go on from any of these saves."""

import json
import random
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsparse import distributed, saves, tables
from rlsparse.config import TrialConfig
from rlsparse.resources import Strategy
from rlsparse.saves import Saving
from rlsparse.train import identity, train_trial

TRIAL = "0123456789ab"
MAY_DIFFER = ("wall_s", "cpu_s", "peak_bytes")  # as all that ends in _cpu_s


# An epoch takes 2 steps, or 3 of kto, or one rollout: 2 batches in 4 micro-batches, 2 passes.
NUM_STEPS = 5
PROBE = {
    "snapshots": [2, 4], "score_snapshots": False, "k_steps": [2, 4], "step_masks": True,
    "step_patches": True, "casts": True, "update_interval": 1,
}  # fmt: skip
ONLINE = ("grpo", "rloo", "ppo", "prime")
ROLLOUT = {"num_generations": 2, "steps_per_rollout": 2, "num_iterations": 2}


def cut(name: str, **given: Any) -> TrialConfig:
    """A trial whose steps, rollouts and epochs end in different places; ``given`` is of train."""
    own = ROLLOUT if name in ONLINE else {}
    train = {"num_steps": NUM_STEPS, "gradient_accumulation_steps": 2, "batch_size": 8}
    return TrialConfig.model_validate(
        {
            "algorithm": {"name": name, **own, **given.pop("algorithm", {})},
            "task": {"num_train_problems": 12, "num_eval_problems": 8},
            "probe": PROBE | given.pop("probe", {}),
            "train": {**train, "learning_rate": 1e-4, **given},
        }
    )


@dataclass
class Shelf:
    """Keeps every save of a trial, with the files that the trial had left then."""

    folder: Path

    def put(self, step: int, part: Path, trial_dir: Path, trial_files: Collection[str]) -> None:
        shutil.copytree(part, self.save(step) / part.name)
        for name in trial_files:
            copy = self.trial(step) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trial_dir / name, copy)

    def complete(self, info: dict[str, Any]) -> None:
        (self.save(info["step"]) / saves.INFO).write_text(json.dumps(info))

    def save(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def trial(self, step: int, rank: int = 0) -> Path:
        """Files of a worker that goes on from a step."""
        return self.folder / f"trial-{step}-{rank}"

    def whole(self, rank: int = 0) -> Path:
        """Files of a worker that nothing disturbs."""
        return self.folder / f"whole-{rank}"


def run(
    config: TrialConfig,
    base: Any,
    folder: Path,
    saving: Saving | None = None,
    strategy: Strategy = "ddp",
    mask: Any = None,
) -> dict[str, Any]:
    """Train, with all random states in some place or other at the start; returns the summary."""
    random.random(), np.random.rand(7), torch.rand(5)
    return train_trial(
        config,
        trial_id=TRIAL,
        base_dir=base.path,
        base_fingerprint=base.fingerprint,
        out_dir=folder,
        strategy=strategy,
        saving=saving,
        mask=mask,
    )


def save_and_go_on(
    rank: int,
    config: TrialConfig,
    base: Any,
    shelf: Shelf,
    steps: Sequence[int],
    strategy: Strategy = "ddp",
    mask: Any = None,
) -> None:
    """Train without a disturbance, and once more from the saves of some steps.

    The first worker's clock says that it is time to save, after every step; no other's ever does.
    """
    interval_s = 0 if rank == 0 else 1e9
    run(config, base, shelf.whole(rank), Saving(interval_s, shelf), strategy, mask)
    maker = identity(config, TRIAL, base.fingerprint, 1, strategy)
    distributed.wait_for_all()  # the first has completed the last save
    for step in steps:
        folder = shelf.trial(step, rank)
        saves.check(shelf.save(step), folder, maker)
        run(config, base, folder, Saving(1e9, shelf, shelf.save(step)), strategy, mask)


def files(folder: Path) -> dict[str, Any]:
    """What a trial left, but for what two runs of it need not share."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "_SUCCESS"  # holds hashes of all
    }
    summary = json.loads(found["summary.json"])
    same = {k: v for k, v in summary.items() if not k.endswith(MAY_DIFFER)}
    return found | {"summary.json": same}


def assert_same_files(one: Path, other: Path) -> None:
    ours, theirs = files(one), files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def assert_went_on(shelf: Shelf, *steps: int) -> None:
    """What went on from a step ended as the trial that nothing disturbed."""
    last = tables.read(shelf.whole() / "steps.parquet", "steps").to_pylist()[-1]
    assert last["update_sparsity_k1"] < 1  # else there is nothing that could go wrong
    for step in steps:
        assert_same_files(shelf.trial(step), shelf.whole())
