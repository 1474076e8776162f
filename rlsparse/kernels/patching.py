"""Kernels of patches: where weights changed, as gaps or bits, and how far they moved."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import types

from rlsparse.kernels.packed_vectors import places_for
from rlsparse.kernels.vectors import inlined, load, store

_bytes, _numbers = types.CPointer(types.uint8), types.CPointer(types.uint32)


def _positions() -> tuple[Callable[..., None], Any]:
    """positions = the set bits of ``n`` words, in order; up to 64 beyond them are overwritten."""
    places = places_for()

    def positions(words: Any, positions: Any, n: Any) -> None:
        k = np.int64(0)
        for word in range(n):
            bits = load(words, word)
            if bits != 0:
                k = places(np.uint32(64 * word), bits, positions, k)

    words = types.CPointer(types.uint64)
    return positions, types.void(words, _numbers, types.int64)


def _bitmap() -> tuple[Callable[..., None], Any]:
    """Set the bits of ``n`` positions in words, which are zero."""

    def bitmap(positions: Any, words: Any, n: Any) -> None:
        k = np.int64(0)
        while k < n:
            position = np.int64(load(positions, k))
            word, bits = position >> 6, np.uint64(0)
            while position >> 6 == word:
                bits |= np.uint64(1) << np.uint64(position & 63)
                k += 1
                position = np.int64(load(positions, k)) if k < n else np.int64(-1)
            store(words, word, bits)

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
        at, expected, k = np.int64(0), np.int64(0), np.int64(0)
        while k < n and at < size:
            gap = np.int64(load(data, at))
            at += 1
            if gap >= 128:
                shift, byte = np.int64(7), np.int64(128)
                gap &= 127
                while byte >= 128 and at < size and shift < 35:
                    byte = np.int64(load(data, at))
                    gap |= (byte & 127) << shift
                    shift += 7
                    at += 1
                if byte >= 128:
                    break
            expected += gap
            if expected >= limit:
                break
            store(positions, k, np.uint32(expected))
            expected += 1
            k += 1
        store(used, 0, at if k == n else np.int64(-1))

    integers = types.CPointer(types.int64)
    return ungaps, types.void(_bytes, _numbers, integers, *[types.int64] * 3)


# --- values: what weights became ---------------------------------------------------------------


def _steps_for(item: Any) -> tuple[Callable[..., None], Any]:
    """after = the steps from ``n`` codes before to those after.

    Modulo 2^width, and zigzag: 0, -1, 1, -2, ... are 0, 1, 2, 3, ...
    """
    kind, width = np.dtype(str(item)).type, item.bitwidth
    ascending, one = _order(kind, width)[0], kind(1)

    def steps(before: Any, after: Any, n: Any) -> None:
        for k in range(n):
            distance = kind(ascending(load(after, k)) - ascending(load(before, k)))
            sign = kind(kind(0) - kind(distance >> kind(width - 1)))
            store(after, k, kind(kind(distance << one) ^ sign))

    bits = types.CPointer(item)
    return steps, types.void(bits, bits, types.int64)


def _move_for(item: Any) -> tuple[Callable[..., None], Any]:
    """Move what is at ``n`` positions of ``bits`` by these steps."""
    kind, width = np.dtype(str(item)).type, item.bitwidth
    (ascending, descending), one = _order(kind, width), kind(1)

    def move(steps: Any, positions: Any, bits: Any, n: Any) -> None:
        for k in range(n):
            step, at = load(steps, k), np.int64(load(positions, k))
            distance = kind(kind(step >> one) ^ kind(kind(0) - kind(step & one)))
            store(bits, at, descending(kind(ascending(load(bits, at)) + distance)))

    bits = types.CPointer(item)
    return move, types.void(bits, _numbers, bits, types.int64)


def _order(kind: Any, width: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """From codes to their place in the order of their values, and back; without branches."""
    top, last = kind(1 << (width - 1)), kind(width - 1)

    @inlined
    def ascending(code: Any) -> Any:
        is_negative = kind(kind(0) - kind(code >> last))
        return kind(code ^ kind(is_negative | top))

    @inlined
    def descending(place: Any) -> Any:
        is_negative = kind(kind(place >> last) - kind(1))
        return kind(place ^ kind(is_negative | top))

    return ascending, descending


def _halves() -> tuple[Callable[..., None], Any]:
    """The lower and the upper halves of ``n`` bytes, two to a byte, the first in its lower half.

    Bytes are ``stride`` apart. Both sides get ceil(n / 2) bytes.
    """

    def halves(plane: Any, low: Any, high: Any, n: Any, stride: Any) -> None:
        for k in range(n // 2):
            one, two = load(plane, 2 * k * stride), load(plane, (2 * k + 1) * stride)
            store(low, k, np.uint8(one & 15 | np.uint8(two << 4)))
            store(high, k, np.uint8(one >> 4 | two & 240))
        if n % 2:
            store(low, n // 2, np.uint8(load(plane, (n - 1) * stride) & 15))
            store(high, n // 2, np.uint8(load(plane, (n - 1) * stride) >> 4))

    return halves, types.void(_bytes, _bytes, _bytes, types.int64, types.int64)


def _whole() -> tuple[Callable[..., None], Any]:
    """The way back from ``halves``."""

    def whole(low: Any, high: Any, plane: Any, n: Any, stride: Any) -> None:
        for k in range(n // 2):
            lower, upper = load(low, k), load(high, k)
            store(plane, 2 * k * stride, np.uint8(lower & 15 | np.uint8(upper << 4)))
            store(plane, (2 * k + 1) * stride, np.uint8(lower >> 4 | upper & 240))
        if n % 2:
            lower, upper = load(low, n // 2), load(high, n // 2)
            store(plane, (n - 1) * stride, np.uint8(lower & 15 | np.uint8(upper << 4)))

    return whole, types.void(_bytes, _bytes, _bytes, types.int64, types.int64)


KERNELS: dict[str, Callable[[], tuple[Callable[..., None], Any]]] = {
    "positions": _positions, "bitmap": _bitmap, "gaps": _gaps, "ungaps": _ungaps,
    "halves": _halves, "whole": _whole,
}  # fmt: skip
for _item in (types.uint8, types.uint16, types.uint32, types.uint64):
    KERNELS[f"steps_{_item.bitwidth}"] = partial(_steps_for, _item)
    KERNELS[f"move_{_item.bitwidth}"] = partial(_move_for, _item)
"""Makers of the kernels by name, and width."""
