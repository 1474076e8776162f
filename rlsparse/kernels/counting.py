"""Kernels over one tensor or over masks: magnitudes, stripes, overlaps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import types

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
    add_to_planes,
    advance,
    count_bits,
    inlined,
    load,
    part,
    store,
)

_BLOCK_WORDS = 1024  # of each mask per pass: a pair of blocks stays in the fastest cache


def _magnitudes_for(kind: Format) -> tuple[Callable[..., None], Any]:
    """Magnitude histogram and sum of squares of the finite ones of ``n`` weights."""
    item = np.dtype(f"u{kind.width // 8}").type
    magnitude, first_nonfinite = item(2 ** (kind.width - 1) - 1), item(kind.first_nonfinite)
    value = kind.value

    @inlined
    def careful(bits: Any, histogram: Any, floats: Any, workspace: Any, n: Any) -> None:
        for i in range(n):
            code = load(bits, i)
            if code & magnitude < first_nonfinite:
                x = np.float64(value(code))
                bump(histogram, magnitude_bin(x), np.int64(1))
                bump(floats, at.SUM_SQ_BEFORE, x * x)

    def narrow(bits: Any, histogram: Any, floats: Any, workspace: Any, n: Any) -> None:
        x, codes = part(workspace, at.X, np.float32), part(workspace, at.X, np.uint32)
        bins, raw = part(workspace, at.BINS, np.uint16), part(workspace, at.RAW, np.int32)
        for start in range(0, n, at.BLOCK):
            block, size = advance(bits, start), min(at.BLOCK, n - start)
            total = 0.0
            for i in range(size):
                store(x, i, value(load(block, i)))
            for i in range(size):
                total += np.float64(load(x, i)) * np.float64(load(x, i))
            if total < np.inf:
                bump(floats, at.SUM_SQ_BEFORE, total)
                bin_magnitudes(codes, bins, raw, size)
            else:
                careful(block, histogram, floats, workspace, size)
        empty_raw(raw, histogram)

    pointer, counts = types.CPointer(kind.item), types.CPointer(types.int64)
    sums, workspace = types.CPointer(types.float64), types.CPointer(types.uint8)
    signature = types.void(pointer, counts, sums, workspace, types.int64)
    return careful if kind.width == 64 else narrow, signature


def _stripes() -> tuple[Callable[..., None], Any]:
    """Set bits per row and per column of a packed mask of whole rows, added to the counts.

    ``planes`` is scratch of 9 x (words per row, rounded up to a multiple of 8) zero words: a row
    shifted to start at a word, and eight planes of counters, emptied every 255 rows.
    """

    def stripes(
        mask: Any, rows: Any, columns: Any, planes: Any, num_rows: Any, row_length: Any
    ) -> None:
        num_words = (row_length + 63) // 64
        stride = (num_words + 7) // 8 * 8
        last = (num_rows * row_length + 63) // 64 - 1
        rest = row_length & 63
        keep = (
            np.uint64(2**64 - 1) if rest == 0 else (np.uint64(1) << np.uint64(rest)) - np.uint64(1)
        )
        counters = advance(planes, stride)
        pending = 0
        for row in range(num_rows):
            first = row * row_length
            shift = np.uint64(first & 63)
            total = np.int64(0)
            for k in range(num_words):
                place = (first >> 6) + k
                word = load(mask, place) >> shift
                if shift != 0 and place < last:
                    word |= load(mask, place + 1) << (np.uint64(64) - shift)
                if k == num_words - 1:
                    word &= keep
                store(planes, k, word)
                total += count_bits(word)
            bump(rows, row, total)
            if total:
                for k in range(0, stride, 8):
                    add_to_planes(counters, planes, k, stride)
            pending += 1
            if pending == 255 or row == num_rows - 1:
                pending = 0
                for k in range(num_words):
                    for bit in range(min(64, row_length - 64 * k)):
                        count = np.int64(0)
                        for plane in range(8):
                            word = load(counters, plane * stride + k) >> np.uint64(bit)
                            count += np.int64(word & np.uint64(1)) << plane
                        bump(columns, 64 * k + bit, count)
                for k in range(8 * stride):
                    store(counters, k, np.uint64(0))

    words, counts = types.CPointer(types.uint64), types.CPointer(types.int64)
    return stripes, types.void(words, counts, counts, words, types.int64, types.int64)


def _popcount_and() -> tuple[Callable[..., None], Any]:
    """Shared set bits of each two of R masks of W words, added to [R, R]; lower half untouched."""

    def popcount_and(masks: Any, shared: Any, num_masks: Any, num_words: Any) -> None:
        for start in range(0, num_words, _BLOCK_WORDS):
            size = min(_BLOCK_WORDS, num_words - start)
            for i in range(num_masks):
                left = advance(masks, i * num_words + start)
                for j in range(i, num_masks):
                    right = advance(masks, j * num_words + start)
                    count = np.int64(0)
                    for k in range(size):
                        count += count_bits(load(left, k) & load(right, k))
                    bump(shared, i * num_masks + j, count)

    words, counts = types.CPointer(types.uint64), types.CPointer(types.int64)
    return popcount_and, types.void(words, counts, types.int64, types.int64)


KERNELS: dict[str, Callable[[], tuple[Callable[..., None], Any]]] = {
    **{f"magnitudes_{name}": partial(_magnitudes_for, kind) for name, kind in FORMATS.items()},
    "stripes": _stripes,
    "popcount_and": _popcount_and,
}
"""Makers of the kernels by name: each gives a function and its numba signature."""
