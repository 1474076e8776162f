"""The worker processes that train one trial together: who this one is, and what they agree on.

Whoever starts several workers starts torch's process group, too; without one, this process is the
only worker, and nothing here does anything. The group must take tensors on the host, and those on
GPUs where models are there (backend ``cpu:gloo,cuda:nccl``).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed.tensor import DTensor


def rank() -> int:
    """Number of this worker, from 0; worker 0 measures and writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_workers() -> int:
    """Workers that train the trial together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def worker_seed(seed: int) -> int:
    """Seed of what each worker draws for itself; worker 0 has ``seed``, the others their own."""
    if rank() == 0:
        return seed
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]) >> 1


def wait_for_all() -> None:
    """Return once every worker is here."""
    if num_workers() > 1:
        distributed.barrier()


def from_first(value: Any) -> Any:
    """What worker 0 gave, plain data, on every worker: what each computed may differ in a bit."""
    if num_workers() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Plain data of all workers, in their order; on worker 0, elsewhere an empty list."""
    if num_workers() == 1:
        return [value]
    box: list[Any] | None = [None] * num_workers() if rank() == 0 else None
    distributed.gather_object(value, box)
    return box or []


def first_given(value: Any) -> Any:
    """Of plain data of all workers, the first that is not None, in their order; all get it."""
    return from_first(next((one for one in gathered(value) if one is not None), None))


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over all workers, elementwise; every worker gets it."""
    if num_workers() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def total_counts(counts: Iterable[int]) -> list[int]:
    """Sums over all workers of integers that are on the host."""
    if num_workers() == 1:
        return list(counts)
    sums = torch.tensor(list(counts), dtype=torch.int64)
    distributed.all_reduce(sums)
    return [int(count) for count in sums]


def average_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all workers; one that has none counts as zero.

    For models that are trained beside the one that the trainer's own averaging covers.
    """
    if num_workers() == 1:
        return
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        distributed.all_reduce(weight.grad)
        weight.grad.div_(num_workers())


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace vectors, of the same lengths everywhere, by their means over all workers.

    Those of one number format travel as one.
    """
    if num_workers() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        joined = torch.cat(alike)
        distributed.all_reduce(joined)
        parts = torch.split(joined.div_(num_workers()), [tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a tensor, detached: all, unless each worker holds a part of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
