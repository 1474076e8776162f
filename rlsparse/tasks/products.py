"""Products such as ``12 * 34 =``, from reasoning-gym's ``products``."""

from collections.abc import Iterator

from rlsparse.tasks.reasoning import ReasoningTask, drawn


class Products(ReasoningTask):
    """Products of whole numbers."""

    version = "1"
    knobs = ("num_terms", "num_digits")

    @staticmethod
    def draw(num_terms: int, num_digits: int) -> Iterator[tuple[str, str]]:
        """See ``ReasoningTask.draw``; every number has ``num_digits`` digits."""
        for item in drawn(
            "products",
            min_terms=num_terms,
            max_terms=num_terms,
            min_digits=num_digits,
            max_digits=num_digits,
        ):
            yield item["metadata"]["expression"], item["answer"]
