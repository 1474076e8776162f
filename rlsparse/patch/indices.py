"""Codec ``indices``: sorted flat indices and the values there; small where few weights change."""

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsparse.errors import PatchError
from rlsparse.patch.codec import Layout, Read
from rlsparse.tensor_file import Bits


class Indices:
    """``idx``: uint32, or uint64 in tensors beyond 2^32 elements; ``val``: bits after."""

    def layout(self, num_elements: int, num_changed: int, value_dtype: str) -> Layout:
        """See ``Codec``."""
        index_dtype = "u32" if num_elements <= 2**32 else "u64"
        return {"idx": (index_dtype, num_changed), "val": (value_dtype, num_changed)}

    def encode(self, changed: NDArray[np.bool_], after_bits: Bits) -> dict[str, NDArray[Any]]:
        """See ``Codec``."""
        index = np.flatnonzero(changed)
        narrow = index.astype("<u4" if changed.size <= 2**32 else "<u8")
        return {"idx": narrow, "val": after_bits[index]}

    def decode(
        self, read: Read, num_elements: int, num_changed: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], Bits]:
        """See ``Codec``; finds the slice by bisection in the file."""
        ranks = range(num_changed)
        first = bisect_left(ranks, start, key=lambda rank: int(read("idx", rank, rank + 1)[0]))
        last = bisect_left(
            ranks, stop, lo=first, key=lambda rank: int(read("idx", rank, rank + 1)[0])
        )
        positions = read("idx", first, last).astype(np.int64) - start
        ascending = bool((np.diff(positions) > 0).all())
        if positions.size and not (
            ascending and positions[0] >= 0 and positions[-1] < stop - start
        ):
            raise PatchError(f"indices of elements [{start}, {stop}) are not in order")
        return positions, read("val", first, last)
