"""Which weights of a model a mask selects, and the proof that the others have not changed."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rlsparse import masks
from rlsparse.errors import CheckpointError, ConfigError, TrialError
from rlsparse.kernels import popcount
from rlsparse.masks import Packed
from rlsparse.subnetwork.selection import Selection


@dataclass(frozen=True)
class SubnetworkMask:
    """Which weights of a model are trained.

    Attributes:
        bits: weight tensor -> (its shape, its packed mask), as ``masks.write_masks`` takes it.
        base_fingerprint: ``checkpoint.fingerprint`` of the base that the mask was made for; not
            checked, a subnetwork may be trained from other weights.
        metadata: what it is, and of what it was made.

    Raises:
        CheckpointError: no weight is in it, or a packed mask does not fit its shape.
    """

    bits: Mapping[str, tuple[tuple[int, ...], Packed]]
    base_fingerprint: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """See the class."""
        for shape, packed in self.bits.values():
            masks.check(packed, math.prod(shape))
        if not self.num_selected:
            raise CheckpointError(
                f"the mask of {len(self.bits)} tensors has no weight in it, so that nothing would "
                "be trained; make it of a run that changed some"
            )

    @cached_property
    def num_selected(self) -> int:
        """Weights in it."""
        return sum(popcount(packed) for _, packed in self.bits.values())

    @property
    def density(self) -> float:
        """Fraction of all weights that is in it; a tied one counts for each name in the file."""
        return self.num_selected / sum(math.prod(shape) for shape, _ in self.bits.values())

    def selection(self, name: str) -> Selection | None:
        """The weights of a tensor that are in it; None if none is."""
        shape, packed = self.bits[name]
        return Selection(packed, math.prod(shape)) if packed.any() else None

    @cached_property
    def fingerprint(self) -> str:
        """``masks.fingerprint`` of its bits."""
        return masks.fingerprint(self.bits)


def load_mask(path: str | Path) -> SubnetworkMask:
    """Read a mask file (``masks.write_masks``) whole: one bit per weight.

    Raises:
        CheckpointError: not a mask file, cut short or damaged, or no weight is in it.
    """
    file = masks.read_masks(path)
    return SubnetworkMask(masks.bits_of(file), file.base_fingerprint, file.metadata)


def check(model: torch.nn.Module, mask: SubnetworkMask) -> None:
    """Check that ``mask`` is one of the weights of ``model``.

    A tied weight counts once, under the name that the model has for it first. A mask may list its
    other names too, with equal bits.

    Raises:
        CheckpointError: the mask is of another model: other names or shapes, or other bits for
            two names of one tied weight.
    """
    names = {weight: name for name, weight in model.named_parameters()}
    firsts = {
        name: names[weight] for name, weight in model.named_parameters(remove_duplicate=False)
    }
    if differing := sorted((names.values() - mask.bits.keys()) | (mask.bits.keys() - firsts)):
        here = ["only the model" if name in firsts else "only the mask" for name in differing[:3]]
        shown = ", ".join(f"{n} ({h} has it)" for n, h in zip(differing, here, strict=False))
        raise CheckpointError(
            f"the mask is of another model: {len(differing)} names differ, {shown}; give the mask "
            "of this model, and the model as it was before anything wrapped it"
        )
    for name, first in firsts.items():
        if name in mask.bits:
            _check_tensor(name, model.get_parameter(name), mask.bits, first)


def _check_tensor(
    name: str,
    weight: torch.Tensor,
    bits: Mapping[str, tuple[tuple[int, ...], Packed]],
    first: str,
) -> None:
    shape, packed = bits[name]
    if shape != tuple(weight.shape):
        raise CheckpointError(
            f"the mask is of another model: {name} has shape {list(weight.shape)} in the model and "
            f"{list(shape)} in the mask; give the mask of this model"
        )
    if not np.array_equal(packed, bits[first][1]):
        raise CheckpointError(
            f"the mask is of another model: {name} and {first} are one tied weight here, but have "
            "different bits in the mask; give both the same, or leave the former out"
        )


def check_model(model: torch.nn.Module) -> None:
    """Refuse wrappers that would gather dense gradients, and weights that are not whole.

    Raises:
        ConfigError: it is such a model, or none.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"the model is a {type(model).__name__}; give the model itself, not its parameters"
        )
    if isinstance(model, DistributedDataParallel):
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel, whose buckets are dense gradients; "
            "give the model itself and train that: the optimizer averages gradients over workers"
        )
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise ConfigError(
            "each worker holds a part of the model (FSDP), a mask selects of whole tensors; train "
            "a subnetwork with the whole model on each worker (strategy ddp)"
        )


def check_trainable(names: Mapping[torch.nn.Parameter, str]) -> None:
    """Check that weights in a mask, with their names, can be trained as they are.

    Raises:
        ConfigError: some are frozen, or not contiguous.
    """
    frozen = [name for weight, name in names.items() if not weight.requires_grad]
    strided = [name for weight, name in names.items() if not weight.is_contiguous()]
    for what, bad, remedy in (
        (
            "frozen",
            frozen,
            "requires_grad_(True) of them, or release() of the subnetwork optimizer before this "
            "one, whose mask has none of them",
        ),
        ("not contiguous", strided, "contiguous() of them"),
    ):
        if bad:
            raise ConfigError(
                f"{len(bad)} tensors in the mask are {what}, {', '.join(bad[:3])}; call {remedy}, "
                "or take them out of the mask"
            )


def outside_digests(model: torch.nn.Module, mask: SubnetworkMask) -> dict[str, str]:
    """sha256 (hex) per weight tensor over the bytes of the weights that are not in the mask.

    Takes a copy of the largest tensor, and a pass over all weights.

    Raises:
        CheckpointError: the mask is of another model.
    """
    check(model, mask)
    digests = {}
    for name, weight in model.named_parameters():
        flat, selection = weight.detach().flatten().clone(), mask.selection(name)
        if selection is not None:
            selection.put(flat, flat.new_zeros(selection.size))
        content = flat.cpu().view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(content.data).hexdigest()
    return digests


def assert_outside_unchanged(
    model: torch.nn.Module, mask: SubnetworkMask, before: Mapping[str, str]
) -> None:
    """Prove that no weight outside the mask has changed, not even in a bit.

    Args:
        model: after training, in the format that it was trained in.
        mask: that it was trained under.
        before: ``outside_digests`` before training.

    Raises:
        TrialError: one has.
    """
    after = outside_digests(model, mask)
    if moved := sorted(name for name in after if after[name] != before.get(name)):
        raise TrialError(
            f"weights outside the mask have changed in {len(moved)} tensors, {', '.join(moved[:3])}"
            ": something else than the subnetwork optimizer has written them; do not use this run"
        )
