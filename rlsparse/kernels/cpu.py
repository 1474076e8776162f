"""The kernels of the CPU, compiled by numba; call them through ``rlsparse.kernels``.

Top-level functions only: numba's cache never hits for closures. All release the GIL.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rlsparse.definitions import MAX_EXPONENT, MIN_EXPONENT, NUM_EXPONENTS

_BLOCK = 4096  # words of each mask per pass: a pair of blocks stays in the L2 cache
_ONE = np.uint64(1)

_F = TypeVar("_F", bound=Callable[..., Any])
_compiled: Callable[[_F], _F] = njit(nogil=True, cache=True)


@_compiled
def scan(before: Any, after: Any, abs_mask: Any, first_nonfinite: Any) -> Any:
    """Pack which pairs differ, gather those, and count pairs with a non-finite side.

    Returns:
        Packed mask uint8 [ceil(n / 8)], before and after of the changed pairs, and the count.
    """
    n = before.size
    mask = np.zeros((n + 7) // 8, np.uint8)
    changed_before = np.empty_like(before)
    changed_after = np.empty_like(after)
    num_changed = 0
    num_nonfinite = 0
    for j in range(mask.size):
        byte = 0
        for k in range(min(8, n - 8 * j)):
            a, b = before[8 * j + k], after[8 * j + k]
            byte |= (a != b) << k
            num_nonfinite += ((a & abs_mask) >= first_nonfinite) | (
                (b & abs_mask) >= first_nonfinite
            )
        mask[j] = byte
        if byte:
            for k in range(min(8, n - 8 * j)):
                if (byte >> k) & 1:
                    changed_before[num_changed] = before[8 * j + k]
                    changed_after[num_changed] = after[8 * j + k]
                    num_changed += 1
    return (
        mask,
        changed_before[:num_changed].copy(),
        changed_after[:num_changed].copy(),
        num_nonfinite,
    )


@_compiled
def _magnitude_bin(value: float) -> int:
    """Bin of a finite value in the magnitude histogram (definitions.NUM_MAGNITUDE_BINS)."""
    if value == 0.0:
        return 0
    mantissa, exponent = math.frexp(abs(value))  # value = mantissa * 2^exponent, mantissa >= 1/2
    position = 1 + min(max(exponent - 1, MIN_EXPONENT), MAX_EXPONENT) - MIN_EXPONENT
    return position + NUM_EXPONENTS if mantissa == 0.5 else position


@_compiled
def _ulp_bin(before: Any, after: Any, sign: Any) -> int:
    """Bin of the distance between two codes that ascend with the value (definitions.ULP_BINS)."""
    low = ~before & (sign | (sign - _ONE)) if before & sign else before | sign
    high = ~after & (sign | (sign - _ONE)) if after & sign else after | sign
    rest = (high - low if high > low else low - high) - _ONE
    position = 0
    while rest and position < 9:
        rest >>= _ONE
        position += 1
    return position


@_compiled
def compare(
    before_bits: Any,
    after_bits: Any,
    before: Any,
    after: Any,
    tolerances: NDArray[np.float64],
    relative: float,
    counts: NDArray[np.int64],
    ulps: NDArray[np.int64],
    magnitudes: NDArray[np.int64],
) -> Any:
    """Count bitwise changed pairs under the other definitions.

    ``counts`` comes in holding the number of pairs in each place (bitwise, tolerances, relative);
    pairs unchanged under a definition are taken off. ``ulps`` and ``magnitudes`` are added to.

    Returns:
        Sum of squares, sum and maximum of |after - before|; number of sign flips.
    """
    sign = _ONE << np.uint64(8 * before_bits.itemsize - 1)
    sum_sq = sum_abs = max_abs = 0.0
    num_flips = 0
    for i in range(before.size):
        a, b = np.float64(before[i]), np.float64(after[i])
        if not math.isfinite(a):
            continue
        magnitudes[_magnitude_bin(a)] += 1
        if not math.isfinite(b):
            continue
        delta = abs(b - a)
        for t in range(tolerances.size):
            counts[1 + t] -= delta <= tolerances[t]
        counts[1 + tolerances.size] -= delta <= relative * max(abs(a), abs(b))
        ulps[_ulp_bin(np.uint64(before_bits[i]), np.uint64(after_bits[i]), sign)] += 1
        if (a < 0.0 < b) or (b < 0.0 < a):
            num_flips += 1
        sum_sq += delta * delta
        sum_abs += delta
        max_abs = max(max_abs, delta)
    return sum_sq, sum_abs, max_abs, num_flips


@_compiled
def magnitudes(weights: Any, histogram: NDArray[np.int64]) -> float:
    """Add ``weights`` to ``histogram``; returns the sum of squares of the finite ones."""
    sum_sq = 0.0
    for weight in weights:
        value = np.float64(weight)
        if math.isfinite(value):
            histogram[_magnitude_bin(value)] += 1
            sum_sq += value * value
    return sum_sq


@_compiled
def _popcount(word: Any) -> Any:
    # LLVM recognises this form and emits the instruction.
    word = word - ((word >> _ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@_compiled
def popcount_and(masks: Any) -> NDArray[np.int64]:
    """Shared set bits of each two rows of uint64 ``masks`` [R, W]; shape [R, R]."""
    num_masks, num_words = masks.shape
    shared = np.zeros((num_masks, num_masks), np.int64)
    for start in range(0, num_words, _BLOCK):
        block = masks[:, start : start + _BLOCK]
        for i in range(num_masks):
            for j in range(i, num_masks):
                count = np.int64(0)
                for k in range(block.shape[1]):
                    count += np.int64(_popcount(block[i, k] & block[j, k]))
                shared[i, j] += count
    for i in range(num_masks):
        for j in range(i):
            shared[i, j] = shared[j, i]
    return shared
