"""Codec ``bitmap``: one bit per element; compact where more than about one in five changed."""

import numpy as np

from rlsparse.errors import PatchError
from rlsparse.kernels import popcount
from rlsparse.kernels.compare import set_bits
from rlsparse.kernels.machine_code import load
from rlsparse.patch.codec import Positions, Stream, address


class Bitmap:
    """Bit i of byte j is element 8 j + i; bits beyond the last element are zero."""

    def encode(self, positions: Positions, num_elements: int) -> Stream:
        """See ``Codec``."""
        words = np.zeros(-(-num_elements // 64), "<u8")
        load("bitmap", 2, 1)(address(positions), address(words), positions.size)
        return words.view(np.uint8)[: -(-num_elements // 8)]

    def decode(self, stream: Stream, num_elements: int, num_changed: int) -> Positions:
        """See ``Codec``."""
        if stream.size != -(-num_elements // 8) or popcount(stream) != num_changed:
            raise PatchError(f"not a bitmap of {num_changed} of {num_elements} elements")
        if stream.size and num_elements % 8 and stream[-1] >> (num_elements % 8):
            raise PatchError(f"bitmap with bits beyond its {num_elements} elements")
        return set_bits(np.pad(stream, (0, -stream.size % 8)).view("<u8"), num_changed)
