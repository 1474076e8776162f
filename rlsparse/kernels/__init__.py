"""The hot loops: what changed between two runs of weights, magnitudes, and overlap of masks.

Callers pass bits (flat unsigned integers) and the short name of the number format. The CPU kernels
are machine code (``machine_code``), made by numba when this machine first needs one; those for CUDA
tensors are in ``gpu``.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rlsparse.definitions import ABS_TOLERANCES, DEFINITIONS, NUM_MAGNITUDE_BINS
from rlsparse.errors import CheckpointError
from rlsparse.kernels import layout as at
from rlsparse.kernels.machine_code import load
from rlsparse.tensor_file import ITEMSIZE, Bits, bits_dtype

if TYPE_CHECKING:
    import torch

FLOATS: dict[str, np.dtype[Any]] = {
    "fp64": np.dtype(np.float64),
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Number formats with values; tensors in any other are compared bit by bit only."""


@dataclass(frozen=True)
class ChunkCounts:
    """What changed between two equally long runs of weights.

    Attributes:
        num_elements: pairs compared.
        num_changed: definition of ``definitions.DEFINITIONS`` -> changed pairs.
        ulp_histogram: changed finite pairs by distance in representable values (``ULP_BINS``).
        magnitude_histogram_changed: bitwise changed pairs by |before| (``NUM_MAGNITUDE_BINS``);
            pairs whose before is not finite are in no bin.
        sum_sq_before: sum of before^2 over finite weights, changed or not. Formats of at most 16
            bits are added 64 at a time in fp32: relative error below 4e-7. All else is float64.
        sum_sq_delta: sum of (after - before)^2 over finite pairs; likewise the next two.
        sum_abs_delta: sum of |after - before|.
        max_abs_delta: largest |after - before|.
        num_sign_flips: finite pairs of strictly opposite sign.
        num_zero_sign_flips: pairs of -0 and +0: changed bitwise, under no other definition.
        num_nonfinite: pairs with a NaN or an infinity on either side, changed or not.
        num_nan: pairs with a NaN on either side.
        mask: bitwise change, packed: bit i of byte j is pair 8 j + i; uint8, on the device of the
            weights.
    """

    num_elements: int
    num_changed: dict[str, int]
    ulp_histogram: list[int]
    magnitude_histogram_changed: list[int]
    sum_sq_before: float
    sum_sq_delta: float
    sum_abs_delta: float
    max_abs_delta: float
    num_sign_flips: int
    num_zero_sign_flips: int
    num_nonfinite: int
    num_nan: int
    mask: Any

    def columns(self) -> dict[str, object]:
        """The counts under the column names of table ``tensor_deltas`` (without the mask)."""
        changed = {f"num_changed_{name}": count for name, count in self.num_changed.items()}
        rest = {k: v for k, v in vars(self).items() if k not in ("num_changed", "mask")}
        return {"num_elements": self.num_elements, **changed, **rest}


