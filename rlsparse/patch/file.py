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
from rlsparse.tensor_file import (
    ITEMSIZE,
    Bits,
    TensorInfo,
    check_name,
    parse_json,
    read_header,
    unique,
)

FORMAT_VERSION = "3"
METADATA_KEY = "rlsparse_patch"
CHECKSUM_KEY = "rlsparse_patch_checksum"
"""xxh3 (128 bits, hex) of what is at ``METADATA_KEY``, which has that of the index."""
PATCH_FILE = "weights.patch.safetensors"

_AGAIN = "write it again"
MAX_BLOCK = 2**31
"""Elements of a block, so that positions fit 32 bits."""
MAX_INDEX = 2**31
"""Bytes of an index, so that a damaged header cannot ask for all memory."""


@dataclass(frozen=True)
class PatchedTensor:
    """What a patch says of one tensor.

    Attributes:
        dtype: short name of its number format, before (cast, if need be) and after.
        shape: of the tensor.
        num_changed: elements whose bits differ.
        xxh3_before: xxh3 (128 bits, hex) of all its bytes before.
        xxh3_after: likewise after.
        blocks: what it is cut into, in order; none if nothing changed.
        part: the flat elements [start, stop) of which alone all this is said, if the patch is of a
            worker that holds no more; blocks count from its start. None: all.
    """

    dtype: str
    shape: tuple[int, ...]
    num_changed: int
    xxh3_before: str
    xxh3_after: str
    blocks: tuple[Entry, ...] = ()
    part: tuple[int, int] | None = None

    @property
    def num_elements(self) -> int:
        """Elements of which the patch says whether they changed."""
        start, stop = self.part or (0, math.prod(self.shape))
        return stop - start

    @property
    def data_bytes(self) -> int:
        """Bytes that its blocks take."""
        return sum(sum(block.sizes) for block in self.blocks)

    def entry(self) -> dict[str, Any]:
        """As the index has it: without ``part`` where that is all."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "PatchedTensor":
        """The way back."""
        blocks = tuple(Entry._make([*row, tuple(sizes)]) for *row, sizes in entry["blocks"])
        sequences: dict[str, Any] = {
            key: tuple(entry[key]) for key in ("shape", "part") if key in entry
        }
        return cls(**{**entry, **sequences, "blocks": blocks})

    def check(self, num_streams: int) -> None:
        """Raise ValueError if what is said contradicts itself."""
        if not all(type(number) is int and number >= 0 for number in self._numbers()):
            raise ValueError("numbers")
        if not isinstance(self.xxh3_before, str) or not isinstance(self.xxh3_after, str):
            raise ValueError("checksums")
        start, stop = self.part or (0, math.prod(self.shape))
        if not 0 <= start <= stop <= math.prod(self.shape):
            raise ValueError(f"elements {start} to {stop}")
        if not 0 <= self.num_changed <= self.num_elements:
            raise ValueError(f"{self.num_changed} changes")
        if (self.num_changed == 0) != (self.xxh3_before == self.xxh3_after):
            raise ValueError(f"{self.num_changed} changes and the checksums")
        stops = [0, *(block.stop for block in self.blocks)]
        lengths = [stop - start for start, stop in itertools.pairwise(stops)]
        if (
            stops[-1] != (self.num_elements if self.num_changed else 0)
            or any(not 0 < length <= MAX_BLOCK for length in lengths)
            or any(b.num_changed > n for b, n in zip(self.blocks, lengths, strict=True))
            or any(b.position_bytes > 8 * n for b, n in zip(self.blocks, lengths, strict=True))
            or any(len(block.sizes) != num_streams for block in self.blocks)
            or sum(block.num_changed for block in self.blocks) != self.num_changed
        ):
            raise ValueError("blocks")

    def _numbers(self) -> Iterator[Any]:
        yield from (*self.shape, self.num_changed, *(self.part or ()))
        for block in self.blocks:
            yield from (*block[:-1], *block.sizes)


@dataclass(frozen=True)
class Patch:
    """An opened patch; holds no file handle, so it pickles and needs no closing.

    Attributes:
        path: the file.
        values: how values are coded.
        base_fingerprint: ``checkpoint.fingerprint`` of the checkpoint that it applies to.
        metadata: notes of whoever wrote it.
        tensors: name -> what it says of that tensor.
        data: name -> where the blocks of that tensor lie, one after another.
    """

    path: Path
    values: Coding
    base_fingerprint: str
    metadata: dict[str, str]
    tensors: dict[str, PatchedTensor]
    data: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> "Patch":
        """Open a patch and check what it says of itself; the blocks are not read.

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
            if content["version"] == FORMAT_VERSION:
                if notes.get(CHECKSUM_KEY) != xxhash.xxh3_128_hexdigest(text.encode()):
                    raise ValueError("another checksum")
                return cls._of(path, arrays, content)
            version = content["version"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PatchError(f"{path} has a damaged patch header ({error!r}): {_AGAIN}") from error
        raise PatchError(
            f"{path} is a patch of format {version}, this release reads {FORMAT_VERSION}: write "
            "it again with this release"
        )

    @classmethod
    def _of(cls, path: Path, arrays: dict[str, TensorInfo], content: dict[str, Any]) -> "Patch":
        patch = cls(
            path, content["values"], content["base_fingerprint"], content["metadata"],
            *_read_index(arrays, content),
        )  # fmt: skip
        strings = (patch.base_fingerprint, *patch.metadata.values())
        if not all(isinstance(text, str) for text in strings):
            raise ValueError("the fingerprint or a note is no text")
        return patch

    @property
    def num_changed(self) -> int:
        """Weights whose bits differ, over all tensors."""
        return sum(tensor.num_changed for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


def _read_index(
    arrays: dict[str, TensorInfo], content: dict[str, Any]
) -> tuple[dict[str, PatchedTensor], dict[str, TensorInfo]]:
    """What the index says of each tensor, and where its blocks are."""
    said, coding = content["index"], content["values"]
    if coding not in CODINGS:
        raise ValueError(f"values are {coding!r}")
    kinds = {name: (info.dtype, len(info.shape)) for name, info in arrays.items()}
    if kinds != {"index": ("u8", 1), "data": ("u8", 1)}:
        raise ValueError(f"arrays {kinds}")
    if type(said["size_bytes"]) is not int or not 0 <= said["size_bytes"] <= MAX_INDEX:
        raise ValueError(f"an index of {said['size_bytes']} bytes")
    stored = arrays["index"].read()
    if xxhash.xxh3_128_hexdigest(stored.data) != said["xxh3"]:
        raise ValueError("another checksum of the index")
    text = blocks.expanded(stored, said["size_bytes"]).tobytes()
    tensors: dict[str, PatchedTensor] = {}
    data, offset = {}, 0
    for row in parse_json(text, unique)["tensors"]:
        name = check_name(arrays["index"].file, row.pop("name"))
        if name in tensors:
            raise ValueError(f"{name} comes twice")
        one = PatchedTensor.of(row)
        try:
            one.check(1 + len(values.stream_bytes(coding, ITEMSIZE[one.dtype], 0)))
        except ValueError as error:
            raise ValueError(f"{error} of {name}") from error
        tensors[name] = one
        place = arrays["data"].offset + offset
        data[name] = TensorInfo(name, "u8", (one.data_bytes,), arrays["data"].file, place)
        offset += one.data_bytes
    if offset != arrays["data"].num_elements:
        raise ValueError(f"{arrays['data'].num_elements} bytes of data, {offset} in blocks")
    return tensors, data


class Changes:
    """What a patch changes in one tensor, for pieces of it in order.

    The block that is at hand is kept decoded: some hundred kilobytes.

    Args:
        patch: the patch.
        name: a tensor; of one that the patch does not list nothing is changed.
    """

    def __init__(self, patch: Patch, name: str) -> None:
        self.patch = patch
        self.name = name
        self._blocks = patch.tensors[name].blocks if name in patch.tensors else ()
        self._stops = np.array([block.stop for block in self._blocks], np.int64)
        ends = np.cumsum([0, *(sum(block.sizes) for block in self._blocks)]).tolist()
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
        while number < len(self._blocks):
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
        for number in range(len(self._blocks)):
            self._decoded(number, int(self._stops[number - 1]) if number else 0)

    def _decoded(self, number: int, start: int) -> Block:
        if number != self._at:
            dtype = self.patch.tensors[self.name].dtype
            try:
                payload = self.patch.data[self.name].read(*self._offsets[number : number + 2])
                self._block = blocks.decode(
                    payload, self._blocks[number], start, self.patch.values, ITEMSIZE[dtype]
                )
            except (PatchError, CheckpointError) as error:
                raise PatchError(
                    f"{self.patch.path} is damaged at tensor {self.name}: {error}"
                ) from error
            self._at = number
        return self._block
