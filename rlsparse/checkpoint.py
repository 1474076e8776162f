"""Checkpoints: which tensors there are, in which files, and how they are cut into chunks."""

import fnmatch
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlsparse.errors import CheckpointError
from rlsparse.files import PICKLED_SUFFIXES, File, Folder, RemoteFile, locate, read_bytes
from rlsparse.models import named
from rlsparse.tensor_file import (
    SINGLE_FILE,
    Bits,
    TensorInfo,
    check_name,
    parse_json,
    read_header,
    unique,
)

CHUNK_ELEMENTS = 2**22
CHUNK_ALIGNMENT = 64
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; holds no file handle, so it pickles and needs no closing.

    Attributes:
        path: the folder or file really read: a trainer's inner folder, the local copy of a hub
            model, or, as text without password and query, a URL.
        tensors: all stored tensors by name, sorted.
        metadata: the safetensors metadata (of the first file that has any).
        tied: stored tensor -> the one that it is a copy of: the output head -> the embedding when
            ``config.json`` says so, and tensors of a pickled file that share their storage.
        config: the content of ``config.json``, or nothing.
    """

    path: Path | str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    tied: dict[str, str]
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a checkpoint; only headers are read.

        A folder holds safetensors (one file, or shards with an index) or, only where it has none,
        ``pytorch_model.bin``, single or in shards; a folder that has both a single file and an
        index is read as transformers does: the single file wins. Where a folder itself has no
        weights, the folders of trainers in it are searched and the largest step is taken.

        Args:
            path: a local folder or file; where there is none of that name, a base of
                ``models.NAMES``, or a hub id ``org/name`` or ``org/name@revision``, of which just
                the weights are downloaded and cached; or an fsspec URL of a folder or of one file,
                read by byte ranges.

        Raises:
            CheckpointError: nothing there, another kind of checkpoint, damaged or incomplete.
        """
        place = locate(_base(path) or path)
        if isinstance(place, (Path, RemoteFile)):
            found = _Weights(place if isinstance(place, Path) else str(place), [place], {}, {})
        else:
            found = _search(place)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        tied: dict[str, str] = {}
        for file in found.files:
            stored, notes, shared = _inventory(file)
            if twice := sorted(tensors.keys() & stored.keys()):
                raise CheckpointError(
                    f"{file} stores {_some(twice)} again, another shard has them too"
                )
            tensors |= stored
            tied |= shared
            metadata = metadata or notes
        _check_index(found, tensors)
        tensors = dict(sorted(tensors.items()))
        tied = {**_tied(found.config, tensors), **tied}
        return cls(found.path, tensors, metadata, tied, found.config)

    def read_bits(self, name: str, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of the flat elements [start, stop) of tensor ``name``."""
        return self.tensors[name].read(start, stop)

    @property
    def counted(self) -> list[TensorInfo]:
        """Tensors in order of name, each storage once: without heads tied to the embedding."""
        return [info for name, info in self.tensors.items() if name not in self.tied]


def _base(path: str | Path) -> Path | None:
    """Folder of the base model of that name, unless a file or folder has it."""
    return named(path) if isinstance(path, str) and not Path(path).exists() else None


@dataclass(frozen=True)
class _Weights:
    """Files with weights, and which tensor the index says is in which (by full name)."""

    path: Path | str
    files: list[File]
    shard_of: dict[str, File]
    config: dict[str, Any]


def _search(folder: Folder) -> _Weights:
    """Weights in a folder, or in the folders of trainers in it.

    Raises:
        CheckpointError: none; with the remedy where the kind is known.
    """
    visited: list[tuple[Folder, list[str]]] = []
    if found := _first_weights(folder, visited, depth=4):
        return found
    for place, names in reversed(visited):  # the innermost folder says best what it is
        if remedy := _remedy(place.path, names):
            raise CheckpointError(f"no weights to read in {place.path}: {remedy}")
    names = visited[0][1]
    listed = _some(names) if names else "nothing that can be listed"
    raise CheckpointError(
        f"no {SINGLE_FILE}, {INDEX_FILE} or {PICKLED_FILE} in {folder.path}, which holds {listed}"
        + (folder.note or f"; {_REMEDY if names else 'check that the place is right'}")
    )


def _first_weights(
    folder: Folder, visited: list[tuple[Folder, list[str]]], depth: int
) -> _Weights | None:
    for single, index in ((SINGLE_FILE, INDEX_FILE), (PICKLED_FILE, PICKLED_INDEX_FILE)):
        if file := folder.find(single):
            return _Weights(folder.path, [file], {}, _config(folder))
        if file := folder.find(index):
            shard_of = _shards(folder, file)
            files = list(dict.fromkeys(shard_of.values()))
            return _Weights(folder.path, files, shard_of, _config(folder))
    names = folder.names()
    visited.append((folder, names))
    if file := _only_file(folder, names):
        return _Weights(folder.path, [file], {}, _config(folder))
    for name in _trainer_folders(names) if depth else ():
        if found := _first_weights(folder.inner(name), visited, depth - 1):
            return found
    return None


_NUMBERED_FOLDERS = tuple(
    re.compile(rf"{stem}(\d{{1,18}})")
    for stem in ("checkpoint-", "global_step_", "weight_v", "step[_-]", "epoch_")
)
_PLAIN_FOLDERS = ("actor/huggingface", "huggingface", "actor", "policy", "model")


def _trainer_folders(names: Sequence[str]) -> Iterator[str]:
    """Inner folders to search: the largest step of the first kind that is there, then fixed ones.

    A smaller step never stands in for the largest one.
    """
    for pattern in _NUMBERED_FOLDERS:
        steps = [(int(match[1]), match[0]) for name in names if (match := pattern.fullmatch(name))]
        if steps:
            yield max(steps)[1]
            break
    yield from (name for name in _PLAIN_FOLDERS if name.split("/")[0] in names)


def _only_file(folder: Folder, names: Sequence[str]) -> File | None:
    """The one safetensors file of another name; adapters are no weights.

    Raises:
        CheckpointError: there are several, or a shard without its index.
    """
    files = [
        name for name in names if name.endswith(".safetensors") and not name.startswith("adapter")
    ]
    if len(files) > 1 or any(re.search(r"-\d+-of-0*[2-9]\d*\.", name) for name in files):
        raise CheckpointError(
            f"{folder.path} has no {INDEX_FILE} and holds {_some(files)}: add the index, or give "
            "one of these files"
        )
    return folder.find(files[0]) if files else None


def _shards(folder: Folder, index: File) -> dict[str, File]:
    """Tensor -> shard, as an index says.

    Raises:
        CheckpointError: the index is damaged, or names a shard that is absent or outside.
    """
    try:
        weight_map = parse_json(read_bytes(index, MAX_JSON_BYTES), unique).get("weight_map")
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{index} is damaged: {error}; download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it lists no tensors; download it again")
    shards: dict[str, File] = {}
    missing = []
    for shard in sorted({check_name(index, shard) for shard in weight_map.values()}):
        if shard.startswith("/") or {"", ".", ".."} & set(re.split(r"[/\\]", shard)):
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not inside its folder; refused"
            )
        if file := folder.find(shard):
            shards[shard] = file
        else:
            missing.append(shard)
    if missing:
        raise CheckpointError(
            f"{folder.path} lacks the shards {_some(missing)} that {index.name} lists"
            + (folder.note or "; download them again")
        )
    return {name: shards[shard] for name, shard in weight_map.items()}


def _check_index(found: _Weights, tensors: Mapping[str, TensorInfo]) -> None:
    if lacking := sorted(found.shard_of.keys() - tensors.keys()):
        raise CheckpointError(
            f"the shards of {found.path} lack {_some(lacking)} that the index lists; download it "
            "again"
        )
    for name, shard in found.shard_of.items():
        if tensors[name].file != shard:
            raise CheckpointError(
                f"the index of {found.path} says that {name} is in {shard.name}, it is in "
                f"{tensors[name].file.name}; download it again"
            )


def _inventory(file: File) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, str]]:
    """Tensors, metadata, and tensors that share another one's storage."""
    if file.name.endswith(PICKLED_SUFFIXES):
        from rlsparse.pickled import read_pickled  # torch is imported only where it is needed

        tensors, tied = read_pickled(file)
        return tensors, {}, tied
    if not file.name.endswith(".safetensors"):
        remedy = _remedy(file.parent if isinstance(file, Path) else str(file), [file.name])
        raise CheckpointError(f"{file} is not a .safetensors file; {remedy or _REMEDY}")
    return *read_header(file), {}


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


_REMEDY = "load it with transformers and `save_pretrained` it as safetensors"
_PEFT = "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained"
_AUTO = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
_OTHER_KINDS: dict[str, str] = {
    "model_world_size_*_rank_*.pt": "it holds FSDP shards of verl: `python -m verl.model_merger "
    "merge --backend fsdp --local_dir {quoted} --target_dir OUT`",
    "dist_ckpt": "it holds Megatron shards of verl: `python -m verl.model_merger merge --backend "
    "megatron --local_dir {quoted} --target_dir OUT`",
    "pytorch_model_fsdp_[0-9]*": "it holds FSDP shards of accelerate: "
    "`accelerate merge-weights {quoted}/{name} OUT`",
    "zero_to_fp32.py": "it holds DeepSpeed ZeRO shards: "
    "`python -m deepspeed.utils.zero_to_fp32 {quoted} OUT --safe_serialization`",
    "global_step[0-9]*": "it holds DeepSpeed ZeRO shards: "
    "`python -m deepspeed.utils.zero_to_fp32 {quoted} OUT --safe_serialization`",
    "*zero_pp_rank_*": "it holds DeepSpeed ZeRO shards: `python -m deepspeed.utils.zero_to_fp32 "
    "{parent} OUT --safe_serialization --tag {tag}`",
    "mp_rank_*_model_states.pt": "it holds DeepSpeed shards: `python -m "
    "deepspeed.utils.zero_to_fp32 {parent} OUT --safe_serialization --tag {tag}`",
    "iter_[0-9]*": 'it holds Megatron shards: `python -c "from megatron.bridge import AutoBridge '
    "as B; B.from_hf_pretrained('BASE_HUB_ID').export_ckpt('{path}/{name}', 'OUT')\"`",
    "mp_rank_*": 'it holds Megatron shards: `python -c "from megatron.bridge import AutoBridge '
    "as B; B.from_hf_pretrained('BASE_HUB_ID').export_ckpt('{path}', 'OUT')\"`",
    "*.distcp": "it holds shards of torch.distributed.checkpoint: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {quoted} OUT.pt`",
    ".metadata": "it holds shards of torch.distributed.checkpoint: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {quoted} OUT.pt`",
    "adapter_*": "it holds a LoRA adapter, merge it into its base: "
    f"`python -c \"{_PEFT}('{{path}}').merge_and_unload().save_pretrained('OUT')\"`",
    "*.gguf": "it holds quantised GGUF weights; as dequantised by transformers: "
    f"`python -c \"{_AUTO}('{{path}}', gguf_file='{{name}}').save_pretrained('OUT')\"`",
    "tf_model.h5": "it holds TensorFlow weights; with transformers < 5: "
    f"`python -c \"{_AUTO}('{{path}}', from_tf=True).save_pretrained('OUT')\"`",
    "flax_model.msgpack": "it holds Flax weights; with transformers < 5: "
    f"`python -c \"{_AUTO}('{{path}}', from_flax=True).save_pretrained('OUT')\"`",
    "latest_checkpointed_iteration.txt": "it is the folder of a Megatron run whose iterations are "
    "not there: give the folder that holds iter_*",
    "*.pt": "it holds pickled weights under another name: give the file {path}/{name} itself",
    "*.pth": "it holds pickled weights under another name: give the file {path}/{name} itself",
    "*.bin": "it holds pickled weights under another name: give the file {path}/{name} itself",
}
"""Files of checkpoints that cannot be read as they are, and the command that converts each."""

_NO_WEIGHTS = {"optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state.pth"}


def _remedy(path: Path | str, names: Sequence[str]) -> str | None:
    """What to do about a folder with these names, if its kind is known."""
    weights = [name for name in names if name not in _NO_WEIGHTS]
    for pattern, remedy in _OTHER_KINDS.items():
        if matching := fnmatch.filter(weights, pattern):
            parent, _, tag = str(path).rpartition("/")
            return remedy.format(
                path=path,
                quoted=shlex.quote(str(path)),
                name=matching[-1],
                parent=shlex.quote(parent or "."),
                tag=tag,
            )
    return None


def _config(folder: Folder) -> dict[str, Any]:
    file = folder.find("config.json")
    if file is None:
        return {}
    try:
        return parse_json(read_bytes(file, MAX_JSON_BYTES))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; download it again") from error


def _tied(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    heads, embeddings = (
        [info for name, info in tensors.items() if re.search(rf"(^|\.)({names})\.weight$", name)]
        for names in ("lm_head", "embed_tokens|wte")
    )
    if config.get("tie_word_embeddings") is not True or len(heads) != 1 or len(embeddings) != 1:
        return {}
    one, other = heads[0], embeddings[0]
    is_tied = (one.dtype, one.shape) == (other.dtype, other.shape) and _have_equal_bits(one, other)
    return {one.name: other.name} if is_tied else {}


def _have_equal_bits(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether a stored head is a copy: transformers does not tie one that differs, either."""
    return all(
        np.array_equal(one.read(chunk.start, chunk.stop), other.read(chunk.start, chunk.stop))
        for chunk in chunks(one.shape)
    )


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
