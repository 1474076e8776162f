"""Checkpoints on disk: what tensors there are, their bits slice by slice, and what they are called.

The safetensors header is parsed here, so that no tensor is read before it is asked for and bf16
and fp8 need no framework. Weights are handed out as *bits*: flat little-endian unsigned integers
of the width of the stored format.
"""

import hashlib
import itertools
import json
import math
import os
import re
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

Bits = NDArray[np.unsignedinteger[Any]]
"""Bit patterns of weights, flat: uint8, uint16, uint32 or uint64 by the width of the format."""

CHUNK_ELEMENTS = 2**22
CHUNK_ALIGNMENT = 64
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; holds no file handle, so it pickles and needs no closing.

    Attributes:
        path: the folder or file that was opened.
        tensors: all stored tensors by name, sorted.
        metadata: the safetensors metadata (of the first file that has any).
        tied: stored output head -> embedding, when ``config.json`` says they are one tensor.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    tied: dict[str, str]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a local folder (one file, or shards with an index) or one .safetensors file.

        A folder that has both is read as transformers does: the single file wins.

        Raises:
            CheckpointError: nothing there, another kind of checkpoint, damaged or incomplete.
        """
        files = _files(path := Path(path))
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            found, notes = read_header(file)
            if twice := sorted(tensors.keys() & found.keys()):
                raise CheckpointError(f"{file} stores {twice} again, another shard has them too")
            tensors |= found
            metadata = metadata or notes
        listed = _weight_map(path) if files[0].name != SINGLE_FILE else {}
        if lacking := sorted(listed.keys() - tensors.keys()):
            raise CheckpointError(f"the shards of {path} lack {lacking} that {INDEX_FILE} lists")
        tensors = dict(sorted(tensors.items()))
        return cls(path, tensors, metadata, _tied(path, tensors))

    def read_bits(self, name: str, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of the flat elements [start, stop) of tensor ``name``."""
        return self.tensors[name].read(start, stop)

    @property
    def counted(self) -> list[TensorInfo]:
        """Tensors in order of name, each storage once: without heads tied to the embedding."""
        return [info for name, info in self.tensors.items() if name not in self.tied]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a .safetensors file; {_REMEDY}")
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: no such file or folder")
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    shards = sorted({path / shard for shard in _weight_map(path).values()})
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{path} lacks the shards {missing} that {INDEX_FILE} lists")
    if not shards:
        remedies = (text for glob, text in _OTHER_KINDS.items() if any(path.glob(glob)))
        remedy = next(remedies, _REMEDY).format(path=path)
        raise CheckpointError(f"no {SINGLE_FILE} or {INDEX_FILE} in {path}; {remedy}")
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    index = path / INDEX_FILE
    try:
        content = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        return {str(name): str(shard) for name, shard in content.get("weight_map", {}).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error


_REMEDY = "load it with transformers and `save_pretrained` it as safetensors"
_OTHER_KINDS: dict[str, str] = {
    "model_world_size_*_rank_*.pt": "it holds FSDP shards of verl: `python -m verl.model_merger "
    "merge --backend fsdp --local_dir {path} --target_dir OUT`",
    "*.distcp": "it holds shards of torch.distributed.checkpoint: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} OUT`",
    "adapter_model.safetensors": "it holds a LoRA adapter: merge it into its base first",
    "*.bin": f"it holds PyTorch .bin weights: {_REMEDY}",
    "*.pt": f"it holds pickled PyTorch weights: {_REMEDY}",
    "*.pth": f"it holds pickled PyTorch weights: {_REMEDY}",
}
"""Files of checkpoints that cannot be read, and what to do about each."""


def _tied(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        is_tied = config.get("tie_word_embeddings", False)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a JSON mapping") from error
    heads, embeddings = (
        [info for name, info in tensors.items() if re.search(rf"(^|\.)({names})\.weight$", name)]
        for names in ("lm_head", "embed_tokens|wte")
    )
    if is_tied is not True or len(heads) != 1 or len(embeddings) != 1:
        return {}
    one, other = heads[0], embeddings[0]
    return {one.name: other.name} if (one.dtype, one.shape) == (other.dtype, other.shape) else {}


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 (hex) over names, formats, shapes and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for info in checkpoint.tensors.values():
        digest.update(json.dumps([info.name, info.dtype, list(info.shape)]).encode() + b"\n")
        for chunk in chunks(info.shape):
            digest.update(info.read(chunk.start, chunk.stop).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a tensor: flat elements [start, start + num_elements)."""

    index: int
    start: int
    num_elements: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.num_elements


def chunks(shape: Sequence[int], max_elements: int = CHUNK_ELEMENTS) -> Iterator[Chunk]:
    """Cut a tensor into chunks, by shape alone; an empty tensor has none.

    A chunk is consecutive whole rows of the view [shape[0], rest] (a vector's rows are single
    elements) and starts at a multiple of 64; where one row, or the rows that make a multiple of
    64, exceed ``max_elements``, it is the fewest rows allowed.
    """
    total, row = math.prod(shape), math.prod(shape[1:])
    if not total:
        return
    unit = math.lcm(row, CHUNK_ALIGNMENT)
    size = max(unit, max_elements // unit * unit)
    for index, start in enumerate(range(0, total, size)):
        yield Chunk(index, start, min(size, total - start))


_MODULE_NAMES: dict[str, str] = {
    "q": "q_proj q_a_proj q_b_proj wq query",
    "k": "k_proj wk key",
    "v": "v_proj wv value",
    "o": "o_proj wo out_proj",
    # DeepSeek's kv projections hold keys and values of all heads in one matrix.
    "qkv": "qkv qkv_proj query_key_value c_attn Wqkv W_pack kv_a_proj_with_mqa kv_b_proj",
    "gate": "gate_proj w1",
    "up": "up_proj w3 c_fc fc1 fc_in dense_h_to_4h",
    "gate_up": "gate_up_proj",
    "down": "down_proj w2 fc2 fc_out dense_4h_to_h",
    "router": "gate router shared_expert_gate",
    "embed": "embed_tokens wte wpe tok_embeddings word_embeddings embed_positions embed_in",
    "head": "lm_head embed_out output",
}
_MODULE = {name: module for module, names in _MODULE_NAMES.items() for name in names.split()}
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")


def layer_and_module(name: str, shape: Sequence[int] | None = None) -> tuple[int | None, str]:
    """Layer index (None outside the layers) and one of ``tables.MODULES`` for a tensor's name.

    Args:
        name: as stored, for example ``model.layers.3.self_attn.q_proj.weight``.
        shape: tells GPT-2's causal-mask buffers from biases, and unnamed norms by being vectors.
    """
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), None)
    if parts[-1].endswith("bias"):
        return layer, "bias" if shape is None or len(shape) in (1, 2) else "other"
    is_weight = parts[-1] in ("weight", "scale") and len(parts) > 1
    stem = parts[-2] if is_weight else parts[-1]
    if _NORM.search(stem):
        return layer, "norm"
    if stem in ("c_proj", "dense"):  # GPT-2 and GPT-NeoX use one name in two places
        return layer, "o" if any(
            "attn" in part or "attention" in part for part in parts
        ) else "down"
    is_vector = is_weight and shape is not None and len(shape) == 1
    return layer, _MODULE.get(stem, "norm" if is_vector else "other")


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
