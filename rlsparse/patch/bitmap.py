"""Codec ``bitmap``: one bit per weight and the values where it is set."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsparse.errors import PatchError
from rlsparse.patch.codec import Layout, Read
from rlsparse.tensor_file import Bits

_BLOCK = 2**16


class Bitmap:
    """``bitmap``: packed mask, little-endian; ``val``: bits after.

    ``rank``: changes before each block of 65536 elements, so that a slice finds its values
    without counting from the start.
    """

    def layout(self, num_elements: int, num_changed: int, value_dtype: str) -> Layout:
        """See ``Codec``."""
        return {
            "bitmap": ("u8", -(-num_elements // 8)),
            "rank": ("u64", -(-num_elements // _BLOCK)),
            "val": (value_dtype, num_changed),
        }

    def encode(self, changed: NDArray[np.bool_], after_bits: Bits) -> dict[str, NDArray[Any]]:
        """See ``Codec``."""
        starts = np.arange(0, changed.size, _BLOCK)
        per_block = np.add.reduceat(changed, starts, dtype=np.int64)
        rank = (np.cumsum(per_block) - per_block).astype("<u8")
        bitmap = np.packbits(changed, bitorder="little")
        return {"bitmap": bitmap, "rank": rank, "val": after_bits[changed]}

    def decode(
        self, read: Read, num_elements: int, num_changed: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], Bits]:
        """See ``Codec``; reads the mask from the block that holds ``start``."""
        if start == stop:
            return np.empty(0, np.int64), read("val", 0, 0)
        block = start // _BLOCK
        origin = block * _BLOCK
        packed = read("bitmap", origin // 8, -(-stop // 8))
        changed = np.unpackbits(packed, count=stop - origin, bitorder="little").view(np.bool_)
        rank = read("rank", block, -(-stop // _BLOCK)).astype(np.int64)
        per_block = np.add.reduceat(changed, np.arange(0, changed.size, _BLOCK), dtype=np.int64)
        if not np.array_equal(rank[0] + np.cumsum(per_block)[:-1], rank[1:]):
            raise PatchError(f"bitmap and rank of elements [{start}, {stop}) disagree")
        first = int(rank[0]) + int(np.count_nonzero(changed[: start - origin]))
        positions = np.flatnonzero(changed[start - origin :])
        if first + positions.size > num_changed:
            raise PatchError(f"bitmap of elements [{start}, {stop}) has too many bits set")
        return positions, read("val", first, first + positions.size)
