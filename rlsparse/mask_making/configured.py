"""Masks as the configuration of a trial describes them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rlsparse.definitions import Direction, Size
from rlsparse.mask_config import Leaf, LikeMask, MaskConfig, Pick, UnionMask, parts
from rlsparse.mask_making.algebra import intersection, union
from rlsparse.mask_making.chosen import (
    by_direction,
    by_magnitude,
    random_like,
    random_within_magnitude,
)
from rlsparse.mask_making.made import MadeMask
from rlsparse.masks import Mask


def make_mask(
    mask: MaskConfig, read: Callable[[Leaf], Mask], base: str | Path, *, seed: int
) -> Mask:
    """The mask that a trial trains under.

    Args:
        mask: what its configuration says.
        read: gives the mask of each leaf; called in the order of ``mask_config.leaves``.
        base: checkpoint that the trial starts from.
        seed: of the trial, for masks that are drawn.

    Raises:
        CheckpointError: masks that are combined are of different models, or one that another is to
            be like is of another base.
    """
    if isinstance(mask, Leaf):
        return read(mask)
    made = [make_mask(part, read, base, seed=seed) for part in parts(mask)]
    if isinstance(mask, LikeMask):
        return _like(made[0], base, mask.pick, seed if mask.mask_seed is None else mask.mask_seed)
    return union(made) if isinstance(mask, UnionMask) else intersection(made)


def _like(mask: Mask, base: str | Path, pick: Pick, seed: int) -> MadeMask:
    makers: dict[Pick, Callable[[], MadeMask]] = {
        "random": partial(random_like, mask, seed),
        "random_within_magnitude": partial(random_within_magnitude, mask, base, seed),
        "low_magnitude": partial(by_magnitude, mask, base, Size.LOW),
        "high_magnitude": partial(by_magnitude, mask, base, Size.HIGH),
        "principal": partial(by_direction, mask, base, Direction.PRINCIPAL),
        "other": partial(by_direction, mask, base, Direction.OTHER),
    }
    return makers[pick]()
