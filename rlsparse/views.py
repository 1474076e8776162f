"""Two runs of weights compared in a number format other than the one they are stored in."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rlsparse.definitions import NUM_MAGNITUDE_BINS, VIEWS
from rlsparse.errors import CheckpointError
from rlsparse.kernels import FLOATS, ChunkCounts, Scan, cast_bits, magnitude_histogram
from rlsparse.tensor_file import Bits


def check_view(view: str, allowed: Sequence[str] = VIEWS) -> None:
    """Refuse an unknown view.

    Raises:
        CheckpointError: not of ``allowed``.
    """
    if view not in allowed:
        raise CheckpointError(f"unknown number format {view!r}; choose of {', '.join(allowed)}")


class ViewScan:
    """Counts over one run of pairs in a view; the pairs arrive as stored, in pieces.

    Both sides are rounded to the view first. In the view ``stored`` two different formats are
    compared in fp32 (fp64 if one is fp64), which holds both exactly. Formats without values
    (integers) are compared as stored in every view. Changed weights are binned by the magnitude
    of ``before`` *as stored*, so that the bins divide by those of ``base_tensors``.

    Args:
        num_elements: pairs to come.
        dtype_before: their stored format on one side.
        dtype_after: and on the other.
        view: of ``definitions.VIEWS``.

    Raises:
        CheckpointError: formats differ and one has no values.
    """

    def __init__(self, num_elements: int, dtype_before: str, dtype_after: str, view: str) -> None:
        self._stored = dtype_before, dtype_after
        self._format = _format(dtype_before, dtype_after, view)
        self._scan = Scan(num_elements, self._format)
        self._magnitudes: NDArray[np.int64] | None = None
        if view != "stored" and self._format != dtype_before:
            self._magnitudes = np.zeros(NUM_MAGNITUDE_BINS, np.int64)

    def add(self, before: Bits, after: Bits, workspace: NDArray[np.uint8]) -> None:
        """Count the next pairs; all pieces but the last hold a multiple of 64."""
        one = cast_bits(before, self._stored[0], self._format)
        other = cast_bits(after, self._stored[1], self._format)
        self._scan.add(one, other, workspace)
        if self._magnitudes is not None:
            self._magnitudes += magnitude_histogram(before[one != other], self._stored[0])[0]

    def counts(self) -> ChunkCounts:
        """What has been counted."""
        counts = self._scan.counts()
        if self._magnitudes is None:
            return counts
        return replace(counts, magnitude_histogram_changed=self._magnitudes.tolist())


def _format(before: str, after: str, view: str) -> str:
    """The number format in which a pair is compared."""
    if before == after and (view == "stored" or before not in FLOATS):
        return before
    for dtype in (before, after):
        if dtype not in FLOATS:
            raise CheckpointError(
                f"cannot compare {before} with {after}: {dtype} has no values to cast; formats "
                f"that can be cast: {', '.join(FLOATS)}"
            )
    if view != "stored":
        return view
    return "fp64" if "fp64" in (before, after) else "fp32"
