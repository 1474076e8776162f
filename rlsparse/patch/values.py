"""What changed weights became: a number per change, stored as planes of bytes, the lowest first.

``relative``: the step from the code before to the code after, among all codes in the order of
their values (a negative x is ~x, any other x with the top bit set), modulo 2^width and zigzag, so
that small steps either way are small numbers. A bijection of bit patterns: -0 and +0 are one step
apart, NaNs keep their payload. The planes of small numbers are all but empty; the base is needed to
read them. ``absolute``: the bits after.
"""

from typing import Literal, get_args

import numpy as np

from rlsparse.kernels.machine_code import load
from rlsparse.patch.codec import Positions, Stream, address
from rlsparse.tensor_file import Bits

Coding = Literal["relative", "absolute"]
CODINGS: tuple[Coding, ...] = get_args(Coding)


def find(coding: Coding, before: Bits, after: Bits, positions: Positions) -> Bits:
    """The values [k] of what changed at positions [k]."""
    values = _taken(after, positions)
    if coding == "relative":
        earlier = _taken(before, positions)
        load(f"steps_{8 * values.itemsize}", 2, 1)(address(earlier), address(values), values.size)
    return values


def _taken(bits: Bits, positions: Positions) -> Bits:
    found = np.empty(positions.size, bits.dtype)
    load(f"take_index_{8 * bits.itemsize}", 3, 4)(
        address(bits), address(positions), address(found), 0, positions.size, 0, bits.size
    )
    return found


def apply(coding: Coding, values: Bits, positions: Positions, bits: Bits) -> None:
    """Turn the bits before at positions [k] into those after, in place."""
    assert values.dtype == bits.dtype
    assert values.size == positions.size
    if coding == "relative":
        load(f"move_{8 * bits.itemsize}", 3, 1)(
            address(values), address(positions), address(bits), positions.size
        )
    else:
        load(f"put_index_{8 * bits.itemsize}", 3, 4)(
            address(bits), address(positions), address(values), 0, positions.size, 0, bits.size
        )


def streams(coding: Coding, values: Bits) -> list[Stream]:
    """What is stored of values: of relative ones the lowest plane as two of half bytes.

    Most steps fit half a byte. Two to a byte, the entropy coder has half the bytes to do, and comes
    closer to their entropy.
    """
    planes = _as_bytes(values).T
    if coding == "absolute":
        return [*np.ascontiguousarray(planes)]
    low, high = np.empty((2, -(-values.size // 2)), np.uint8)
    load("halves", 3, 2)(address(values), address(low), address(high), values.size, values.itemsize)
    return [low, high, *np.ascontiguousarray(planes[1:])]


def stream_bytes(coding: Coding, itemsize: int, num_values: int) -> list[int]:
    """The size of each stream."""
    whole, half = num_values, -(-num_values // 2)
    return [whole] * itemsize if coding == "absolute" else [half, half, *[whole] * (itemsize - 1)]


def of_streams(coding: Coding, stored: list[Stream], num_values: int) -> Bits:
    """The way back from ``streams``."""
    itemsize = len(stored) - (coding == "relative")
    values = np.zeros(num_values, f"<u{itemsize}")
    if coding == "relative":
        load("whole", 3, 2)(
            address(stored[0]), address(stored[1]), address(values), num_values, itemsize
        )
        stored = stored[1:]
    for plane in range(coding == "relative", itemsize):
        if stored[plane].any():  # the upper ones of small steps are empty
            _as_bytes(values)[:, plane] = stored[plane]
    return values


def _as_bytes(values: Bits) -> Stream:
    """[k, bytes], the lowest first."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(values.size, values.itemsize)
