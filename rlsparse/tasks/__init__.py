"""Tasks: a data set and its grader in one file; the same grader rewards and evaluates.

A new task is one class in ``config.py``, one file here that satisfies ``Task``, and one line in
``TASKS``.
"""

from collections.abc import Sequence
from typing import Protocol

from rlsparse.config import TaskConfig
from rlsparse.tasks.chain_sum import ChainSum
from rlsparse.tasks.problem import Problem, Split


class Task(Protocol):
    """What training and evaluation need of a task."""

    version: str
    """Changes whenever problems, splits or grades change; part of the identity of a trial."""
    max_completion_tokens: int

    def problems(self, split: Split, count: int | None = None) -> Sequence[Problem]:
        """The problems of a split, in a fixed order; the first ``count`` of them if given."""

    def grade(self, completion: str, answer: str) -> float:
        """Grade in [0, 1] of the text that a model wrote after the prompt."""


TASKS = {"chain_sum": ChainSum}


def load_task(config: TaskConfig) -> Task:
    """The task that a configuration names."""
    return TASKS[config.name](config)


def task_version(config: TaskConfig) -> str:
    """Version of the task that a configuration names, without loading its data."""
    return TASKS[config.name].version


__all__ = ["TASKS", "Problem", "Split", "Task", "load_task", "task_version"]
