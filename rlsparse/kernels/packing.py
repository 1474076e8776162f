"""Kernels over some elements of a tensor: take them, put them back, update them in one pass.

Which elements is said in one of three forms: ``index`` (uint32 each), ``bitmap`` (uint64 words,
the lowest bit first; zeros beyond the tensor) or ``whole`` (all; nothing is read). Each kernel
does a stretch of the form: positions of an index, words of a bitmap, elements of a whole.

Arithmetic is that of ``torch.optim`` (neither foreach nor fused) on a CPU, operation by operation:
nothing is reordered, and products are fused with sums where torch fuses them. Roots are rounded to
the nearest; those of MKL, which torch takes, not always. Results depend neither on how a tensor is
split nor on which thread does what.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numba import types

from rlsparse.kernels.formats import FORMATS
from rlsparse.kernels.packed_vectors import (
    bf16_of_float,
    bits_of_float,
    fma,
    prefetch,
    scatter_for,
    stack_for,
    walk_back,
)
from rlsparse.kernels.vectors import (
    LANES,
    advance,
    count_bits,
    gather_for,
    inlined,
    load,
    part,
    store,
    walk,
)

_BLOCK = 256  # the weights of a block stay in the fastest cache until they are put back
_AHEAD = 8  # words
_CAPACITY = _BLOCK + 2 * LANES
_bf16, _fp32 = FORMATS["bf16"].value, FORMATS["fp32"].value


# --- the three forms -------------------------------------------------------------------------
#
# reach(where, cursor, last): where a block that begins at ``cursor`` ends, and its elements.
# collect(dense, where, cursor, end, size, block) and spread(...): to the block, and back.


def _index_for(width: int) -> tuple[Callable[..., Any], ...]:
    @inlined
    def reach(where: Any, cursor: Any, last: Any) -> Any:
        end = min(cursor + _BLOCK, last)
        return end, end - cursor

    @inlined
    def collect(dense: Any, where: Any, cursor: Any, end: Any, size: Any, block: Any) -> None:
        for k in range(end - cursor):
            store(block, k, load(dense, np.int64(load(where, cursor + k))))

    @inlined
    def spread(dense: Any, where: Any, cursor: Any, end: Any, size: Any, block: Any) -> None:
        for k in range(end - cursor):
            store(dense, np.int64(load(where, cursor + k)), load(block, k))

    return reach, collect, spread


def _bitmap_for(width: int) -> tuple[Callable[..., Any], ...]:
    gather, scatter = gather_for(width), scatter_for(width)

    @inlined
    def reach(where: Any, cursor: Any, last: Any) -> Any:
        count = np.int64(0)
        while cursor < last and count < _BLOCK:
            count += count_bits(load(where, cursor))
            cursor += 1
        return cursor, count

    @inlined
    def collect(dense: Any, where: Any, cursor: Any, end: Any, size: Any, block: Any) -> None:
        place = np.int64(0)
        for word in range(cursor, end):
            bits = load(where, word)
            if bits != 0:
                for line in range(0, LANES, 512 // width):
                    prefetch(dense, LANES * (word + _AHEAD) + line)
                if LANES * word + LANES <= size:
                    place = gather(dense, LANES * word, bits, block, place)
                else:  # nothing beyond the tensor may be read
                    place = walk(dense, LANES * word, bits, block, place)

    @inlined
    def spread(dense: Any, where: Any, cursor: Any, end: Any, size: Any, block: Any) -> None:
        place = np.int64(0)
        for word in range(cursor, end):
            bits = load(where, word)
            if bits != 0:
                if LANES * word + LANES <= size:
                    place = scatter(dense, LANES * word, bits, block, place)
                else:
                    place = walk_back(dense, LANES * word, bits, block, place)

    return reach, collect, spread


def _whole_for(width: int) -> tuple[Callable[..., Any], ...]:
    reach, *_ = _index_for(width)

    @inlined
    def collect(dense: Any, where: Any, cursor: Any, end: Any, size: Any, block: Any) -> None:
        for k in range(end - cursor):
            store(block, k, load(dense, cursor + k))

    @inlined
    def spread(dense: Any, where: Any, cursor: Any, end: Any, size: Any, block: Any) -> None:
        for k in range(end - cursor):
            store(dense, cursor + k, load(block, k))

    return reach, collect, spread


FORMS = {"index": _index_for, "bitmap": _bitmap_for, "whole": _whole_for}
_WHERE = {"index": types.uint32, "bitmap": types.uint64, "whole": types.uint64}


# --- copies and sums -------------------------------------------------------------------------


def _take_for(form: str, item: Any) -> tuple[Callable[..., None], Any]:
    """packed[place:] = the selected of dense."""
    reach, collect, _ = FORMS[form](item.bitwidth)
    stack, kind = stack_for(_CAPACITY * item.bitwidth // 8), np.dtype(str(item)).type

    def take(
        dense: Any, where: Any, packed: Any, first: Any, last: Any, place: Any, size: Any
    ) -> None:
        block = part(stack(), 0, kind)
        cursor = first
        while cursor < last:
            end, count = reach(where, cursor, last)
            collect(dense, where, cursor, end, size, block)
            target = advance(packed, place)
            for k in range(count):
                store(target, k, load(block, k))
            place += count
            cursor = end

    return take, _copy_signature(form, item)


def _put_for(form: str, item: Any) -> tuple[Callable[..., None], Any]:
    """The selected of dense = packed[place:]; nothing else is written."""
    reach, _, spread = FORMS[form](item.bitwidth)
    stack, kind = stack_for(_CAPACITY * item.bitwidth // 8), np.dtype(str(item)).type

    def put(
        dense: Any, where: Any, packed: Any, first: Any, last: Any, place: Any, size: Any
    ) -> None:
        block = part(stack(), 0, kind)
        cursor = first
        while cursor < last:
            end, count = reach(where, cursor, last)
            source = advance(packed, place)
            for k in range(count):
                store(block, k, load(source, k))
            spread(dense, where, cursor, end, size, block)
            place += count
            cursor = end

    return put, _copy_signature(form, item)


def _copy_signature(form: str, item: Any) -> Any:
    bits, where = types.CPointer(item), types.CPointer(_WHERE[form])
    return types.void(bits, where, bits, *[types.int64] * 4)


def _add_for(form: str, dtype: str) -> tuple[Callable[..., None], Any]:
    """packed[place:] += the selected of dense, rounded once."""
    item = FORMATS[dtype].item
    reach, collect, _ = FORMS[form](item.bitwidth)
    stack, kind = stack_for(_CAPACITY * item.bitwidth // 8), np.dtype(str(item)).type
    of_bits, to_bits = _conversions(dtype)

    def add(
        dense: Any, where: Any, packed: Any, first: Any, last: Any, place: Any, size: Any
    ) -> None:
        block = part(stack(), 0, kind)
        cursor = first
        while cursor < last:
            end, count = reach(where, cursor, last)
            collect(dense, where, cursor, end, size, block)
            target = advance(packed, place)
            for k in range(count):
                store(target, k, to_bits(of_bits(load(target, k)) + of_bits(load(block, k))))
            place += count
            cursor = end

    return add, _copy_signature(form, item)


def _conversions(dtype: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Bits to float32, and back."""
    return (_bf16, bf16_of_float) if dtype == "bf16" else (_fp32, bits_of_float)


