"""Live weights as they are served: what a worker holds of them, and what changed since a copy."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from rlsparse import distributed, sharded
from rlsparse.errors import ConfigError
from rlsparse.kernels.compare import compare, set_bits
from rlsparse.patch.codec import Positions
from rlsparse.tensor_file import Bits

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Number formats that can be served, and their short names."""
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SIGNED = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}

_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")
"""What ``torch.compile`` and activation checkpointing put into the names of a module's weights."""

PIECE = 2**18
"""Weights of a piece: small enough that what is cast is compared while it is in the cache."""
_DEVICE_PIECE = 2**24
"""A multiple of it, large enough that starting programs costs little."""


class Found(NamedTuple):
    """What changed in a piece: places counted from its start [k], and the bits there now [k]."""

    positions: Positions
    bits: Bits


class Held(NamedTuple):
    """What this worker holds of a weight tensor.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: flat index in it of the first element held.
        weights: what is held, flat, as it is trained.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weights: torch.Tensor


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module that DDP or ``torch.compile`` wraps, whose names are those of its checkpoints.

    Raises:
        ConfigError: weights lie flat, as FSDP1 has them, or elsewhere (ZeRO-3).
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        is_parallel = isinstance(model, DistributedDataParallel)
        model = model.get_submodule("module" if is_parallel else "_orig_mod")
    is_flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if is_flat or any(hasattr(weight, "ds_id") for weight in model.parameters()):
        what = "FullyShardedDataParallel" if is_flat else "DeepSpeed's ZeRO stage 3"
        raise ConfigError(
            f"the model's weights are held by {what}, not in its own tensors; a PatchWriter takes "
            "a model as it is, under DistributedDataParallel, or split by fully_shard(model)"
        )
    return model


def is_split(model: torch.nn.Module) -> bool:
    """Whether each worker holds a part of the weights alone."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def held(model: torch.nn.Module) -> Iterator[Held]:
    """What this worker holds of all weights, tied ones once.

    Raises:
        ConfigError: weights are split otherwise than by rows over all workers.
    """
    named = [(_WRAPPERS.sub("", name), weight) for name, weight in model.named_parameters()]
    if not is_split(model):
        for name, weight in named:
            yield Held(name, tuple(weight.shape), 0, weight.detach().reshape(-1))
        return
    sharded.split(model)
    for name, weight in named:
        shape = tuple(weight.shape)
        if not isinstance(weight, DTensor):  # all have all of it, the first gives it
            start = 0 if distributed.rank() == 0 else weight.numel()
            yield Held(name, shape, start, weight.detach().reshape(-1)[start:])
            continue
        mesh = weight.device_mesh
        if weight.placements != (Shard(0),) or mesh.size() != distributed.num_workers():
            raise ConfigError(
                f"{name} lies as {weight.placements} on {mesh.size()} of "
                f"{distributed.num_workers()} workers; a PatchWriter needs Shard(0) over all of "
                "them, as fully_shard(model) makes it"
            )
        yield Held(name, shape, sharded.start_of(shape), sharded.own_rows(weight))


def served(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integer view of weights in the format that is served: of themselves if they are in it."""
    return weights.to(dtype).view(INTEGERS[dtype])


def to_host(bits: torch.Tensor) -> Bits:
    """Unsigned bits of an integer view; of the same memory if that is on the host."""
    found: Bits = bits.cpu().numpy().view(f"<u{bits.itemsize}")
    return found


def is_on_host(weights: torch.Tensor) -> bool:
    """Whether compiled kernels compare them; else torch does, where they are."""
    return weights.device.type == "cpu"


def find_on_host(weights: torch.Tensor, dtype: torch.dtype, sent: Bits) -> Iterator[Found]:
    """What changed since ``sent``, piece by piece of ``PIECE``.

    Args:
        weights: as they are trained, flat, on the host.
        dtype: that is served.
        sent: bits in that format, as many.
    """
    for start in range(0, sent.size, PIECE):
        before = sent[start : start + PIECE]
        after = to_host(served(weights[start : start + PIECE], dtype))
        words = np.empty(-(-before.size // 64), np.uint64)
        positions = set_bits(words, compare(before, after, words))
        yield Found(positions, after[positions])


def find_on_device(
    weights: torch.Tensor, dtype: torch.dtype, sent: torch.Tensor
) -> Iterator[Found]:
    """``find_on_host`` in torch alone, for any device; what changed alone comes to the host.

    Args:
        weights: as they are trained, flat.
        dtype: that is served.
        sent: integer view of bits in that format, on the same device; becomes what is there now.
    """
    for start in range(0, sent.numel(), _DEVICE_PIECE):
        before = sent[start : start + _DEVICE_PIECE]
        after = served(weights[start : start + _DEVICE_PIECE], dtype)
        places = before.ne(after).nonzero().squeeze(1)
        values = after[places]
        before[places] = values
        bits, positions = to_host(values), places.to(torch.int32).cpu().numpy()
        edges = range(0, before.numel() + PIECE, PIECE)
        cuts = np.searchsorted(positions, [*edges]).tolist()
        for number, first in enumerate(range(0, before.numel(), PIECE)):
            own = slice(cuts[number], cuts[number + 1])
            yield Found((positions[own] - np.int32(first)).view(np.uint32), bits[own])
