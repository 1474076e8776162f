"""Masks with the density of another, chosen otherwise: at random, by size, by direction.

Every choice is the smallest keys of a tensor, or of each of its strata. Keys are 64 random bits, or
32 bits of a score over 32 random ones, so that equal scores are ordered at random. Random bits are
Philox's own, which numpy keeps the same in all releases; the stream of a tensor follows from its
name, the seed and the kind of choice alone, so that a mask is the same on every machine, and
independent from tensor to tensor. (Scores of principal weights rest on the linear algebra of the
machine.) Keys are made again in each of three passes, so that no tensor's are held whole.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsparse import masks
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.decomposition import choose_method, decompose
from rlsparse.definitions import Direction, Size
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.kernels import FLOATS, popcount, values
from rlsparse.mask_making.made import MadeMask, described, open_base, shapes_of
from rlsparse.masks import Mask, Packed
from rlsparse.overlap.strata import add_strata, count_strata, magnitude_labels
from rlsparse.placement import principal_scores
from rlsparse.spectrum import PRINCIPAL_RANK
from rlsparse.tensor_file import Bits, TensorInfo, bits_dtype

Keys = NDArray[np.uint64]
Scores = NDArray[np.uint32]
Places = NDArray[np.int64]

_PIECE = 2**18  # weights in memory
_BUCKET_BITS = 12


# --- at random -------------------------------------------------------------------------------


def uniform(base: str | Path, density: float, seed: int) -> MadeMask:
    """Of each tensor of a base this share of the weights, at random (arXiv 2602.01599).

    The number of weights is rounded, half upwards. Unlike the code published with the article,
    a tied weight has one mask.

    Args:
        base: what ``Checkpoint.open`` takes.
        density: in (0, 1).
        seed: another one gives an independent mask; of one seed the denser holds the sparser.

    Raises:
        ConfigError: a density or a seed that there is not.
        CheckpointError: the base cannot be read.
    """
    if not 0 < density < 1:
        raise ConfigError(f"density {density}: must be above 0 and below 1")
    _check_seed(seed)
    opened = Checkpoint.open(base)
    shapes = shapes_of(opened)

    def make(name: str) -> Packed:
        size = math.prod(shapes[name])
        return _random(name, size, math.floor(density * size + 0.5), seed)

    metadata = {
        "kind": "uniform", "source": str(base), "density": repr(density), "seed": str(seed)
    }  # fmt: skip
    return MadeMask(shapes, fingerprint(opened), metadata, make)


def random_like(mask: Mask, seed: int) -> MadeMask:
    """Of each tensor as many weights as a mask has there, at random.

    Raises:
        ConfigError: the seed is negative.
    """
    _check_seed(seed)

    def make(name: str) -> Packed:
        return _random(name, math.prod(mask.shapes[name]), popcount(mask.packed(name)), seed)

    return _like(mask, "random", {"seed": str(seed)}, make)


def random_within_magnitude(mask: Mask, base: str | Path, seed: int) -> MadeMask:
    """Of each power of two of |w| of each tensor as many weights as a mask has there, at random.

    The strata are those of the null ``magnitude`` (``overlap.strata``), in the view that the mask
    was made in.

    Args:
        mask: of the base.
        base: what ``Checkpoint.open`` takes.
        seed: another one gives an independent mask.

    Raises:
        ConfigError: the seed is negative.
        CheckpointError: the base cannot be read, or the mask is of another one.
    """
    _check_seed(seed)
    opened, view = open_base(base, mask), mask.metadata.get("view", "stored")

    def make(name: str) -> Packed:
        return _random_in_strata(opened.tensors[name], mask.packed(name), view, seed)

    return _like(mask, "random_within_magnitude", {"seed": str(seed), "weights": str(base)}, make)


def _random(name: str, size: int, count: int, seed: int) -> Packed:
    def pieces() -> Iterator[tuple[Places, Keys]]:
        for keys in _random_keys("uniform", name, size, seed):
            yield np.zeros(keys.size, np.int64), keys

    return _smallest(pieces, size, np.array([count]))


def _random_in_strata(info: TensorInfo, packed: Packed, view: str, seed: int) -> Packed:
    parts = [
        count_strata(packed[None, start // 8 : -(-(start + bits.size) // 8)], labels)
        for start, bits in _pieces(info)
        for labels in [magnitude_labels(bits, info.dtype, view)]
    ]
    if not parts:
        return packed
    strata = add_strata(parts)

    def pieces() -> Iterator[tuple[Places, Keys]]:
        random = _random_keys("within magnitude", info.name, info.num_elements, seed)
        for (_, bits), keys in zip(_pieces(info), random, strict=True):
            labels = magnitude_labels(bits, info.dtype, view)
            yield np.searchsorted(strata.labels, labels), keys

    return _smallest(pieces, info.num_elements, strata.changed[0])


# --- by score --------------------------------------------------------------------------------


def by_magnitude(mask: Mask, base: str | Path, pick: Size) -> MadeMask:
    """Of each tensor the smallest or largest |w| of the base, as many as a mask has there.

    Weights of one size are taken at random (from a fixed seed), for in bf16 there are many and
    their order in the tensor would make stripes. fp64 is ranked as fp32; NaNs are the largest.

    Raises:
        CheckpointError: the base cannot be read, has formats without values, or the mask is of
            another one.
    """
    opened = open_base(base, mask)
    choose = _lowest if pick is Size.LOW else _highest

    def make(name: str) -> Packed:
        info = opened.tensors[name]

        def scores() -> Iterator[Scores]:
            for _, bits in _pieces(info):
                yield _sizes(info, bits)

        return choose(info, popcount(mask.packed(name)), scores)

    return _like(mask, f"{pick}_magnitude", {"weights": str(base)}, make)


def by_direction(
    mask: Mask, base: str | Path, pick: Direction, rank: int = PRINCIPAL_RANK
) -> MadeMask:
    """Of each tensor the most or least principal weights of the base, as many as a mask has there.

    Principal are the largest |rank-k reconstruction of W0| (arXiv 2511.08567; deviation: as many
    in each tensor as the mask has there, not half, so that all arms train as many). A tensor of
    more dimensions is the matrix [shape[0], rest]; one of fewer is its own rank-1 reconstruction,
    so that its principal weights are the largest. Equal scores are ordered at random. One tensor
    is in memory, at up to 40 bytes per weight (``decomposition.decompose``).

    Args:
        mask: of the base.
        base: what ``Checkpoint.open`` takes.
        pick: which.
        rank: k.

    Raises:
        ConfigError: no rank.
        CheckpointError: as ``by_magnitude``, or the base has NaNs or infinities.
    """
    if rank < 1:
        raise ConfigError(f"rank {rank}: must be at least 1")
    opened = open_base(base, mask)
    choose = _highest if pick is Direction.PRINCIPAL else _lowest

    def make(name: str) -> Packed:
        info, count = opened.tensors[name], popcount(mask.packed(name))
        if count in (0, info.num_elements):
            return mask.packed(name)
        found = _principal(info, rank)

        def scores() -> Iterator[Scores]:
            for start in range(0, found.size, _PIECE):
                yield found[start : start + _PIECE]

        return choose(info, count, scores)

    kind = "principal" if pick is Direction.PRINCIPAL else "non_principal"
    return _like(mask, kind, {"weights": str(base), "rank": str(rank)}, make)


def _principal(info: TensorInfo, rank: int) -> Scores:
    """How principal each weight is: larger is more; flat."""
    _check_values(info)
    weights = values(info.read(), info.dtype)
    if not np.isfinite(weights).all():
        raise CheckpointError(
            f"{info.file}: {info.name} has a NaN or an infinity, which has no principal directions"
        )
    if len(info.shape) > 1:
        weights = weights.reshape(info.shape[0], -1)
        factors = decompose(weights, choose_method("auto", weights.shape), rank)
        weights = principal_scores(weights, factors.left[:, : factors.rank])
    return _ranks(weights.reshape(-1))


def _sizes(info: TensorInfo, bits: Bits) -> Scores:
    _check_values(info)
    return _ranks(values(bits, info.dtype))


def _ranks(weights: NDArray[np.floating[Any]]) -> Scores:
    """|w| as integers of the same order, which fill 32 bits, so that buckets divide them."""
    with np.errstate(over="ignore", under="ignore"):
        sizes: Scores = np.abs(weights).astype(np.float32, copy=False).view(np.uint32)
    return sizes << np.uint32(1)


def _highest(info: TensorInfo, count: int, scores: Callable[[], Iterator[Scores]]) -> Packed:
    """The ``count`` largest scores of a tensor: what is left by the smallest."""
    size = info.num_elements
    return masks.complement(_lowest(info, size - count, scores), size)


def _lowest(info: TensorInfo, count: int, scores: Callable[[], Iterator[Scores]]) -> Packed:
    """The ``count`` smallest scores of a tensor."""

    def pieces() -> Iterator[tuple[Places, Keys]]:
        random = _random_keys("ties", info.name, info.num_elements, 0)
        for own, other in zip(scores(), random, strict=True):
            keys = (own.astype(np.uint64) << np.uint64(32)) | (other >> np.uint64(32))
            yield np.zeros(keys.size, np.int64), keys

    return _smallest(pieces, info.num_elements, np.array([count]))


# --- the choice ------------------------------------------------------------------------------


def _smallest(
    pieces: Callable[[], Iterator[tuple[Places, Keys]]], size: int, counts: NDArray[np.int64]
) -> Packed:
    """Packed mask of the ``counts[s]`` smallest keys of each stratum s; of equal ones the first.

    Args:
        pieces: gives, each time, stratum and key of every weight, in pieces of whole bytes.
        size: weights in all.
        counts: shape [S].
    """
    if counts.sum() in (0, size):
        mask = np.zeros(masks.num_bytes(size), np.uint8)
        return mask if not counts.any() else masks.complement(mask, size)
    first = np.arange(len(counts)) << _BUCKET_BITS
    histogram = np.zeros(len(counts) << _BUCKET_BITS, np.int64)
    for strata, keys in pieces():
        histogram += np.bincount(_buckets(strata, keys), minlength=histogram.size)
    up_to = np.cumsum(histogram.reshape(len(counts), -1), axis=1)
    last = first + (up_to < counts[:, None]).sum(axis=1)  # the bucket of the last key chosen
    left = counts - (up_to.reshape(-1)[last] - histogram[last])
    found: list[tuple[Places, Keys]] = []
    for strata, keys in pieces():
        inside = _buckets(strata, keys) == last[strata]
        found.append((strata[inside], keys[inside]))
    where, border = (np.concatenate(part) for part in zip(*found, strict=True))
    limits = np.zeros(len(counts), np.uint64)
    for stratum in np.flatnonzero(counts):
        own = np.sort(border[where == stratum])
        limits[stratum] = own[left[stratum] - 1]
        left[stratum] -= np.searchsorted(own, limits[stratum])
    parts = []
    for strata, keys in pieces():
        chosen = keys < limits[strata]
        for tied in np.flatnonzero(keys == limits[strata]):
            chosen[tied] = left[strata[tied]] > 0
            left[strata[tied]] -= 1
        parts.append(masks.pack(chosen))
    return np.concatenate(parts)


def _buckets(strata: Places, keys: Keys) -> Places:
    buckets: Places = (strata << _BUCKET_BITS) + (keys >> np.uint64(64 - _BUCKET_BITS)).astype(
        np.int64
    )
    return buckets


# --- small parts -----------------------------------------------------------------------------


def _random_keys(choice: str, name: str, size: int, seed: int) -> Iterator[Keys]:
    """64 random bits for each weight of a tensor, in pieces."""
    digest = hashlib.sha256(repr((choice, seed, name)).encode()).digest()
    source = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    for start in range(0, size, _PIECE):
        yield source.random_raw(min(_PIECE, size - start))


def _pieces(info: TensorInfo) -> Iterator[tuple[int, Bits]]:
    """First element and bits of each piece of a tensor; valid until the next one."""
    buffer = np.empty(_PIECE, bits_dtype(info.dtype))
    start = 0
    for bits in info.pieces(0, info.num_elements, buffer):
        yield start, bits
        start += bits.size


def _like(
    mask: Mask, kind: str, settings: dict[str, str], make: Callable[[str], Packed]
) -> MadeMask:
    """What is chosen as densely as ``mask``."""
    metadata = {"kind": kind, "source": described(mask), **settings}
    if "view" in mask.metadata:
        metadata["view"] = mask.metadata["view"]
    return MadeMask(mask.shapes, mask.base_fingerprint, metadata, make)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"seed {seed}: must be 0 or more")


def _check_values(info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{info.file}: {info.name} is {info.dtype}, which has no values to rank; formats that "
            f"have: {', '.join(FLOATS)}"
        )
