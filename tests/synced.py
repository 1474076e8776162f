"""What the tests of weight sync share: real training steps, and what a receiver should hold."""

from typing import Any

import numpy as np
import torch

from rlsparse.models import TINY
from rlsparse.models.loading import load_model

Bits = dict[str, np.ndarray]


def tiny(precision: str = "bf16-mixed") -> Any:
    """The tiny base; by default with fp32 masters."""
    return load_model(TINY, precision)


def adam(model: Any, lr: float = 3e-5) -> torch.optim.Adam:
    """At a rate at which in bf16 some of the weights change in a step."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def train_step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One real step on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (2, 12), generator=generator)
    tokens = tokens.to(model.device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def served(model: Any, dtype: torch.dtype = torch.bfloat16) -> Bits:
    """Flat bits of all weights as they are served; an oracle apart from the writer."""
    return {name: bits_of(weight.detach().to(dtype)) for name, weight in model.named_parameters()}


def bits_of(weight: torch.Tensor) -> np.ndarray:
    """Flat unsigned bits, copied."""
    raw = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().copy()
    return raw.view(f"<u{weight.dtype.itemsize}")


def held(receiver: Any) -> Bits:
    """Flat bits that a receiver holds, copied."""
    return {name: tensor.bits.copy() for name, tensor in receiver.tensors.items()}


def same(one: Bits, other: Bits) -> bool:
    """Whether all bits are equal."""
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def num_different(one: Bits, other: Bits) -> int:
    """Weights whose bits differ."""
    return sum(int((one[name] != other[name]).sum()) for name in one)
