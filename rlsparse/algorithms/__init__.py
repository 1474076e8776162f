"""Training algorithms: one file each, over TRL where TRL has them.

A new algorithm is one class in ``config.py``, one file here with a ``build`` function, and one
line in ``ALGORITHMS``. ``build`` returns a transformers ``Trainer`` that is ready to train and
sets every field that defines the algorithm, because TRL's defaults differ from the papers.
"""

from collections.abc import Callable
from typing import Any

from rlsparse.algorithms import dpo, grpo, kto, orpo, ppo, prime, rft, rloo, sft, simpo
from rlsparse.algorithms.context import TrialContext

ALGORITHMS: dict[str, Callable[[TrialContext], Any]] = {
    "sft": sft.build,
    "rft": rft.build,
    "dpo": dpo.build,
    "simpo": simpo.build,
    "orpo": orpo.build,
    "kto": kto.build,
    "grpo": grpo.build,
    "rloo": rloo.build,
    "ppo": ppo.build,
    "prime": prime.build,
}

__all__ = ["ALGORITHMS", "TrialContext"]
