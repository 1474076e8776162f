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
    inlined,
    load,
    store,
)


@dataclass(frozen=True)
class Format:
    """A number format: its unsigned integer, its first codes beyond the finite, its values.

    A finite code of at most 16 bits, its sign apart, becomes a float32 when its digits are moved by
    ``shift`` and its exponent is raised by ``raised``; ``vectors`` says what subnormal ones need.
    """

    item: Any
    first_nonfinite: int
    first_nan: int
    shift: int = 0
    raised: int = 0

    @property
    def width(self) -> int:
        """Bits of a weight."""
        return int(self.item.bitwidth)

    @property
    def value(self) -> Callable[[Any], Any]:
        """Value of a code: float32, float64 for fp64; NaN where it is not finite."""
        if self.width == 64:
            return double_of_bits
        if self.width == 32:
            return float_of_bits
        return _from_bf16 if self.shift == 16 else _small_value_of(self)


def _small_value_of(kind: Format) -> Callable[[Any], Any]:
    magnitude_bits = np.uint32(2 ** (kind.width - 1) - 1)
    first_nonfinite, sign = np.uint32(kind.first_nonfinite), np.uint32(2 ** (kind.width - 1))
    shift, first_normal = np.uint32(kind.shift), np.uint32(2 ** (23 - kind.shift))
    raised, one = np.uint32(kind.raised << 23), np.uint32(1 << 23)

    @inlined
    def small_value(code: Any) -> Any:
        bits = np.uint32(code)
        magnitude = np.uint32(bits & magnitude_bits)
        moved = np.uint32(np.uint32(magnitude << shift) + raised)
        # A subnormal code lacks the leading one that float32 implies: add it, subtract its value.
        is_subnormal = magnitude < first_normal
        lead = float_of_bits(np.uint32(raised + one)) if is_subnormal else np.float32(0)
        size = float_of_bits(np.uint32(moved + one) if is_subnormal else moved) - lead
        size = np.float32(np.nan) if magnitude >= first_nonfinite else np.float32(size)
        return np.float32(-size) if bits & sign else size

    return small_value


@inlined
def _from_bf16(code: Any) -> Any:
    return float_of_bits(np.uint32(np.uint32(code) << np.uint32(16)))


FORMATS = {
    "bf16": Format(types.uint16, 0x7F80, 0x7F81, 16),
    "fp16": Format(types.uint16, 0x7C00, 0x7C01, 13, 112),
    "fp32": Format(types.uint32, 0x7F80_0000, 0x7F80_0001),
    "fp64": Format(types.uint64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    "fp8_e4m3": Format(types.uint8, 0x7F, 0x7F, 20, 120),
    "fp8_e5m2": Format(types.uint8, 0x7C, 0x7D, 21, 112),
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
