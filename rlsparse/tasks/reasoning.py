"""What the families of reasoning-gym share: draws without repeats, in four disjoint splits."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar

from rlsparse.errors import ConfigError
from rlsparse.task_config import ProblemSetConfig
from rlsparse.tasks.graders import exact_grade
from rlsparse.tasks.problem import Problem, Split, split_of, with_shots

_SHARES: dict[Split, float] = {"pretrain": 0.50, "train": 0.25, "validation": 0.08, "test": 0.17}
_NUM_DRAWS = 20_000
_DRAW_SEED = 0

Draw = Callable[..., Iterable[tuple[str, str]]]


class ReasoningTask(ABC):
    """Problems of one family of reasoning-gym, in four splits that are disjoint by problem text.

    A problem belongs to a split by the sha256 of its text, whatever the seed, the difficulty or
    the number of draws, so that no study can train on what another one tests. A family says how
    problems are drawn; by default a problem is a bare expression with a whole number as answer,
    so that a model with a vocabulary of digits can be trained on it.

    Attributes:
        version: changes whenever problems, splits or grades change.
        knobs: fields of the configuration that set the difficulty; arguments of ``draw``.
    """

    version: ClassVar[str]
    knobs: ClassVar[tuple[str, ...]]

    def __init__(self, config: ProblemSetConfig) -> None:
        self.config: Any = config
        self.max_completion_tokens = config.max_completion_tokens

    @staticmethod
    @abstractmethod
    def draw(*knobs: Any) -> Iterable[tuple[str, str]]:
        """Text and answer of many problems of one difficulty; repeats are dropped later."""

    def prompt(self, text: str) -> str:
        """What a model reads of a problem."""
        return f"{text} ="

    def problems(self, split: Split, count: int | None = None) -> list[Problem]:
        """The problems of a split, in a fixed order that is unrelated to their content.

        Raises:
            ConfigError: the split has fewer than ``count`` distinct problems.
        """
        splits = split_by_text(self.draw, *(getattr(self.config, knob) for knob in self.knobs))
        if count is not None and count > len(splits[split]):
            difficulty = " and ".join(f"{knob} {getattr(self.config, knob)}" for knob in self.knobs)
            raise ConfigError(
                f"task {self.config.name} with {difficulty} has {len(splits[split])} distinct "
                f"{split} problems, {count} were asked for; raise {' or '.join(self.knobs)}, or "
                "ask for fewer"
            )
        shots = splits["pretrain"][: self.config.num_shots]
        return with_shots(map(self._problem, splits[split][:count]), [*map(self._problem, shots)])

    def _problem(self, drawn: tuple[str, str]) -> Problem:
        text, answer = drawn
        return Problem(self.prompt(text), f" {answer}", answer)

    def grade(self, completion: str, answer: str) -> float:
        """1 if the first line of the completion is the answer and nothing else, else 0."""
        return exact_grade(completion, answer)


def drawn(family: str, *, size: int = _NUM_DRAWS, **options: Any) -> Iterator[dict[str, Any]]:
    """Items of a family of reasoning-gym, always the same."""
    import reasoning_gym

    items = reasoning_gym.create_dataset(family, seed=_DRAW_SEED, size=size, **options)
    for index in range(size):
        with suppress(ZeroDivisionError):  # now and then basic_arithmetic divides by zero
            yield items[index]


@lru_cache(maxsize=16)
def split_by_text(draw: Draw, *knobs: Any) -> dict[Split, list[tuple[str, str]]]:
    """Texts and answers of each split, in the order of a hash."""
    answers = dict(draw(*knobs))
    hashed = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in answers)
    splits: dict[Split, list[tuple[str, str]]] = {split: [] for split in _SHARES}
    for digest, text in hashed:
        splits[split_of(digest, _SHARES)].append((text, answers[text]))
    return splits
