"""A patch file that was opened: its header, its tables, and what they say of each tensor."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlsparse.errors import CheckpointError, PatchError
from rlsparse.patch import blocks, values
from rlsparse.patch.blocks import Block, Entry
from rlsparse.patch.codec import Positions
from rlsparse.patch.values import CODINGS, Coding
from rlsparse.tensor_file import ITEMSIZE, Bits, TensorInfo, parse_json, read_header, unique

FORMAT_VERSION = "2"
METADATA_KEY = "rlsparse_patch"
CHECKSUM_KEY = "rlsparse_patch_checksum"
"""xxh3 (128 bits, hex) of what is at ``METADATA_KEY``, which has those of tables and tensors."""
PATCH_FILE = "weights.patch.safetensors"

_AGAIN = "write it again"
_ARRAYS = ("blocks", "sizes", "data")
MAX_BLOCK = 2**31
"""Elements of a block, so that positions fit 32 bits."""


@dataclass(frozen=True)
class PatchedTensor:
    """What a patch says of one tensor.

    Attributes:
        dtype: short name of its number format, before (cast, if need be) and after.
        shape: of the tensor.
        num_changed: elements whose bits differ.
        xxh3_before: xxh3 (128 bits, hex) of all its bytes before.
        xxh3_after: likewise after.
        xxh3_table: of its blocks and sizes; "" if nothing changed.
        part: the flat elements [start, stop) of which alone all this is said, if the patch is of a
            worker that holds no more; blocks count from its start. None: all.
    """

    dtype: str
    shape: tuple[int, ...]
    num_changed: int
    xxh3_before: str
    xxh3_after: str
    xxh3_table: str
    part: tuple[int, int] | None = None

    @property
    def num_elements(self) -> int:
        """Elements of which the patch says whether they changed."""
        start, stop = self.part or (0, math.prod(self.shape))
        return stop - start

    def entry(self) -> dict[str, Any]:
        """As the header has it: without ``part`` where that is all."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "PatchedTensor":
        """The way back."""
        sequences: dict[str, Any] = {
            key: tuple(entry[key]) for key in ("shape", "part") if key in entry
        }
        return cls(**{**entry, **sequences})


