"""Bit-packed masks of weights: set algebra and mask files.

Packed means little-endian: bit i of byte j is flat element 8 j + i. Bits beyond the last element
are zero, in every result.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlsparse.errors import CheckpointError
from rlsparse.files import RemoteFile, locate
from rlsparse.kernels import popcount
from rlsparse.tensor_file import TensorInfo, atomic_write, header_bytes, read_header

Packed = NDArray[np.uint8]

Bits = dict[str, tuple[tuple[int, ...], Packed]]
"""A mask of a model: weight tensor -> (its shape, its packed mask)."""

FORMAT_VERSION = "2"
METADATA_KEY = "rlsparse_mask"
CHECKSUM_KEY = "rlsparse_mask_checksum"
"""Of what is at ``METADATA_KEY``, which holds those of the masks."""

_AGAIN = "make it again"


def num_bytes(num_elements: int) -> int:
    """Bytes of a packed mask."""
    return -(-num_elements // 8)


def pack(mask: NDArray[np.bool_]) -> Packed:
    """Pack a boolean array of any shape, in C order."""
    return np.packbits(mask, axis=None, bitorder="little")


def unpack(packed: Packed, num_elements: int) -> NDArray[np.bool_]:
    """The flat boolean array of a packed mask, shape [num_elements]."""
    check(packed, num_elements)
    return np.unpackbits(packed, count=num_elements, bitorder="little").view(np.bool_)


def union(left: Packed, right: Packed) -> Packed:
    """Elements in either mask."""
    return np.bitwise_or(left, _alike(left, right))


def intersection(left: Packed, right: Packed) -> Packed:
    """Elements in both masks."""
    return np.bitwise_and(left, _alike(left, right))


def complement(packed: Packed, num_elements: int) -> Packed:
    """Elements not in the mask."""
    check(packed, num_elements)
    inverted = np.invert(packed)
    if num_elements % 8:
        inverted[-1] &= _tail_bits(num_elements)
    return inverted


def density(packed: Packed, num_elements: int) -> float:
    """Fraction of elements in the mask; NaN for an empty tensor."""
    check(packed, num_elements)
    return popcount(packed) / num_elements if num_elements else math.nan


def check(packed: Packed, num_elements: int) -> None:
    """Raise CheckpointError unless ``packed`` is a well-formed mask of ``num_elements``."""
    if packed.dtype != np.uint8 or packed.shape != (num_bytes(num_elements),):
        raise CheckpointError(
            f"a packed mask of {num_elements} elements is uint8[{num_bytes(num_elements)}], got "
            f"{packed.dtype}{list(packed.shape)}"
        )
    if num_elements % 8 and packed[-1] & ~_tail_bits(num_elements):
        raise CheckpointError(f"packed mask has bits beyond its {num_elements} elements")


def _alike(left: Packed, right: Packed) -> Packed:
    if left.shape != right.shape:
        raise CheckpointError(
            f"masks of different tensors: {left.size} and {right.size} bytes; combine masks of "
            "one base only"
        )
    return right


def _tail_bits(num_elements: int) -> np.uint8:
    return np.uint8((1 << num_elements % 8) - 1)


class Mask(Protocol):
    """Which weights of a model are in it, asked for tensor by tensor."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Weight tensor -> its shape."""

    @property
    def base_fingerprint(self) -> str:
        """Of the checkpoint whose weights it selects; empty if it is of several."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What it is, and of what it was made."""

    def packed(self, name: str) -> Packed:
        """The packed mask of a weight tensor."""


def bits_of(mask: Mask) -> Bits:
    """All of a mask.

    Raises:
        CheckpointError: of a mask file, the mask of a tensor is damaged.
    """
    return {name: (mask.shapes[name], mask.packed(name)) for name in sorted(mask.shapes)}


def fingerprint(bits: Mapping[str, tuple[Sequence[int], Packed]]) -> str:
    """sha256 (hex) over names, shapes and packed masks of tensors, in order of name."""
    digest = hashlib.sha256()
    for name, (shape, packed) in sorted(bits.items()):
        digest.update(json.dumps([name, list(shape)]).encode() + b"\n")
        digest.update(np.ascontiguousarray(packed).data)
    return digest.hexdigest()


# --- mask files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskFile:
    """An opened mask file; masks are read when asked for.

    Attributes:
        path: the file, or its URL.
        shapes: weight tensor -> its shape, sorted by name.
        base_fingerprint: of the checkpoint whose weights the masks select.
        metadata: notes of whoever wrote it.
        tensors: weight tensor -> where its packed mask lies.
        checksums: weight tensor -> xxh3 of 128 bits (hex) of its packed mask.
    """

    path: Path | str
    shapes: dict[str, tuple[int, ...]]
    base_fingerprint: str
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    checksums: dict[str, str]

    def packed(self, name: str) -> Packed:
        """The packed mask of weight tensor ``name``.

        Raises:
            CheckpointError: it has another checksum than when it was written, or bits beyond the
                last element.
        """
        mask = self.tensors[name].read().view(np.uint8)
        if _checksum(mask.data) != self.checksums[name]:
            raise CheckpointError(
                f"{self.path} is damaged: the mask of {name} has another checksum; {_AGAIN}"
            )
        check(mask, math.prod(self.shapes[name]))
        return mask


