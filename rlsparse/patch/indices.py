"""Codec ``indices``: the positions themselves, four bytes each; for those who read them raw."""

import numpy as np

from rlsparse.errors import PatchError
from rlsparse.patch.codec import Positions, Stream


class Indices:
    """uint32, little-endian."""

    def encode(self, positions: Positions, num_elements: int) -> Stream:
        """See ``Codec``."""
        return positions.astype("<u4", copy=False).view(np.uint8)

    def decode(self, stream: Stream, num_elements: int, num_changed: int) -> Positions:
        """See ``Codec``."""
        if stream.size != 4 * num_changed:
            raise PatchError(f"{stream.size} bytes of indices for {num_changed} changes")
        positions = np.frombuffer(stream.tobytes(), "<u4").astype(np.uint32, copy=False)
        if num_changed and (
            positions[-1] >= num_elements or (np.diff(positions.astype(np.int64)) < 1).any()
        ):
            raise PatchError(f"indices are not ascending below {num_elements}")
        return positions
