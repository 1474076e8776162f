"""The kernels of the GPU, in Triton: the same numbers as the CPU's. Call them through ``gpu``.

``compare`` runs one program per warp. It walks over tiles of 1024 pairs, of which every lane loads
32, eight at a time. Comparing them gives each lane a word of one bit per pair: the packed mask.
Whatever concerns changed weights only then runs on the lowest bit left in each lane's word until
no lane has one, so that its cost falls with the density; those weights come from the L1 cache once
more.

Nothing is flushed to zero: distances in ULP are taken on integers, differences of formats of at
most 16 bits are decided in fp32, which holds all their values as normal numbers or its own
subnormals, everything else is float64. A tile with a NaN or an infinity shows it in its sum of
squares or its highest code, and only such a tile is searched for them.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from rlsparse.definitions import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    NUM_EXPONENTS,
    NUM_MAGNITUDE_BINS,
    ULP_BINS,
)

NUM_COUNTS = tl.constexpr(11)
NUM_SUMS = tl.constexpr(4)
NUM_BINS = tl.constexpr(128)  # bins of magnitudes, then of ULPs; the rest is thrown away
_NO_BIN = tl.constexpr(127)
_FIRST_ULP_BIN = tl.constexpr(NUM_MAGNITUDE_BINS)
_LAST_ULP_BIN = tl.constexpr(len(ULP_BINS) - 1)
_MIN_EXPONENT, _MAX_EXPONENT = tl.constexpr(MIN_EXPONENT), tl.constexpr(MAX_EXPONENT)
_NUM_EXPONENTS = tl.constexpr(NUM_EXPONENTS)

_jit: Callable[[Callable[..., Any]], Any] = triton.jit


@_jit
def _values(bits: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Exact values of zero-extended ``bits``: float64 for fp64 and fp32, else float32."""
    if FORMAT == "fp64":
        found = bits.to(tl.float64, bitcast=True)
    elif FORMAT == "fp32":
        found = bits.to(tl.float32, bitcast=True).to(tl.float64)
    elif FORMAT == "bf16":
        found = (bits << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        found = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "fp8_e5m2":
        found = (bits << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # fp8_e4m3: a half with the same digits has an exponent 8 too small
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16)
        found = half.to(tl.float16, bitcast=True).to(tl.float32) * 256
        found = tl.where((bits & 0x7F) == 0x7F, float("nan"), found)
    return found


@_jit
def _exponent_field(word: tl.tensor) -> tl.tensor:
    """Bits below the sign of ``word`` as float32, shifted down: 127 + log2 of a power of two."""
    return word.to(tl.float32).to(tl.int32, bitcast=True) >> 23


@_jit
def _magnitude_bin(values: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Bins of finite float64 ``values`` (definitions.NUM_MAGNITUDE_BINS)."""
    bits = values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    digits = bits & 0xFFFFFFFFFFFFF
    exponent = (bits >> 52).to(tl.int32) - 1023
    if FORMAT == "fp64":  # the only one with subnormals here: a power of two has one digit
        digits = tl.where(exponent == -1023, bits & (bits - 1), digits)
    place = 1 + tl.minimum(tl.maximum(exponent, _MIN_EXPONENT), _MAX_EXPONENT) - _MIN_EXPONENT
    place += tl.where(digits == 0, _NUM_EXPONENTS, 0)
    return tl.where(bits == 0, 0, place)


@_jit
def _popcount(word: tl.tensor) -> tl.tensor:
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@_jit
def _load(bits: tl.tensor, base: tl.tensor, num_elements: tl.tensor,
          WORD: tl.constexpr, IN_BOUNDS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The tile of ``bits`` from ``base`` on as [128, 8], zero beyond the end; a lane has 4 rows."""
    inside = tl.arange(0, 128)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if IN_BOUNDS:
        tile = tl.load(bits + base + inside)
    else:
        tile = tl.load(bits + base + inside, mask=base + inside < num_elements, other=0)
    return tile.to(WORD)


@_jit
def _per_lane(tile: tl.tensor) -> tl.tensor:
    return tl.sum(tl.reshape(tl.sum(tile, axis=1), (4, 32)), axis=0)


@_jit
def _pack(changed: tl.tensor, mask: tl.tensor, base: tl.tensor, num_elements: tl.tensor,
          IN_BOUNDS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Store the mask of a tile; returns a word per lane, of which byte j is from its row j."""
    row = tl.arange(0, 128)
    packed = tl.sum(changed.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    if IN_BOUNDS:
        tl.store(mask + base // 8 + row, packed.to(tl.uint8))
    else:
        inside = base + row * 8 < num_elements
        tl.store(mask + base // 8 + row, packed.to(tl.uint8), mask=inside)
    words = tl.reshape(packed, (4, 32)) << (tl.arange(0, 4) * 8)[:, None]
    return tl.sum(words, axis=0).to(tl.uint32)


@_jit
def _ulp_bin(x: tl.tensor, y: tl.tensor, ABS: tl.constexpr) -> tl.tensor:
    """Bins of the distance of codes that differ (definitions.ULP_BINS); -0 is just below +0."""
    p, q = x & ABS, y & ABS
    rest = tl.where((x ^ y) > ABS, p + q, tl.maximum(p, q) - tl.minimum(p, q) - 1)
    return tl.minimum(tl.maximum(_exponent_field(rest) - 126, 0), _LAST_ULP_BIN)


@_jit
def compare(
    before: tl.tensor, after: tl.tensor, mask: tl.tensor, counts: tl.tensor, sums: tl.tensor,
    histograms: tl.tensor, start: tl.tensor, num_elements: tl.tensor, num_tiles: tl.tensor,
    FORMAT: tl.constexpr, WORD: tl.constexpr, FIRST_NONFINITE: tl.constexpr,
    FIRST_NAN: tl.constexpr, ABS: tl.constexpr, TAUS: tl.constexpr, IN_BOUNDS: tl.constexpr,
) -> None:  # fmt: skip
    """One pass over ``num_tiles`` tiles of 1024 pairs from pair ``start`` on.

    ``before``, ``after``: bits, ``num_elements`` each. ``mask``: as in ``ChunkCounts``, written.
    ``counts`` [programs, NUM_COUNTS], ``sums`` [programs, NUM_SUMS], ``histograms`` [programs,
    NUM_BINS]: written, in the order of the last lines. ``TAUS``: the tolerances, then the relative
    one. ``IN_BOUNDS``: no tile reaches beyond the tensor.
    """
    zero, nothing = tl.zeros((32,), tl.int32), tl.zeros((32,), tl.float64)
    num_changed, num_flips, num_nonfinite, num_nan = zero, zero, zero, zero
    over_0, over_1, over_2, over_3, over_4, over_5, over_r = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    sum_sq_before, sum_sq, sum_abs, max_abs = nothing, nothing, nothing, nothing
    histogram = tl.zeros((NUM_BINS,), tl.int32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        base = start + tile * tl.full((), 1024, tl.int64)
        u = _load(before, base, num_elements, WORD, IN_BOUNDS)
        v = _load(after, base, num_elements, WORD, IN_BOUNDS)
        word = _pack(u != v, mask, base, num_elements, IN_BOUNDS)
        num_changed += _popcount(word)
        if FORMAT != "none":
            values = _values(u, FORMAT).to(tl.float64)
            sum_tile = _per_lane(values * values)
            highest = tl.zeros((32,), WORD)
            while tl.max(word, axis=0) != 0:
                lowest = word & (0 - word)
                word ^= lowest
                valid = lowest != 0
                bit = _exponent_field(lowest) - 127
                at = tl.arange(0, 32) * 8 + bit + (bit >> 3) * 248  # row j is 256 elements on
                x = tl.load(before + base + at, mask=valid, other=0).to(WORD)
                y = tl.load(after + base + at, mask=valid, other=0).to(WORD)
                p, q = x & ABS, y & ABS
                highest = tl.maximum(highest, tl.maximum(p, q))
                finite = tl.maximum(p, q) < FIRST_NONFINITE
                flip = ((x ^ y) > ABS) & (tl.minimum(p, q) > 0)
                num_flips += (flip & finite).to(tl.int32)

                a, b = _values(x, FORMAT), _values(y, FORMAT)
                delta = tl.where(finite, tl.abs(b - a), float("inf"))
                over_0 += (delta > 0).to(tl.int32)
                over_1 += (delta > TAUS[0]).to(tl.int32)
                over_2 += (delta > TAUS[1]).to(tl.int32)
                over_3 += (delta > TAUS[2]).to(tl.int32)
                over_4 += (delta > TAUS[3]).to(tl.int32)
                over_5 += (delta > TAUS[4]).to(tl.int32)
                scale = tl.where(finite, tl.maximum(tl.abs(a), tl.abs(b)), 0)
                over_r += (delta > scale * TAUS[5]).to(tl.int32)

                wide = a.to(tl.float64)
                exact = tl.where(finite, tl.abs(b.to(tl.float64) - wide), 0)
                sum_sq += exact * exact
                sum_abs += exact
                max_abs = tl.where(exact > max_abs, exact, max_abs)

                ulp = tl.where(finite & valid, _FIRST_ULP_BIN + _ulp_bin(x, y, ABS), _NO_BIN)
                known = (p < FIRST_NONFINITE) & valid
                size = tl.where(known, _magnitude_bin(wide, FORMAT), _NO_BIN)
                histogram += tl.histogram(tl.reshape(tl.join(ulp, size), (64,)), NUM_BINS)
            strange = (highest >= FIRST_NONFINITE) | ~(sum_tile < float("inf"))
            if tl.max(strange.to(tl.int32), axis=0) != 0:
                p = _load(before, base, num_elements, WORD, IN_BOUNDS) & ABS
                q = _load(after, base, num_elements, WORD, IN_BOUNDS) & ABS
                values = _values(tl.where(p < FIRST_NONFINITE, p, 0), FORMAT).to(tl.float64)
                sum_tile = _per_lane(values * values)
                num_nonfinite += _per_lane((tl.maximum(p, q) >= FIRST_NONFINITE).to(tl.int32))
                num_nan += _per_lane((tl.maximum(p, q) >= FIRST_NAN).to(tl.int32))
            sum_sq_before += sum_tile

    totals = (num_changed, over_0, over_1, over_2, over_3, over_4, over_5, over_r,
              num_flips, num_nonfinite, num_nan)  # fmt: skip
    for i in tl.static_range(NUM_COUNTS):
        tl.store(counts + tl.program_id(0) * NUM_COUNTS + i, tl.sum(totals[i], axis=0))
    sums += tl.program_id(0) * NUM_SUMS
    tl.store(sums, tl.sum(sum_sq_before, axis=0))
    tl.store(sums + 1, tl.sum(sum_sq, axis=0))
    tl.store(sums + 2, tl.sum(sum_abs, axis=0))
    tl.store(sums + 3, tl.max(max_abs, axis=0))
    tl.store(histograms + tl.program_id(0) * NUM_BINS + tl.arange(0, NUM_BINS), histogram)


@_jit
def magnitudes(
    weights: tl.tensor, sums: tl.tensor, histograms: tl.tensor, num_elements: tl.tensor,
    num_tiles: tl.tensor, FORMAT: tl.constexpr, WORD: tl.constexpr,
    FIRST_NONFINITE: tl.constexpr, ABS: tl.constexpr,
) -> None:  # fmt: skip
    """Sum of squares and magnitude histogram of the finite weights; each program leaves a row."""
    sum_sq = tl.zeros((1024,), tl.float64)
    histogram = tl.zeros((NUM_BINS,), tl.int32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        at = tile * tl.full((), 1024, tl.int64) + tl.arange(0, 1024)
        here = at < num_elements
        bits = tl.load(weights + at, mask=here, other=0).to(WORD)
        finite = (bits & ABS) < FIRST_NONFINITE
        values = _values(tl.where(finite, bits, 0), FORMAT).to(tl.float64)
        sum_sq += values * values
        bins = tl.where(here & finite, _magnitude_bin(values, FORMAT), _NO_BIN)
        histogram += tl.histogram(bins, NUM_BINS)
    tl.store(sums + tl.program_id(0), tl.sum(sum_sq, axis=0))
    tl.store(histograms + tl.program_id(0) * NUM_BINS + tl.arange(0, NUM_BINS), histogram)


@_jit
def stripes(
    mask: tl.tensor, row_counts: tl.tensor, column_counts: tl.tensor, num_rows: tl.tensor,
    row_length: tl.tensor, row_bytes: tl.tensor, num_bytes: tl.tensor, num_strips: tl.tensor,
    ALIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Set bits per row and column; a program takes 128 rows of 256 groups of 8 columns.

    ``mask``: ``num_bytes`` bytes. ``row_counts`` [num_strips, num_rows] and ``column_counts``
    [blocks, row_length] are written. ``row_bytes``: groups in a row. ``ALIGNED``: rows start at
    whole bytes.
    """
    block = tl.program_id(0) // num_strips
    strip = (tl.program_id(0) % num_strips).to(tl.int64)
    group = strip * 256 + tl.arange(0, 256)
    low = tl.zeros((8, 256), tl.int32)  # a byte for each of four columns, at most 16 in each
    high = tl.zeros((8, 256), tl.int32)
    for step in range(16):
        row = block * 128 + step * 8 + tl.arange(0, 8)
        wide = row.to(tl.int64)[:, None]
        here = (row < num_rows)[:, None] & (group < row_bytes)[None, :]
        if ALIGNED:
            at = wide * row_bytes + group[None, :]
            byte = tl.load(mask + at, mask=here, other=0).to(tl.int32)
        else:
            bit = wide * row_length + (group * 8)[None, :]
            at = bit >> 3
            byte = tl.load(mask + at, mask=here, other=0).to(tl.int32)
            after = tl.load(mask + at + 1, mask=here & (at + 1 < num_bytes), other=0)
            byte = (byte | (after.to(tl.int32) << 8)) >> (bit & 7).to(tl.int32)
            left = tl.minimum(tl.maximum(row_length - group * 8, 0), 8)
            byte &= ((1 << left.to(tl.int32)) - 1)[None, :]
        # The product puts bit i of a nibble into byte i.
        first = ((byte & 15) * 0x204081) & 0x01010101
        second = ((byte >> 4) * 0x204081) & 0x01010101
        low += first
        high += second
        ones = tl.sum(((first + second) * 0x01010101) >> 24, axis=1)
        tl.store(row_counts + strip * num_rows + row, ones, mask=row < num_rows)
    column_counts += block.to(tl.int64) * row_length
    for k in tl.static_range(4):
        column = group * 8 + k
        ones = tl.sum((low >> (8 * k)) & 255, axis=0)
        tl.store(column_counts + column, ones, mask=column < row_length)
        ones = tl.sum((high >> (8 * k)) & 255, axis=0)
        tl.store(column_counts + column + 4, ones, mask=column + 4 < row_length)
