"""Linear equations such as ``Solve for x: 3*x + 5 = 11``, from reasoning-gym."""

from collections.abc import Iterator

from rlsparse.tasks.graders import math_grade
from rlsparse.tasks.reasoning import ReasoningTask, drawn

_ASK = "Solve for x: "


class SimpleEquations(ReasoningTask):
    """Equations with one solution, a whole number; the answer may be free text.

    The unknown is always x: reasoning-gym draws its letter, and one equation under two letters
    would be in two splits.
    """

    version = "1"
    knobs = ("num_terms", "max_value")

    @staticmethod
    def draw(num_terms: int, max_value: int) -> Iterator[tuple[str, str]]:
        """See ``ReasoningTask.draw``; constants and solution lie in 1 ... ``max_value``."""
        for item in drawn(
            "simple_equations",
            size=8_000,  # sympy is slow
            min_terms=num_terms,
            max_terms=num_terms,
            min_value=1,
            max_value=max_value,
        ):
            equation = item["metadata"]["equation"].replace(item["metadata"]["variable"], "x")
            if "x" in equation:  # else it was multiplied by zero
                yield equation, item["answer"]

    def prompt(self, text: str) -> str:
        """See ``ReasoningTask.prompt``."""
        return f"{_ASK}{text}\nAnswer:"

    def grade(self, completion: str, answer: str) -> float:
        """See ``math_grade``; problems that the model goes on to pose itself are not read."""
        return math_grade(completion.partition(_ASK)[0], answer)
