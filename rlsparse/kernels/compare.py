"""Bitwise change alone, in one pass: for patches, and for measuring while training."""

import numpy as np
from numpy.typing import NDArray

from rlsparse.kernels import layout as at
from rlsparse.kernels.machine_code import load
from rlsparse.tensor_file import Bits

_SPARE = 64
"""Places beyond the last that the kernel may write, as it writes whole vectors."""


def compare(before: Bits, after: Bits, words: NDArray[np.uint64]) -> int:
    """Find what differs between two runs of weights.

    Args:
        before: bits, shape [n], contiguous.
        after: likewise, of the same width.
        words: shape [ceil(n / 64)], contiguous; is filled with the packed mask (bit i of word j is
            pair 64 j + i, those beyond the last pair are zero).

    Returns:
        Number of pairs whose bits differ.
    """
    assert before.shape == after.shape
    assert before.dtype == after.dtype
    assert words.shape == (-(-before.size // 64),)
    assert before.flags.c_contiguous
    assert after.flags.c_contiguous
    assert words.flags.c_contiguous
    counts = np.zeros(at.NUM_INTEGERS, np.int64)
    unused = counts.ctypes.data  # the kernel's other results are those of `Scan`
    load(f"compare_{8 * before.itemsize}", 7, 1)(
        before.ctypes.data, after.ctypes.data, words.ctypes.data,
        counts.ctypes.data, unused, unused, unused, before.size,
    )  # fmt: skip
    return int(counts[at.CHANGED])


def set_bits(words: NDArray[np.uint64], num_set: int) -> NDArray[np.uint32]:
    """Places of the set bits of a packed mask, ascending, of which there are ``num_set``."""
    assert words.flags.c_contiguous
    assert words.size <= 2**26
    places = np.empty(num_set + _SPARE, np.uint32)
    load("positions", 2, 1)(words.ctypes.data, places.ctypes.data, words.size)
    return places[:num_set]
