"""One safetensors file: its header, the bits of its tensors, and how to write one.

The header is parsed here, so that no tensor is read before it is asked for and bf16 and fp8 need
no framework. Weights are handed out as *bits*: flat little-endian unsigned integers of the width
of the stored format.
"""

import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rlsparse.errors import CheckpointError

SINGLE_FILE = "model.safetensors"

Bits = NDArray[np.unsignedinteger[Any]]
"""Bit patterns of weights, flat: uint8, uint16, uint32 or uint64 by the width of the format."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

_FORMATS: dict[str, tuple[str, int]] = {
    "F64": ("fp64", 8), "F32": ("fp32", 4), "F16": ("fp16", 2), "BF16": ("bf16", 2),
    "F8_E4M3": ("fp8_e4m3", 1), "F8_E5M2": ("fp8_e5m2", 1), "F8_E8M0": ("fp8_e8m0", 1),
    "I64": ("i64", 8), "I32": ("i32", 4), "I16": ("i16", 2), "I8": ("i8", 1),
    "U64": ("u64", 8), "U32": ("u32", 4), "U16": ("u16", 2), "U8": ("u8", 1),
    "C64": ("c64", 8), "BOOL": ("bool", 1),
}  # fmt: skip
_TAGS = {name: tag for tag, (name, _) in _FORMATS.items()}

ITEMSIZE: dict[str, int] = dict(_FORMATS.values())
"""Bytes per element of every number format that can be read, by its short name."""


def bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger[Any]]:
    """The unsigned integer type that holds one element of format ``dtype``."""
    return np.dtype(f"<u{ITEMSIZE[dtype]}")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and how it is stored; ``offset`` is its first byte in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_elements(self) -> int:
        """Number of weights; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.num_elements * ITEMSIZE[self.dtype]

    def read(self, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of the flat elements [start, stop).

        Raises:
            CheckpointError: the range is not inside the tensor, or the file has shrunk.
        """
        stop = self.num_elements if stop is None else stop
        if not 0 <= start <= stop <= self.num_elements:
            raise CheckpointError(
                f"{self.file}: {self.name} has {self.num_elements} elements, not [{start}, {stop})"
            )
        item = bits_dtype(self.dtype)
        offset = self.offset + start * item.itemsize
        try:
            bits: Bits = np.fromfile(self.file, item, count=stop - start, offset=offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror}") from error
        if bits.size != stop - start:
            raise CheckpointError(f"{self.file} was truncated while {self.name} was read")
        return bits


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, checked against its size.

    Raises:
        CheckpointError: not a safetensors file, truncated, or tensors overlap.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or not a safetensors file")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique)
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = {name: _info(file, name, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} has a damaged safetensors header: {error!r}") from error
    ordered = sorted(tensors.values(), key=lambda info: (info.offset, info.size_bytes))
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.size_bytes > right.offset:
            raise CheckpointError(f"{file} is damaged: {left.name} and {right.name} overlap")
    end = ordered[-1].offset + ordered[-1].size_bytes if ordered else 0
    if end > size:
        raise CheckpointError(f"{file} is truncated: {size} bytes, its tensors end at {end}")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)


def _info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    tag, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if tag not in _FORMATS:
        raise CheckpointError(
            f"{file}: tensor {name} has the number format {tag}; known: {', '.join(_FORMATS)}"
        )
    info = TensorInfo(name, _FORMATS[tag][0], shape, file, data_start + begin)
    is_sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not is_sound or end - begin != info.size_bytes:
        raise ValueError(f"entry {entry} of tensor {name}")
    return info


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary stream that becomes ``path`` only if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def header_bytes(
    entries: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """Start of a safetensors file whose tensors (name, dtype, shape) follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * ITEMSIZE[dtype]
        span, offset = [offset, end], end
        header[name] = {"dtype": _TAGS[dtype], "shape": list(shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int], Bits | Iterator[Bits]]],
    metadata: Mapping[str, str] | None = None,
    extra_files_from: Path | None = None,
) -> None:
    """Write folder ``path`` with ``model.safetensors``, atomically.

    Args:
        path: the folder, made if need be.
        tensors: name -> (dtype, shape, flat bits, or an iterator over consecutive pieces of them,
            run when the tensor is written).
        metadata: safetensors metadata.
        extra_files_from: folder whose configuration and tokenizer files are copied along.

    Raises:
        CheckpointError: the bits of a tensor do not have the size of its shape.
    """
    path.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name][0]], name))
    with atomic_write(path / SINGLE_FILE) as stream:
        entries = [(name, *tensors[name][:2]) for name in names]
        stream.write(header_bytes(entries, metadata or {"format": "pt"}))
        for name, dtype, shape in entries:
            bits = tensors[name][2]
            size = 0
            for piece in (bits,) if isinstance(bits, np.ndarray) else bits:
                size += stream.write(np.ascontiguousarray(piece, bits_dtype(dtype)).data)
            if size != math.prod(shape) * ITEMSIZE[dtype]:
                raise CheckpointError(f"{size} bytes given for {name}, {dtype} {list(shape)}")
        for file in sorted(extra_files_from.iterdir()) if extra_files_from else ():
            is_text = file.suffix in {".json", ".txt", ".model", ".jinja", ".tiktoken"}
            if is_text and file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, path / file.name)
