"""A patch of two stored checkpoints."""

from pathlib import Path

import numpy as np

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.kernels import FLOATS
from rlsparse.patch.blocks import CodecName, Compression
from rlsparse.patch.file import Patch
from rlsparse.patch.values import Coding
from rlsparse.patch.write import TensorPair, cast_pieces, write_patch
from rlsparse.tensor_file import TensorInfo

_MAX_NAMES = 3


def make_patch(
    before: Checkpoint,
    after: Checkpoint,
    path: Path,
    *,
    coding: Coding = "relative",
    codec: CodecName | None = None,
    compression: Compression = "zstd",
) -> Patch:
    """Write the patch from one checkpoint to another, atomically; tensors are read in pieces.

    It is in the format of ``after``; ``before`` is cast to that. A tied copy is left out where
    ``after`` still has it equal to what it is tied to.

    Args:
        before: the base.
        after: with the same tensors.
        path: see ``write_patch``, as for the others.
        coding: of the values.
        codec: of the positions.
        compression: of everything.

    Raises:
        PatchError: the checkpoints have not the same tensors, or a format cannot be cast.
    """
    pairs = [
        TensorPair(name, after.tensors[name].dtype, info.shape, info, after.tensors[name])
        for name, info in _same_tensors(before, after).items()
    ]
    return write_patch(
        path, pairs, base_fingerprint=fingerprint(before), coding=coding, codec=codec,
        compression=compression,
    )  # fmt: skip


def _same_tensors(before: Checkpoint, after: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors of ``before`` that a patch must list."""
    ours = {name for name in before.tensors if name not in before.tied}
    theirs = {name for name in after.tensors if name not in after.tied}
    wrong = [f"{before.path} alone has {n}" for n in sorted(ours - after.tensors.keys())]
    wrong += [f"{after.path} alone has {n}" for n in sorted(theirs - before.tensors.keys())]
    found = {}
    for name in sorted(before.tensors.keys() & after.tensors.keys()):
        one, other = before.tensors[name], after.tensors[name]
        fits = one.dtype == other.dtype or {one.dtype, other.dtype} <= FLOATS.keys()
        if one.shape != other.shape or not fits:
            wrong.append(
                f"{name} is {one.dtype} {list(one.shape)} before, {other.dtype} "
                f"{list(other.shape)} after"
            )
        elif name in ours or not _is_copy(after, name, before.tied[name]):
            found[name] = one
    if wrong:
        more = f" and {len(wrong) - _MAX_NAMES} more" if len(wrong) > _MAX_NAMES else ""
        raise PatchError(
            f"no patch from {before.path} to {after.path}, which have not the same tensors: "
            f"{'; '.join(wrong[:_MAX_NAMES])}{more}; a patch is of one model, stored alike"
        )
    return found


def _is_copy(checkpoint: Checkpoint, name: str, owner: str) -> bool:
    """Whether a tensor has the bits of another, in its format."""
    one, other = checkpoint.tensors[name], checkpoint.tensors[owner]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    sides = (cast_pieces(info, info.dtype) for info in (one, other))
    return all(np.array_equal(own, theirs) for own, theirs in zip(*sides, strict=True))
