"""What kernels over packed elements need beyond ``vectors``: the way back, and exact arithmetic."""

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rlsparse.kernels.vectors import (
    LANES,
    declared,
    i64,
    inlined,
    load,
    load_vector,
    lowered,
    lowest_bit,
    store,
)


@cache
def stack_for(num_bytes: int) -> Callable[..., Any]:
    """stack(): ``num_bytes`` of scratch that end with the kernel, for ``vectors.part``."""

    @lowered
    def stack(context: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scratch = cgutils.alloca_once(builder, ir.IntType(8), size=num_bytes)
            scratch.align = LANES
            return scratch

        return types.CPointer(types.uint8)(), code

    return stack


@lowered
def prefetch(context: Any, pointer: Any, index: Any) -> Any:
    """Ask for pointer[index], which need not exist, to be brought near."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, number = builder.gep(args[0], [args[1]]), ir.IntType(32)
        kinds = [place.type, number, number, number]
        ask = declared(builder, "llvm.prefetch.p0", ir.VoidType(), kinds)
        builder.call(ask, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(pointer, types.int64), code


@lowered
def fma(context: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend of float32, rounded once."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = ir.FloatType()
        return builder.call(declared(builder, "llvm.fma.f32", single, [single] * 3), args)

    return types.float32(types.float32, types.float32, types.float32), code


@lowered
def bits_of_float(context: Any, value: Any) -> Any:
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@inlined
def bf16_of_float(value: Any) -> Any:
    """The nearest bf16, of two the even one, as its bits; NaNs become torch's."""
    bits = bits_of_float(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
    high = np.uint32(rounded >> np.uint32(16))
    return np.uint16(np.uint32(0x7FC0) if value != value else high)


@cache
def scatter_for(width: int) -> Callable[..., Any]:
    """The way back of ``vectors.gather_for``, which writes no item whose bit is not set.

    The result is called as scatter(target, index, mask, source, place): items of source[place:] go
    to those of target[index : index + 64] whose bit is set; returns the place after them. Up to 64
    items beyond that place may be read.
    """
    features = llvm.get_host_cpu_features()
    needed = "avx512vbmi2" if width < 32 else "avx512f"
    return _expand_for(width) if features.get(needed, False) else walk_back


def _expand_for(width: int) -> Callable[..., Any]:
    lanes = 512 // width
    vector = ir.VectorType(ir.IntType(width), lanes)
    flags = ir.VectorType(ir.IntType(1), lanes)
    short = f"v{lanes}i{width}"

    @lowered
    def expand(context: Any, target: Any, index: Any, mask: Any, source: Any, place: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, index, mask, source, place = args
            spread = declared(
                builder, f"llvm.x86.avx512.mask.expand.{short}", vector, [vector, vector, flags]
            )
            write = declared(
                builder,
                f"llvm.masked.store.{short}.p0",
                ir.VoidType(),
                [vector, vector.as_pointer(), ir.IntType(32), flags],
            )
            for part in range(LANES // lanes):
                offset = i64(part * lanes)
                bits = builder.lshr(mask, offset)
                if lanes < LANES:
                    bits = builder.trunc(bits, ir.IntType(lanes))
                marked = builder.bitcast(bits, flags)
                values = load_vector(builder, source, place, lanes)
                wide = builder.call(spread, [values, vector(ir.Undefined), marked])
                slot = builder.gep(target, [builder.add(index, offset)])
                slot = builder.bitcast(slot, vector.as_pointer())
                builder.call(write, [wide, slot, ir.IntType(32)(1), marked])
                count = builder.ctpop(bits)
                place = builder.add(place, builder.zext(count, i64) if lanes < LANES else count)
            return place

        return types.int64(target, types.int64, types.uint64, source, types.int64), code

    return expand


@cache
def places_for() -> Callable[..., Any]:
    """The fastest way of this processor to write where the bits of a mask are set.

    The result is called as places(first, mask, target, place): ``first`` plus the number of each
    set bit, as uint32, goes to target[place:]; returns the place after them. Up to 64 items beyond
    that place may be overwritten.
    """
    return _iota if llvm.get_host_cpu_features().get("avx512f", False) else _number


@lowered
def _iota(context: Any, first: Any, mask: Any, target: Any, place: Any) -> Any:
    """``places_for`` with AVX-512."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, mask, target, place = args
        lanes, item = 16, ir.IntType(32)
        vector, flags = ir.VectorType(item, lanes), ir.VectorType(ir.IntType(1), lanes)
        function = declared(
            builder, f"llvm.x86.avx512.mask.compress.v{lanes}i32", vector, [vector, vector, flags]
        )
        start = builder.insert_element(vector(ir.Undefined), first, item(0))
        start = builder.shuffle_vector(start, vector(ir.Undefined), vector([0] * lanes))
        for part in range(0, LANES, lanes):
            numbers = builder.add(start, vector([*range(part, part + lanes)]))
            bits = builder.trunc(builder.lshr(mask, i64(part)), ir.IntType(lanes))
            marked = builder.bitcast(bits, flags)
            squeezed = builder.call(function, [numbers, vector(ir.Undefined), marked])
            slot = builder.bitcast(builder.gep(target, [place]), vector.as_pointer())
            builder.store(squeezed, slot, align=1)
            place = builder.add(place, builder.zext(builder.ctpop(bits), i64))
        return place

    return types.int64(types.uint32, types.uint64, target, types.int64), code


@inlined
def _number(first: Any, mask: Any, target: Any, place: Any) -> Any:
    """``places_for`` bit by bit, on any processor."""
    while mask != 0:
        store(target, place, np.uint32(first + np.uint32(lowest_bit(mask))))
        mask &= mask - np.uint64(1)
        place += 1
    return place


@inlined
def walk_back(target: Any, index: Any, mask: Any, source: Any, place: Any) -> Any:
    """``scatter_for`` bit by bit, on any processor."""
    while mask != 0:
        store(target, index + lowest_bit(mask), load(source, place))
        mask &= mask - np.uint64(1)
        place += 1
    return place
