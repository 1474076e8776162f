"""Sums such as ``4 - 1 + 7 =``, from reasoning-gym's ``chain_sum``.

Reduced to the bare expression, so that a model with a vocabulary of digits can be trained on it
in a minute; ``num_shots`` puts solved problems before the prompt for general models.
"""

import hashlib
from functools import lru_cache

import reasoning_gym

from rlsparse.config import ChainSumConfig
from rlsparse.errors import ConfigError
from rlsparse.tasks.problem import Problem, Split

_SHARES: dict[Split, float] = {"pretrain": 0.50, "train": 0.25, "validation": 0.08, "test": 0.17}
_NUM_DRAWS = 20_000
_DRAW_SEED = 0


class ChainSum:
    """Chain sums in four splits that are disjoint by problem text.

    A problem belongs to a split by the sha256 of its text, whatever the seed, the difficulty or
    the number of draws, so that no study can train on what another one tests.
    """

    version = "1"

    def __init__(self, config: ChainSumConfig) -> None:
        self.config = config
        self.max_completion_tokens = config.max_completion_tokens

    def problems(self, split: Split, count: int | None = None) -> list[Problem]:
        """The problems of a split, in a fixed order that is unrelated to their content.

        Raises:
            ConfigError: the split has fewer than ``count`` distinct problems.
        """
        splits = _splits(self.config.num_terms, self.config.num_digits)
        expressions = splits[split]
        if count is not None and count > len(expressions):
            raise ConfigError(
                f"task chain_sum with num_terms {self.config.num_terms} and num_digits "
                f"{self.config.num_digits} has {len(expressions)} distinct {split} problems, "
                f"{count} were asked for; raise num_terms or num_digits, or ask for fewer"
            )
        shots = "".join(
            f"{expression} = {answer}\n"
            for expression, answer in splits["pretrain"][: self.config.num_shots]
        )
        return [
            Problem(f"{shots}{expression} =", f" {answer}", answer)
            for expression, answer in expressions[:count]
        ]

    def grade(self, completion: str, answer: str) -> float:
        """1 if the first line of the completion is the answer and nothing else, else 0."""
        lines = completion.strip().splitlines()
        return float(bool(lines) and lines[0].strip() == answer)


@lru_cache(maxsize=8)
def _splits(num_terms: int, num_digits: int) -> dict[Split, list[tuple[str, str]]]:
    drawn = reasoning_gym.create_dataset(
        "chain_sum",
        seed=_DRAW_SEED,
        size=_NUM_DRAWS,
        min_terms=num_terms,
        max_terms=num_terms,
        min_digits=num_digits,
        max_digits=num_digits,
    )
    answers = {item["metadata"]["expression"]: item["answer"] for item in drawn}
    hashed = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in answers)
    splits: dict[Split, list[tuple[str, str]]] = {split: [] for split in _SHARES}
    for digest, text in hashed:
        # The order comes from the leading digits, the split from others: unrelated.
        position = int(digest[-8:], 16) / 16**8
        for split, share in _SHARES.items():
            if position < share or split == "test":
                splits[split].append((text, answers[text]))
                break
            position -= share
    return splits
