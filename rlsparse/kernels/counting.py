"""Kernels over one tensor or over masks: magnitudes, stripes, overlaps, strata, agreement."""

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
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WORDS,
    add_shared_bits,
    add_to_planes,
    advance,
    count_bits,
    inlined,
    load,
    lowest_bit,
    part,
    store,
)


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
    """Shared set bits of each two of R masks of W words, added to [R, R]; lower half untouched.

    ``blocks`` is scratch, best at the start of a line of the cache: R + 3 blocks of
    ``layout.MASK_WORDS`` words, and 8 words for the counts of a tile. Copied there, eight words
    are one line, and masks whose size is a power of two do not share places in the cache.
    """

    def popcount_and(masks: Any, shared: Any, blocks: Any, num_masks: Any, num_words: Any) -> None:
        tile = advance(blocks, (num_masks + 3) * at.MASK_WORDS)
        for start in range(0, num_words, at.MASK_WORDS):
            size = min(at.MASK_WORDS, num_words - start)
            whole = (size + TILE_WORDS - 1) // TILE_WORDS * TILE_WORDS
            for mask in range(num_masks):
                source = advance(masks, mask * num_words + start)
                block = advance(blocks, mask * at.MASK_WORDS)
                for k in range(size):
                    store(block, k, load(source, k))
                for k in range(size, whole):
                    store(block, k, np.uint64(0))
            for i in range(0, num_masks, TILE_ROWS):
                for j in range(i, num_masks, TILE_COLUMNS):
                    for cell in range(TILE_ROWS * TILE_COLUMNS):
                        store(tile, cell, np.uint64(0))
                    rows = advance(blocks, i * at.MASK_WORDS)
                    columns = advance(blocks, j * at.MASK_WORDS)
                    add_shared_bits(rows, columns, at.MASK_WORDS, whole, tile)
                    for cell in range(TILE_ROWS * TILE_COLUMNS):
                        row, column = i + cell // TILE_COLUMNS, j + cell % TILE_COLUMNS
                        if row <= column < num_masks:
                            count = np.int64(load(tile, cell))
                            bump(shared, row * num_masks + column, count)

    words, counts = types.CPointer(types.uint64), types.CPointer(types.int64)
    return popcount_and, types.void(words, counts, words, types.int64, types.int64)


def _label_counts() -> tuple[Callable[..., None], Any]:
    """Labels of the set bits of each of R masks of W words, added to [R, number of labels]."""

    def label_counts(
        masks: Any, labels: Any, counts: Any, num_masks: Any, num_words: Any, num_labels: Any
    ) -> None:
        for start in range(0, num_words, at.MASK_WORDS):  # whose labels stay in the cache
            size = min(at.MASK_WORDS, num_words - start)
            for mask in range(num_masks):
                block = advance(masks, mask * num_words + start)
                histogram = advance(counts, mask * num_labels)
                for k in range(size):
                    word = load(block, k)
                    place = advance(labels, (start + k) * 64)
                    while word != 0:
                        bump(histogram, np.int64(load(place, lowest_bit(word))), np.int64(1))
                        word &= word - np.uint64(1)

    words, counts = types.CPointer(types.uint64), types.CPointer(types.int64)
    labels = types.CPointer(types.uint16)
    sizes = (types.int64, types.int64, types.int64)
    return label_counts, types.void(words, labels, counts, *sizes)


def _agreement() -> tuple[Callable[..., None], Any]:
    """Bits set in exactly k of R masks of W words, k >= 1, added to [R + 1].

    ``planes`` is scratch of (number of planes + 1) x ``layout.MASK_WORDS`` words: 64 counters at
    once, kept as planes of bits, of which there are enough for R.
    """

    def agreement(
        masks: Any, counts: Any, planes: Any, num_masks: Any, num_words: Any, num_planes: Any
    ) -> None:
        carry = advance(planes, num_planes * at.MASK_WORDS)
        for start in range(0, num_words, at.MASK_WORDS):
            size = min(at.MASK_WORDS, num_words - start)
            for k in range(num_planes * at.MASK_WORDS):
                store(planes, k, np.uint64(0))
            for mask in range(num_masks):
                block = advance(masks, mask * num_words + start)
                for k in range(size):
                    store(carry, k, load(block, k))
                for plane in range(num_planes):
                    if mask + 1 < 1 << plane:
                        break
                    bits = advance(planes, plane * at.MASK_WORDS)
                    for k in range(size):
                        old, more = load(bits, k), load(carry, k)
                        store(bits, k, old ^ more)
                        store(carry, k, old & more)
            for value in range(1, num_masks + 1):
                for k in range(size):
                    store(carry, k, np.uint64(2**64 - 1))
                for plane in range(num_planes):
                    bits = advance(planes, plane * at.MASK_WORDS)
                    flip = np.uint64(0) if (value >> plane) & 1 else np.uint64(2**64 - 1)
                    for k in range(size):
                        store(carry, k, load(carry, k) & (load(bits, k) ^ flip))
                total = np.int64(0)
                for k in range(size):
                    total += count_bits(load(carry, k))
                bump(counts, value, total)

    words, counts = types.CPointer(types.uint64), types.CPointer(types.int64)
    sizes = (types.int64, types.int64, types.int64)
    return agreement, types.void(words, counts, words, *sizes)


KERNELS: dict[str, Callable[[], tuple[Callable[..., None], Any]]] = {
    **{f"magnitudes_{name}": partial(_magnitudes_for, kind) for name, kind in FORMATS.items()},
    "stripes": _stripes,
    "popcount_and": _popcount_and,
    "label_counts": _label_counts,
    "agreement": _agreement,
}
"""Makers of the kernels by name: each gives a function and its numba signature."""
