"""The contract of a codec: how the changed weights of one tensor are laid out in a patch."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsparse.tensor_file import Bits

Read = Callable[[str, int, int], NDArray[Any]]
"""(array, start, stop) -> elements [start, stop) of one of the codec's arrays."""

Layout = dict[str, tuple[str, int]]
"""Array -> (number format, number of elements): all that a codec stores for one tensor."""


class Codec(Protocol):
    """Stores, losslessly, where a tensor changed and the bits that are there afterwards.

    What ``encode`` returns has exactly the arrays of ``layout``, so the smallest encoding is known
    before encoding, and a damaged patch before decoding. ``decode`` reads only what the slice
    needs.
    """

    def layout(self, num_elements: int, num_changed: int, value_dtype: str) -> Layout:
        """What is stored for ``num_changed`` of ``num_elements`` values of ``value_dtype``."""

    def encode(self, changed: NDArray[np.bool_], after_bits: Bits) -> dict[str, NDArray[Any]]:
        """Encode ``after_bits`` [n] where ``changed`` [n]."""

    def decode(
        self, read: Read, num_elements: int, num_changed: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], Bits]:
        """Positions, ascending and counted from ``start``, and values of changes in a slice.

        Raises:
            PatchError: the arrays contradict each other.
        """
