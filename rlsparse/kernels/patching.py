"""Kernels of patches: where weights changed, as gaps, and what they became, as planes of bytes."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numba import types

from rlsparse.kernels.vectors import inlined, load, lowest_bit, store

_bytes, _numbers = types.CPointer(types.uint8), types.CPointer(types.uint32)


def _positions() -> tuple[Callable[..., None], Any]:
    """positions = the set bits of ``n`` words, in order."""

    def positions(words: Any, positions: Any, n: Any) -> None:
        k = np.int64(0)
        for word in range(n):
            bits = load(words, word)
            while bits != 0:
                store(positions, k, np.uint32(64 * word + lowest_bit(bits)))
                bits &= bits - np.uint64(1)
                k += 1

    words = types.CPointer(types.uint64)
    return positions, types.void(words, _numbers, types.int64)


def _bitmap() -> tuple[Callable[..., None], Any]:
    """Set the bits of ``n`` positions in words."""

    def bitmap(positions: Any, words: Any, n: Any) -> None:
        for k in range(n):
            position = np.uint64(load(positions, k))
            word = np.int64(position >> np.uint64(6))
            bit = np.uint64(1) << (position & np.uint64(63))
            store(words, word, load(words, word) | bit)

    return bitmap, types.void(_numbers, types.CPointer(types.uint64), types.int64)


# --- gaps: LEB128, seven bits to a byte, the lowest first; the highest bit says that more follow


def _gaps() -> tuple[Callable[..., None], Any]:
    """data = the elements skipped before each of ``n`` positions; size[0] = their bytes.

    Each takes up to 5 bytes of ``data``.
    """

    def gaps(positions: Any, data: Any, size: Any, n: Any) -> None:
        at, expected = np.int64(0), np.int64(0)
        for k in range(n):
            position = np.int64(load(positions, k))
            gap, expected = position - expected, position + 1
            while gap >= 128:
                store(data, at, np.uint8(gap & 127 | 128))
                gap >>= 7
                at += 1
            store(data, at, np.uint8(gap))
            at += 1
        store(size, 0, at)

    return gaps, types.void(_numbers, _bytes, types.CPointer(types.int64), types.int64)


def _ungaps() -> tuple[Callable[..., None], Any]:
    """The way back, of ``n`` gaps in ``size`` bytes; used[0] = the bytes read.

    It is -1 where a number does not end, or a position reaches ``limit``.
    """

    def ungaps(data: Any, positions: Any, used: Any, size: Any, n: Any, limit: Any) -> None:
        at, expected = np.int64(0), np.int64(0)
        for k in range(n):
            gap, shift, byte = np.int64(0), np.int64(0), np.int64(128)
            while byte >= 128 and at < size and shift < 35:
                byte = np.int64(load(data, at))
                gap |= (byte & 127) << shift
                shift += 7
                at += 1
            expected += gap
            if byte >= 128 or expected >= limit:
                at = np.int64(-1)
                break
            store(positions, k, np.uint32(expected))
            expected += 1
        store(used, 0, at)

    integers = types.CPointer(types.int64)
    return ungaps, types.void(_bytes, _numbers, integers, *[types.int64] * 3)


# --- values: byte p of value k lies at planes[p * n + k] ----------------------------------------


def _split_for(item: Any, is_relative: bool) -> tuple[Callable[..., None], Any]:
    """Planes of what is after at ``n`` positions; of relative ones, of the steps from before.

    ``stride`` values have room in a plane.
    """
    kind, width = np.dtype(str(item)).type, item.bitwidth
    step = _relative(kind, width)[0]

    def split(before: Any, after: Any, positions: Any, planes: Any, n: Any, stride: Any) -> None:
        for k in range(n):
            at = np.int64(load(positions, k))
            value = load(after, at)
            if is_relative:
                value = step(load(before, at), value)
            for plane in range(width // 8):
                byte = np.uint8(np.uint64(value) >> np.uint64(8 * plane))
                store(planes, plane * stride + k, byte)

    bits = types.CPointer(item)
    return split, types.void(bits, bits, _numbers, _bytes, types.int64, types.int64)


def _join_for(item: Any, is_relative: bool) -> tuple[Callable[..., None], Any]:
    """The way back: overwrite what is at ``n`` positions of ``bits``."""
    kind, width = np.dtype(str(item)).type, item.bitwidth
    back = _relative(kind, width)[1]

    def join(planes: Any, positions: Any, bits: Any, n: Any, stride: Any) -> None:
        for k in range(n):
            at, value = np.int64(load(positions, k)), kind(0)
            for plane in range(width // 8):
                byte = np.uint64(load(planes, plane * stride + k)) << np.uint64(8 * plane)
                value = kind(value | kind(byte))
            if is_relative:
                value = back(load(bits, at), value)
            store(bits, at, value)

    return join, types.void(_bytes, _numbers, types.CPointer(item), types.int64, types.int64)


def _halves() -> tuple[Callable[..., None], Any]:
    """The lower and the upper halves of ``n`` bytes, two to a byte, the first in its lower half.

    Both get ceil(n / 2) bytes.
    """

    def halves(plane: Any, low: Any, high: Any, n: Any) -> None:
        for k in range(n // 2):
            one, two = load(plane, 2 * k), load(plane, 2 * k + 1)
            store(low, k, np.uint8(one & 15 | np.uint8(two << 4)))
            store(high, k, np.uint8(one >> 4 | two & 240))
        if n % 2:
            store(low, n // 2, np.uint8(load(plane, n - 1) & 15))
            store(high, n // 2, np.uint8(load(plane, n - 1) >> 4))

    return halves, types.void(_bytes, _bytes, _bytes, types.int64)


def _whole() -> tuple[Callable[..., None], Any]:
    """The way back from ``halves``."""

    def whole(low: Any, high: Any, plane: Any, n: Any) -> None:
        for k in range(n // 2):
            lower, upper = load(low, k), load(high, k)
            store(plane, 2 * k, np.uint8(lower & 15 | np.uint8(upper << 4)))
            store(plane, 2 * k + 1, np.uint8(lower >> 4 | upper & 240))
        if n % 2:
            lower, upper = load(low, n // 2), load(high, n // 2)
            store(plane, n - 1, np.uint8(lower & 15 | np.uint8(upper << 4)))

    return whole, types.void(_bytes, _bytes, _bytes, types.int64)


def _relative(kind: Any, width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Steps from one code to another among codes in the order of their values, and back.

    Modulo 2^width, and zigzag: 0, -1, 1, -2, ... are 0, 1, 2, 3, ...
    """
    top, one = kind(1 << (width - 1)), kind(1)

    @inlined
    def step(before: Any, after: Any) -> Any:
        low = kind(~before) if before & top else kind(before | top)
        high = kind(~after) if after & top else kind(after | top)
        distance = kind(high - low)
        sign = kind(kind(0) - kind(distance >> kind(width - 1)))
        return kind(kind(distance << one) ^ sign)

    @inlined
    def back(before: Any, steps: Any) -> Any:
        low = kind(~before) if before & top else kind(before | top)
        distance = kind(kind(steps >> one) ^ kind(kind(0) - kind(steps & one)))
        high = kind(low + distance)
        return kind(high ^ top) if high & top else kind(~high)

    return step, back


KERNELS: dict[str, Callable[[], tuple[Callable[..., None], Any]]] = {
    "positions": _positions, "bitmap": _bitmap, "gaps": _gaps, "ungaps": _ungaps,
    "halves": _halves, "whole": _whole,
}  # fmt: skip
for _item, _kind in product(
    (types.uint8, types.uint16, types.uint32, types.uint64), ("relative", "absolute")
):
    _of = (_item, _kind == "relative")
    KERNELS[f"split_{_kind}_{_item.bitwidth}"] = partial(_split_for, *_of)
    KERNELS[f"join_{_kind}_{_item.bitwidth}"] = partial(_join_for, *_of)
"""Makers of the kernels by name: work, coding of values, width."""
