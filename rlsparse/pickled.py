"""Pickled PyTorch weights (``.bin``, ``.pt``, ``.pth``), read without unpickling any weight.

torch reads the names, shapes and places alone (``weights_only=True`` under ``FakeTensorMode``,
torch >= 2.7; its notes on serialization, "torch.load with FakeTensorMode"); the weights are then
streamed from where they lie, uncompressed, in the zip file. No code of the file is run.
"""

import io
import pickle
import re
import struct
import zipfile
from typing import Any

from rlsparse.errors import CheckpointError
from rlsparse.files import File, fill, opened
from rlsparse.tensor_file import ITEMSIZE, TensorInfo, check_name

MAX_PICKLE_BYTES = 100_000_000

_REMEDY = (
    "load it where it was made and save it as safetensors "
    "(model.save_pretrained, or safetensors.torch.save_file)"
)

_FORMATS = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
    "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "float8_e8m0fnu": "fp8_e8m0",
    "float8_e4m3fnuz": "fp8_e4m3fnuz", "float8_e5m2fnuz": "fp8_e5m2fnuz",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8",
    "uint64": "u64", "uint32": "u32", "uint16": "u16", "uint8": "u8",
    "complex64": "c64", "bool": "bool",
}  # fmt: skip

_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
"""What a damaged or hostile file makes the readers of torch and of zip files raise."""


def read_pickled(file: File) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors of a file of ``torch.save``, and which of them are another one's storage.

    The file holds {name: tensor}, or that under the key ``state_dict`` or ``model``.

    Returns:
        Tensors by name in the order of the file; name -> earlier name that shares its storage.

    Raises:
        CheckpointError: damaged, of the format before torch 1.6, needs code to be run, or holds
            anything but contiguous tensors of known number formats.
    """
    try:
        with opened(file) as stream:
            records = _records(stream, file)
            weights = _load(stream)
        named = _state_dict(weights, file)
        tensors = {name: _info(file, name, value, records) for name, value in named.items()}
    except CheckpointError:
        raise
    except _DAMAGE as error:
        if forbidden := re.search(r"GLOBAL (\S+)|class (\S+)|function (\S+)", str(error)):
            name = next(filter(None, forbidden.groups()))
            raise CheckpointError(
                f"{file} is not opened: it asks for {name} to be run, and a pickle could run "
                f"anything; if you trust it, {_REMEDY}"
            ) from error
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"[:200]
        raise CheckpointError(f"{file} is damaged ({reason}): download or save it again") from error
    first: dict[tuple[int, str, tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for name, info in tensors.items():
        owner = first.setdefault((info.offset, info.dtype, info.shape), name)
        if owner != name and info.num_elements:
            tied[name] = owner
    return tensors, tied


def _records(stream: io.FileIO, file: File) -> dict[int, int]:
    """Offset -> length of every storage in the zip file, as its own headers say.

    torch computes the offsets from the order and the sizes of the storages; they are true only
    if they are found here.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":
        raise CheckpointError(f"{file} is no zip file as torch >= 1.6 writes them: {_REMEDY}")
    archive = zipfile.ZipFile(stream)
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if len(entries) < len(archive.infolist()) or "data.pkl" not in entries:
        raise CheckpointError(f"{file} is no archive of torch.save: {_REMEDY}")
    if entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{file} holds more than tensors in its pickle: {_REMEDY}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise CheckpointError(f"{file} is compressed, its weights cannot be streamed: {_REMEDY}")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(f"{file} holds big-endian weights: {_REMEDY}")
    keys = [key.removeprefix("data/") for key in entries if key.startswith("data/")]
    if ".format_version" in entries and keys != [str(number) for number in range(len(keys))]:
        raise CheckpointError(f"{file} was packed again in another order: {_REMEDY}")
    records = {}
    for key in keys:
        entry, header = entries[f"data/{key}"], bytearray(30)
        stream.seek(entry.header_offset)
        fill(stream, memoryview(header), file)
        start = entry.header_offset + 30 + sum(struct.unpack("<26xHH", header))
        if start + entry.file_size > size:
            raise CheckpointError(f"{file} is truncated: download or save it again")
        records[start] = entry.file_size
    stream.seek(0)
    return records


def _load(stream: io.FileIO) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(stream, weights_only=True)


def _state_dict(weights: Any, file: File) -> dict[str, Any]:
    inner = [key for key in ("state_dict", "model") if isinstance(weights, dict) and key in weights]
    if len(inner) == 1 and isinstance(weights[inner[0]], dict):
        weights = weights[inner[0]]
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file} holds a {type(weights).__name__}, not tensors: {_REMEDY}")
    return {check_name(file, name): value for name, value in weights.items()}


def _info(file: File, name: str, value: Any, records: dict[int, int]) -> TensorInfo:
    import torch

    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{file}: {name} is a {type(value).__name__}, not a tensor; only {{name: tensor}} is "
            f"read, also under the key state_dict or model: {_REMEDY}"
        )
    dtype = _FORMATS.get(str(value.dtype).removeprefix("torch."))
    is_plain = value.layout == torch.strided and not (value.is_conj() or value.is_neg())
    if not dtype or not is_plain or not value.is_contiguous():
        raise CheckpointError(
            f"{file}: {name} is {value.dtype}, {value.layout}, strides "
            f"{list(value.stride()) if is_plain else '-'}; only contiguous tensors of known "
            f"formats are read: {_REMEDY}"
        )
    storage = value.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None:
        raise CheckpointError(f"{file} cannot be streamed by torch {torch.__version__}: {_REMEDY}")
    skipped = int(value.storage_offset()) * ITEMSIZE[dtype]
    info = TensorInfo(name, dtype, tuple(map(int, value.shape)), file, int(offset) + skipped)
    length = records.get(int(offset))
    if length != storage.nbytes() or not 0 <= skipped <= length - info.size_bytes:
        raise CheckpointError(
            f"{file} is damaged: {name} lies outside its storage: download or save it again"
        )
    return info
