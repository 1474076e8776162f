"""Which weights are alike: strata within which, under a null, masks are independent.

A stratum of a tensor is a power of two of |before| as stored (zeros and weights of exactly a power
of two apart, as in ``definitions.NUM_MAGNITUDE_BINS``; all non-finite weights are one more). Where
the view is coarser than the stored base, also the distance to the nearest rounding tie of the view:
a weight near a tie flips at the slightest update, so that independent noise of 1/8 of a spacing
gives two masks a lift of 3 over the power of two alone. The distance has no direction: noise
that is symmetric crosses either tie alike, and a drift that two runs share is something they share.
It is binned by half octaves, 24 of them: noise of whatever size beyond 2^-10 of a spacing meets
bins that are narrow against itself, and what is left of the lift is at most 1 % (uniform noise) or
0.7 % (Gaussian); equally wide bins leave 10 % at 2 % density and more below.
"""

from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rlsparse.definitions import MAX_EXPONENT, MIN_EXPONENT, NUM_EXPONENTS, NUM_MAGNITUDE_BINS
from rlsparse.kernels import FLOATS, cast_bits, label_counts, values
from rlsparse.tensor_file import Bits, bits_dtype

Labels = NDArray[np.uint16]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

NUM_TIE_BINS = 24
"""Distances to a rounding tie: half a spacing, and half octaves from there down to 2^-12."""
NUM_SIZE_BINS = 12
"""Of update sizes: none, deciles, not finite."""

_NONFINITE = NUM_MAGNITUDE_BINS
_PIECE = 2**18  # weights at a time, so that scratch stays small
_SIZE_BITS = 11  # of a float32: exponent and three more binary digits; no sign


class Strata(NamedTuple):
    """Counts of the strata of some weights, those that occur.

    Attributes:
        labels: of the strata, ascending; shape [S].
        sizes: weights in each; shape [S].
        changed: of these, those in the mask of each run; shape [R, S].
    """

    labels: Counts
    sizes: Counts
    changed: Counts


def magnitude_labels(bits: Bits, dtype: str, view: str) -> Labels:
    """Stratum of each weight of the base, as stored, for masks of changes in a view.

    Args:
        bits: flat bits of the base, shape [n].
        dtype: their number format; weights of one without values are one stratum.
        view: of ``definitions.VIEWS``.

    Returns:
        Shape [n]; NUM_TIE_BINS * magnitude bin + bin of the distance to the tie, which is 0 where
        the view cannot round the stored weights.
    """
    if dtype not in FLOATS:
        return np.full(bits.size, _NONFINITE * NUM_TIE_BINS, np.uint16)
    if view == "stored" or FLOATS[view].itemsize > FLOATS[dtype].itemsize:
        view = dtype
    if bits_dtype(dtype).itemsize <= 2:
        return np.take(_labels_of_all(dtype, view), bits)
    labels = np.empty(bits.size, np.uint16)
    for start in range(0, bits.size, _PIECE):
        labels[start : start + _PIECE] = _labels(bits[start : start + _PIECE], dtype, view)
    return labels


@cache
def _labels_of_all(dtype: str, view: str) -> Labels:
    item = bits_dtype(dtype)
    return _labels(np.arange(2 ** (8 * item.itemsize)).astype(item), dtype, view)


def _labels(bits: Bits, dtype: str, view: str) -> Labels:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        sizes = np.abs(values(bits, dtype).astype(np.float64))
    finite = np.isfinite(sizes)
    sizes = np.where(finite, sizes, 1.0)
    digits, exponents = np.frexp(sizes)  # sizes = digits * 2^exponents, digits in [.5, 1)
    places = np.clip(exponents - 1, MIN_EXPONENT, MAX_EXPONENT) - MIN_EXPONENT + 1
    places = np.where(sizes == 0, 0, places + np.where(digits == 0.5, NUM_EXPONENTS, 0))
    ties = np.zeros(bits.size, np.int64) if view == dtype else _tie_bins(bits, sizes, dtype, view)
    return np.where(finite, places * NUM_TIE_BINS + ties, _NONFINITE * NUM_TIE_BINS).astype(
        np.uint16
    )