class Scan:
    """Counts over one run of pairs that arrives in pieces; holds no more than a packed mask.

    Args:
        num_elements: pairs to come.
        dtype: short name of their format.

    Raises:
        CheckpointError: unknown format.
    """

    def __init__(self, num_elements: int, dtype: str) -> None:
        if dtype not in ITEMSIZE:
            raise CheckpointError(f"unknown number format {dtype!r}; known: {', '.join(ITEMSIZE)}")
        self.num_elements = num_elements
        self.dtype = dtype
        self._done = 0
        name = f"scan_{dtype}" if dtype in FLOATS else f"compare_{8 * bits_dtype(dtype).itemsize}"
        self._kernel = load(name, 7, 1)
        self._words = np.zeros(-(-num_elements // 64), np.uint64)
        self._integers = np.zeros(at.NUM_INTEGERS, np.int64)
        self._floats = np.zeros(at.NUM_FLOATS, np.float64)
        self._magnitudes = np.zeros(NUM_MAGNITUDE_BINS, np.int64)

    def add(self, before: Bits, after: Bits, workspace: NDArray[np.uint8] | None = None) -> None:
        """Count the next pairs; all pieces but the last hold a multiple of 64.

        Args:
            before: shape [n], contiguous.
            after: shape [n], contiguous.
            workspace: scratch of ``new_workspace``, to be used by one thread at a time.

        Raises:
            CheckpointError: the lengths or the widths differ.
        """
        item = bits_dtype(self.dtype)
        if before.shape != after.shape or {before.dtype, after.dtype} != {item}:
            raise CheckpointError(
                f"cannot compare {before.dtype}{list(before.shape)} with "
                f"{after.dtype}{list(after.shape)} as {self.dtype}: both must be {item} bits of "
                "one length"
            )
        assert self._done % 64 == 0, "a piece before the last was not a multiple of 64"
        assert self._done + before.size <= self.num_elements
        assert before.flags.c_contiguous
        assert after.flags.c_contiguous
        if workspace is None:
            workspace = new_workspace()
        self._kernel(
            before.ctypes.data,
            after.ctypes.data,
            self._words.ctypes.data + self._done // 8,
            self._integers.ctypes.data,
            self._floats.ctypes.data,
            self._magnitudes.ctypes.data,
            workspace.ctypes.data,
            before.size,
        )
        self._done += before.size

    def counts(self) -> ChunkCounts:
        """What has been counted."""
        numbers = self._integers.tolist()
        changed, finite = numbers[at.CHANGED], numbers[at.FINITE]
        within = numbers[at.WITHIN_ABS : at.WITHIN_ULPS]
        if self.dtype not in FLOATS:
            within = [0] * (len(ABS_TOLERANCES) + 1)
        up_to = [0, *numbers[at.WITHIN_ULPS : at.FINITE], finite]
        return ChunkCounts(
            num_elements=self.num_elements,
            num_changed=dict(
                zip(DEFINITIONS, [changed, *(changed - n for n in within)], strict=True)
            ),
            ulp_histogram=np.diff(up_to).tolist(),
            magnitude_histogram_changed=self._magnitudes.tolist(),
            sum_sq_before=float(self._floats[at.SUM_SQ_BEFORE]),
            sum_sq_delta=float(self._floats[at.SUM_SQ_DELTA]),
            sum_abs_delta=float(self._floats[at.SUM_ABS_DELTA]),
            max_abs_delta=float(self._floats[at.MAX_ABS_DELTA]),
            num_sign_flips=numbers[at.SIGN_FLIPS],
            num_zero_sign_flips=numbers[at.ZERO_SIGN_FLIPS],
            num_nonfinite=numbers[at.NONFINITE],
            num_nan=numbers[at.NAN],
            mask=self._words.view(np.uint8)[: -(-self.num_elements // 8)],
        )


def new_workspace() -> NDArray[np.uint8]:
    """Scratch for ``Scan.add``; reuse saves its 150 KB from leaving the cache."""
    return np.zeros(at.WORKSPACE_BYTES, np.uint8)


def measure(before: "Bits | torch.Tensor", after: "Bits | torch.Tensor", dtype: str) -> ChunkCounts:
    """Compare two runs of weights stored in format ``dtype``, under every definition.

    Differences and tolerances are float64: |after - before| is exact for every format of at most
    32 bits unless the exponents are further apart than 53 bits hold. A pair with a NaN or an
    infinity is changed, under every definition, iff its bits differ; so is any pair of a format
    without values (integers).

    Args:
        before: bits, shape [n]; or a CUDA tensor of any shape, which is measured where it is.
        after: likewise.
        dtype: short name of the format of both; tensors say it themselves.

    Raises:
        CheckpointError: the lengths or the widths differ.
    """
    if not isinstance(before, np.ndarray):
        from rlsparse.kernels import gpu

        return gpu.measure(before, cast("torch.Tensor", after))
    after = cast(Bits, after)
    scan = Scan(before.size, dtype)
    scan.add(np.ascontiguousarray(before), np.ascontiguousarray(after))
    return scan.counts()


def stripe_counts(mask: Any, num_rows: int, num_columns: int) -> tuple[Any, Any]:
    """Changed weights per row and per column.

    Args:
        mask: packed mask of whole rows, as in ``ChunkCounts``; an array or a CUDA tensor.
        num_rows: rows in it.
        num_columns: weights per row.

    Returns:
        int64 counts of shapes [num_rows] and [num_columns], arrays or tensors as ``mask`` is.
    """
    if not isinstance(mask, np.ndarray):
        from rlsparse.kernels import gpu

        return gpu.stripe_counts(mask, num_rows, num_columns)
    rows, columns = np.zeros(num_rows, np.int64), np.zeros(num_columns, np.int64)
    stride = -(-num_columns // 512) * 8
    planes = np.zeros(9 * stride, np.uint64)
    words = _words(mask)
    load("stripes", 4, 2)(
        words.ctypes.data, rows.ctypes.data, columns.ctypes.data, planes.ctypes.data,
        num_rows, num_columns,
    )  # fmt: skip
    return rows, columns


def _words(mask: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The same bits as 64-bit words, the last filled up with zeros; a copy only if need be."""
    if mask.size % 8 or not mask.flags.c_contiguous:
        mask = np.pad(mask, (0, -mask.size % 8))
    return mask.view(np.uint64)


def magnitude_histogram(bits: "Bits | torch.Tensor", dtype: str) -> tuple[NDArray[np.int64], float]:
    """Weights by power of two, as ``definitions.NUM_MAGNITUDE_BINS`` says, and sum of squares.

    Non-finite weights are in neither; formats without values give zeros.

    Args:
        bits: shape [n]; or a CUDA tensor of any shape.
        dtype: short name of their format; a tensor says it itself.

    Returns:
        Histogram of shape [NUM_MAGNITUDE_BINS], and the sum.
    """
    if not isinstance(bits, np.ndarray):
        from rlsparse.kernels import gpu

        return gpu.magnitude_histogram(bits)
    histogram = np.zeros(NUM_MAGNITUDE_BINS, np.int64)
    if dtype not in FLOATS:
        return histogram, 0.0
    bits, sums, workspace = np.ascontiguousarray(bits), np.zeros(1), new_workspace()
    load(f"magnitudes_{dtype}", 4, 1)(
        bits.ctypes.data, histogram.ctypes.data, sums.ctypes.data, workspace.ctypes.data, bits.size
    )
    return histogram, float(sums[0])


def popcount(mask: NDArray[np.unsignedinteger[Any]]) -> int:
    """Number of set bits."""
    return int(np.bitwise_count(mask).sum(dtype=np.int64))


def popcount_and(masks: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """Set bits that each two of R packed masks share.

    Args:
        masks: uint8 or uint64, shape [R, words]; bits beyond the tensor must be zero.

    Returns:
        Shape [R, R], symmetric; the diagonal is each mask's own count.
    """
    words = _rows_of_words(masks)
    shared = np.zeros((len(words), len(words)), np.int64)
    # Tiles at the edge reach up to 3 masks beyond the last. A line of the cache holds 8 words.
    scratch = np.zeros((len(words) + 3) * at.MASK_WORDS + 16, np.uint64)
    aligned = scratch.ctypes.data + -scratch.ctypes.data % 64
    load("popcount_and", 3, 2)(words.ctypes.data, shared.ctypes.data, aligned, *words.shape)
    return shared + np.triu(shared, 1).T


def label_counts(
    masks: NDArray[np.unsignedinteger[Any]], labels: NDArray[np.uint16], num_labels: int
) -> NDArray[np.int64]:
    """How many of the weights of each label each of R packed masks holds.

    Args:
        masks: as in ``popcount_and``.
        labels: one per weight, below ``num_labels``; shape [n].
        num_labels: number of labels, L.

    Returns:
        Shape [R, L].

    Raises:
        CheckpointError: bits are set, or might be, beyond the last label.
    """
    words = _rows_of_words(masks)
    if labels.dtype != np.uint16 or not labels.size <= 64 * words.shape[1] < labels.size + 64:
        raise CheckpointError(
            f"{labels.dtype}{list(labels.shape)} labels do not fit masks of {words.shape[1]} words"
        )
    if labels.size and int(labels.max()) >= num_labels:
        raise CheckpointError(f"label {labels.max()} is not below the number of {num_labels}")
    # Stray bits of the last word find a label all the same.
    padded = np.pad(labels, (0, -labels.size % 64)) if labels.size % 64 else labels
    counts = np.zeros((len(words), num_labels), np.int64)
    load("label_counts", 3, 3)(
        words.ctypes.data, np.ascontiguousarray(padded).ctypes.data, counts.ctypes.data,
        *words.shape, num_labels,
    )  # fmt: skip
    return counts


def agreement(masks: NDArray[np.unsignedinteger[Any]], num_elements: int) -> NDArray[np.int64]:
    """How many weights are in exactly k of R packed masks.

    Args:
        masks: as in ``popcount_and``.
        num_elements: weights that the masks are about.

    Returns:
        Shape [R + 1], by k; sums to ``num_elements``.
    """
    words = _rows_of_words(masks)
    num_planes = max(len(words).bit_length(), 1)
    counts = np.zeros(len(words) + 1, np.int64)
    planes = np.zeros((num_planes + 1) * at.MASK_WORDS, np.uint64)
    load("agreement", 3, 3)(
        words.ctypes.data, counts.ctypes.data, planes.ctypes.data, *words.shape, num_planes
    )
    counts[0] = num_elements - counts.sum()
    return counts


def _rows_of_words(masks: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.uint64]:
    """Masks [R, n] as 64-bit words, the last filled up with zeros; a copy only if need be."""
    masks = np.ascontiguousarray(masks)
    padding = -masks.shape[1] * masks.itemsize % 8
    if padding:
        masks = np.pad(masks.view(np.uint8), ((0, 0), (0, padding)))
    return masks.view(np.uint64)


def values(bits: Bits, dtype: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """Exact values of ``bits``: float64 for fp64, float32 for every narrower format."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "fp64":
        return bits.view(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(FLOATS[dtype]).astype(np.float32, copy=False)


def cast_bits(bits: Bits, dtype_from: str, dtype_to: str) -> Bits:
    """Cast weights to another format, rounding to nearest, ties to even (as ml_dtypes does).

    Values beyond the largest finite one become an infinity, or NaN in ``fp8_e4m3``, which has
    none; torch 2.13 instead saturates there at 448. NaNs stay NaN, their payload may change.

    Raises:
        CheckpointError: either format has no values.
    """
    if dtype_from == dtype_to:
        return bits
    for dtype in (dtype_from, dtype_to):
        if dtype not in FLOATS:
            raise CheckpointError(f"cannot cast {dtype}; known formats: {', '.join(FLOATS)}")
    if dtype_to == "fp32" and dtype_from == "bf16":
        return bits.astype(np.uint32) << np.uint32(16)
    if bits_dtype(dtype_from).itemsize <= 2 and bits.size > 2**12:
        return np.take(_casts_of_all(dtype_from, dtype_to), bits)
    return _cast(bits, dtype_from, dtype_to)


@cache
def _casts_of_all(dtype_from: str, dtype_to: str) -> Bits:
    """What each code of a narrow format becomes: to look up is faster than to compute."""
    item = bits_dtype(dtype_from)
    return _cast(np.arange(2 ** (8 * item.itemsize)).astype(item), dtype_from, dtype_to)


def _cast(bits: Bits, dtype_from: str, dtype_to: str) -> Bits:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        wide = values(bits, dtype_from)
        if dtype_from == "fp64" and dtype_to not in ("fp32", "fp16"):
            wide = _odd_single(wide)  # ml_dtypes would round twice, by way of fp32
        return wide.astype(FLOATS[dtype_to], copy=False).view(bits_dtype(dtype_to))


def _odd_single(wide: NDArray[Any]) -> NDArray[np.float32]:
    """fp64 to fp32 rounded to odd, from where rounding to a narrower format is exact."""
    single = wide.astype(np.float32)
    single = np.where(np.abs(single) > np.abs(wide), np.nextafter(single, np.float32(0)), single)
    odd: NDArray[np.uint32] = single.view(np.uint32) | (single != wide)
    return odd.view(np.float32)
