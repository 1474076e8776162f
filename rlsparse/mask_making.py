"""Makes the mask that a trial trains under, of mask files and of what other trials have left."""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from rlsparse import masks
from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError
from rlsparse.kernels import popcount
from rlsparse.mask_config import Leaf, LikeMask, MaskConfig, Pick, UnionMask, parts
from rlsparse.masks import Bits
from rlsparse.patch import Patch, check_base, reconstruct


def make_mask(
    mask: MaskConfig, read: Callable[[Leaf], Bits], base: Checkpoint, *, seed: int
) -> Bits:
    """The bits of a mask.

    Args:
        mask: what a trial's configuration says.
        read: gives the bits of each leaf; called in the order of ``mask_config.leaves``.
        base: weights that the trial starts from.
        seed: of the trial, for masks that are drawn.

    Raises:
        CheckpointError: masks that are combined are not of the same tensors.
    """
    if isinstance(mask, Leaf):
        return read(mask)
    made = [make_mask(part, read, base, seed=seed) for part in parts(mask)]
    if isinstance(mask, LikeMask):
        own = seed if mask.mask_seed is None else mask.mask_seed
        return PICKS[mask.pick](made[0], base, own)
    return _combined(masks.union if isinstance(mask, UnionMask) else masks.intersection, made)


def changed(base: Checkpoint, base_fingerprint: str, patch: Patch) -> Bits:
    """The weights that a patch of ``base`` changes, bitwise, in the format of the patch.

    Args:
        base: what the patch is against.
        base_fingerprint: its ``checkpoint.fingerprint``, which costs a pass over all weights.
        patch: as it was opened.

    Raises:
        PatchError: the patch is damaged, or of another base.
    """
    check_base(base, patch, base_fingerprint)
    found = {}
    for name, tensor in patch.tensors.items():
        # A chunk begins at a multiple of 64 elements, so that its bytes are whole.
        packed = [masks.pack(old != new) for _, old, new in reconstruct(base, patch, name)]
        found[name] = tensor.shape, np.concatenate([np.zeros(0, np.uint8), *packed])
    return found


def random_like(bits: Bits, base: Checkpoint, seed: int) -> Bits:
    """As many weights of each tensor, drawn uniformly; each tensor has a generator of its own."""
    drawn = {}
    for name, (shape, packed) in bits.items():
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        chosen = np.zeros(math.prod(shape), np.bool_)
        generator = np.random.default_rng([seed, key])
        chosen[generator.choice(chosen.size, popcount(packed), replace=False, shuffle=False)] = True
        drawn[name] = shape, masks.pack(chosen)
    return drawn


PICKS: dict[Pick, Callable[[Bits, Checkpoint, int], Bits]] = {"random": random_like}
"""How a mask is made like another one: (bits of that, base, seed) -> bits."""


def _combined(
    operation: Callable[[masks.Packed, masks.Packed], masks.Packed], made: Sequence[Bits]
) -> Bits:
    first, *others = made
    for other in others:
        if differing := sorted(first.keys() ^ other.keys()):
            raise CheckpointError(
                f"masks of different models: {len(differing)} tensors are in one of them alone, "
                f"{', '.join(differing[:3])}; combine masks of one base only"
            )
        first = {n: (shape, operation(own, other[n][1])) for n, (shape, own) in first.items()}
    return first
