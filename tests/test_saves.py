"""A trial that goes on from a save ends with the bits of one that nothing disturbed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Base
from shelf import ONLINE, TRIAL, Shelf, assert_same_files, assert_went_on, cut, run, save_and_go_on

from rlsparse import saves
from rlsparse.algorithms import ALGORITHMS
from rlsparse.config import TrialConfig
from rlsparse.errors import CheckpointError, RlsparseWarning
from rlsparse.saves import Saving
from rlsparse.train import identity


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


def assert_resumes(config: TrialConfig, base: Base, shelf: Shelf, *steps: int) -> None:
    """Compare a trial that is saved after every step with what goes on from some of them."""
    save_and_go_on(0, config, base, shelf, steps)
    assert_went_on(shelf, *steps)


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
def test_every_algorithm_goes_on_to_the_same_bits(name, base, shelf):
    # The middle of an epoch and, where there is one, of a rollout; the end of both.
    assert_resumes(cut(name, **CASES[name]), base, shelf, *([3, 4] if name in ONLINE else [3]))


def test_saving_changes_nothing(base, shelf, tmp_path):
    config = cut("ppo")
    run(config, base, tmp_path / "plain")
    run(config, base, tmp_path / "saved", Saving(0, shelf))
    assert_same_files(tmp_path / "plain", tmp_path / "saved")
    assert sorted(p.name for p in shelf.folder.glob("step-*")) == [
        "step-1", "step-2", "step-3", "step-4"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_save(tmp_path_factory, tiny_trial, base) -> tuple[TrialConfig, Shelf]:
    """A trial that was saved after its first step, its snapshot."""
    config, shelf = tiny_trial(probe={"snapshots": [1]}), Shelf(tmp_path_factory.mktemp("shelf"))
    run(config, base, shelf.whole(), Saving(0, shelf))
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
        (identity(config, TRIAL, base.fingerprint, 1, "fsdp"), "strategy"),
        ({**own, "num_workers": 2}, "num_workers"),
        (identity(config.model_copy(update={"seed": 1}), TRIAL, "0", 1), "base, config"),
        ({**own, "torch": "2.0"}, "torch"),
    ]:
        with pytest.raises(CheckpointError, match=f"made with other {named}$"):
            saves.check(shelf.save(1), shelf.trial(1), other)


PARTS = ["rlsparse.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", [*(f"worker-0/{part}" for part in PARTS), "save.json"])
def test_a_damaged_save_is_refused(name, one_save, copied, base):
    own = identity(one_save[0], TRIAL, base.fingerprint, 1)
    file = copied.save(1) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-1] if name == "save.json" else content)
    with pytest.raises(CheckpointError, match=r"is damaged$|cannot be read"):
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
    saving = Saving(1e9, copied, resume_from=save)
    summary = run(config, base, copied.trial(1), saving)
    assert 7000 < summary["wall_s"] < 7500
    assert 5000 < summary["cpu_s"] < 5500


@pytest.mark.parametrize("broken", ["torch.save", "put", "complete"])
def test_a_save_that_fails_is_a_warning(broken, one_save, base, shelf, tmp_path, monkeypatch):
    config, good = one_save

    def fail(*_: Any) -> None:
        raise RuntimeError("writer failed") if broken == "torch.save" else OSError("No space left")

    monkeypatch.setattr(*((torch, "save") if broken == "torch.save" else (shelf, broken)), fail)
    with pytest.warns(RlsparseWarning, match=r"step 1 could not be saved \(.*(space left|failed)"):
        run(config, base, tmp_path / "trial", Saving(0, shelf))
    assert not (shelf.save(1) / saves.INFO).exists()
    assert_same_files(tmp_path / "trial", good.whole())


def test_no_save_before_its_time(tiny_trial, base, shelf, tmp_path):
    run(tiny_trial(), base, tmp_path / "trial", Saving(1e9, shelf))
    assert not shelf.folder.exists()