@dataclass(frozen=True)
class Patch:
    """An opened patch; holds no file handle, so it pickles and needs no closing.

    Attributes:
        path: the file.
        values: how values are coded.
        base_fingerprint: ``checkpoint.fingerprint`` of the checkpoint that it applies to.
        metadata: notes of whoever wrote it.
        tensors: name -> what it says of that tensor.
        arrays: the arrays in the file, ``<tensor>.<array>``.
    """

    path: Path
    values: Coding
    base_fingerprint: str
    metadata: dict[str, str]
    tensors: dict[str, PatchedTensor]
    arrays: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> "Patch":
        """Open a patch and check that all its parts are there; payloads are not read.

        Raises:
            PatchError: not a patch, of another format version, or damaged.
        """
        path = Path(path)
        try:
            arrays, notes = read_header(path)
        except CheckpointError as error:
            raise PatchError(
                f"not a readable patch: {error}; give one that `rlsparse patch make` wrote"
            ) from error
        if METADATA_KEY not in notes:
            raise PatchError(f"{path} is not a patch: no {METADATA_KEY} in its metadata")
        text = notes[METADATA_KEY]
        try:
            content = parse_json(text.encode(), unique)
            if content["version"] != FORMAT_VERSION:
                raise PatchError(
                    f"{path} is a patch of format {content['version']}, this release reads "
                    f"{FORMAT_VERSION}: write it again with this release"
                )
            if notes.get(CHECKSUM_KEY) != xxhash.xxh3_128_hexdigest(text.encode()):
                raise ValueError("another checksum")
            if content["values"] not in CODINGS:
                raise ValueError(f"values are {content['values']!r}")
            tensors = {name: PatchedTensor.of(entry) for name, entry in content["tensors"].items()}
            patch = cls(
                path, content["values"], content["base_fingerprint"], content["metadata"],
                tensors, arrays,
            )  # fmt: skip
            patch._check_header()
            for name, tensor in tensors.items():
                patch._check(name, tensor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PatchError):
                raise
            raise PatchError(f"{path} has a damaged patch header ({error!r}): {_AGAIN}") from error
        return patch

    def _check_header(self) -> None:
        strings = (self.base_fingerprint, *self.metadata.values())
        if not all(isinstance(text, str) for text in strings):
            raise ValueError("the fingerprint or a note is no text")
        changed = [name for name, tensor in self.tensors.items() if tensor.num_changed]
        expected = {f"{name}.{key}" for name in changed for key in _ARRAYS}
        if self.arrays.keys() != expected:
            raise ValueError(f"arrays {sorted(self.arrays.keys() ^ expected)[:3]}")

    def _check(self, name: str, tensor: PatchedTensor) -> None:
        width = self._num_streams(tensor)
        numbers = (*tensor.shape, tensor.num_changed, *(tensor.part or ()))
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"numbers of {name}")
        sums = (tensor.xxh3_before, tensor.xxh3_after, tensor.xxh3_table)
        if not all(isinstance(text, str) for text in sums):
            raise ValueError(f"checksums of {name}")
        start, stop = tensor.part or (0, math.prod(tensor.shape))
        if not 0 <= start <= stop <= math.prod(tensor.shape):
            raise ValueError(f"elements {start} to {stop} of {name}")
        if not 0 <= tensor.num_changed <= tensor.num_elements:
            raise ValueError(f"{tensor.num_changed} changes of {name}")
        if (tensor.num_changed == 0) != (tensor.xxh3_before == tensor.xxh3_after):
            raise ValueError(f"{tensor.num_changed} changes and the checksums of {name}")
        if not tensor.num_changed:
            return
        found = [self.arrays[f"{name}.{key}"] for key in _ARRAYS]
        kinds = [(info.dtype, len(info.shape), info.shape[1:]) for info in found]
        expected = [("u64", 2, (len(Entry._fields),)), ("u64", 2, (width,)), ("u8", 1, ())]
        if kinds != expected or found[0].shape[0] != found[1].shape[0]:
            raise ValueError(f"arrays of {name}")

    def _num_streams(self, tensor: PatchedTensor) -> int:
        return 1 + len(values.stream_bytes(self.values, ITEMSIZE[tensor.dtype], 0))

    def blocks(self, name: str) -> list[tuple[Entry, list[int]]]:
        """The table of a tensor: of each block its entry and the sizes of its streams.

        Raises:
            PatchError: it contradicts itself.
        """
        tensor = self.tensors.get(name)
        if tensor is None or not tensor.num_changed:
            return []
        try:
            columns, width = len(Entry._fields), self._num_streams(tensor)
            read = [self.arrays[f"{name}.{key}"].read() for key in ("blocks", "sizes")]
        except CheckpointError as error:
            raise PatchError(f"{self.path} is damaged at tensor {name}: {error}") from error
        if table_checksum(*read) != tensor.xxh3_table:
            raise PatchError(f"{self.path} is damaged: the table of {name} has another checksum")
        entries = [Entry(*row) for row in read[0].reshape(-1, columns).tolist()]
        sizes = read[1].reshape(-1, width).tolist()
        stops = [0, *(entry.stop for entry in entries)]
        lengths = [stop - start for start, stop in itertools.pairwise(stops)]
        if (
            stops[-1] != tensor.num_elements
            or any(not 0 < length <= MAX_BLOCK for length in lengths)
            or any(e.num_changed > n for e, n in zip(entries, lengths, strict=True))
            or any(e.position_bytes > 8 * n for e, n in zip(entries, lengths, strict=True))
            or sum(entry.num_changed for entry in entries) != tensor.num_changed
            or sum(map(sum, sizes)) != self.arrays[f"{name}.data"].num_elements
        ):
            raise PatchError(
                f"{self.path} is damaged: the table of tensor {name} contradicts itself"
            )
        return [*zip(entries, sizes, strict=True)]

    @property
    def num_changed(self) -> int:
        """Weights whose bits differ, over all tensors."""
        return sum(tensor.num_changed for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


def table_checksum(entries: Bits, sizes: Bits) -> str:
    """xxh3 (128 bits, hex) of the table of a tensor."""
    digest = xxhash.xxh3_128(entries.data)
    digest.update(sizes.data)
    return digest.hexdigest()


class Changes:
    """What a patch changes in one tensor, for pieces of it in order.

    The block that is at hand is kept decoded: some hundred kilobytes.

    Args:
        patch: the patch.
        name: a tensor; of one that the patch does not list nothing is changed.

    Raises:
        PatchError: the table of the tensor contradicts itself.
    """

    def __init__(self, patch: Patch, name: str) -> None:
        self.patch = patch
        self.name = name
        self._table = patch.blocks(name)
        self._stops = np.array([entry.stop for entry, _ in self._table], np.int64)
        ends = np.cumsum([0, *(sum(sizes) for _, sizes in self._table)]).tolist()
        self._offsets: list[int] = ends
        self._at = -1
        self._block = Block(np.empty(0, np.uint32), np.empty(0, np.uint8))

    def between(self, start: int, stop: int) -> Iterator[tuple[Positions, Bits]]:
        """Changes of the flat elements [start, stop), block by block.

        Yields:
            Positions counted from ``start`` [k], and values [k].

        Raises:
            PatchError: the patch is damaged.
        """
        assert stop - start <= MAX_BLOCK
        number = int(np.searchsorted(self._stops, start, side="right"))
        while number < len(self._table):
            begin = int(self._stops[number - 1]) if number else 0
            if begin >= stop:
                return
            block = self._decoded(number, begin)
            ends = np.clip([start - begin, stop - begin], 0, MAX_BLOCK).astype(np.uint32)
            low, high = np.searchsorted(block.positions, ends).tolist()
            if low < high:
                moved = block.positions[low:high] + np.uint32((begin - start) % 2**32)
                yield moved, block.values[low:high]
            number += 1

    def apply(self, bits: Bits, start: int) -> None:
        """Turn the bits before of the flat elements from ``start`` on into those after, in place.

        Raises:
            PatchError: the patch is damaged.
        """
        for positions, found in self.between(start, start + bits.size):
            values.apply(self.patch.values, found, positions, bits)

    def check(self) -> None:
        """Read and decode all blocks.

        Raises:
            PatchError: one is damaged.
        """
        for number in range(len(self._table)):
            self._decoded(number, int(self._stops[number - 1]) if number else 0)

    def _decoded(self, number: int, start: int) -> Block:
        if number != self._at:
            entry, sizes = self._table[number]
            dtype = self.patch.tensors[self.name].dtype
            data = self.patch.arrays[f"{self.name}.data"]
            try:
                payload = data.read(*self._offsets[number : number + 2])
                self._block = blocks.decode(
                    payload, entry, start, sizes, self.patch.values, ITEMSIZE[dtype]
                )
            except (PatchError, CheckpointError) as error:
                raise PatchError(
                    f"{self.patch.path} is damaged at tensor {self.name}: {error}"
                ) from error
            self._at = number
        return self._block
