"""Patches for programs that do not read them: plain indices and values of what changed.

The file is safetensors. Of every changed tensor ``t`` it has ``t.idx`` [k], the flat indices in
ascending order (int32; int64 where ``t`` has more than 2^31 - 1 elements), and ``t.val`` [k], the
values after in the format of ``t``. Its metadata entry ``rlsparse_export`` is JSON: ``version``,
``base_fingerprint``, ``metadata`` (the patch's notes), and ``tensors``, of each changed one its
``dtype`` and ``shape``. As in a patch, an unlisted tied head follows its embedding.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import PatchError
from rlsparse.patch.apply import after_pieces, check_weights, check_whole
from rlsparse.patch.file import Changes, Patch
from rlsparse.patch.write import PIECE
from rlsparse.tensor_file import Bits, write_tensors

EXPORT_KEY = "rlsparse_export"
EXPORT_VERSION = "1"


def export_patch(patch: Patch, path: Path, base: Checkpoint | None = None) -> None:
    """Write indices and values of all that a patch changes, atomically; tensors are streamed.

    Args:
        patch: what to write.
        path: file to write.
        base: the checkpoint that it was made against. Relative values need it; all that the patch
            is of is read and checked before anything is written, and again what comes out.

    Raises:
        PatchError: the patch is relative and there is no base, or it is another; the patch is
            damaged or of parts of tensors.
    """
    check_source(patch, base)
    if base is not None:
        check_weights(base, patch)
    changed = {name: one for name, one in patch.tensors.items() if one.num_changed}
    tensors: dict[str, tuple[str, list[int], Iterable[Bits]]] = {}
    for name, one in changed.items():
        index = "i32" if math.prod(one.shape) < 2**31 else "i64"
        tensors[f"{name}.idx"] = (
            index,
            [one.num_changed],
            (at.view(np.uint64) for at, _ in _stored(patch, name)),
        )
        values = (bits for _, bits in changed_values(patch, name, base))
        tensors[f"{name}.val"] = one.dtype, [one.num_changed], values
    content = {
        "version": EXPORT_VERSION,
        "base_fingerprint": patch.base_fingerprint,
        "metadata": patch.metadata,
        "tensors": {
            name: {"dtype": one.dtype, "shape": one.shape} for name, one in changed.items()
        },
    }
    write_tensors(path, tensors, {EXPORT_KEY: json.dumps(content, sort_keys=True)})


def check_source(patch: Patch, base: Checkpoint | None) -> None:
    """Refuse a patch whose values cannot be told.

    Raises:
        PatchError: it is relative and there is no base, or it is of parts of tensors.
    """
    check_whole(patch)
    if base is None and patch.values == "relative":
        raise PatchError(
            f"{patch.path} has relative values, which are steps from its base: give that too "
            "(--base), or make the patch with --values absolute"
        )


def changed_values(
    patch: Patch, name: str, base: Checkpoint | None
) -> Iterator[tuple[NDArray[np.int64], Bits]]:
    """Flat indices [k] and bits after [k] of what changed in a tensor, in order, some at a time.

    Args:
        patch: one that ``check_source`` lets pass.
        name: one of its tensors.
        base: as of ``export_patch``.

    Raises:
        PatchError: damaged, or, at the end, the base's tensor is another.
    """
    if base is None:
        yield from _stored(patch, name)
        return
    changes, at = Changes(patch, name), 0
    for piece in after_pieces(base, patch, name):
        for positions, _ in changes.between(at, at + piece.size):
            yield positions.astype(np.int64) + at, piece[positions]
        at += piece.size


def _stored(patch: Patch, name: str) -> Iterator[tuple[NDArray[np.int64], Bits]]:
    """Flat indices and values as they are in the patch."""
    changes, size = Changes(patch, name), patch.tensors[name].num_elements
    for start in range(0, size, PIECE):
        for positions, values in changes.between(start, min(start + PIECE, size)):
            yield positions.astype(np.int64) + start, values
