"""What a task is made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Split = Literal["pretrain", "train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt`` is what the model reads, ``completion`` the gold text after it."""

    prompt: str
    completion: str
    answer: str


class Task(Protocol):
    """What training and evaluation need of a task."""

    max_completion_tokens: int

    @property
    def version(self) -> str:
        """Changes whenever problems, splits or grades change; part of the identity of a trial."""

    def problems(self, split: Split, count: int | None = None) -> Sequence[Problem]:
        """The problems of a split, in a fixed order; the first ``count`` of them if given."""

    def grade(self, completion: str, answer: str) -> float:
        """Grade in [0, 1] of the text that a model wrote after the prompt."""


def with_shots(problems: Iterable[Problem], shots: Sequence[Problem]) -> list[Problem]:
    """The problems with solved ones before each prompt, one a line."""
    shown = "".join(f"{shot.prompt}{shot.completion}\n" for shot in shots)
    return [replace(problem, prompt=shown + problem.prompt) for problem in problems]


def split_of(digest: str, shares: dict[Split, float]) -> Split:
    """The split of a problem, by the last 32 bits of its hash.

    An order by the hash is one by its first digits, and so unrelated.
    """
    position = int(digest[-8:], 16) / 16**8
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return "test"
