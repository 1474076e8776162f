"""The hot loops: what changed between two runs of weights, magnitudes, and overlap of masks.

Callers pass bits (flat unsigned integers) and the short name of the number format. The compiled
code is in ``cpu``; numba is imported when a kernel is first called, not with this module.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rlsparse.definitions import (
    ABS_TOLERANCES,
    DEFINITIONS,
    NUM_MAGNITUDE_BINS,
    REL_TOLERANCE,
    ULP_BINS,
)
from rlsparse.errors import CheckpointError
from rlsparse.tensor_file import Bits, bits_dtype

FLOATS: dict[str, np.dtype[Any]] = {
    "fp64": np.dtype(np.float64),
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Number formats with values; tensors in any other are compared bit by bit only."""

_FIRST_NONFINITE: dict[str, int] = {
    "fp64": 0x7FF0_0000_0000_0000,
    "fp32": 0x7F80_0000,
    "fp16": 0x7C00,
    "bf16": 0x7F80,
    "fp8_e4m3": 0x7F,
    "fp8_e5m2": 0x7C,
}
"""Smallest bit pattern, sign cleared, that is an infinity or a NaN."""


@dataclass(frozen=True)
class ChunkCounts:
    """What changed between two equally long runs of weights.

    Attributes:
        num_elements: pairs compared.
        num_changed: definition of ``definitions.DEFINITIONS`` -> changed pairs.
        ulp_histogram: changed finite pairs by distance in representable values (``ULP_BINS``).
        magnitude_histogram_changed: bitwise changed pairs by |before| (``tables``); pairs whose
            before is not finite are in no bin.
        sum_sq_delta: sum of (after - before)^2 over finite pairs; likewise the next two.
        sum_abs_delta: sum of |after - before|.
        max_abs_delta: largest |after - before|.
        num_sign_flips: finite pairs of strictly opposite sign.
        num_nonfinite: pairs with a NaN or an infinity on either side, changed or not.
        mask: bitwise change, packed: bit i of byte j is pair 8 j + i.
    """

    num_elements: int
    num_changed: dict[str, int]
    ulp_histogram: list[int]
    magnitude_histogram_changed: list[int]
    sum_sq_delta: float
    sum_abs_delta: float
    max_abs_delta: float
    num_sign_flips: int
    num_nonfinite: int
    mask: bytes

    def columns(self) -> dict[str, object]:
        """The counts under the column names of table ``tensor_deltas`` (without the mask)."""
        return {
            "num_elements": self.num_elements,
            **{f"num_changed_{name}": count for name, count in self.num_changed.items()},
            "ulp_histogram": self.ulp_histogram,
            "magnitude_histogram_changed": self.magnitude_histogram_changed,
            "sum_sq_delta": self.sum_sq_delta,
            "sum_abs_delta": self.sum_abs_delta,
            "max_abs_delta": self.max_abs_delta,
            "num_sign_flips": self.num_sign_flips,
            "num_nonfinite": self.num_nonfinite,
        }


def measure(before_bits: Bits, after_bits: Bits, dtype: str) -> ChunkCounts:
    """Compare two runs of weights stored in format ``dtype``, under every definition.

    Differences and tolerances are float64: |after - before| is exact for every format of at most
    32 bits unless the exponents are further apart than 53 bits hold. A pair with a NaN or an
    infinity is changed, under every definition, iff its bits differ; so is any pair of a format
    without values (integers).

    Args:
        before_bits: shape [n].
        after_bits: shape [n].
        dtype: short name of the format of both.

    Raises:
        CheckpointError: the lengths or the widths differ.
    """
    from rlsparse.kernels import cpu

    item = bits_dtype(dtype)
    if before_bits.shape != after_bits.shape or {before_bits.dtype, after_bits.dtype} != {item}:
        raise CheckpointError(
            f"cannot compare {before_bits.dtype}{list(before_bits.shape)} with "
            f"{after_bits.dtype}{list(after_bits.shape)} as {dtype}: both must be {item} bits of "
            "one length"
        )
    has_values = dtype in FLOATS
    mask, before, after, num_nonfinite = cpu.scan(
        _read_only(before_bits),
        _read_only(after_bits),
        item.type(2 ** (8 * item.itemsize - 1) - 1 if has_values else 0),
        item.type(_FIRST_NONFINITE.get(dtype, 1)),
    )
    counts = np.full(len(DEFINITIONS), before.size, np.int64)
    ulps, magnitudes = np.zeros(len(ULP_BINS), np.int64), np.zeros(NUM_MAGNITUDE_BINS, np.int64)
    sums, num_sign_flips = (0.0, 0.0, 0.0), 0
    if has_values:
        *sums, num_sign_flips = cpu.compare(
            before, after, values(before, dtype), values(after, dtype),
            np.array([float(tau) for tau in ABS_TOLERANCES]), float(REL_TOLERANCE),
            counts, ulps, magnitudes,
        )  # fmt: skip
    return ChunkCounts(
        before_bits.size, dict(zip(DEFINITIONS, counts.tolist(), strict=True)), ulps.tolist(),
        magnitudes.tolist(), *sums, num_sign_flips, num_nonfinite, mask.tobytes(),
    )  # fmt: skip


