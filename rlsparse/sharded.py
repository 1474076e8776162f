"""The probe's eyes where each worker holds a part of every weight tensor (FSDP2).

A worker compares its own rows, where they are; counts are added up. Whole tensors are put together
one at a time, on the host of the first worker, from what each found changed: the model is whole
nowhere.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from rlsparse import distributed, masks
from rlsparse.masks import Packed
from rlsparse.prices import Prices
from rlsparse.tensor_file import Bits
from rlsparse.trajectory import OnMask, StepChanges, Trajectory

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


def own_rows(weight: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a weight tensor, flat."""
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),)
    return distributed.own_part(weight).reshape(-1)


def own_state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights and optimizer between steps, in ordinary tensors: what this worker holds of each."""
    split(model)
    state: dict[str, Any] = recursively_apply(
        distributed.own_part, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    return state


def load_own_state(model: torch.nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Go on from what ``own_state`` gave to this worker, the weights being held as then."""
    split(model)
    for name, weight in model.state_dict().items():
        distributed.own_part(weight).copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    for weight, kept in optimizer.state.items():
        if isinstance(weight, DTensor):
            kept.update({name: _part_like(weight, own) for name, own in kept.items()})


def _part_like(weight: DTensor, own: Any) -> Any:
    """What an optimizer keeps of this worker's rows of ``weight``, as a part of a whole again."""
    if not isinstance(own, torch.Tensor) or own.shape != weight.to_local().shape:
        return own
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(own, mesh, placements, shape=weight.shape, stride=weight.stride())


def start_of(shape: Sequence[int]) -> int:
    """Flat index in a whole tensor of the first element that this worker holds.

    Rows are dealt out as ``torch.chunk`` does: as many to each, fewer or none to the last.
    """
    num_rows, *rest = shape
    rows_each = -(-num_rows // distributed.num_workers())
    return min(distributed.rank() * rows_each, num_rows) * math.prod(rest)


def spaced(model: torch.nn.Module, stride: int) -> torch.Tensor:
    """|w| of every ``stride``-th element of each weight tensor, fp32, on the host of worker 0."""
    split(model)
    own = [own_rows(w)[-start_of(w.shape) % stride :: stride] for w in model.parameters()]
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
        prices: likewise.
        base: reads the base.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        windows: Sequence[int],
        prices: Prices,
        *,
        base: BasePart,
    ) -> None:
        self._base = base
        split(model)
        super().__init__(model, dtype, windows, prices)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        split(self._model)
        for name, weight in self._model.named_parameters():
            yield name, own_rows(weight)

    def stored(self) -> Iterator[tuple[str, tuple[int, ...], Bits]]:
        """See ``Trajectory`` and the class."""
        for name, shape, bits in super().stored():
            start = start_of(shape)
            changed = bits != self._base(name, start, start + bits.size)
            found = distributed.gathered((start, bits.size, masks.pack(changed), bits[changed]))
            if found:
                whole = self._base(name, 0, math.prod(shape))
                for first, size, mask, values in found:
                    whole[first : first + size][masks.unpack(mask, size)] = values
                yield name, shape, whole

    def trained(self) -> Iterator[tuple[str, int, Bits]]:
        """See ``Trajectory``; here each worker gets its own rows."""
        for name, _, bits in super().trained():
            yield name, start_of(self.shapes[name]), bits

    def totals(self, counts: Iterable[int]) -> list[int]:
        """See ``Trajectory``; to be called by all workers, and all get them."""
        return distributed.total_counts(counts)

    def advance(self, step: int, on_mask: OnMask | None = None) -> StepChanges:
        """See ``Trajectory`` and the class; all workers get the counts of whole tensors."""

        def join(name: str, mask: Packed) -> None:
            whole = self._joined(name, mask)
            if on_mask and whole is not None:
                on_mask(name, whole)

        own = super().advance(step, join if on_mask else None)
        *changed, ever, num_infinite = self.totals(
            [*own.num_changed.values(), own.num_ever_changed, not own.is_finite]
        )
        return StepChanges(dict(zip(own.num_changed, changed, strict=True)), ever, not num_infinite)

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
