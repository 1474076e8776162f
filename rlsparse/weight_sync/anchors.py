"""One version, whole: written by each worker of what it holds, read into memory."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.tensor_file import (
    Bits,
    TensorInfo,
    bits_dtype,
    copy_settings,
    parse_json,
    read_header,
    unique,
    write_tensors,
)
from rlsparse.weight_sync.versions import Notes

_KEY = "rlsparse_anchor"
_CHECKSUM_KEY = "rlsparse_anchor_checksum"

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
        name: {
            "dtype": one.dtype, "shape": [*one.shape], "region": one.region, "xxh3": one.xxh3,
        }
        for name, one in tensors.items()
    }  # fmt: skip
    stored = {
        name: (
            one.dtype,
            one.shape if notes.part == (1, 1) else (one.region[1] - one.region[0],),
            one.pieces,
        )
        for name, one in tensors.items()
    }
    metadata = {"format": "pt", **notes.metadata(), _KEY: json.dumps(entries)}
    write_tensors(file, stored, {**metadata, _CHECKSUM_KEY: _checksum(metadata)})


def _checksum(metadata: Mapping[str, str]) -> str:
    """xxh3 (128 bits, hex) of all metadata but itself."""
    others = {key: text for key, text in metadata.items() if key != _CHECKSUM_KEY}
    return xxhash.xxh3_128_hexdigest(json.dumps(others, sort_keys=True).encode())


class _Stored(NamedTuple):
    """What a worker's file says of a tensor, and where it has it."""

    shape: tuple[int, ...]
    region: Region
    xxh3: str
    info: TensorInfo


def read_anchor(files: Sequence[Path]) -> tuple[Notes, dict[str, HostTensor]]:
    """Put an anchor together from the files of all parts.

    Raises:
        PatchError: it is damaged, or its parts are not of one version.
    """
    where = files[0].parent
    try:
        opened = [_open(file) for file in files]
        if len({(notes.version, notes.stream) for notes, _ in opened}) != 1:
            raise PatchError(f"the parts of {where} are not of one version; take another")
        parts: dict[str, list[_Stored]] = {}
        for stored in (one for _, tensors in opened for one in tensors):
            parts.setdefault(stored.info.name, []).append(stored)
        whole = {name: _together(str(where), found) for name, found in parts.items()}
    except PatchError:
        raise
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"{where} is no anchor, or damaged: {error}; take another") from error
    return opened[0][0], whole


def _open(file: Path) -> tuple[Notes, list[_Stored]]:
    """What a file says of itself; only its header is read."""
    stored, metadata = read_header(file)
    if metadata[_CHECKSUM_KEY] != _checksum(metadata):
        raise ValueError(f"the metadata of {file.name} have another checksum")
    entries = parse_json(metadata[_KEY].encode(), unique)
    if {name: one["dtype"] for name, one in entries.items()} != {
        name: info.dtype for name, info in stored.items()
    }:
        raise ValueError(f"{file.name} has other tensors than it says")
    tensors = []
    for name, one in entries.items():
        start, stop = one["region"]
        numbers = *one["shape"], start, stop
        if not all(type(number) is int and number >= 0 for number in numbers) or (
            stop - start != stored[name].num_elements
        ):
            raise ValueError(f"{file.name} has not the elements of {name} that it says")
        tensors.append(_Stored(tuple(one["shape"]), (start, stop), one["xxh3"], stored[name]))
    return Notes.of(file, metadata), tensors


def _together(where: str, parts: Sequence[_Stored]) -> HostTensor:
    """Read a tensor from its parts; nothing is allocated before they are known to cover it."""
    name, dtype, shape = parts[0].info.name, parts[0].info.dtype, parts[0].shape
    if {(part.info.dtype, part.shape) for part in parts} != {(dtype, shape)}:
        raise ValueError(f"its parts say that {name} is of several shapes or formats")
    check_cover(where, name, math.prod(shape), [part.region for part in parts])
    whole = HostTensor(dtype, shape, np.empty(math.prod(shape), bits_dtype(dtype)))
    for part in parts:
        start, stop = part.region
        for _ in part.info.pieces(0, stop - start, whole.bits[start:stop]):
            pass
        if whole.checksum(part.region) != part.xxh3:
            raise ValueError(f"{name} has another checksum in {part.info.file}")
    return whole


def check_cover(what: str, name: str, size: int, regions: Sequence[Region]) -> None:
    """Refuse parts that are not together the whole of a tensor of ``size`` elements, once.

    Raises:
        PatchError: they are not.
    """
    at = 0
    for start, stop in sorted(regions):
        if start != at:
            break
        at = stop
    if at != size or at != sum(stop - start for start, stop in regions):
        raise PatchError(
            f"{what} has the elements {sorted(regions)} of {name}, which has {size}: "
            "give the files of all workers"
        )


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, HostTensor]:
    """All tensors of any checkpoint, tied ones once."""
    return {
        info.name: HostTensor(info.dtype, info.shape, info.read()) for info in checkpoint.counted
    }
