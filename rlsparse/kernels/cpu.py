"""The kernels of the CPU in Python; ``machine_code`` has numba compile them, once per machine.

All take addresses and allocate nothing. Clean data takes the fast way: 64 pairs per comparison,
changed pairs squeezed into small buffers and judged there, vector by vector. A block that holds a
NaN or an infinity takes the careful way, one pair at a time, as all of fp64 does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import types

from rlsparse.definitions import ABS_TOLERANCES, REL_TOLERANCE
from rlsparse.kernels import layout as at
from rlsparse.kernels.formats import (
    FORMATS,
    Format,
    bin_magnitudes,
    bump,
    empty_raw,
    magnitude_bin,
)
from rlsparse.kernels.vectors import (
    LANES,
    advance,
    at_most,
    at_most_each,
    count_bits,
    differ,
    double_of_bits,
    gather_for,
    inlined,
    load,
    part,
    signs_differ,
    squares_for,
    store,
    store_ulps,
    zeros_among,
)

FASTMATH = {"reassoc", "nsz", "contract"}
"""Sums may be reordered, so that they vectorise; NaN and infinities keep their meaning."""

_T0, _T1, _T2, _T3, _T4 = (float(tau) for tau in ABS_TOLERANCES)
_REL = float(REL_TOLERANCE)
_BLOCK = at.BLOCK
_ALL = np.uint64(2**64 - 1)
_ONE = np.uint64(1)


# --- the careful way -------------------------------------------------------------------------


def _careful_for(kind: Format) -> Callable[..., None]:
    """Judges the pairs [start, start + n) one at a time; counts all but the changed bits."""
    item = np.dtype(f"u{kind.width // 8}").type
    magnitude = np.uint64(2 ** (kind.width - 1) - 1)
    sign = np.uint64(2 ** (kind.width - 1))
    everything = np.uint64(2**kind.width - 1)
    first_nonfinite, first_nan = np.uint64(kind.first_nonfinite), np.uint64(kind.first_nan)
    value = kind.value

    @inlined
    def ascending(code: Any) -> Any:
        return (~code) & everything if code & sign else code | sign

    @inlined
    def judge_changed(a: Any, b: Any, x: Any, y: Any, integers: Any, floats: Any) -> None:
        delta = abs(y - x)
        bump(integers, at.FINITE, np.int64(1))
        bump(integers, at.WITHIN_ABS, np.int64(delta <= _T0))
        bump(integers, at.WITHIN_ABS + 1, np.int64(delta <= _T1))
        bump(integers, at.WITHIN_ABS + 2, np.int64(delta <= _T2))
        bump(integers, at.WITHIN_ABS + 3, np.int64(delta <= _T3))
        bump(integers, at.WITHIN_ABS + 4, np.int64(delta <= _T4))
        bump(integers, at.WITHIN_REL, np.int64(delta <= _REL * max(abs(x), abs(y))))
        low, high = ascending(a), ascending(b)
        ulps = high - low if high > low else low - high
        for power in range(9):
            bump(integers, at.WITHIN_ULPS + power, np.int64(ulps <= _ONE << np.uint64(power)))
        bump(integers, at.SIGN_FLIPS, np.int64((x < 0.0 < y) or (y < 0.0 < x)))
        bump(integers, at.ZERO_SIGN_FLIPS, np.int64(x == 0.0 and y == 0.0))
        bump(floats, at.SUM_SQ_DELTA, delta * delta)
        bump(floats, at.SUM_ABS_DELTA, delta)
        store(floats, at.MAX_ABS_DELTA, max(delta, load(floats, at.MAX_ABS_DELTA)))

    @inlined
    def careful(
        before: Any, after: Any, start: Any, n: Any, integers: Any, floats: Any, histogram: Any
    ) -> None:
        for i in range(start, start + n):
            a, b = np.uint64(load(before, i)), np.uint64(load(after, i))
            is_finite = (a & magnitude) < first_nonfinite
            if not is_finite or (b & magnitude) >= first_nonfinite:
                bump(integers, at.NONFINITE, np.int64(1))
                has_nan = (a & magnitude) >= first_nan or (b & magnitude) >= first_nan
                bump(integers, at.NAN, np.int64(has_nan))
            if a != b and is_finite:
                x = np.float64(value(item(a)))
                bump(histogram, magnitude_bin(x), np.int64(1))
                if (b & magnitude) < first_nonfinite:
                    judge_changed(a, b, x, np.float64(value(item(b))), integers, floats)

    return careful


def _exact_squares_for(kind: Format) -> Callable[..., Any]:
    """Sum of squares of the finite ones of bits[start : start + n], in float64."""
    item = np.dtype(f"u{kind.width // 8}").type
    magnitude, first_nonfinite = item(2 ** (kind.width - 1) - 1), item(kind.first_nonfinite)
    value = kind.value

    @inlined
    def exact_squares(bits: Any, start: Any, n: Any) -> Any:
        total = 0.0
        for i in range(start, start + n):
            code = load(bits, i)
            if code & magnitude < first_nonfinite:
                total += np.float64(value(code)) * np.float64(value(code))
        return total

    return exact_squares


# --- the fast way ----------------------------------------------------------------------------


def _judge_for(kind: Format) -> Callable[..., None]:
    """Judges ``n`` changed pairs of finite values that lie squeezed in the workspace."""
    item = np.dtype(f"u{kind.width // 8}").type
    ulp_item = np.uint32 if kind.width == 32 else np.uint16
    value, careful = kind.value, _careful_for(kind)

    @inlined
    def differences(workspace: Any, n: Any, floats: Any) -> bool:
        before, after = part(workspace, at.BEFORE, item), part(workspace, at.AFTER, item)
        x, y = part(workspace, at.X, np.float32), part(workspace, at.Y, np.float32)
        delta, limit = part(workspace, at.DELTA, np.float64), part(workspace, at.LIMIT, np.float64)
        # One short loop per array: LLVM gives up on many arrays that might overlap.
        for i in range(n):
            store(x, i, value(load(before, i)))
        for i in range(n):
            store(y, i, value(load(after, i)))
        total, squares = 0.0, 0.0
        for i in range(n):
            d = abs(np.float64(load(y, i)) - np.float64(load(x, i)))
            store(delta, i, d)
            total += d
            squares += d * d
        for i in range(n):
            a, b = abs(np.float64(load(x, i))), abs(np.float64(load(y, i)))
            store(limit, i, _REL * (a if a > b else b))
        if not total < np.inf:
            return False
        # Codes of positive numbers ascend with them, and only integers have a vector maximum.
        codes = part(workspace, at.DELTA, np.uint64)
        largest = np.uint64(0)
        for i in range(n):
            largest = max(largest, load(codes, i))
        bump(floats, at.SUM_ABS_DELTA, total)
        bump(floats, at.SUM_SQ_DELTA, squares)
        most = max(load(floats, at.MAX_ABS_DELTA), double_of_bits(largest))
        store(floats, at.MAX_ABS_DELTA, most)
        return True

    @inlined
    def count(workspace: Any, n: Any, integers: Any) -> None:
        before, after = part(workspace, at.BEFORE, item), part(workspace, at.AFTER, item)
        delta, limit = part(workspace, at.DELTA, np.float64), part(workspace, at.LIMIT, np.float64)
        ulps = part(workspace, at.ULPS, ulp_item)
        t0 = t1 = t2 = t3 = t4 = near = flips = zeros = np.int64(0)
        u0 = u1 = u2 = u3 = u4 = u5 = u6 = u7 = u8 = np.int64(0)
        for i in range(0, n, LANES):
            valid = _ALL if n - i >= LANES else (_ONE << np.uint64(n - i)) - _ONE
            near += count_bits(at_most_each(delta, limit, i) & valid)
            # What a looser tolerance calls changed is changed under the tighter ones.
            within = at_most(delta, i, _T4) & valid
            if within != 0:
                t4 += count_bits(within)
                within = at_most(delta, i, _T3) & valid
                if within != 0:
                    t3 += count_bits(within)
                    within = at_most(delta, i, _T2) & valid
                    if within != 0:
                        t2 += count_bits(within)
                        t1 += count_bits(at_most(delta, i, _T1) & valid)
                        t0 += count_bits(at_most(delta, i, _T0) & valid)
            store_ulps(before, after, ulps, i)
            u0 += count_bits(at_most(ulps, i, ulp_item(1)) & valid)
            u1 += count_bits(at_most(ulps, i, ulp_item(2)) & valid)
            within = at_most(ulps, i, ulp_item(4)) & valid
            u2 += count_bits(within)
            if within == valid:
                rest = count_bits(valid)
                u3 += rest
                u4 += rest
                u5 += rest
                u6 += rest
                u7 += rest
                u8 += rest
            else:
                u3 += count_bits(at_most(ulps, i, ulp_item(8)) & valid)
                u4 += count_bits(at_most(ulps, i, ulp_item(16)) & valid)
                u5 += count_bits(at_most(ulps, i, ulp_item(32)) & valid)
                u6 += count_bits(at_most(ulps, i, ulp_item(64)) & valid)
                u7 += count_bits(at_most(ulps, i, ulp_item(128)) & valid)
                u8 += count_bits(at_most(ulps, i, ulp_item(256)) & valid)
            crossed = signs_differ(before, after, i) & valid
            if crossed != 0:
                zero_before, zero_after = zeros_among(before, i), zeros_among(after, i)
                flips += count_bits(crossed & ~(zero_before | zero_after))
                zeros += count_bits(crossed & zero_before & zero_after)
        found = (t0, t1, t2, t3, t4, near, u0, u1, u2, u3, u4, u5, u6, u7, u8)
        for slot in range(15):
            bump(integers, at.WITHIN_ABS + slot, found[slot])
        bump(integers, at.FINITE, n)
        bump(integers, at.SIGN_FLIPS, flips)
        bump(integers, at.ZERO_SIGN_FLIPS, zeros)

    @inlined
    def judge(workspace: Any, n: Any, integers: Any, floats: Any, histogram: Any) -> None:
        if differences(workspace, n, floats):
            count(workspace, n, integers)
            bin_magnitudes(
                part(workspace, at.X, np.uint32),
                part(workspace, at.BINS, np.uint16),
                part(workspace, at.RAW, np.int32),
                n,
            )
        else:
            before, after = part(workspace, at.BEFORE, item), part(workspace, at.AFTER, item)
            careful(before, after, 0, n, integers, floats, histogram)

    return judge


def _scan_for(kind: Format) -> tuple[Callable[..., None], Any]:
    """The diff kernel of a format of at most 32 bits."""
    item = np.dtype(f"u{kind.width // 8}").type
    careful, exact_squares = _careful_for(kind), _exact_squares_for(kind)
    judge, gather = _judge_for(kind), gather_for(kind.width)
    sum_squares = squares_for(kind.first_nonfinite, kind.shift, kind.raised)

    @inlined
    def sweep(
        before: Any, after: Any, mask: Any, integers: Any, floats: Any, histogram: Any,
        workspace: Any, n: Any,
    ) -> None:  # fmt: skip
        """``n`` is a multiple of 64."""
        changed_before = part(workspace, at.BEFORE, item)
        changed_after = part(workspace, at.AFTER, item)
        place = np.int64(0)
        num_changed = np.int64(0)
        for start in range(0, n, _BLOCK):
            stop = min(n, start + _BLOCK)
            first = place
            squares = 0.0
            for i in range(start, stop, LANES):
                word = differ(before, after, i)
                store(mask, i >> 6, word)
                squares += sum_squares(before, i)
                if word != 0:
                    num_changed += count_bits(word)
                    gather(after, i, word, changed_after, place)
                    place = gather(before, i, word, changed_before, place)
            if not squares < np.inf:  # NaN or infinite before: not for the fast way
                place = first
                careful(before, after, start, stop - start, integers, floats, histogram)
            if not 1e-25 < squares < np.inf:
                squares = exact_squares(before, start, stop - start)
            bump(floats, at.SUM_SQ_BEFORE, squares)
            if place >= _BLOCK:
                judge(workspace, place, integers, floats, histogram)
                place = np.int64(0)
        if place:
            judge(workspace, place, integers, floats, histogram)
        bump(integers, at.CHANGED, num_changed)

    def scan(
        before: Any, after: Any, mask: Any, integers: Any, floats: Any, histogram: Any,
        workspace: Any, n: Any,
    ) -> None:  # fmt: skip
        whole = n & ~63
        sweep(before, after, mask, integers, floats, histogram, workspace, whole)
        if n > whole:  # the rest is followed by zeros, which are equal and count nowhere
            rest_before = part(workspace, at.TAIL_BEFORE, item)
            rest_after = part(workspace, at.TAIL_AFTER, item)
            for i in range(LANES):
                inside = whole + i < n
                store(rest_before, i, load(before, whole + i) if inside else item(0))
                store(rest_after, i, load(after, whole + i) if inside else item(0))
            rest_mask = advance(mask, whole >> 6)
            sweep(rest_before, rest_after, rest_mask, integers, floats, histogram, workspace, LANES)
        empty_raw(part(workspace, at.RAW, np.int32), histogram)

    return scan, _scan_signature(kind.item)


def _scan_signature(item: Any) -> Any:
    bits, words = types.CPointer(item), types.CPointer(types.uint64)
    counts, sums = types.CPointer(types.int64), types.CPointer(types.float64)
    workspace = types.CPointer(types.uint8)
    return types.void(bits, bits, words, counts, sums, counts, workspace, types.int64)


def _compare_for(item: Any) -> tuple[Callable[..., None], Any]:
    """Mask and number of changed items, whatever they mean."""

    def compare(
        before: Any, after: Any, mask: Any, integers: Any, floats: Any, histogram: Any,
        workspace: Any, n: Any,
    ) -> None:  # fmt: skip
        num_changed = np.int64(0)
        whole = n & ~63
        for i in range(0, whole, LANES):
            word = differ(before, after, i)
            store(mask, i >> 6, word)
            num_changed += count_bits(word)
        if n > whole:
            word = np.uint64(0)
            for i in range(whole, n):
                word |= np.uint64(load(before, i) != load(after, i)) << np.uint64(i - whole)
            store(mask, whole >> 6, word)
            num_changed += count_bits(word)
        bump(integers, at.CHANGED, num_changed)

    return compare, _scan_signature(item)


def _scan_fp64() -> tuple[Callable[..., None], Any]:
    """The diff kernel of fp64, all of it the careful way."""
    compare, signature = _compare_for(types.uint64)
    compare, kind = inlined(compare), FORMATS["fp64"]
    careful, exact_squares = _careful_for(kind), _exact_squares_for(kind)

    def scan(
        before: Any, after: Any, mask: Any, integers: Any, floats: Any, histogram: Any,
        workspace: Any, n: Any,
    ) -> None:  # fmt: skip
        compare(before, after, mask, integers, floats, histogram, workspace, n)
        careful(before, after, 0, n, integers, floats, histogram)
        bump(floats, at.SUM_SQ_BEFORE, exact_squares(before, 0, n))

    return scan, signature


KERNELS: dict[str, Callable[[], tuple[Callable[..., None], Any]]] = {
    **{
        f"scan_{name}": partial(_scan_for, kind) for name, kind in FORMATS.items() if name != "fp64"
    },
    "scan_fp64": _scan_fp64,
    **{
        f"compare_{item.bitwidth}": partial(_compare_for, item)
        for item in (types.uint8, types.uint16, types.uint32, types.uint64)
    },
}
"""Makers of the kernels by name: each gives a function and its numba signature."""
