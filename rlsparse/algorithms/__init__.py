"""Training algorithms: one file each, over TRL where TRL has them.

A new algorithm is one class in ``config.py``, one file here with a ``build`` function, and one
line in ``ALGORITHMS``. ``build`` returns a transformers ``Trainer`` that is ready to train and
sets every field that defines the algorithm, because TRL's defaults differ from the papers.
"""

from collections.abc import Callable
from typing import Any

from rlsparse.algorithms import dpo, grpo, sft
from rlsparse.algorithms.context import TrialContext

ALGORITHMS: dict[str, Callable[[TrialContext], Any]] = {
    "sft": sft.build,
    "dpo": dpo.build,
    "grpo": grpo.build,
}

__all__ = ["ALGORITHMS", "TrialContext"]