def write_masks(
    path: Path,
    masks: Mapping[str, tuple[Sequence[int], Packed]],
    base_fingerprint: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a mask file, atomically: a safetensors file with one U8 tensor per weight tensor.

    Args:
        path: file to write, by convention ``*.mask.safetensors``.
        masks: weight tensor -> (its shape, its packed mask).
        base_fingerprint: ``checkpoint.fingerprint`` of the base.
        metadata: further notes.

    Raises:
        CheckpointError: a mask does not fit its shape.
    """
    packed = (masks[name][1] for name in sorted(masks))
    shapes = {name: tuple(shape) for name, (shape, _) in masks.items()}
    write_stream(path, shapes, packed, base_fingerprint, metadata)


def write_stream(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Iterable[Packed],
    base_fingerprint: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """``write_masks`` with one mask in memory at a time.

    Args:
        path: likewise.
        shapes: weight tensor -> its shape.
        packed: their masks, in order of name; an error that it raises leaves no file.
        base_fingerprint: likewise.
        metadata: likewise.

    Raises:
        CheckpointError: a mask does not fit its shape.
    """
    sizes = {name: math.prod(shape) for name, shape in sorted(shapes.items())}
    content = {
        "version": FORMAT_VERSION,
        "base_fingerprint": base_fingerprint,
        "metadata": dict(metadata or {}),
        "shapes": {name: list(shapes[name]) for name in sizes},
    }
    checksums = dict.fromkeys(sizes, _checksum(b""))  # of the right length until they are known
    with atomic_write(path) as stream:
        stream.write(_header(sizes, content, checksums))
        for (name, size), mask in zip(sizes.items(), packed, strict=True):
            check(mask, size)
            written = np.ascontiguousarray(mask)
            checksums[name] = _checksum(written.data)
            stream.write(written.data)
        stream.seek(0)
        stream.write(_header(sizes, content, checksums))


def _header(
    sizes: Mapping[str, int], content: Mapping[str, Any], checksums: Mapping[str, str]
) -> bytes:
    """Start of a mask file; as long for any checksums."""
    text = json.dumps({**content, "checksums": checksums}, sort_keys=True, separators=(",", ":"))
    entries = [(name, "u8", (num_bytes(size),)) for name, size in sizes.items()]
    return header_bytes(entries, {METADATA_KEY: text, CHECKSUM_KEY: _checksum(text.encode())})


def _checksum(content: memoryview | bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def read_masks(path: str | Path) -> MaskFile:
    """Open a mask file, by its path or its fsspec URL.

    Raises:
        CheckpointError: not a mask file, of another format version, or damaged.
    """
    file = locate(path) if isinstance(path, str) and "://" in path else Path(path)
    if not isinstance(file, Path | RemoteFile):
        raise CheckpointError(f"{path} is a folder; give a mask file")
    path = file if isinstance(file, Path) else str(file)
    tensors, notes = read_header(file)
    content = _content(path, notes)
    try:
        shapes = {name: tuple(shape) for name, shape in sorted(content["shapes"].items())}
        expected = {name: ("u8", (num_bytes(math.prod(s)),)) for name, s in shapes.items()}
        own, metadata, checksums = (
            content[key] for key in ("base_fingerprint", "metadata", "checksums")
        )
        fits = checksums.keys() == shapes.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged mask header ({error!r}): {_AGAIN}") from error
    if not fits or expected != {name: (info.dtype, info.shape) for name, info in tensors.items()}:
        raise CheckpointError(
            f"{path} is damaged: its masks do not fit the shapes it lists; {_AGAIN}"
        )
    return MaskFile(path, shapes, own, metadata, tensors, checksums)


def _content(path: Path | str, notes: Mapping[str, str]) -> dict[str, Any]:
    """What a mask file says of itself, by its safetensors metadata."""
    if METADATA_KEY not in notes:
        raise CheckpointError(f"{path} is not a mask file: no {METADATA_KEY} in its metadata")
    text = notes[METADATA_KEY]
    try:
        content: dict[str, Any] = json.loads(text)
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged mask header ({error!r}): {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a mask file of format {version}, this release reads {FORMAT_VERSION}: "
            f"{_AGAIN}"
        )
    if notes.get(CHECKSUM_KEY) != _checksum(text.encode()):
        raise CheckpointError(
            f"{path} has a damaged mask header (another checksum than it says): {_AGAIN}"
        )
    return content
