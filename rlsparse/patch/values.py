"""What changed weights became, as planes of bytes: byte p of every value, one plane after another.

``relative``: the step from the code before to the code after, among all codes in the order of
their values (a negative x is ~x, any other x with the top bit set), modulo 2^width and zigzag, so
that small steps either way are small numbers. A bijection of bit patterns: -0 and +0 are one step
apart, NaNs keep their payload. The planes of small numbers are all but empty; the base is needed to
read them. ``absolute``: the bits after.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlsparse.kernels.machine_code import load
from rlsparse.patch.codec import Positions, Stream, address
from rlsparse.tensor_file import Bits

Coding = Literal["relative", "absolute"]
CODINGS: tuple[Coding, ...] = get_args(Coding)


def split(coding: Coding, before: Bits, after: Bits, positions: Positions) -> NDArray[np.uint8]:
    """Planes [bytes per value, k] of ``after`` at positions [k]."""
    planes = np.empty((after.itemsize, positions.size), np.uint8)
    load(f"split_{coding}_{8 * after.itemsize}", 4, 2)(
        address(before), address(after), address(positions), address(planes),
        positions.size, positions.size,
    )  # fmt: skip
    return planes


def join(
    coding: Coding, planes: NDArray[np.uint8], first: int, positions: Positions, bits: Bits
) -> None:
    """Turn the bits before at some positions into those after, in place.

    Args:
        coding: of the planes.
        planes: as of ``split``.
        first: which of its values is the first that is asked for.
        positions: where they go, [k].
        bits: of which those there are overwritten.
    """
    assert first + positions.size <= planes.shape[1]
    load(f"join_{coding}_{8 * bits.itemsize}", 3, 2)(
        address(planes) + first, address(positions), address(bits),
        positions.size, planes.shape[1],
    )  # fmt: skip


def streams(coding: Coding, planes: NDArray[np.uint8]) -> list[Stream]:
    """What is stored of ``planes``: of relative values the lowest plane as two of half bytes.

    Most steps fit half a byte. Two to a byte, the entropy coder has half the bytes to do, and comes
    closer to their entropy.
    """
    if coding == "absolute":
        return [*planes]
    low, high = np.empty((2, -(-planes.shape[1] // 2)), np.uint8)
    load("halves", 3, 1)(address(planes), address(low), address(high), planes.shape[1])
    return [low, high, *planes[1:]]


def stream_bytes(coding: Coding, itemsize: int, num_values: int) -> list[int]:
    """The size of each stream."""
    whole, half = num_values, -(-num_values // 2)
    return [whole] * itemsize if coding == "absolute" else [half, half, *[whole] * (itemsize - 1)]


def planes_of(coding: Coding, stored: list[Stream], num_values: int) -> NDArray[np.uint8]:
    """The way back from ``streams``."""
    if coding == "absolute":
        return np.stack(stored)
    low, high, *others = stored
    planes = np.empty((1 + len(others), num_values), np.uint8)
    load("whole", 3, 1)(address(low), address(high), address(planes), num_values)
    if others:
        planes[1:] = others
    return planes
