"""Shared by the tests of training: the tiny base, and a factory of very small trials."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrialConfig
from rlsparse.models import TINY

SMALL = {
    "task": {"num_train_problems": 16, "num_eval_problems": 16},
    "train": {"num_steps": 2, "batch_size": 8, "learning_rate": 1e-4, "precision": "bf16"},
}


@dataclass(frozen=True)
class Base:
    """A base model and its content hash."""

    path: Path
    fingerprint: str


@pytest.fixture(scope="session")
def base() -> Base:
    """The tiny base that ships with the project."""
    return Base(TINY, fingerprint(Checkpoint.open(TINY)))


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
