"""Sums such as ``4 - 1 + 7 =``, from reasoning-gym's ``chain_sum``."""

from collections.abc import Iterator

from rlsparse.tasks.reasoning import ReasoningTask, drawn


class ChainSum(ReasoningTask):
    """Sums and differences; the tiny base was pretrained on its pretrain split."""

    version = "1"
    knobs = ("num_terms", "num_digits")

    @staticmethod
    def draw(num_terms: int, num_digits: int) -> Iterator[tuple[str, str]]:
        """See ``ReasoningTask.draw``; every number has ``num_digits`` digits."""
        for item in drawn(
            "chain_sum",
            min_terms=num_terms,
            max_terms=num_terms,
            min_digits=num_digits,
            max_digits=num_digits,
        ):
            yield item["metadata"]["expression"], item["answer"]
