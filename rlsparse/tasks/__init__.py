"""Tasks: a data set and its grader in one file; the same grader rewards and evaluates.

A new task is one class in ``task_config.py``, one file here that satisfies ``Task``, and one line
in ``TASKS``. Importing this package imports neither torch nor any library of data.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsparse.config import TrialConfig
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.mask_config import FileMask, leaves
from rlsparse.masks import bits_of, fingerprint, read_masks
from rlsparse.task_config import TaskConfig
from rlsparse.tasks.basic_arithmetic import BasicArithmetic
from rlsparse.tasks.chain_sum import ChainSum
from rlsparse.tasks.dataset import DatasetTask
from rlsparse.tasks.problem import Problem, Split, Task
from rlsparse.tasks.products import Products
from rlsparse.tasks.prompts import render_prompts
from rlsparse.tasks.rewards import Reward, load_reward
from rlsparse.tasks.rows import content_hash, stamp
from rlsparse.tasks.simple_equations import SimpleEquations
from rlsparse.tasks.user_code import code_hash

TASKS: dict[str, Callable[[Any], Task]] = {
    "chain_sum": ChainSum,
    "products": Products,
    "basic_arithmetic": BasicArithmetic,
    "simple_equations": SimpleEquations,
    "dataset": DatasetTask,
}


def load_task(config: TaskConfig) -> Task:
    """The task that a configuration names."""
    return TASKS[config.name](config)


def data_version(config: TrialConfig) -> str:
    """What decides a trial's data and rewards beside its configuration; part of its identity.

    The task's version, followed by hashes of the code of a user's reward and of a user's
    demonstrations or preferences, where the algorithm has them, and of the bits of mask files.

    Raises:
        ConfigError: a user's file, data set or function is not there, or a mask file is damaged.
    """
    reward = getattr(config.algorithm, "reward", "task")
    data = getattr(config.algorithm, "data", "gold")
    parts = [load_task(config.task).version]
    if ":" in reward:
        parts.append(f"reward {code_hash(reward)}")
    if data not in ("gold", "sampled"):
        parts.append(f"data {content_hash(data)}")
    files = [leaf.file for leaf in leaves(config.train.mask) if isinstance(leaf, FileMask)]
    parts += [f"mask {_mask_hash(file, stamp(file))}" for file in files]
    return ", ".join(parts)


@lru_cache(maxsize=64)
def _mask_hash(file: str, stamp: tuple[int, ...]) -> str:
    """Hash of the bits of a mask file, which is read again when its stamp has changed."""
    if "://" not in file and not Path(file).is_file():
        raise ConfigError(
            f"train.mask: no mask file {file}: give a path, relative to the working directory "
            f"({Path.cwd()}), or a URL"
        )
    try:
        return fingerprint(bits_of(read_masks(file)))[:16]
    except CheckpointError as error:
        raise ConfigError(f"train.mask: {error}") from error


__all__ = [
    "TASKS",
    "Problem",
    "Reward",
    "Split",
    "Task",
    "data_version",
    "load_reward",
    "load_task",
    "render_prompts",
]
