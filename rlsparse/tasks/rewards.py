"""What training rewards completions with: the task's grader, the user's function, a surrogate.

The surrogates ask whether an effect needs a reward at all: their rewards hold no information about
which completion is right. They draw from generators of their own.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

import numpy as np

from rlsparse.errors import TrialError
from rlsparse.tasks.problem import Task
from rlsparse.tasks.user_code import explain, load_function


class Reward(Protocol):
    """Rewards completions; deterministic given its seed and the order of calls."""

    def __call__(
        self, *, prompts: list[str], completions: list[str], answers: list[str]
    ) -> list[float]:
        """One finite reward per completion, in their order."""


def load_reward(name: str, task: Task, *, seed: int) -> Reward:
    """The reward that a configuration names.

    Args:
        name: ``task``, ``shuffled``, ``random`` or ``module:function``.
        task: its grader rewards, or is shuffled.
        seed: seed of the surrogates.

    Raises:
        ConfigError: there is no such function.
    """
    match name:
        case "task":
            return Graded(task.grade)
        case "shuffled":
            return Shuffled(Graded(task.grade), seed)
        case "random":
            return CoinToss(seed)
    return UserReward(name)


class Graded:
    """The grade of each completion."""

    def __init__(self, grade: Callable[[str, str], float]) -> None:
        self._grade = grade

    def __call__(
        self, *, prompts: list[str], completions: list[str], answers: list[str]
    ) -> list[float]:
        """See ``Reward``."""
        return [self._grade(c, a) for c, a in zip(completions, answers, strict=True)]


class Seeded:
    """A reward that draws from a generator of its own per call: no call depends on another's size.

    Attributes:
        num_calls: calls so far; with the seed they decide what is drawn next.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.num_calls = 0

    def _next_generator(self) -> np.random.Generator:
        generator = np.random.default_rng([self._seed, self.num_calls])
        self.num_calls += 1
        return generator


class Shuffled(Seeded):
    """Rewards permuted among the completions of the same prompt in a call.

    Each prompt keeps its rewards, and so its mean, spread and difficulty.
    """

    def __init__(self, reward: Reward, seed: int) -> None:
        super().__init__(seed)
        self._reward = reward

    def __call__(
        self, *, prompts: list[str], completions: list[str], answers: list[str]
    ) -> list[float]:
        """See ``Reward``."""
        rewards = self._reward(prompts=prompts, completions=completions, answers=answers)
        generator = self._next_generator()
        places: dict[str, list[int]] = defaultdict(list)
        for place, prompt in enumerate(prompts):
            places[prompt].append(place)
        shuffled = list(rewards)
        for own in places.values():
            for place, source in zip(own, generator.permutation(own), strict=True):
                shuffled[place] = rewards[source]
        return shuffled


class CoinToss(Seeded):
    """0 or 1 with equal chances, whatever the completion."""

    def __call__(
        self, *, prompts: list[str], completions: list[str], answers: list[str]
    ) -> list[float]:
        """See ``Reward``."""
        tosses: list[float] = self._next_generator().integers(2, size=len(completions)).tolist()
        return [float(toss) for toss in tosses]


class UserReward:
    """A user's function, its result checked.

    It is called with lists ``prompts``, ``completions`` and ``answers`` as keywords.
    """

    def __init__(self, name: str) -> None:
        self._name = f"reward function {name}"
        self._function = load_function(name)

    def __call__(
        self, *, prompts: list[str], completions: list[str], answers: list[str]
    ) -> list[float]:
        """See ``Reward``.

        Raises:
            TrialError: the function raised, or its result is not one finite number per completion.
        """
        try:
            result = self._function(prompts=prompts, completions=completions, answers=answers)
        except Exception as error:  # a user's function may raise anything
            raise TrialError(explain(self._name, error)) from error
        return self._checked(result, len(completions))

    def _checked(self, result: Any, count: int) -> list[float]:
        rewards = result.tolist() if hasattr(result, "tolist") else result
        allowed = f"allowed is a list of {count} finite numbers, one per completion"
        if not isinstance(rewards, list | tuple):
            raise TrialError(f"{self._name} returned {_brief(result)}; {allowed}")
        if len(rewards) != count:
            raise TrialError(f"{self._name} returned {len(rewards)} rewards; {allowed}")
        for place, reward in enumerate(rewards):
            if not isinstance(reward, Real) or not math.isfinite(reward):
                raise TrialError(
                    f"{self._name} returned {_brief(reward)} for completion {place}; {allowed}"
                )
        return [float(reward) for reward in rewards]


def _brief(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
