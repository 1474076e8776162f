"""Shared by the tests of training: base models, very small trials, and those that have run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrialConfig
from rlsparse.models import TINY
from rlsparse.patch import PATCH_FILE
from rlsparse.tables import snapshot_folder

SMALL: dict[str, dict] = {
    "task": {"num_train_problems": 16, "num_eval_problems": 16},
    "train": {"num_steps": 2, "batch_size": 8, "learning_rate": 1e-4, "precision": "bf16"},
}


@dataclass(frozen=True)
class Base:
    """A base model and its content hash."""

    path: Path
    fingerprint: str


@dataclass(frozen=True)
class Trained:
    """A trial that has run, and what it left."""

    config: TrialConfig
    base: Base
    folder: Path
    summary: dict[str, Any]
    progress: list[dict[str, Any]]

    def patch(self, step: int | None = None) -> Path:
        """The patch of a snapshot, the last one if ``step`` is None."""
        return self.folder / snapshot_folder(step or self.config.train.num_steps) / PATCH_FILE


@pytest.fixture(scope="session")
def base() -> Base:
    """The tiny base that ships with the project."""
    return Base(TINY, fingerprint(Checkpoint.open(TINY)))


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory) -> Base:
    """The tiny base stored in fp32, its weights moved off the bf16 grid."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("wide") / "base"
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return Base(folder, fingerprint(Checkpoint.open(folder)))


@pytest.fixture(scope="session")
def tiny_trial() -> Callable[..., TrialConfig]:
    """Factory of configurations that train in a second: ``tiny_trial("grpo", precision="fp32")``.

    Keyword arguments are fields of ``train``; ``algorithm``, ``task`` and ``probe`` take mappings,
    and ``seed`` and ``keep_checkpoints`` values.
    """

    def make(name: str = "sft", **given) -> TrialConfig:
        return TrialConfig.model_validate(
            {
                "algorithm": {"name": name, **given.pop("algorithm", {})},
                "task": {**SMALL["task"], **given.pop("task", {})},
                "probe": given.pop("probe", {}),
                "seed": given.pop("seed", 0),
                "keep_checkpoints": given.pop("keep_checkpoints", False),
                "train": {**SMALL["train"], **given},
            }
        )

    return make


@pytest.fixture
def context_of(tmp_path):
    """What a trial gives the ``build`` of its algorithm: ``context_of(config, base)``."""
    from rlsparse.algorithms import TrialContext
    from rlsparse.models.loading import load_model, load_tokenizer
    from rlsparse.tasks import load_reward, load_task

    def make(config: TrialConfig, base: Base) -> TrialContext:
        task = load_task(config.task)
        reward = getattr(config.algorithm, "reward", "task")
        return TrialContext(
            config=config,
            model=load_model(base.path, config.train.precision),
            tokenizer=load_tokenizer(base.path),
            task=task,
            problems=list(task.problems("train", config.task.num_train_problems)),
            reward=load_reward(reward, task, seed=config.sampling_seed),
            scratch_dir=tmp_path,
        )

    return make


@pytest.fixture(scope="session")
def run_trial(tmp_path_factory) -> Callable[..., Trained]:
    """Runs a trial in this process, every time it is called; ``mask`` is what it trains."""
    from rlsparse.train import train_trial

    def run(config: TrialConfig, base: Base, mask: Any = None) -> Trained:
        folder, progress = tmp_path_factory.mktemp("trial"), []
        summary = train_trial(
            config,
            trial_id="0123456789ab",
            base_dir=base.path,
            base_fingerprint=base.fingerprint,
            out_dir=folder,
            on_progress=progress.append,
            mask=mask,
        )
        return Trained(config, base, folder, summary, progress)

    return run


@pytest.fixture(scope="session")
def trained(run_trial) -> Callable[[TrialConfig, Base], Trained]:
    """The trial of a configuration, run once per session."""
    done: dict[tuple[str, Base], Trained] = {}

    def get(config: TrialConfig, base: Base) -> Trained:
        key = config.model_dump_json(), base
        if key not in done:
            done[key] = run_trial(config, base)
        return done[key]

    return get
