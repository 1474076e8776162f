"""The contract of a codec: how the places of a block that changed are written as bytes."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.uint32]
"""Places of changed elements, counted from the start of their block; ascending."""

Stream = NDArray[np.uint8]


class Codec(Protocol):
    """Writes positions as bytes, losslessly; what is repetitive in them is compressed afterwards.

    A codec is one file with this contract and one line in ``codecs.CODECS``.
    """

    def encode(self, positions: Positions, num_elements: int) -> Stream:
        """The bytes of ``positions`` [k], all below ``num_elements``."""

    def decode(self, stream: Stream, num_elements: int, num_changed: int) -> Positions:
        """The way back.

        Raises:
            PatchError: these are not the bytes of ``num_changed`` ascending positions below
                ``num_elements``.
        """


def address(array: NDArray[Any]) -> int:
    """Where a kernel finds an array."""
    assert array.flags.c_contiguous
    return int(array.__array_interface__["data"][0])  # array.ctypes takes twice as long
