"""A trial that goes on from a save ends with the bits of one that nothing disturbed."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Base, Trained

from rlsparse import saves, tables
from rlsparse.algorithms import ALGORITHMS
from rlsparse.config import TrialConfig
from rlsparse.errors import CheckpointError, RlsparseWarning
from rlsparse.saves import Saving
from rlsparse.train import identity, train_trial

TRIAL = "0123456789ab"
MAY_DIFFER = ("wall_s", "cpu_s", "peak_bytes")  # as all that ends in _cpu_s
# An epoch takes 2 steps, or 3 of kto, or one rollout: 2 batches in 4 micro-batches, 2 passes.
NUM_STEPS = 5
PROBE = {
    "snapshots": [2, 4], "score_snapshots": False, "k_steps": [2, 4], "step_masks": True,
    "casts": True, "update_interval": 1,
}  # fmt: skip
ONLINE = ("grpo", "rloo", "ppo", "prime")
ROLLOUT = {"num_generations": 2, "steps_per_rollout": 2, "num_iterations": 2}


@dataclass
class Shelf:
    """Keeps every save of a trial, with the files that the trial had left then."""

    folder: Path

    def put(self, save: Path, trial_dir: Path) -> None:
        info = json.loads((save / saves.INFO).read_text())
        shutil.copytree(save, self.save(info["step"]))
        for name in info["trial_files"]:
            copy = self.trial(info["step"]) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trial_dir / name, copy)

    def save(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def trial(self, step: int) -> Path:
        return self.folder / f"trial-{step}"


def run(config: TrialConfig, base: Base, folder: Path, saving: Saving | None = None) -> Trained:
    """Train, with all random states in some place or other at the start."""
    random.random(), np.random.rand(7), torch.rand(5)
    summary = train_trial(
        config,
        trial_id=TRIAL,
        base_dir=base.path,
        base_fingerprint=base.fingerprint,
        out_dir=folder,
        saving=saving,
    )
    return Trained(config, base, folder, summary, [])


def files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    summary = json.loads(found["summary.json"])
    same = {k: v for k, v in summary.items() if not k.endswith(MAY_DIFFER)}
    return found | {"summary.json": same}


def assert_same_files(one: Path, other: Path) -> None:
    ours, theirs = files(one), files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


def resume(config: TrialConfig, base: Base, shelf: Shelf, step: int) -> Path:
    """Go on from a step, in a folder of its own."""
    folder = shelf.trial(step)
    saves.check(shelf.save(step), folder, identity(config, TRIAL, base.fingerprint, 1))
    run(config, base, folder, Saving(1e9, shelf.put, resume_from=shelf.save(step)))
    return folder


def assert_resumes(config: TrialConfig, base: Base, shelf: Shelf, *steps: int) -> None:
    """Compare a trial that is saved after every step with what goes on from some of them."""
    undisturbed = shelf.folder / "undisturbed"
    run(config, base, undisturbed, Saving(0, shelf.put))
    last = tables.read(undisturbed / "steps.parquet", "steps").to_pylist()[-1]
    assert last["update_sparsity_k1"] < 1  # else there is nothing that could go wrong
    for step in steps:
        assert_same_files(resume(config, base, shelf, step), undisturbed)


@pytest.fixture
def cut(tiny_trial: Callable[..., TrialConfig]) -> Callable[..., TrialConfig]:
    """A trial whose steps, rollouts and epochs end in different places."""

    def make(name: str, **given: Any) -> TrialConfig:
        own = ROLLOUT if name in ONLINE else {}
        algorithm = {**own, **given.pop("algorithm", {})}
        return tiny_trial(
            name,
            algorithm=algorithm,
            task={"num_train_problems": 12, "num_eval_problems": 8},
            probe=PROBE,
            **{"num_steps": NUM_STEPS, "gradient_accumulation_steps": 2, **given},
        )

    return make


CASES: dict[str, dict[str, Any]] = {
    "sft": {"precision": "bf16-weights"},
    "rft": {"precision": "bf16-weights", "optimizer": "sgd-momentum", "learning_rate": 0.3},
    "dpo": {"precision": "bf16", "lr_schedule": "cosine", "warmup_steps": 4},
    "simpo": {"precision": "fp32", "optimizer": "sgd-momentum", "lr_schedule": "linear"},
    "orpo": {"precision": "fp32", "trainable_layers": [1], "max_grad_norm": None},
    "kto": {"precision": "bf16-mixed", "warmup_steps": 4},
    "grpo": {"precision": "bf16-mixed"},
    "rloo": {"precision": "fp32", "algorithm": {"reward": "random"}},
    "ppo": {"precision": "bf16-weights"},
    "prime": {
        "precision": "bf16-weights",
        "num_steps": 7,  # what the reward model learns in a rollout acts in the next
        "algorithm": {
            "num_iterations": 1, "reward_learning_rate": 1e-3,
            "min_accuracy": 0.0, "max_accuracy": 1.0,
        },
    },
}  # fmt: skip
"""Every algorithm, each under another regime."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_goes_on_to_the_same_bits(name, cut, base, shelf):
    # The middle of an epoch and, where there is one, of a rollout; the end of both.
    assert_resumes(cut(name, **CASES[name]), base, shelf, *([3, 4] if name in ONLINE else [3]))


