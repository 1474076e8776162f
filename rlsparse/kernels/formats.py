"""Number formats inside the kernels: values of bits, and bins of magnitudes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from rlsparse.definitions import MAX_EXPONENT, MIN_EXPONENT, NUM_EXPONENTS
from rlsparse.kernels import layout as at
from rlsparse.kernels.vectors import (
    bits_of_double,
    double_of_bits,
    float_of_bits,
    float_of_half_bits,
    inlined,
    load,
    store,
)


@inlined
def _from_bf16(bits: Any) -> Any:
    return float_of_bits(np.uint32(np.uint32(bits) << np.uint32(16)))


@inlined
def _from_e4m3(bits: Any) -> Any:
    # A half with the same digits has an exponent 8 too small; all-ones, the NaN, stays one.
    if bits & np.uint16(0x7F) == 0x7F:
        return np.float32(np.nan)
    half = ((bits & np.uint16(0x80)) << np.uint16(8)) | ((bits & np.uint16(0x7F)) << np.uint16(7))
    return np.float32(float_of_half_bits(np.uint16(half)) * np.float32(256))


@inlined
def _from_fp16(bits: Any) -> Any:
    return float_of_half_bits(np.uint16(bits))


@inlined
def _from_e5m2(bits: Any) -> Any:
    return float_of_half_bits(np.uint16(np.uint16(bits) << np.uint16(8)))


@inlined
def _from_fp32(bits: Any) -> Any:
    return float_of_bits(np.uint32(bits))


@inlined
def _from_fp64(bits: Any) -> Any:
    return double_of_bits(np.uint64(bits))


@dataclass(frozen=True)
class Format:
    """A number format: its unsigned integer, its first codes beyond the finite, its values."""

    name: str
    item: Any
    first_nonfinite: int
    first_nan: int
    value: Callable[[Any], Any]

    @property
    def width(self) -> int:
        """Bits of a weight."""
        return int(self.item.bitwidth)


FORMATS = {
    "bf16": Format("bf16", types.uint16, 0x7F80, 0x7F81, _from_bf16),
    "fp16": Format("fp16", types.uint16, 0x7C00, 0x7C01, _from_fp16),
    "fp32": Format("fp32", types.uint32, 0x7F80_0000, 0x7F80_0001, _from_fp32),
    "fp64": Format("fp64", types.uint64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001, _from_fp64),
    "fp8_e4m3": Format("fp8_e4m3", types.uint8, 0x7F, 0x7F, _from_e4m3),
    "fp8_e5m2": Format("fp8_e5m2", types.uint8, 0x7C, 0x7D, _from_e5m2),
}


@inlined
def bump(pointer: Any, index: Any, amount: Any) -> None:
    """pointer[index] += amount."""
    store(pointer, index, load(pointer, index) + amount)


@inlined
def magnitude_bin(value: Any) -> Any:
    """Bin of a finite value in the magnitude histogram (definitions.NUM_MAGNITUDE_BINS)."""
    bits = bits_of_double(value) & np.uint64(2**63 - 1)
    if bits == 0:
        return np.int64(0)
    mantissa = bits & np.uint64(2**52 - 1)
    exponent = np.int64(bits >> np.uint64(52)) - 1023
    clipped: Any = min(max(exponent, MIN_EXPONENT), MAX_EXPONENT)
    place = 1 + clipped - MIN_EXPONENT
    if exponent == -1023:  # subnormal in fp64: a power of two has one digit
        return place + NUM_EXPONENTS if mantissa & (mantissa - np.uint64(1)) == 0 else place
    return place + NUM_EXPONENTS if mantissa == 0 else place


@inlined
def empty_raw(raw: Any, histogram: Any) -> None:
    """Move the raw bins (float32 exponents) to their places in the magnitude histogram."""
    for index in range(at.NUM_RAW_BINS):
        count = np.int64(load(raw, index)) + np.int64(load(raw, index + at.NUM_RAW_BINS))
        if count == 0:
            continue
        store(raw, index, np.int32(0))
        store(raw, index + at.NUM_RAW_BINS, np.int32(0))
        place = 0
        if index < 512:
            exponent = max(index % 256, 1) - 127  # subnormals are below the range anyway
            place = 1 + min(max(exponent, MIN_EXPONENT), MAX_EXPONENT) - MIN_EXPONENT
            place += NUM_EXPONENTS * (index // 256)
        bump(histogram, place, count)


@inlined
def bin_magnitudes(x: Any, bins: Any, raw: Any, n: Any) -> None:
    """Count the finite float32 values whose bits are ``x`` in raw bins."""
    for i in range(n):
        bits = load(x, i)
        exponent = np.int32((bits >> np.uint32(23)) & np.uint32(255))
        digits = np.int32(bits & np.uint32(0x7FFFFF))
        rest = np.int32(digits & np.int32(digits - np.int32(exponent == 0)))
        place = np.int32(exponent + np.int32(256) * np.int32(rest == 0))
        is_zero = bits & np.uint32(0x7FFFFFFF) == 0
        store(bins, i, np.uint16(512) if is_zero else np.uint16(place))
    # Two histograms by turns: neighbours often share a bin, and would wait for each other.
    for i in range(n):
        bump(raw, np.int64(load(bins, i)) + at.NUM_RAW_BINS * (i & 1), np.int32(1))
