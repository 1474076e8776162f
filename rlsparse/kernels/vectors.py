"""64 weights at a time: the vector instructions that numba has no words for, as LLVM code.

LLVM turns them into whatever the processor has (AVX-512, AVX2, NEON). One bit of a result stands
for one weight, the lowest for the first: the layout of Arrow's bitmaps.
"""

import math
from collections.abc import Callable
from functools import cache, reduce
from typing import Any, TypeVar

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

LANES = 64

_F = TypeVar("_F", bound=Callable[..., Any])
inlined: Callable[[_F], _F] = register_jitable
"""Decorator of functions that kernels call."""
lowered: Callable[[_F], Callable[..., Any]] = intrinsic

i64 = ir.IntType(64)


def load_vector(builder: Any, pointer: Any, index: Any, lanes: int = LANES) -> Any:
    """pointer[index : index + lanes]."""
    element = builder.gep(pointer, [index])
    vector = ir.VectorType(pointer.type.pointee, lanes)
    # Tensors of a file may start at any byte.
    return builder.load(builder.bitcast(element, vector.as_pointer()), align=1)


def _repeat(builder: Any, value: Any) -> Any:
    vector, order = ir.VectorType(value.type, LANES), ir.VectorType(ir.IntType(32), LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), order([0] * LANES))


def _compare(builder: Any, sign: str, left: Any, right: Any) -> Any:
    is_float = isinstance(left.type.element, (ir.FloatType, ir.DoubleType))
    compare = builder.fcmp_ordered if is_float else builder.icmp_unsigned
    return builder.bitcast(compare(sign, left, right), i64)


@lowered
def differ(context: Any, left: Any, right: Any, index: Any) -> Any:
    """Which of left[index : index + 64] differ from right[index : index + 64], as 64 bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sides = (load_vector(builder, pointer, args[2]) for pointer in args[:2])
        return _compare(builder, "!=", *sides)

    return types.uint64(left, right, types.int64), code


@lowered
def at_most(context: Any, values: Any, index: Any, limit: Any) -> Any:
    """Which of values[index : index + 64] are at most the scalar ``limit``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, index, limit = args
        return _compare(builder, "<=", load_vector(builder, values, index), _repeat(builder, limit))

    return types.uint64(values, types.int64, values.dtype), code


