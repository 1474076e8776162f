"""One safetensors file: its header, the bits of its tensors, and how to write one.

The header is parsed here, so that no tensor is read before it is asked for and bf16 and fp8 need
no framework. Weights are handed out as *bits*: flat little-endian unsigned integers of the width
of the stored format.
"""

import io
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rlsparse.errors import CheckpointError
from rlsparse.files import File, fill, opened

SINGLE_FILE = "model.safetensors"

Bits = NDArray[np.unsignedinteger[Any]]
"""Bit patterns of weights, flat: uint8, uint16, uint32 or uint64 by the width of the format."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_HEAD_BYTES = 2**16  # holds the header of most files: one request where a file is remote
_AGAIN = "download or save it again"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_FORMATS: dict[str, tuple[str, int]] = {
    "F64": ("fp64", 8), "F32": ("fp32", 4), "F16": ("fp16", 2), "BF16": ("bf16", 2),
    "F8_E4M3": ("fp8_e4m3", 1), "F8_E5M2": ("fp8_e5m2", 1), "F8_E8M0": ("fp8_e8m0", 1),
    "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 1),
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
    """Where one tensor lies and how it is stored; ``offset`` is its first byte in ``file``.

    Holds no file handle, so it pickles, and several threads may read at once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: File
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
        """Bits of the flat elements [start, stop), in an array of their own.

        Raises:
            CheckpointError: the range is not inside the tensor, or the file has shrunk.
        """
        stop = self.num_elements if stop is None else stop
        bits: Bits = np.empty(max(stop - start, 0), bits_dtype(self.dtype))
        for _ in self.pieces(start, stop, bits):
            pass
        return bits

    def pieces(self, start: int, stop: int, buffer: Bits) -> Iterator[Bits]:
        """Bits of the flat elements [start, stop) in order, in one buffer filled again and again.

        The file is opened once, and read unbuffered and without the GIL. A piece is valid until
        the next one is asked for.

        Args:
            start: first element.
            stop: one past the last element.
            buffer: shape [n], contiguous, of the type ``bits_dtype(dtype)``; any n > 0.

        Yields:
            Views ``buffer[:k]``: k = n, but for the last.

        Raises:
            CheckpointError: the range is not inside the tensor, the buffer is of another type or
                empty, or the file has shrunk.
        """
        if not 0 <= start <= stop <= self.num_elements:
            raise CheckpointError(
                f"{self.file}: {self.name} has {self.num_elements} elements, not [{start}, {stop})"
            )
        item = bits_dtype(self.dtype)
        if buffer.dtype != item or (start < stop and not buffer.size):
            raise CheckpointError(
                f"{self.name} needs a buffer of {item}, not {buffer.dtype}{list(buffer.shape)}"
            )
        return self._filled(start, stop, buffer)

    def _filled(self, start: int, stop: int, buffer: Bits) -> Iterator[Bits]:
        if start == stop:
            return
        with opened(self.file) as stream:
            stream.seek(self.offset + start * buffer.itemsize)
            for position in range(start, stop, buffer.size):
                piece = buffer[: stop - position]
                fill(stream, piece.data.cast("B"), self.file)
                yield piece


def read_header(file: File) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, checked against its size.

    As strict as the safetensors library: tensors follow each other without holes or overlaps and
    end where the file ends. Stricter, with a stated reason: a name given twice, and names with
    control characters.

    Raises:
        CheckpointError: not a safetensors file, truncated, or damaged.
    """
    with opened(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        head = bytearray(min(size, _HEAD_BYTES))
        fill(stream, memoryview(head), file)
        length = int.from_bytes(head[:8], "little")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} stands for a file that is not here yet: `git lfs pull`")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {_AGAIN}")
        text = bytearray(length)
        text[: len(head) - 8] = head[8 : 8 + length]
        if 8 + length > len(head):
            fill(stream, memoryview(text)[len(head) - 8 :], file)
    try:
        header = parse_json(bytes(text), unique)
        metadata = header.pop("__metadata__", None)
        notes = {} if metadata is None else dict(metadata.items())
        if not all(isinstance(value, str) for value in notes.values()):
            raise ValueError("metadata are not all strings")
        "".join((*notes, *notes.values())).encode()  # raises on lone surrogates
        tensors = {name: _info(file, name, entry, 8 + length) for name, entry in header.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"[:200]
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({reason}): {_AGAIN}"
        ) from error
    _check_places(file, tensors, 8 + length, size)
    return tensors, notes


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of ``parse_json`` in which no name may be given twice.

    Raises:
        ValueError: one is.
    """
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)


