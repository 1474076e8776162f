"""The probe's eyes where each worker holds a part of every weight tensor (FSDP2).

A worker compares its own rows, where they are; counts are added up. Whole tensors are put together
one at a time, on the host of the first worker, from what each found changed: the model is whole
nowhere.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from rlsparse import distributed, masks
from rlsparse.masks import Packed
from rlsparse.tensor_file import Bits
from rlsparse.trajectory import OnMask, StepChanges, Trajectory, bits_of, unsigned

BasePart = Callable[[str, int, int], Bits]
"""(weight, start, stop) -> bits of these flat elements of the base, in the stored format."""


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each worker holds a part of the weights of ``model``."""
    return isinstance(model, FSDPModule)


def split(model: torch.nn.Module) -> None:
    """Leave each worker only its own part of all weights; does nothing to an ordinary model.

    A pass without a gradient leaves some weights whole, for the gradient that would follow, and
    replaces the parameters that an optimizer or the probe must see.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def start_of(weight: DTensor) -> int:
    """Flat index of a worker's first element; its rows follow those of the worker before."""
    assert weight.placements == (Shard(0),)
    num_rows = weight.shape[0]
    rows_each = -(-num_rows // distributed.num_workers())
    return min(distributed.rank() * rows_each, num_rows) * math.prod(weight.shape[1:])


def spaced(model: torch.nn.Module, stride: int) -> torch.Tensor:
    """|w| of every ``stride``-th element of each weight tensor, fp32, on the host of worker 0."""
    split(model)
    weights: Iterator[Any] = model.parameters()
    own = [
        weight.detach().to_local().reshape(-1)[-start_of(weight) % stride :: stride]
        for weight in weights
    ]
    parts = distributed.gathered(torch.cat([part.abs().float().cpu() for part in own]).numpy())
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(1)


class ShardedTrajectory(Trajectory):
    """A trajectory of which each worker holds its part: to be used by all of them alike.

    ``stored``, ``ever_changed`` and ``on_mask`` give whole tensors to the first worker and nothing
    to the others, which must go through them all the same.

    Args:
        model: at its base weights, in parts.
        dtype: the stored format.
        windows: see ``Trajectory``.
        base: reads the base.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        windows: Sequence[int],
        base: BasePart,
    ) -> None:
        self._base = base
        super().__init__(model, dtype, windows)
        self.num_elements = sum(weight.numel() for weight in model.parameters())

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._parts():
            yield name, weight.to_local().reshape(-1)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        split(self._model)
        for name, weight in self._model.named_parameters():
            yield name, weight.detach()

    def stored(self) -> Iterator[tuple[str, tuple[int, ...], Bits]]:
        """See ``Trajectory`` and the class."""
        for name, weight in self._parts():
            start = start_of(weight)
            bits = unsigned(bits_of(weight.to_local().reshape(-1), self._dtype).cpu())
            changed = bits != self._base(name, start, start + bits.size)
            found = distributed.gathered((start, bits.size, masks.pack(changed), bits[changed]))
            if found:
                whole = self._base(name, 0, weight.numel())
                for first, size, mask, values in found:
                    whole[first : first + size][masks.unpack(mask, size)] = values
                yield name, tuple(weight.shape), whole

    def is_finite(self) -> bool:
        """See ``Trajectory``; all workers say the same."""
        return distributed.total_counts([not super().is_finite()]) == [0]

    def advance(self, step: int, on_mask: OnMask | None = None) -> StepChanges:
        """See ``Trajectory`` and the class; all workers get the counts of whole tensors."""

        def join(name: str, mask: Packed) -> None:
            whole = self._joined(name, mask)
            if on_mask and whole is not None:
                on_mask(name, whole)

        own = super().advance(step, join if on_mask else None)
        *changed, ever = distributed.total_counts([*own.num_changed.values(), own.num_ever_changed])
        return StepChanges(dict(zip(own.num_changed, changed, strict=True)), ever)

    def ever_changed(self) -> Iterator[tuple[str, Packed]]:
        """See ``Trajectory`` and the class."""
        for name, mask in super().ever_changed():
            whole = self._joined(name, mask)
            if whole is not None:
                yield name, whole

    def _joined(self, name: str, mask: Packed) -> Packed | None:
        """The packed mask of a whole tensor; None on workers but the first.

        A part may begin within a byte, so bits are unpacked first.
        """
        found = distributed.gathered((mask, self._copies[1][name].numel()))
        return (
            masks.pack(np.concatenate([masks.unpack(*part) for part in found])) if found else None
        )
