"""Checkpoints: which tensors there are, in which files, and how they are cut into chunks."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsparse.errors import CheckpointError
from rlsparse.tensor_file import SINGLE_FILE, Bits, TensorInfo, read_header

CHUNK_ELEMENTS = 2**22
CHUNK_ALIGNMENT = 64
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; holds no file handle, so it pickles and needs no closing.

    Attributes:
        path: the folder or file that was opened.
        tensors: all stored tensors by name, sorted.
        metadata: the safetensors metadata (of the first file that has any).
        tied: stored output head -> embedding, when ``config.json`` says they are one tensor.
        config: the content of ``config.json``, or nothing.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    tied: dict[str, str]
    config: dict[str, Any]

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
        config = _config(path)
        return cls(path, tensors, metadata, _tied(config, tensors), config)

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


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON mapping")
    return config


def _tied(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    heads, embeddings = (
        [info for name, info in tensors.items() if re.search(rf"(^|\.)({names})\.weight$", name)]
        for names in ("lm_head", "embed_tokens|wte")
    )
    is_tied = config.get("tie_word_embeddings", False)
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