def _tie_bins(bits: Bits, sizes: Floats, dtype: str, view: str) -> NDArray[np.int64]:
    """0: half a spacing away, on the grid; 1: down to 2^-1.5; 2: to 2^-2; and so on."""
    item, limits = bits_dtype(view), ml_dtypes.finfo(FLOATS[view])
    largest = np.array([limits.max]).view(item)[0]
    rounded = cast_bits(bits, dtype, view) & item.type(2 ** (8 * item.itemsize - 1) - 1)
    rounded = np.minimum(rounded, largest)

    def value(code: Bits) -> Floats:
        found: Floats = values(code.astype(item), view).astype(np.float64)
        return found

    own, smallest = value(rounded), float(value(np.ones(1, item))[0])
    below = np.where(rounded > 0, value(np.maximum(rounded, 1) - item.type(1)), -smallest)
    above = np.where(rounded < largest, value(np.minimum(rounded, largest - 1) + item.type(1)), 0)
    above = np.where(rounded < largest, above, 2 * own - below)
    distance = np.minimum((own + above) / 2 - sizes, sizes - (own + below) / 2)
    spacing = np.exp2(np.frexp(sizes)[1] - 1.0) * float(limits.eps)
    share = np.clip(distance / np.maximum(spacing, smallest), 0, 0.5)
    digits, exponents = np.frexp(share)  # .5 is digits .5, exponent 0
    half_octaves = -2 * exponents.astype(np.int64) + (digits < np.sqrt(0.5))
    return np.where(share > 0, np.clip(half_octaves - 1, 0, NUM_TIE_BINS - 1), NUM_TIE_BINS - 1)


def update_sizes(before: Bits, dtype_before: str, after: Bits, dtype_after: str) -> Floats:
    """|after - before| of a run, shape [n]; before is cast to the format after, as training does.

    NaN where either is not finite; of formats without values, 1 where the bits differ.
    """
    if dtype_before not in FLOATS or dtype_after not in FLOATS:
        differ: Floats = (before != after).astype(np.float64)
        return differ
    before = cast_bits(before, dtype_before, dtype_after)
    with np.errstate(invalid="ignore", over="ignore"):
        new, old = (values(side, dtype_after).astype(np.float64) for side in (after, before))
        sizes: Floats = np.abs(new - old)
    return sizes


def update_size_labels(labels: Labels, sizes: Floats) -> Labels:
    """Strata divided by the size of an independent run's updates.

    Within a stratum, weights that the run left alone are one bin, the others fall into deciles of
    the size of their update; equal sizes share a bin, the one of their middle rank. Sizes are
    ranked by their first four binary digits, and below 2^-126 alike, so that nothing is sorted.

    Args:
        labels: stratum of each weight, shape [n].
        sizes: |after - before| of each, shape [n]; NaN where it is not finite.

    Returns:
        Shape [n], by stratum and bin; they refine ``labels``.
    """
    present, places = _occupied(labels)
    with np.errstate(over="ignore", under="ignore"):
        single = sizes.astype(np.float32)
    single = np.where(sizes > 0, np.maximum(single, np.float32(2**-126)), single)
    digits = np.ascontiguousarray(single).view(np.uint32) >> np.uint32(31 - _SIZE_BITS)
    digits &= np.uint32(2**_SIZE_BITS - 1)
    cells = (places.astype(np.uint32) << np.uint32(_SIZE_BITS)) | digits
    counts = np.bincount(cells, minlength=len(present) << _SIZE_BITS).reshape(len(present), -1)
    infinite = int(np.float32(np.inf).view(np.uint32)) >> (31 - _SIZE_BITS)
    moved = counts[:, 1:infinite]
    ranks = np.cumsum(moved, axis=1) - moved / 2
    deciles = np.minimum(10 * ranks / np.maximum(moved.sum(axis=1, keepdims=True), 1), 9.999)
    bins = np.zeros(counts.shape, np.int64)
    bins[:, 1:infinite] = 1 + deciles.astype(np.int64)
    bins[:, infinite:] = NUM_SIZE_BINS - 1
    bins += NUM_SIZE_BINS * np.arange(len(present))[:, None]
    return np.take(bins.astype(np.uint16).reshape(-1), cells)


def count_strata(masks: NDArray[np.unsignedinteger[Any]], labels: Labels) -> Strata:
    """Count the weights of each label, and those in each of R packed masks [R, bytes or words]."""
    present, places = _occupied(labels)
    sizes = np.bincount(places, minlength=len(present)).astype(np.int64)
    return Strata(present, sizes, label_counts(masks, places, max(len(present), 1)))


def add_strata(parts: "list[Strata]") -> Strata:
    """The strata of several runs of weights together: those of one label are one."""
    if len(parts) == 1:
        return parts[0]
    labels = np.unique(np.concatenate([part.labels for part in parts]))
    sizes = np.zeros(len(labels), np.int64)
    changed = np.zeros((len(parts[0].changed), len(labels)), np.int64)
    for part in parts:
        places = np.searchsorted(labels, part.labels)
        sizes[places] += part.sizes
        changed[:, places] += part.changed
    return Strata(labels, sizes, changed)


def _occupied(labels: Labels) -> tuple[Counts, Labels]:
    """The labels that occur, ascending, and the place of each weight's label among them."""
    counts: NDArray[Any] = np.bincount(labels)
    present = np.flatnonzero(counts)
    places = np.zeros(max(counts.size, 1), np.uint16)
    places[present] = np.arange(len(present))
    return present.astype(np.int64), places[labels]
