"""Writes patches: compares tensors piece by piece and encodes what changed, block by block."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash

from rlsparse.errors import PatchError
from rlsparse.kernels import FLOATS, cast_bits
from rlsparse.kernels.compare import compare, set_bits
from rlsparse.patch import blocks, values
from rlsparse.patch.blocks import Block, CodecName, Compression, Entry
from rlsparse.patch.codec import Positions
from rlsparse.patch.file import (
    CHECKSUM_KEY,
    FORMAT_VERSION,
    MAX_BLOCK,
    METADATA_KEY,
    Patch,
    PatchedTensor,
)
from rlsparse.patch.values import Coding
from rlsparse.tensor_file import Bits, TensorInfo, atomic_write, bits_dtype, header_bytes

PIECE = 2**18  # elements; both sides of bf16 stay in a core's cache
BLOCK_CHANGES = 2**16
"""Changes from which a block is closed: more compress no better, and one needs all decoded."""


class TensorPair(NamedTuple):
    """One tensor before and after: flat bits of equal length, in format ``dtype``.

    Either side may be a stored tensor, which is then read piece by piece, cast to that format.
    """

    name: str
    dtype: str
    shape: Sequence[int]
    before_bits: Bits | TensorInfo
    after_bits: Bits | TensorInfo


def write_patch(
    path: Path,
    pairs: Iterable[TensorPair],
    *,
    base_fingerprint: str,
    metadata: Mapping[str, str] | None = None,
    coding: Coding = "relative",
    codec: CodecName | None = None,
    compression: Compression = "zstd",
) -> Patch:
    """Write a patch, atomically, and open it; the same input gives the same bytes.

    Args:
        path: file to write, by convention ``*.patch.safetensors``.
        pairs: every tensor of the model, changed or not; taken one at a time.
        base_fingerprint: ``checkpoint.fingerprint`` of the base on disk.
        metadata: further notes, kept as ``Patch.metadata``.
        coding: of the values.
        codec: of the positions; None takes for each block the one that suits its density.
        compression: of everything.

    Raises:
        PatchError: bits do not fit their shape or format, or a name comes twice.
    """
    with new_patch(
        path, base_fingerprint=base_fingerprint, metadata=metadata,
        coding=coding, codec=codec, compression=compression,
    ) as builder:  # fmt: skip
        for pair in pairs:
            tensor = builder.tensor(pair.name, pair.dtype, pair.shape)
            _check(pair)
            sides = (_pieces(side, pair.dtype) for side in pair[3:])
            for before, after in zip(*sides, strict=True):
                tensor.compare(before, after)
            tensor.close()
    return Patch.open(path)


def _check(pair: TensorPair) -> None:
    expected = bits_dtype(pair.dtype), (math.prod(pair.shape),)
    found = [_kind(side, pair.dtype) for side in (pair.before_bits, pair.after_bits)]
    if found != [expected, expected]:
        said = " and ".join(f"{item}{list(shape)}" for item, shape in found)
        raise PatchError(
            f"tensor {pair.name}: {pair.dtype} {list(pair.shape)} needs flat {expected[0]} bits of "
            f"shape {list(expected[1])} on both sides, got {said}"
        )


def _kind(side: Bits | TensorInfo, dtype: str) -> tuple[Any, tuple[int, ...]]:
    if isinstance(side, TensorInfo):
        is_cast = {side.dtype, dtype} <= FLOATS.keys()
        return bits_dtype(dtype if is_cast else side.dtype), (side.num_elements,)
    return side.dtype, side.shape


def _pieces(side: Bits | TensorInfo, dtype: str) -> Iterator[Bits]:
    if isinstance(side, TensorInfo):
        yield from cast_pieces(side, dtype)
        return
    for start in range(0, side.size, PIECE):
        yield np.ascontiguousarray(side[start : start + PIECE])


def cast_pieces(info: TensorInfo, dtype: str) -> Iterator[Bits]:
    """Pieces of a stored tensor in order, cast to ``dtype``; each is valid until the next."""
    buffer = np.empty(PIECE, bits_dtype(info.dtype))
    for piece in info.pieces(0, info.num_elements, buffer):
        yield cast_bits(piece, info.dtype, dtype)


@contextmanager
def new_patch(
    path: Path,
    *,
    base_fingerprint: str,
    metadata: Mapping[str, str] | None = None,
    coding: Coding = "relative",
    codec: CodecName | None = None,
    compression: Compression = "zstd",
) -> Iterator["PatchBuilder"]:
    """What builds a patch tensor by tensor; it is written, atomically, where the block ends well.

    What is encoded waits in an unnamed file beside it. The arguments are those of ``write_patch``.
    """
    notes = {"base_fingerprint": base_fingerprint, "metadata": dict(metadata or {})}
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        builder = PatchBuilder(path, spool, notes, coding, codec, compression)
        yield builder
        builder.write()


class PatchBuilder:
    """See ``new_patch``."""

    def __init__(
        self,
        path: Path,
        spool: IO[bytes],
        notes: dict[str, Any],
        coding: Coding,
        codec: CodecName | None,
        compression: Compression,
    ) -> None:
        self.path = path
        self.spool = spool
        self.coding = coding
        self.codec = codec
        self.compression = compression
        self._notes = notes
        self._tensors: dict[str, TensorBuilder] = {}

    def tensor(
        self, name: str, dtype: str, shape: Sequence[int], part: tuple[int, int] | None = None
    ) -> "TensorBuilder":
        """Begin a tensor, or a part of one; the one before must be closed.

        Args:
            name: of the tensor.
            dtype: short name of its format.
            shape: of the whole tensor.
            part: the flat elements [start, stop) that will be added; None adds all.

        Raises:
            PatchError: it was given before.
        """
        if name in self._tensors:
            raise PatchError(f"cannot write {self.path}: tensor {name} is given twice")
        self._tensors[name] = TensorBuilder(self, name, dtype, shape, part)
        return self._tensors[name]

    def write(self) -> None:
        """Write the file from what the closed tensors gave."""
        rows = [{"name": name, **one.summary().entry()} for name, one in self._tensors.items()]
        text = json.dumps({"tensors": rows}, separators=(",", ":")).encode()
        index = blocks.smaller(np.frombuffer(text, np.uint8), self.compression)
        said = {
            "version": FORMAT_VERSION,
            "values": self.coding,
            **self._notes,
            "index": {"size_bytes": len(text), "xxh3": xxhash.xxh3_128_hexdigest(index)},
        }
        header = json.dumps(said, sort_keys=True, separators=(",", ":"))
        notes = {METADATA_KEY: header, CHECKSUM_KEY: xxhash.xxh3_128_hexdigest(header.encode())}
        sizes = {"index": memoryview(index).nbytes, "data": self.spool.tell()}
        entries = [(name, "u8", (size,)) for name, size in sizes.items()]
        self.spool.seek(0)
        with atomic_write(self.path) as stream:
            stream.write(header_bytes(entries, notes))
            stream.write(index)
            shutil.copyfileobj(self.spool, stream, 2**20)


class TensorBuilder:
    """Encodes one tensor from pieces in order; see ``PatchBuilder.tensor``."""

    def __init__(
        self,
        patch: PatchBuilder,
        name: str,
        dtype: str,
        shape: Sequence[int],
        part: tuple[int, int] | None,
    ) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self._patch = patch
        self._dtype, self._shape, self._part = dtype, tuple(shape), part
        self._checksums = ("", "")
        self._hashes = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._begun = self._at = self._waiting = 0
        self._parts: list[Block] = []

    def compare(self, before: Bits, after: Bits) -> None:
        """Add the next elements, of both sides; at most ``MAX_BLOCK`` at a time."""
        words = np.empty(-(-before.size // 64), np.uint64)
        num_changed = compare(before, after, words)
        self.add(before, after, set_bits(words, num_changed))

    def add(self, before: Bits, after: Bits, positions: Positions) -> None:
        """``compare``, where it is known at which positions [k] the sides differ."""
        for digest, bits in zip(self._hashes, (before, after), strict=True):
            digest.update(bits.data)
        if self._at + before.size - self._begun > MAX_BLOCK:
            self._flush()
        found = values.find(self._patch.coding, before, after, positions)
        self._parts.append(Block(positions + np.uint32(self._at - self._begun), found))
        self._at += before.size
        self._waiting += positions.size
        if self._waiting >= BLOCK_CHANGES:
            self._flush()

    def close(self, checksums: tuple[str, str] | None = None) -> None:
        """Encode what is left.

        Args:
            checksums: of the tensor before and after, where what was added has only the same
                changes and not the same bits.
        """
        self._flush()
        before, after = (digest.hexdigest() for digest in self._hashes)
        self._checksums = checksums or (before, after)

    def _flush(self) -> None:
        if self._at == self._begun:
            return
        block = Block(*(np.concatenate(part) for part in zip(*self._parts, strict=True)))
        entry, streams = blocks.encode(
            block, self._begun, self._at, coding=self._patch.coding, codec=self._patch.codec,
            compression=self._patch.compression,
        )  # fmt: skip
        for stream in streams:
            self._patch.spool.write(stream)
        self.entries.append(entry)
        self._parts.clear()
        self._begun, self._waiting = self._at, 0

    def summary(self) -> PatchedTensor:
        """What the index says of the tensor."""
        entries = tuple(self.entries) if self.num_changed else ()
        return PatchedTensor(
            self._dtype, self._shape, self.num_changed, *self._checksums, entries, self._part
        )

    @property
    def num_changed(self) -> int:
        """Changes in all blocks so far."""
        return sum(entry.num_changed for entry in self.entries)
