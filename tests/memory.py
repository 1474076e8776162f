"""What an object holds in memory, and the largest tensor that is made meanwhile."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def held_bytes(value: object) -> int:
    """Of tensors and arrays, not of the model."""
    if isinstance(value, torch.nn.Module):
        return 0
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(held_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(held_bytes, value))
    return sum(map(held_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, views apart."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        is_new = isinstance(made, torch.Tensor) and not function.is_view
        if is_new and not any(made is given for given in args):
            self.num_bytes = max(self.num_bytes, made.nbytes)
        return made