# --- rules -----------------------------------------------------------------------------------
#
# rule(values, gradients, means, squares, settings, n), in place; gradients are bits. Wide rules are
# those of ``fp32_moments``, the others torch's.


def _adamw_for(gradient: Callable[[Any], Any], is_wide: bool) -> Callable[..., None]:
    """AdamW; the second moment is divided before its root is taken, or the root is.

    Settings: 1 - lr wd; 1 - beta1; beta2; 1 - beta2; 1 - beta2^t (or its root); eps;
    -lr / (1 - beta1^t).
    """

    @inlined
    def rule(values: Any, gradients: Any, means: Any, squares: Any, settings: Any, n: Any) -> None:
        decay, weight, beta2 = load(settings, 0), load(settings, 1), load(settings, 2)
        square_weight, correction = load(settings, 3), load(settings, 4)
        eps, size = load(settings, 5), load(settings, 6)
        # torch interpolates from the nearer end.
        is_small = weight < np.float32(0.5)
        coefficient = weight if is_small else weight - np.float32(1)
        for k in range(n):
            g, m = gradient(load(gradients, k)), load(means, k)
            mean = fma(coefficient, g - m, m if is_small else g)
            square = fma(square_weight * g, g, load(squares, k) * beta2)
            if is_wide:
                scale = np.sqrt(square / correction) + eps
            else:
                scale = np.sqrt(square) / correction + eps
            store(means, k, mean)
            store(squares, k, square)
            store(values, k, load(values, k) * decay + size * mean / scale)

    return rule


