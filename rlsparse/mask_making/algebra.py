"""Unions, intersections, differences and complements of masks of one model."""

import math
from collections.abc import Callable, Sequence
from functools import reduce

from rlsparse import masks
from rlsparse.errors import ConfigError
from rlsparse.mask_making.made import MadeMask, check_one_model, described
from rlsparse.masks import Mask, Packed


def union(parts: Sequence[Mask]) -> MadeMask:
    """Weights in any of two or more masks.

    Raises:
        ConfigError: fewer than two.
        CheckpointError: they are of different models.
    """
    return _combined("union", parts, lambda size, packed: reduce(masks.union, packed))


def intersection(parts: Sequence[Mask]) -> MadeMask:
    """Weights in all of two or more masks; errors as of ``union``."""
    return _combined("intersection", parts, lambda size, packed: reduce(masks.intersection, packed))


def difference(parts: Sequence[Mask]) -> MadeMask:
    """Weights in the first of two or more masks and in no other; errors as of ``union``."""
    return _combined("difference", parts, _subtracted)


def complement(mask: Mask) -> MadeMask:
    """Weights that are not in a mask."""

    def make(name: str) -> Packed:
        return masks.complement(mask.packed(name), math.prod(mask.shapes[name]))

    metadata = {"kind": "complement", "source": described(mask)}
    return MadeMask(mask.shapes, mask.base_fingerprint, metadata, make)


def _subtracted(size: int, packed: Sequence[Packed]) -> Packed:
    others = reduce(masks.union, packed[1:])
    return masks.intersection(packed[0], masks.complement(others, size))


def _combined(
    kind: str, parts: Sequence[Mask], combine: Callable[[int, Sequence[Packed]], Packed]
) -> MadeMask:
    if len(parts) < 2:
        raise ConfigError(f"{kind} takes two masks or more, got {len(parts)}")
    named = [f"{described(part)} [{number}]" for number, part in enumerate(parts, 1)]
    check_one_model({n: part.shapes for n, part in zip(named, parts, strict=True)})
    shapes = parts[0].shapes

    def make(name: str) -> Packed:
        return combine(math.prod(shapes[name]), [part.packed(name) for part in parts])

    bases = {part.base_fingerprint for part in parts}
    metadata = {"kind": kind, "source": ", ".join(map(described, parts))}
    return MadeMask(shapes, bases.pop() if len(bases) == 1 else "", metadata, make)
