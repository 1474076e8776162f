"""One version, whole: written by each worker of what it holds, read into memory."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.tensor_file import Bits, bits_dtype, copy_settings, read_header, write_tensors
from rlsparse.weight_sync.versions import Notes

_KEY = "rlsparse_anchor"

Region = tuple[int, int]
"""Flat elements [start, stop) of a tensor."""


@dataclass
class HostTensor:
    """A tensor on the host.

    Attributes:
        dtype: short name of its format.
        shape: of all of it.
        bits: flat.
        checksums: xxh3 (128 bits, hex) of regions of it, as far as they are known.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: Bits
    checksums: dict[Region, str] = field(default_factory=dict)

    def checksum(self, region: Region) -> str:
        """That of a region; all of it is read only if it is not known."""
        if region not in self.checksums:
            self.checksums[region] = xxhash.xxh3_128_hexdigest(self.bits[slice(*region)].data)
        return self.checksums[region]


@dataclass(frozen=True)
class AnchorPart:
    """What a worker writes of a tensor.

    Attributes:
        dtype: short name of its format.
        shape: of the whole tensor.
        region: what the worker holds of it.
        xxh3: checksum of that.
        pieces: its bits.
    """

    dtype: str
    shape: Sequence[int]
    region: Region
    xxh3: str
    pieces: Iterator[Bits]


def write_anchor(
    file: Path, notes: Notes, tensors: Mapping[str, AnchorPart], settings_from: Path | None
) -> None:
    """Write a worker's file of an anchor, atomically; its folder is made if need be.

    Args:
        file: ``VersionFolder.anchor_file``.
        notes: kept in its metadata.
        tensors: what the worker holds. In a file of all of it tensors have their shape, so that it
            is a checkpoint for anyone; else they are flat.
        settings_from: folder whose configuration and tokenizer files are copied beside it.
    """
    file.parent.mkdir(exist_ok=True)
    if settings_from:
        copy_settings(settings_from, file.parent)
    entries = {
        name: {"shape": [*one.shape], "region": one.region, "xxh3": one.xxh3}
        for name, one in tensors.items()
    }
    stored = {
        name: (
            one.dtype,
            one.shape if notes.part == (1, 1) else (one.region[1] - one.region[0],),
            one.pieces,
        )
        for name, one in tensors.items()
    }
    write_tensors(file, stored, {"format": "pt", **notes.metadata(), _KEY: json.dumps(entries)})


def read_anchor(files: Sequence[Path]) -> tuple[Notes, dict[str, HostTensor]]:
    """Put an anchor together from the files of all parts.

    Raises:
        PatchError: it is damaged, or its parts are not of one version.
    """
    tensors: dict[str, HostTensor] = {}
    notes: list[Notes] = []
    for file in files:
        try:
            stored, metadata = read_header(file)
            notes.append(Notes.of(file, metadata))
            for name, entry in json.loads(metadata[_KEY]).items():
                dtype, shape, (start, stop) = stored[name].dtype, entry["shape"], entry["region"]
                if name not in tensors:
                    bits = np.zeros(math.prod(shape), bits_dtype(dtype))
                    tensors[name] = HostTensor(dtype, tuple(shape), bits)
                whole = tensors[name]
                for _ in stored[name].pieces(0, stop - start, whole.bits[start:stop]):
                    pass
                if whole.checksum((start, stop)) != entry["xxh3"]:
                    raise ValueError(f"{name} has another checksum")
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, PatchError):
                raise
            raise PatchError(f"{file} is no anchor, or damaged: {error}; take another") from error
    if len({(each.version, each.stream) for each in notes}) != 1:
        raise PatchError(f"the parts of {files[0].parent} are not of one version; take another")
    for name, tensor in tensors.items():
        check_cover(str(files[0].parent), name, tensor, [*tensor.checksums])
    return notes[0], tensors


def check_cover(what: str, name: str, tensor: HostTensor, regions: Sequence[Region]) -> None:
    """Refuse parts that are not together the whole of a tensor, once.

    Raises:
        PatchError: they are not.
    """
    at = 0
    for start, stop in sorted(regions):
        if start != at:
            break
        at = stop
    if at != tensor.bits.size or at != sum(stop - start for start, stop in regions):
        raise PatchError(
            f"{what} has the elements {sorted(regions)} of {name}, which has {tensor.bits.size}: "
            "give the files of all workers"
        )


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, HostTensor]:
    """All tensors of any checkpoint, tied ones once."""
    return {
        info.name: HostTensor(info.dtype, info.shape, info.read()) for info in checkpoint.counted
    }
