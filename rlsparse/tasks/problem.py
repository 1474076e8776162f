"""What a task is made of."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["pretrain", "train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt`` is what the model reads, ``completion`` the gold text after it."""

    prompt: str
    completion: str
    answer: str
