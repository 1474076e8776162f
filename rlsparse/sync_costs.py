"""What syncing the weights of a trial to who serves them would have taken: bytes, and time.

A trial that kept the patch of each step (``probe.step_patches``) is gone through again, for each
number k of steps per sync: windows (0, k], (k, 2k] and so on. What k steps changed is compared,
encoded and written anew, as a trainer would, and applied with all its checks, as a receiver would.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from rlsparse.checkpoint import Checkpoint
from rlsparse.definitions import STEP_WINDOWS, SYNC_INTERVAL
from rlsparse.errors import PatchError
from rlsparse.patch import TensorPair, write_patch
from rlsparse.patch.blocks import CodecName, Compression
from rlsparse.patch.values import Coding
from rlsparse.patch.write import cast_pieces
from rlsparse.tensor_file import Bits
from rlsparse.weight_sync.anchors import HostTensor
from rlsparse.weight_sync.receiver import PatchReceiver
from rlsparse.weight_sync.versions import Notes, VersionFolder

Row = dict[str, Any]
Tensors = dict[str, HostTensor]


class Way(NamedTuple):
    """How a patch is written: coding of values, codec of positions, compression."""

    coding: Coding
    codec: CodecName | None
    compression: Compression


PATCHES = {
    "relative": Way("relative", None, "zstd"),
    "absolute": Way("absolute", None, "zstd"),
    "indices": Way("absolute", "indices", "none"),
}
"""Ways that send what changed: the smallest, what is applied without the base, and plain 4-byte
indices beside values (as TRL's demonstration and vLLM have them)."""
WAYS = (*PATCHES, "dense", "dense_zstd")
"""And all weights, as they are or under zstd (level 1)."""


def sync_rows(
    base: Checkpoint, folder: Path, *, num_steps: int, dtype: str, scratch: Path
) -> Iterator[Row]:
    """Rows of table ``syncs`` of one trial, without the columns that name it and its host.

    Holds three copies of the weights. Ways that send all weights move them through a file, too.

    Args:
        base: what the trial began at.
        folder: of the patches of its steps.
        num_steps: how many steps there were.
        dtype: the stored format of the trial.
        scratch: folder for what is written, and deleted again.

    Raises:
        PatchError: a patch is missing or damaged, or one that was written anew gives other weights.
    """
    for k in (k for k in STEP_WINDOWS if k <= num_steps):
        receiver = PatchReceiver(_served(base, dtype), folder=VersionFolder(folder))
        before = _copied(receiver.tensors)
        for stop in range(k, num_steps + 1, k):
            if receiver.follow(until=stop) != stop:
                raise PatchError(f"{folder} lacks the patch of step {receiver.version + 1}")
            in_all_ways = stop == k or stop % max(k, SYNC_INTERVAL) == 0
            span = {"k": k, "step_before": stop - k, "step_after": stop}
            for way in WAYS if in_all_ways else ("relative",):
                yield span | {"way": way} | _sent(way, before, receiver.tensors, scratch)
            for name, tensor in receiver.tensors.items():
                np.copyto(before[name].bits, tensor.bits)
                before[name].checksums = dict(tensor.checksums)


def _served(base: Checkpoint, dtype: str) -> Tensors:
    """The weights of the base in the format of the trial, tied ones once."""
    return {
        info.name: HostTensor(
            dtype, info.shape, np.concatenate([piece.copy() for piece in cast_pieces(info, dtype)])
        )
        for info in base.counted
    }


def _copied(tensors: Tensors) -> Tensors:
    return {
        name: HostTensor(one.dtype, one.shape, one.bits.copy(), dict(one.checksums))
        for name, one in tensors.items()
    }


def _sent(way: str, before: Tensors, after: Tensors, scratch: Path) -> Row:
    """Send what is there ``after`` to who has what was there ``before``."""
    sizes = {
        "num_elements": sum(one.bits.size for one in after.values()),
        "dense_bytes": sum(one.bits.nbytes for one in after.values()),
    }
    file = scratch / "sync"
    found = (
        _sent_patch(PATCHES[way], before, after, file)
        if way in PATCHES
        else _sent_dense(way == "dense_zstd", after, file)
    )
    file.unlink()
    return sizes | found


def _sent_patch(way: Way, before: Tensors, after: Tensors, file: Path) -> Row:
    pairs = [
        TensorPair(name, one.dtype, one.shape, before[name].bits, one.bits)
        for name, one in after.items()
    ]
    notes = Notes(1, 0, "", (1, 1)).metadata()
    patch, encode_s = _timed(
        lambda: write_patch(
            file, pairs, base_fingerprint="", metadata=notes,
            coding=way.coding, codec=way.codec, compression=way.compression,
        )
    )  # fmt: skip
    server = PatchReceiver(_copied(before))
    for tensor in server.tensors.values():
        tensor.checksum((0, tensor.bits.size))  # a server knows them of the sync before
    _, apply_s = _timed(lambda: server.apply(file))
    for name, tensor in server.tensors.items():
        if not np.array_equal(tensor.bits, after[name].bits):
            raise PatchError(f"{way}: {name} is not what was sent; report this")
    return {
        "num_changed": patch.num_changed,
        "size_bytes": patch.size_bytes,
        "encode_s": encode_s,
        "apply_s": apply_s,
    }


def _sent_dense(compress: bool, after: Tensors, file: Path) -> Row:
    codec = pyarrow.Codec("zstd", 1)

    def write() -> list[int]:
        with file.open("wb") as stream:
            return [
                stream.write(codec.compress(one.bits.data) if compress else one.bits.data)
                for one in after.values()
            ]

    def read() -> None:
        with file.open("rb") as stream:
            for one, size in zip(targets, sizes, strict=True):
                if compress:
                    content = codec.decompress(stream.read(size), one.nbytes)
                    one[:] = np.frombuffer(content, one.dtype)
                else:
                    stream.readinto(one.data)

    targets: list[Bits] = [one.bits.copy() for one in after.values()]
    sizes, encode_s = _timed(write)
    _, apply_s = _timed(read)
    return {
        "num_changed": None,
        "size_bytes": sum(sizes),
        "encode_s": encode_s,
        "apply_s": apply_s,
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun
