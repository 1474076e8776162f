"""Codec ``gaps``: the elements skipped before each change; compact where few changed."""

import numpy as np

from rlsparse.errors import PatchError
from rlsparse.kernels.machine_code import load
from rlsparse.patch.codec import Positions, Stream, address

_MAX_BYTES = 5


class Gaps:
    """LEB128: seven bits to a byte, the lowest first; the highest bit says that more follow."""

    def encode(self, positions: Positions, num_elements: int) -> Stream:
        """See ``Codec``."""
        stream, size = np.empty(_MAX_BYTES * positions.size, np.uint8), np.zeros(1, np.int64)
        load("gaps", 3, 1)(address(positions), address(stream), address(size), positions.size)
        return stream[: size[0]]

    def decode(self, stream: Stream, num_elements: int, num_changed: int) -> Positions:
        """See ``Codec``."""
        positions, used = np.empty(num_changed, np.uint32), np.zeros(1, np.int64)
        load("ungaps", 3, 3)(
            address(stream), address(positions), address(used),
            stream.size, num_changed, num_elements,
        )  # fmt: skip
        if used[0] != stream.size:
            raise PatchError(
                f"{stream.size} bytes are not gaps of {num_changed} changes below {num_elements}"
            )
        return positions