def parse_json(
    text: bytes, mapping: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict
) -> dict[str, Any]:
    """A JSON mapping; ``mapping`` makes one, at every depth, of its pairs.

    Raises:
        ValueError: anything else, also nesting too deep to read.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=mapping)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON mapping")
    return content


def check_name(file: File, name: object) -> str:
    """The name of a tensor, if it can be printed and written.

    Raises:
        CheckpointError: no string, or one with control characters or lone surrogates.
    """
    if not isinstance(name, str) or _UNPRINTABLE.search(name):
        raise CheckpointError(
            f"{file}: a tensor is called {ascii(name)[:200]}; names are text without control "
            "characters: rename it and save it again"
        )
    return name


def _check_places(file: File, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    ordered = sorted(tensors.values(), key=lambda info: (info.offset, info.size_bytes))
    before = "the header"
    for info in ordered:
        if info.offset != start:
            how = "overlap" if info.offset < start else "have a hole between them"
            raise CheckpointError(f"{file} is damaged: {before} and {info.name} {how}: {_AGAIN}")
        start, before = info.offset + info.size_bytes, info.name
    if start != size:
        what = "truncated" if start > size else "damaged"
        raise CheckpointError(
            f"{file} is {what}: {size} bytes, its tensors end at {start}: {_AGAIN}"
        )


def _info(file: File, name: str, entry: Any, data_start: int) -> TensorInfo:
    tag, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    check_name(file, name)
    if not isinstance(tag, str) or tag not in _FORMATS:
        raise CheckpointError(
            f"{file}: tensor {name} has the number format {ascii(tag)[:40]}; known: "
            f"{', '.join(_FORMATS)}; save it in one of these"
        )
    sizes = (*shape, begin, end)
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"shape or offsets of tensor {name}")
    info = TensorInfo(name, _FORMATS[tag][0], tuple(shape), file, data_start + begin)
    if end - begin != info.size_bytes:
        raise ValueError(f"tensor {name} of {info.size_bytes} bytes lies in {end - begin}")
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


Tensors = Mapping[str, tuple[str, Sequence[int], Bits | Iterable[Bits]]]
"""Name -> (dtype, shape, flat bits, or consecutive pieces of them, made when the tensor is
written)."""


def save_checkpoint(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    extra_files_from: Path | None = None,
) -> None:
    """Write folder ``path`` with ``model.safetensors``, atomically.

    Args:
        path: the folder, made if need be.
        tensors: what is in it.
        metadata: safetensors metadata.
        extra_files_from: folder whose configuration and tokenizer files are copied along.

    Raises:
        CheckpointError: the bits of a tensor do not have the size of its shape.
    """
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(path / SINGLE_FILE, tensors, metadata or {"format": "pt"})
        if extra_files_from:
            copy_settings(extra_files_from, path)
    except BaseException:
        with suppress(OSError):
            if is_new:
                path.rmdir()
        raise


def write_tensors(file: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, atomically; wide formats come first, each by name.

    Raises:
        CheckpointError: as ``save_checkpoint``.
    """
    names = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name][0]], name))
    with atomic_write(file) as stream:
        entries = [(name, *tensors[name][:2]) for name in names]
        stream.write(header_bytes(entries, metadata))
        for name, dtype, shape in entries:
            bits = tensors[name][2]
            size = 0
            for piece in (bits,) if isinstance(bits, np.ndarray) else bits:
                size += stream.write(np.ascontiguousarray(piece, bits_dtype(dtype)).data)
            if size != math.prod(shape) * ITEMSIZE[dtype]:
                raise CheckpointError(f"{size} bytes given for {name}, {dtype} {list(shape)}")


def copy_settings(source: Path, target: Path) -> None:
    """Copy the configuration and tokenizer files of a checkpoint folder into another."""
    for file in sorted(source.iterdir()):
        is_text = file.suffix in {".json", ".txt", ".model", ".jinja", ".tiktoken"}
        if is_text and file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