@lowered
def at_most_each(context: Any, values: Any, limits: Any, index: Any) -> Any:
    """Which of values[index : index + 64] are at most limits[index : index + 64]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sides = (load_vector(builder, pointer, args[2]) for pointer in args[:2])
        return _compare(builder, "<=", *sides)

    return types.uint64(values, limits, types.int64), code


@cache
def squares_for(first_nonfinite: int, shift: int, raised: int) -> Callable[..., Any]:
    """sum_squares(bits, index): of the 64 values from there on, as a float64.

    NaN or infinite if one of them is. Squares of at most 16 bits are added in fp32, as a tree:
    relative error below 4e-7. The arguments are those of ``formats.Format``.
    """

    def singles(builder: Any, bits: Any) -> list[Any]:
        """The float32 values without their signs, in any order."""
        lanes, values = (ir.VectorType(kind, LANES) for kind in (ir.IntType(32), ir.FloatType()))

        def repeat(number: int) -> Any:
            return lanes([number] * LANES)

        codes = builder.zext(builder.and_(bits, bits.type(_all_but_sign(bits))), lanes)
        moved = builder.add(builder.shl(codes, repeat(shift)), repeat(raised << 23))
        # A subnormal code lacks the leading one that float32 implies: add it, subtract its value.
        is_normal = builder.icmp_unsigned(">=", codes, repeat(2 ** (23 - shift)))
        one, lead = repeat(1 << 23), values([2.0 ** (raised + 1 - 127)] * LANES)
        led = builder.bitcast(builder.add(moved, one), values)
        small = builder.fsub(led, lead)
        sizes = builder.select(is_normal, builder.bitcast(moved, values), small)
        is_finite = builder.icmp_unsigned("<", codes, repeat(first_nonfinite))
        return [builder.select(is_finite, sizes, values([math.nan] * LANES))]

    def halves_of_singles(builder: Any, bits: Any) -> list[Any]:
        """The values of bf16, the upper half of a float32: the even ones, and the odd ones."""
        words = ir.VectorType(ir.IntType(32), LANES // 2)
        values = ir.VectorType(ir.FloatType(), LANES // 2)
        pairs = builder.bitcast(bits, words)
        even = builder.shl(pairs, words([16] * (LANES // 2)))
        odd = builder.and_(pairs, words([0xFFFF0000] * (LANES // 2)))
        return [builder.bitcast(side, values) for side in (even, odd)]

    def doubles(builder: Any, bits: Any) -> list[Any]:
        single, double = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.DoubleType()))
        return [builder.fpext(builder.bitcast(bits, single), double)]

    @lowered
    def sum_squares(context: Any, bits: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values_of = {0: doubles, 16: halves_of_singles}.get(shift, singles)
            vectors = values_of(builder, load_vector(builder, args[0], args[1]))
            flags = ("reassoc", "contract")
            squares = reduce(
                lambda total, more: builder.fadd(total, more, flags),
                [builder.fmul(values, values, flags) for values in vectors],
            )
            kind = squares.type.element
            short = "f32" if isinstance(kind, ir.FloatType) else "f64"
            name = f"llvm.vector.reduce.fadd.v{squares.type.count}{short}"
            total = declared(builder, name, kind, [kind, squares.type])
            found = builder.call(total, [kind(-0.0), squares], fastmath=flags)
            return found if short == "f64" else builder.fpext(found, ir.DoubleType())

        return types.float64(bits, types.int64), code

    return sum_squares


def _all_but_sign(bits: Any) -> list[int]:
    return [2 ** (bits.type.element.width - 1) - 1] * LANES


def declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """An LLVM intrinsic, declared once per module."""
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@lowered
def store_ulps(context: Any, before: Any, after: Any, target: Any, index: Any) -> Any:
    """target[index : index + 64] = distances in representable values of two runs of 64 codes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before, after, target, index = args

        def ascending(bits: Any) -> Any:
            vector, width = bits.type, bits.type.element.width
            spread = builder.ashr(bits, vector([width - 1] * LANES))  # all ones where negative
            return builder.xor(bits, builder.or_(spread, vector([2 ** (width - 1)] * LANES)))

        low, high = (ascending(load_vector(builder, side, index)) for side in (before, after))
        is_up = builder.icmp_unsigned(">", high, low)
        distance = builder.select(is_up, builder.sub(high, low), builder.sub(low, high))
        vector = ir.VectorType(target.type.pointee, LANES)
        if vector != distance.type:
            distance = builder.zext(distance, vector)
        place = builder.gep(target, [index])
        builder.store(distance, builder.bitcast(place, vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(before, after, target, types.int64), code


@lowered
def signs_differ(context: Any, before: Any, after: Any, index: Any) -> Any:
    """Which of two runs of 64 codes differ in the sign bit."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sides = (load_vector(builder, side, args[2]) for side in args[:2])
        mixed = builder.xor(*sides)
        return builder.bitcast(builder.icmp_signed("<", mixed, mixed.type([0] * LANES)), i64)

    return types.uint64(before, after, types.int64), code


@lowered
def zeros_among(context: Any, bits: Any, index: Any) -> Any:
    """Which of 64 codes are zero, of either sign."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes = load_vector(builder, args[0], args[1])
        doubled = builder.shl(codes, codes.type([1] * LANES))
        return builder.bitcast(builder.icmp_unsigned("==", doubled, doubled.type([0] * LANES)), i64)

    return types.uint64(bits, types.int64), code


@lowered
def count_bits(context: Any, word: Any) -> Any:
    """Number of set bits."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(
        args[0]
    )


@lowered
def lowest_bit(context: Any, word: Any) -> Any:
    """Position of the lowest set bit of a word that is not zero."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.uint64), code


@lowered
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@lowered
def double_of_bits(context: Any, bits: Any) -> Any:
    """The float64 with these bits."""
    return types.float64(types.uint64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


@lowered
def bits_of_double(context: Any, value: Any) -> Any:
    """The bits of a float64."""
    return types.uint64(types.float64), lambda context, builder, signature, args: builder.bitcast(
        args[0], i64
    )


@lowered
def load(context: Any, pointer: Any, index: Any) -> Any:
    """pointer[index]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.gep(args[0], [args[1]]), align=1)

    return pointer.dtype(pointer, types.int64), code


@lowered
def store(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """pointer[index] = value."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, pointer.dtype), code


@lowered
def advance(context: Any, pointer: Any, count: Any) -> Any:
    """The pointer ``count`` elements further."""
    return pointer(pointer, types.int64), lambda context, builder, signature, args: builder.gep(
        args[0], [args[1]]
    )


@lowered
def part(context: Any, workspace: Any, offset: Any, item: Any) -> Any:
    """The array of ``item`` (a NumPy type) that starts ``offset`` bytes into the workspace."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.gep(args[0], [args[1]])
        return builder.bitcast(start, context.get_value_type(signature.return_type))

    return types.CPointer(item.dtype)(workspace, types.int64, item), code


@lowered
def add_to_planes(context: Any, planes: Any, words: Any, index: Any, stride: Any) -> Any:
    """Add 512 bits to 512 counters of 8 bits, kept as 8 planes of bits.

    Plane p lies at planes[p * stride:]; bit i of words[index] counts in bit i of each plane.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        planes, words, index, stride = args
        carry = load_vector(builder, words, index, 8)
        for plane in range(8):
            place = builder.add(index, builder.mul(stride, i64(plane)))
            bits = load_vector(builder, planes, place, 8)
            target = builder.bitcast(builder.gep(planes, [place]), bits.type.as_pointer())
            builder.store(builder.xor(bits, carry), target, align=1)
            carry = builder.and_(bits, carry)
        return context.get_dummy_value()

    return types.void(planes, words, types.int64, types.int64), code


TILE_ROWS, TILE_COLUMNS, TILE_WORDS = 2, 4, 8


@lowered
def add_shared_bits(
    context: Any, rows: Any, columns: Any, stride: Any, num_words: Any, counts: Any
) -> Any:
    """Shared bits of each of 2 masks with each of 4, added to counts[0:8], row by row.

    Mask r of ``rows`` begins ``r * stride`` words after it; likewise of ``columns``. ``num_words``
    is a multiple of 8. Sums stay in registers of 512 bits, eight counts per six loads; left to
    itself, LLVM takes registers of half the width.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, columns, stride, num_words, counts = args
        vector = ir.VectorType(i64, TILE_WORDS)
        name = f"llvm.ctpop.v{TILE_WORDS}i64"
        count = declared(builder, name, vector, [vector])
        cells = [(r, c) for r in range(TILE_ROWS) for c in range(TILE_COLUMNS)]
        sums = {cell: cgutils.alloca_once_value(builder, vector(None)) for cell in cells}
        with cgutils.for_range(builder, builder.udiv(num_words, i64(TILE_WORDS))) as loop:
            first = builder.mul(loop.index, i64(TILE_WORDS))

            def words(masks: Any, number: int) -> list[Any]:
                places = (builder.add(first, builder.mul(stride, i64(n))) for n in range(number))
                return [load_vector(builder, masks, place, TILE_WORDS) for place in places]

            left, right = words(rows, TILE_ROWS), words(columns, TILE_COLUMNS)
            for r, c in cells:
                shared = builder.call(count, [builder.and_(left[r], right[c])])
                total = builder.add(builder.load(sums[r, c]), shared)
                builder.store(total, sums[r, c])
        add = declared(builder, f"llvm.vector.reduce.add.v{TILE_WORDS}i64", i64, [vector])
        for index, cell in enumerate(cells):
            place = builder.gep(counts, [i64(index)])
            total = builder.call(add, [builder.load(sums[cell])])
            builder.store(builder.add(builder.load(place), total), place)
        return context.get_dummy_value()

    return types.void(rows, columns, types.int64, types.int64, counts), code


@cache
def gather_for(width: int) -> Callable[..., Any]:
    """The fastest way of this processor to copy the marked ones of 64 items of ``width`` bits.

    The result is called as gather(source, index, mask, target, place): items of
    source[index : index + 64] whose bit is set go to target[place:]; returns the place after them.
    Up to 64 items beyond that place may be overwritten.
    """
    features = llvm.get_host_cpu_features()
    needed = "avx512vbmi2" if width < 32 else "avx512f"
    return _compress_for(width) if features.get(needed, False) else walk


def _compress_for(width: int) -> Callable[..., Any]:
    lanes = 512 // width
    vector = ir.VectorType(ir.IntType(width), lanes)
    flags = ir.VectorType(ir.IntType(1), lanes)
    name = f"llvm.x86.avx512.mask.compress.v{lanes}i{width}"

    @lowered
    def compress(context: Any, source: Any, index: Any, mask: Any, target: Any, place: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, index, mask, target, place = args
            function = declared(builder, name, vector, [vector, vector, flags])
            for part in range(LANES // lanes):
                offset = i64(part * lanes)
                values = load_vector(builder, source, builder.add(index, offset), lanes)
                bits = builder.lshr(mask, offset)
                if lanes < LANES:
                    bits = builder.trunc(bits, ir.IntType(lanes))
                marked = builder.bitcast(bits, flags)
                squeezed = builder.call(function, [values, vector(ir.Undefined), marked])
                slot = builder.bitcast(builder.gep(target, [place]), vector.as_pointer())
                builder.store(squeezed, slot, align=1)
                count = builder.ctpop(bits)
                place = builder.add(place, builder.zext(count, i64) if lanes < LANES else count)
            return place

        return types.int64(source, types.int64, types.uint64, target, types.int64), code

    return compress


@inlined
def walk(source: Any, index: Any, mask: Any, target: Any, place: Any) -> Any:
    """``gather_for`` bit by bit, on any processor."""
    while mask != 0:
        store(target, place, load(source, index + lowest_bit(mask)))
        mask &= mask - np.uint64(1)
        place += 1
    return place
