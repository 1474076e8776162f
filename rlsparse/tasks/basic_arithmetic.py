"""Expressions such as ``3 * (4 + 2) =``, from reasoning-gym's ``basic_arithmetic``."""

import re
from collections.abc import Iterator
from fractions import Fraction

from rlsparse.errors import ConfigError
from rlsparse.task_config import BasicArithmeticConfig
from rlsparse.tasks.reasoning import ReasoningTask, drawn

_LARGEST_DIVIDED = 8
"""reasoning-gym looks for divisors by trial up to the square root of what it divides."""


class BasicArithmetic(ReasoningTask):
    """Whole numbers of either sign, parentheses, and the operators that are configured.

    To make divisions come out even, reasoning-gym adds terms, larger numbers and plus signs, and
    where they do not, it rounds: only problems that are as configured and exact are kept.
    """

    version = "1"
    knobs = ("num_terms", "num_digits", "operators")

    def __init__(self, config: BasicArithmeticConfig) -> None:
        super().__init__(config)
        size = config.num_terms * config.num_digits
        if "/" in config.operators and (set(config.operators) == {"/"} or size > _LARGEST_DIVIDED):
            raise ConfigError(
                f"task basic_arithmetic cannot divide with operators {config.operators!r}, "
                f"num_terms {config.num_terms} and num_digits {config.num_digits}: it needs "
                f"another operator beside /, and num_terms x num_digits at most {_LARGEST_DIVIDED}"
            )

    @staticmethod
    def draw(num_terms: int, num_digits: int, operators: str) -> Iterator[tuple[str, str]]:
        """See ``ReasoningTask.draw``; numbers have at most ``num_digits`` digits."""
        for item in drawn(
            "basic_arithmetic",
            min_terms=num_terms,
            max_terms=num_terms,
            min_digits=num_digits,
            max_digits=num_digits,
            operators=list(operators),
            allow_negation=False,
        ):
            text = item["metadata"]["expression"].replace("( ", "(").replace(" )", ")")
            numbers = re.findall(r"\d+", text)
            used = {*re.findall(r"(?<= )[-+*/](?= )", text)}
            exact = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
            if (
                len(numbers) == num_terms
                and max(map(len, numbers)) <= num_digits
                and used <= {*operators}
                and exact == int(item["answer"])
            ):
                yield text, item["answer"]