def test_saving_changes_nothing(cut, base, shelf, tmp_path):
    config = cut("ppo")
    run(config, base, tmp_path / "plain")
    run(config, base, tmp_path / "saved", Saving(0, shelf.put))
    assert_same_files(tmp_path / "plain", tmp_path / "saved")
    assert sorted(p.name for p in shelf.folder.glob("step-*")) == [
        "step-1", "step-2", "step-3", "step-4"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_save(tmp_path_factory, tiny_trial, base) -> tuple[TrialConfig, Shelf]:
    """A trial that was saved after its first step, its snapshot."""
    config, shelf = tiny_trial(probe={"snapshots": [1]}), Shelf(tmp_path_factory.mktemp("shelf"))
    run(config, base, shelf.folder / "whole", Saving(0, shelf.put))
    return config, shelf


@pytest.fixture
def copied(one_save, tmp_path) -> Shelf:
    shutil.copytree(one_save[1].folder, tmp_path / "copy")
    return Shelf(tmp_path / "copy")


def test_a_save_says_whose_it_is(one_save, base):
    config, shelf = one_save
    own = identity(config, TRIAL, base.fingerprint, 1)
    assert saves.check(shelf.save(1), shelf.trial(1), own)["step"] == 1
    for other, named in [
        (identity(config, "f" * 12, base.fingerprint, 1), "trial"),
        (identity(config, TRIAL, base.fingerprint, 2), "num_threads"),
        (identity(config.model_copy(update={"seed": 1}), TRIAL, "0", 1), "base, config"),
        ({**own, "torch": "2.0"}, "torch"),
    ]:
        with pytest.raises(CheckpointError, match=f"made with other {named};"):
            saves.check(shelf.save(1), shelf.trial(1), other)


@pytest.mark.parametrize("name", ["optimizer.pt", "rlsparse.pt", "trainer_state.json", "save.json"])
def test_a_damaged_save_is_refused(name, one_save, copied, base):
    own = identity(one_save[0], TRIAL, base.fingerprint, 1)
    file = copied.save(1) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-1] if name == "save.json" else content)
    with pytest.raises(CheckpointError, match="cannot continue from the save"):
        saves.check(copied.save(1), copied.trial(1), own)


def test_a_save_without_a_patch_of_the_trial_is_refused(one_save, copied, base):
    own = identity(one_save[0], TRIAL, base.fingerprint, 1)
    (patch,) = copied.trial(1).rglob("*.patch.safetensors")
    patch.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.patch\.safetensors"):
        saves.check(copied.save(1), copied.trial(1), own)


def test_times_go_on(one_save, copied, base):
    config, _ = one_save
    save = copied.save(1)
    info = json.loads((save / saves.INFO).read_text())
    assert info["spent"]["cpu_s"] > 0
    info["spent"] = {"wall_s": 7000.0, "cpu_s": 5000.0}
    (save / saves.INFO).write_text(json.dumps(info))
    saving = Saving(1e9, copied.put, resume_from=save)
    summary = run(config, base, copied.trial(1), saving).summary
    assert 7000 < summary["wall_s"] < 7500
    assert 5000 < summary["cpu_s"] < 5500


@pytest.mark.parametrize("broken", ["torch.save", "put"])
def test_a_save_that_fails_is_a_warning(broken, one_save, base, shelf, tmp_path, monkeypatch):
    config, good = one_save

    def fail(*_: Any) -> None:
        raise {"put": OSError(28, "No space left"), "torch.save": RuntimeError("writer failed")}[
            broken
        ]

    if broken == "torch.save":
        monkeypatch.setattr(torch, "save", fail)
    with pytest.warns(RlsparseWarning, match=r"step 1 could not be saved \(.*(space left|failed)"):
        run(config, base, tmp_path / "trial", Saving(0, fail if broken == "put" else shelf.put))
    assert_same_files(tmp_path / "trial", good.folder / "whole")


def test_no_save_before_its_time(tiny_trial, base, shelf, tmp_path):
    run(tiny_trial(), base, tmp_path / "trial", Saving(1e9, shelf.put))
    assert not shelf.folder.exists()
