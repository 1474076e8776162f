"""Which elements of a weight tensor a mask selects, in the form that suits their number."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsparse import masks
from rlsparse.kernels import parallel, popcount
from rlsparse.kernels.machine_code import load
from rlsparse.masks import Packed

BITMAP_FROM = 1 / 32
"""Density from which a bit per weight takes the place of indices of 4 bytes, which are larger.

Which of the two updates scattered weights faster, processors disagree: at 5 % indices by a half on
one, bits by a quarter on another.
"""

_PIECE = 2**17
_KERNEL_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Selection:
    """The elements of a weight tensor that a mask selects, in order.

    How they are held is known here and to the kernels alone: flat indices of 4 bytes, a bitmap
    (``BITMAP_FROM``; also in a tensor of 2^32 elements or more), or nothing for a tensor that is
    selected whole. On other devices than the CPU it is indices.

    Args:
        packed: the mask.
        num_elements: of the tensor.
    """

    def __init__(self, packed: Packed, num_elements: int) -> None:
        masks.check(packed, num_elements)
        self.size = popcount(packed)
        """Number of selected elements."""
        self.num_elements = num_elements
        self._form = "whole"
        self._where: NDArray[np.uint32] | NDArray[np.uint64] = np.empty(0, np.uint64)
        if self.size < num_elements:
            if self.size < BITMAP_FROM * num_elements and num_elements < 2**32:
                found = np.flatnonzero(masks.unpack(packed, num_elements))
                self._form, self._where = "index", found.astype(np.uint32)
            else:
                padded = np.pad(packed, (0, -packed.size % 8))
                self._form, self._where = "bitmap", padded.view(np.uint64)
        self._pieces = self._split()
        self._index: torch.Tensor | None = None  # on another device

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, here and on another device."""
        return self._where.nbytes + (0 if self._index is None else self._index.nbytes)

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """The selected of all elements [n], in order; of a tensor selected whole, ``flat``."""
        if self._form == "whole":
            return flat
        if not _is_for_kernels(flat):
            return flat.index_select(0, self._on(flat.device))
        elements, flat = flat.new_empty(self.size), flat.contiguous()
        self._run(self.calls("take", str(8 * flat.element_size()), flat, elements))
        return elements

    def put(self, flat: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the selected elements of ``flat`` [n] with ``values``; no other is written."""
        if self._form == "whole":
            flat.copy_(values)
        elif not (_is_for_kernels(flat) and flat.is_contiguous()):
            flat.index_copy_(0, self._on(flat.device).long(), values)
        else:
            values = values.contiguous()
            self._run(self.calls("put", str(8 * flat.element_size()), flat, values))
            torch.autograd.graph.increment_version(flat)

    def add(self, elements: torch.Tensor, flat: torch.Tensor, alpha: float = 1) -> None:
        """Add ``alpha`` times the selected of all elements [n] to ``elements``, in place."""
        name = _KERNEL_FORMATS.get(flat.dtype)
        is_plain = alpha == 1 and flat.dtype == elements.dtype and elements.is_contiguous()
        if is_plain and name is not None and _is_for_kernels(flat):
            flat = flat.contiguous()
            self._run(self.calls("add", name, flat, elements))
        else:
            elements.add_(self.take(flat), alpha=alpha)

    def calls(
        self, work: str, kind: str, flat: torch.Tensor, *packed: torch.Tensor
    ) -> list[Callable[[], None]]:
        """What does some work of ``kernels.packing``, piece by piece, in any order.

        Args:
            work: what to do.
            kind: width, format or kind of weights.
            flat: all elements of the tensor, contiguous, on the CPU.
            packed: what the kernel takes beside them.
        """
        kernel = load(f"{work}_{self._form}_{kind}", 2 + len(packed), 4)
        where = self._where.ctypes.data

        def call(first: int, last: int, place: int) -> None:
            pointers = (one.data_ptr() for one in packed)
            kernel(flat.data_ptr(), where, *pointers, first, last, place, self.num_elements)

        return [partial(call, *piece) for piece in self._pieces]

    def _run(self, calls: list[Callable[[], None]]) -> None:
        parallel.run(calls, torch.get_num_threads())

    def _split(self) -> list[tuple[int, int, int]]:
        """Pieces for threads: where each begins and ends in the form, and the selected before."""
        if self._form != "bitmap":
            starts = range(0, self.size, _PIECE)
            return [(start, min(start + _PIECE, self.size), start) for start in starts]
        pieces, place, words = [], 0, _PIECE // 8
        for first in range(0, self._where.size, words):
            piece = self._where[first : first + words]
            pieces.append((first, first + piece.size, place))
            place += popcount(piece)
        return pieces

    def _on(self, device: torch.device) -> torch.Tensor:
        """Indices on ``device``; they follow a model that was moved."""
        if self._index is None or self._index.device != device:
            found: NDArray[Any] = self._where
            if self._form == "bitmap":
                packed = self._where.view(np.uint8)[: masks.num_bytes(self.num_elements)]
                found = np.flatnonzero(masks.unpack(packed, self.num_elements))
            dtype = np.int32 if self.num_elements < 2**31 else np.int64
            self._index = torch.from_numpy(found.astype(dtype)).to(device)
        return self._index


def _is_for_kernels(flat: torch.Tensor) -> bool:
    return flat.device.type == "cpu" and flat.element_size() in (2, 4, 8)
