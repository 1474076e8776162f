"""One block of a tensor: some thousand changes, encoded and compressed on their own.

A block is a stretch of a tensor, long where few weights changed. Its payload is some streams of
bytes, one after another: that of the codec, then the planes of the values, the lowest byte first.
Each is compressed by zstd unless that makes it no smaller.
"""

import itertools
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from rlsparse.errors import PatchError
from rlsparse.patch import values
from rlsparse.patch.bitmap import Bitmap
from rlsparse.patch.codec import Codec, Positions, Stream
from rlsparse.patch.gaps import Gaps
from rlsparse.patch.indices import Indices
from rlsparse.patch.values import Coding
from rlsparse.tensor_file import Bits

CodecName = Literal["indices", "bitmap", "gaps"]
Compression = Literal["zstd", "none"]

CODECS: dict[CodecName, Codec] = {"indices": Indices(), "bitmap": Bitmap(), "gaps": Gaps()}
"""A block names its codec by its place here, so that none may be taken out or moved."""

BITMAP_FROM = 3 / 16
"""Density from which ``bitmap`` is chosen over ``gaps``: from there it is smaller, and faster."""

_LEVEL = 1  # higher ones take several times as long and gain less than 2 %


class Entry(NamedTuple):
    """What the index says of a block, as one row.

    Attributes:
        stop: one past its last element; it starts where the one before stops.
        num_changed: changes in it.
        codec: place in ``CODECS``.
        position_bytes: size of the codec's stream before compression.
        checksum: xxh3 (64 bits) of the payload.
        sizes: of each stream the bytes that are stored, one after another.
    """

    stop: int
    num_changed: int
    codec: int
    position_bytes: int
    checksum: int
    sizes: tuple[int, ...]


class Block(NamedTuple):
    """A decoded block: positions of changes [k], counted from its start, and their values [k]."""

    positions: Positions
    values: Bits


def encode(
    block: Block,
    start: int,
    stop: int,
    *,
    coding: Coding,
    codec: CodecName | None,
    compression: Compression,
) -> tuple[Entry, list[Any]]:
    """Encode a block.

    Args:
        block: what changed.
        start: its first element in the tensor.
        stop: one past its last.
        coding: of its values.
        codec: that of its positions; None takes the one that suits their number.
        compression: of all streams.

    Returns:
        Its entry, and the streams.
    """
    size = stop - start
    name = codec or ("bitmap" if block.positions.size >= BITMAP_FROM * size else "gaps")
    if not block.positions.size:
        name = "gaps"  # takes no bytes then
    positions = CODECS[name].encode(block.positions, size)
    raw = (positions, *values.streams(coding, block.values))
    streams = [smaller(stream, compression) for stream in raw]
    digest = xxhash.xxh3_64()
    for stream in streams:
        digest.update(stream)
    number = list(CODECS).index(name)
    sizes = tuple(memoryview(stream).nbytes for stream in streams)
    checksum = digest.intdigest()
    return Entry(stop, block.positions.size, number, positions.size, checksum, sizes), streams


def decode(payload: Stream, entry: Entry, start: int, coding: Coding, itemsize: int) -> Block:
    """Decode a block.

    Args:
        payload: its bytes.
        entry: what the index says of it.
        start: its first element in the tensor.
        coding: of its values.
        itemsize: bytes of a value.

    Raises:
        PatchError: the bytes are not those that were written, or make no sense.
    """
    if xxhash.xxh3_64_intdigest(payload.data) != entry.checksum:
        raise PatchError("the bytes of a block have another checksum")
    if not entry.codec < len(CODECS):
        raise PatchError(f"codec {entry.codec} is unknown; known: 0 to {len(CODECS) - 1}")
    ends = np.cumsum([0, *entry.sizes]).tolist()
    stored = [payload[low:high] for low, high in itertools.pairwise(ends)]
    number, whole = entry.num_changed, entry.stop - start
    codec = [*CODECS.values()][entry.codec]
    positions = codec.decode(expanded(stored[0], entry.position_bytes), whole, number)
    lengths = values.stream_bytes(coding, itemsize, number)
    found = [expanded(*each) for each in zip(stored[1:], lengths, strict=True)]
    return Block(positions, values.of_streams(coding, found, number))


@cache
def _zstd() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", _LEVEL)


def smaller(stream: Stream, compression: Compression) -> Any:
    """A stream as it is stored: compressed, unless that makes it no smaller."""
    if compression == "none" or not stream.size:
        return stream.data
    packed = _zstd().compress(stream.data)
    return packed if packed.size < stream.size else stream.data


def expanded(stored: Stream, size: int) -> Stream:
    """The stream of ``size`` bytes that ``smaller`` stored.

    Raises:
        PatchError: there is none.
    """
    if stored.size == size:
        return stored
    if stored.size > size:
        raise PatchError(f"{stored.size} bytes stand for {size}")
    try:
        found = np.frombuffer(_zstd().decompress(stored.data, size), np.uint8)
    except OSError as error:
        raise PatchError(f"cannot be decompressed: {error}") from error
    if found.size != size:
        raise PatchError(f"{found.size} bytes were compressed, not {size}")
    return found
