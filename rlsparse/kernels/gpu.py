"""The numbers of ``rlsparse.kernels`` for tensors on a CUDA device, made by ``triton_code``.

Imports torch and triton, so import it only where a tensor on such a device is at hand. Programs
leave partial counts and sums, which torch adds up here: no result depends on timing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from rlsparse.definitions import (
    ABS_TOLERANCES,
    DEFINITIONS,
    NUM_MAGNITUDE_BINS,
    REL_TOLERANCE,
    ULP_BINS,
)
from rlsparse.errors import CheckpointError
from rlsparse.kernels import ChunkCounts
from rlsparse.kernels import triton_code as code


@dataclass(frozen=True)
class _Format:
    """What a kernel must know of a number format; ``name`` is "none" where bits have no value."""

    name: str
    size_bytes: int
    first_nonfinite: int = 0
    first_nan: int = 0

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        return {
            "FORMAT": self.name,
            "WORD": tl.uint64 if self.size_bytes == 8 else tl.uint32,
            "FIRST_NONFINITE": self.first_nonfinite,
            "ABS": 2 ** (8 * self.size_bytes - 1) - 1,
        }

    def tolerances(self) -> tuple[float, ...]:
        """Tolerances in the precision of ``_values``, the relative one last.

        fp32 tolerances are rounded down: a difference on the grid of fp32 is beyond the tolerance
        iff it is beyond the next fp32 below. The relative one is a factor, and no two codes of a
        format of at most 16 bits lie so near 1e-3 that its rounding decides.
        """
        exact = tuple(float(tau) for tau in (*ABS_TOLERANCES, REL_TOLERANCE))
        if self.size_bytes >= 4:
            return exact
        rounded = np.array(exact, np.float32)
        below = np.where(rounded > np.array(exact), np.nextafter(rounded, np.float32(0)), rounded)
        return (*map(float, below[:-1]), float(rounded[-1]))


_FORMATS = {
    torch.float64: _Format("fp64", 8, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    torch.float32: _Format("fp32", 4, 0x7F80_0000, 0x7F80_0001),
    torch.float16: _Format("fp16", 2, 0x7C00, 0x7C01),
    torch.bfloat16: _Format("bf16", 2, 0x7F80, 0x7F81),
    torch.float8_e4m3fn: _Format("fp8_e4m3", 1, 0x7F, 0x7F),
    torch.float8_e5m2: _Format("fp8_e5m2", 1, 0x7C, 0x7D),
}
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_TILE = 1024
_TILES_PER_PROGRAM = 4  # at least: a program leaves 600 bytes behind
_PROGRAMS_PER_PROCESSOR = 128  # at most: some 20 are resident, and finish at different times
_LAUNCH = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def measure(before: torch.Tensor, after: torch.Tensor) -> ChunkCounts:
    """Compare two tensors on one CUDA device, under every definition, in one pass.

    The numbers are those of ``rlsparse.kernels.measure``; all sums are float64, in an order that
    does not depend on timing. Tensors without values (integers) are compared bit by bit only.

    Args:
        before: any shape.
        after: the same shape, format and device.

    Returns:
        The counts; ``mask`` is a uint8 tensor of shape [ceil(n / 8)] on the device.

    Raises:
        CheckpointError: the tensors do not fit each other, or are not on a CUDA device.
    """
    if (before.shape, before.dtype, before.device) != (after.shape, after.dtype, after.device):
        raise CheckpointError(
            f"cannot compare {_described(before)} with {_described(after)}: both must have one "
            "shape, one format and one device; cast or move one of them first"
        )
    x, kind = _bits(before)
    y, _ = _bits(after)
    num_full, rest = divmod(x.numel(), _TILE)
    programs = _num_programs(num_full, x.device)
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    counts, sums, histograms = _partials(programs + 1, x.device)
    constants = {
        **kind.constants(), "FIRST_NAN": kind.first_nan, "TAUS": kind.tolerances(), **_LAUNCH
    }  # fmt: skip
    with torch.cuda.device(x.get_device()):
        if programs:
            code.compare[(programs,)](
                x, y, mask, counts, sums, histograms, 0, x.numel(), num_full,
                IN_BOUNDS=True, **constants,
            )  # fmt: skip
        if rest:
            code.compare[(1,)](
                x, y, mask, counts[programs:], sums[programs:], histograms[programs:],
                num_full * _TILE, x.numel(), 1, IN_BOUNDS=False, **constants,
            )  # fmt: skip
    return _chunk_counts(x.numel(), kind, mask, counts, sums, histograms)


def magnitude_histogram(weights: torch.Tensor) -> tuple[NDArray[np.int64], float]:
    """Weights by power of two, as ``definitions.NUM_MAGNITUDE_BINS`` says, and the sum of squares.

    Non-finite weights are in neither; formats without values give zeros.

    Args:
        weights: any shape, on a CUDA device.

    Returns:
        Histogram of shape [NUM_MAGNITUDE_BINS], and the sum in float64.

    Raises:
        CheckpointError: the tensor is not on a CUDA device.
    """
    x, kind = _bits(weights)
    num_tiles = (x.numel() + _TILE - 1) // _TILE
    programs = _num_programs(num_tiles, x.device)
    _, sums, histograms = _partials(programs, x.device)
    if kind.name == "none" or not programs:
        return np.zeros(NUM_MAGNITUDE_BINS, np.int64), 0.0
    with torch.cuda.device(x.get_device()):
        code.magnitudes[(programs,)](
            x, sums, histograms, x.numel(), num_tiles, **kind.constants(), **_LAUNCH
        )
    histogram: NDArray[np.int64] = histograms.sum(0)[:NUM_MAGNITUDE_BINS].cpu().numpy()
    return histogram, float(sums.flatten()[:programs].sum())


def stripe_counts(
    mask: torch.Tensor, num_rows: int, row_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changed weights in each row and in each column of a matrix, from its packed mask.

    Args:
        mask: ``ChunkCounts.mask`` of the matrix, uint8 of shape [ceil(num_rows * row_length / 8)].
        num_rows: rows of the matrix.
        row_length: its columns.

    Returns:
        int64 of shape [num_rows] and int64 of shape [row_length], on the device of the mask.

    Raises:
        CheckpointError: the mask is not on a CUDA device, or has another size.
    """
    bits, _ = _bits(mask)
    if bits.numel() != (num_rows * row_length + 7) // 8 or bits.dtype != torch.uint8:
        raise CheckpointError(
            f"{_described(mask)} is no packed mask of {num_rows} rows of {row_length} weights: it "
            "must be uint8 with one bit per weight"
        )
    blocks, strips = (num_rows + 127) // 128, (row_length + 2047) // 2048
    rows = torch.zeros(strips, num_rows, dtype=torch.int32, device=bits.device)
    columns = torch.zeros(blocks, row_length, dtype=torch.int32, device=bits.device)
    if bits.numel():
        with torch.cuda.device(bits.get_device()):
            code.stripes[(blocks * strips,)](
                bits, rows, columns, num_rows, row_length, -(-row_length // 8), bits.numel(),
                strips, ALIGNED=row_length % 8 == 0, **{**_LAUNCH, "num_warps": 4},
            )  # fmt: skip
    return rows.sum(0), columns.sum(0)


def _bits(tensor: torch.Tensor) -> tuple[torch.Tensor, _Format]:
    """Flat unsigned integers of a tensor, without a copy where it is contiguous; its format."""
    if tensor.device.type != "cuda" and isinstance(code.compare, triton.JITFunction):
        raise CheckpointError(
            f"{_described(tensor)} is not on a CUDA device; give its bits as an array, "
            "such as tensor.view(torch.uint16).numpy()"
        )
    if tensor.dtype.itemsize not in _BITS:
        raise CheckpointError(
            f"{_described(tensor)} has {tensor.dtype.itemsize} bytes per element, not one of "
            f"{list(_BITS)}"
        )
    size_bytes = tensor.dtype.itemsize
    flat = tensor.detach().reshape(-1).view(_BITS[size_bytes])
    return flat, _FORMATS.get(tensor.dtype, _Format("none", size_bytes))


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"


def _num_programs(num_tiles: int, device: torch.device) -> int:
    """Programs of one warp that share the tiles; 0 if there are none."""
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        processors = 1  # Triton's interpreter
    needed = -(-num_tiles // _TILES_PER_PROGRAM)
    return min(needed, int(processors) * _PROGRAMS_PER_PROCESSOR)


def _partials(
    programs: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeroed counts, sums and histograms, a row per program (each sees less than 2^31 pairs)."""
    return (
        torch.zeros(programs, code.NUM_COUNTS.value, dtype=torch.int32, device=device),
        torch.zeros(programs, code.NUM_SUMS.value, dtype=torch.float64, device=device),
        torch.zeros(programs, code.NUM_BINS.value, dtype=torch.int32, device=device),
    )


def _chunk_counts(
    num_elements: int,
    kind: _Format,
    mask: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    histograms: torch.Tensor,
) -> ChunkCounts:
    """Add up what the programs left."""
    num_changed, num_moved, *num_beyond, num_flips, num_nonfinite, num_nan = counts.sum(0).tolist()
    if kind.name == "none":
        num_beyond, num_moved = [num_changed] * (len(DEFINITIONS) - 1), num_changed
    bins = histograms.sum(0).tolist()
    sum_sq_before, sum_sq, sum_abs = sums[:, :3].sum(0).tolist()
    return ChunkCounts(
        num_elements=num_elements,
        num_changed=dict(zip(DEFINITIONS, [num_changed, *num_beyond], strict=True)),
        ulp_histogram=bins[NUM_MAGNITUDE_BINS : NUM_MAGNITUDE_BINS + len(ULP_BINS)],
        magnitude_histogram_changed=bins[:NUM_MAGNITUDE_BINS],
        sum_sq_before=sum_sq_before,
        sum_sq_delta=sum_sq,
        sum_abs_delta=sum_abs,
        max_abs_delta=float(sums[:, 3].max()),
        num_sign_flips=num_flips,
        num_zero_sign_flips=num_changed - num_moved,
        num_nonfinite=num_nonfinite,
        num_nan=num_nan,
        mask=mask,
    )