def magnitude_histogram(bits: Bits, dtype: str) -> tuple[NDArray[np.int64], float]:
    """Weights by power of two, as ``definitions.NUM_MAGNITUDE_BINS`` says, and the sum of squares.

    Non-finite weights are in neither; formats without values give zeros.

    Returns:
        Histogram of shape [NUM_MAGNITUDE_BINS], and the sum.
    """
    from rlsparse.kernels import cpu

    histogram = np.zeros(NUM_MAGNITUDE_BINS, np.int64)
    if dtype not in FLOATS:
        return histogram, 0.0
    return histogram, float(cpu.magnitudes(values(bits, dtype), histogram))


def popcount(mask: NDArray[np.unsignedinteger[Any]]) -> int:
    """Number of set bits."""
    return int(np.bitwise_count(mask).sum(dtype=np.int64))


def popcount_and(masks: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """Set bits that each two of R packed masks share.

    Args:
        masks: uint8 or uint64, shape [R, words]; bits beyond the tensor must be zero.

    Returns:
        Shape [R, R], symmetric; the diagonal is each mask's own count.
    """
    from rlsparse.kernels import cpu

    masks = np.ascontiguousarray(masks)
    padding = -masks.shape[1] * masks.itemsize % 8
    if padding:
        masks = np.pad(masks.view(np.uint8), ((0, 0), (0, padding)))
    shared: NDArray[np.int64] = cpu.popcount_and(_read_only(masks.view(np.uint64)))
    return shared


def values(bits: Bits, dtype: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """Exact values of ``bits``: float64 for fp64, float32 for every narrower format."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "fp64":
        return bits.view(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(FLOATS[dtype]).astype(np.float32, copy=False)


def cast_bits(bits: Bits, dtype_from: str, dtype_to: str) -> Bits:
    """Cast weights to another format, rounding to nearest, ties to even (as ml_dtypes does).

    Values beyond the largest finite one become an infinity, or NaN in ``fp8_e4m3``, which has
    none; torch 2.13 instead saturates there at 448. NaNs stay NaN, their payload may change.

    Raises:
        CheckpointError: either format has no values.
    """
    if dtype_from == dtype_to:
        return bits
    for dtype in (dtype_from, dtype_to):
        if dtype not in FLOATS:
            raise CheckpointError(f"cannot cast {dtype}; known formats: {', '.join(FLOATS)}")
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        wide = values(bits, dtype_from)
        if dtype_from == "fp64" and dtype_to not in ("fp32", "fp16"):
            wide = _odd_single(wide)  # ml_dtypes would round twice, by way of fp32
        cast = wide.astype(FLOATS[dtype_to], copy=False)
    return cast.view(bits_dtype(dtype_to))


def _odd_single(wide: NDArray[Any]) -> NDArray[np.float32]:
    """fp64 to fp32 rounded to odd, from where rounding to a narrower format is exact."""
    single = wide.astype(np.float32)
    single = np.where(np.abs(single) > np.abs(wide), np.nextafter(single, np.float32(0)), single)
    odd: NDArray[np.uint32] = single.view(np.uint32) | (single != wide)
    return odd.view(np.float32)


def _read_only(array: Bits) -> Bits:
    """A read-only contiguous view: numba would compile once more for writable arrays."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