def _sgd_for(gradient: Callable[[Any], Any], is_wide: bool) -> Callable[..., None]:
    """SGD with momentum; there is no second moment. Settings: weight decay; momentum; -lr."""

    @inlined
    def rule(values: Any, gradients: Any, means: Any, squares: Any, settings: Any, n: Any) -> None:
        decay, momentum, size = load(settings, 0), load(settings, 1), load(settings, 2)
        for k in range(n):
            value, g = load(values, k), gradient(load(gradients, k))
            velocity = load(means, k) * momentum + (
                fma(value, decay, g) if decay != 0 or is_wide else g
            )
            store(means, k, velocity)
            store(values, k, fma(velocity, size, value))

    return rule


_RULES = {"adamw": _adamw_for, "sgd": _sgd_for}


def _update_for(name: str, form: str, kind: str) -> tuple[Callable[..., None], Any]:
    """One step of a rule; kinds: ``fp32`` weights, ``masters`` or ``moments`` of bf16 weights."""
    dtype = "fp32" if kind == "fp32" else "bf16"
    item = FORMATS[dtype].item
    reach, collect, spread = FORMS[form](item.bitwidth)
    of_bits, to_bits = _conversions(dtype)
    rule = _RULES[name](of_bits, kind == "moments")
    stack, bits = stack_for(8 * _CAPACITY), np.dtype(str(item)).type
    has_masters = kind == "masters"

    def update(
        dense: Any, where: Any, gradients: Any, masters: Any, means: Any, squares: Any,
        settings: Any, first: Any, last: Any, place: Any, size: Any,
    ) -> None:  # fmt: skip
        scratch = stack()
        block, own = part(scratch, 0, bits), part(scratch, 4 * _CAPACITY, np.float32)
        cursor = first
        while cursor < last:
            end, count = reach(where, cursor, last)
            values = own
            if has_masters:
                values = advance(masters, place)
            else:
                collect(dense, where, cursor, end, size, block)
                for k in range(count):
                    store(values, k, of_bits(load(block, k)))
            rule(
                values, advance(gradients, place), advance(means, place), advance(squares, place),
                settings, count,
            )  # fmt: skip
            for k in range(count):
                store(block, k, to_bits(load(values, k)))
            spread(dense, where, cursor, end, size, block)
            place += count
            cursor = end

    weights, singles = types.CPointer(item), types.CPointer(types.float32)
    pointers = (weights, types.CPointer(_WHERE[form]), weights, *[singles] * 4)
    return update, types.void(*pointers, *[types.int64] * 4)


KERNELS: dict[str, Callable[[], tuple[Callable[..., None], Any]]] = {}
for _form in FORMS:
    for _item in (types.uint8, types.uint16, types.uint32, types.uint64):
        KERNELS[f"take_{_form}_{_item.bitwidth}"] = partial(_take_for, _form, _item)
        KERNELS[f"put_{_form}_{_item.bitwidth}"] = partial(_put_for, _form, _item)
    for _dtype in ("fp32", "bf16"):
        KERNELS[f"add_{_form}_{_dtype}"] = partial(_add_for, _form, _dtype)
    for _rule, _kind in product(_RULES, ("fp32", "masters", "moments")):
        KERNELS[f"{_rule}_{_form}_{_kind}"] = partial(_update_for, _rule, _form, _kind)
"""Makers of the kernels by name: work, form, and width, format or kind."""
