"""What training changed, seen through narrower number formats than it was done in."""

from collections.abc import Iterable

import numpy as np

from rlsparse.definitions import VIEWS
from rlsparse.kernels import cast_bits
from rlsparse.tensor_file import Bits

CASTS = VIEWS[1:]
_PIECE = 2**18


def cast_changes(
    pairs: Iterable[tuple[Bits, Bits]], dtype_before: str, dtype_after: str
) -> dict[str, int]:
    """Count the weights that differ after both sides are cast, for each cast of ``CASTS``.

    fp32 masters change almost everywhere while their bf16 cast hardly does (2602.03839, section 3:
    the gate of a format); so where an update is called sparse is a matter of the format. The casts
    are those of the views (``kernels.cast_bits``): to nearest, ties to even, and what fp8_e4m3 does
    not reach becomes NaN.

    Args:
        pairs: flat bits of a weight tensor before and after, of one length, one tensor at a time.
        dtype_before: format of the first of each pair: the stored one, that training starts from.
        dtype_after: format of the second: the one that is trained.
    """
    num_changed = dict.fromkeys(CASTS, 0)
    for before, after in pairs:
        for start in range(0, before.size, _PIECE):
            piece = slice(start, start + _PIECE)
            for cast in CASTS:
                one = cast_bits(before[piece], dtype_before, cast)
                other = cast_bits(after[piece], dtype_after, cast)
                num_changed[cast] += int(np.count_nonzero(one != other))
    return num_changed
