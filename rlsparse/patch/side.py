"""A checkpoint that is not stored: its base, changed by a patch while it is read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import PatchError
from rlsparse.kernels import cast_bits
from rlsparse.patch import METADATA_KEY, PATCH_FILE, Changes, Patch
from rlsparse.patch.apply import check_fit
from rlsparse.tensor_file import Bits, TensorInfo, bits_dtype


@dataclass(frozen=True)
class PatchedInfo(TensorInfo):
    """A tensor of a base, cast to the patch's format and changed by it while it is read.

    ``file`` is the patch; ``offset`` counts bytes from the start of the whole tensor after, so
    that a slice is made as of any stored tensor. Besides the buffer of ``pieces``, reading holds
    one piece in the base's format if that is another one, and what the patch says of the piece.

    Attributes:
        base: the whole tensor before.
        patch: what the patch says of ``source``, and of no other tensor.
        source: the tensor of the patch; the embedding for a head that follows it.
    """

    base: TensorInfo
    patch: Patch
    source: str

    def _filled(self, start: int, stop: int, buffer: Bits) -> Iterator[Bits]:
        first = self.offset // buffer.itemsize
        stored = buffer
        if self.base.dtype != self.dtype:
            stored = np.empty(min(buffer.size, stop - start), bits_dtype(self.base.dtype))
        changes, position = Changes(self.patch, self.source), first + start
        for bits in self.base.pieces(position, first + stop, stored) if start < stop else ():
            piece = buffer[: bits.size]
            if stored is not buffer:
                piece[:] = cast_bits(bits, self.base.dtype, self.dtype)
            changes.apply(piece, position)
            yield piece
            position += piece.size


def open_side(path: Path | str, base: Checkpoint) -> tuple[Checkpoint, Patch | None]:
    """A checkpoint, and the patch that it is made of if ``path`` is one; only headers are read.

    The checksums of a patch are not checked: ``verify_patch`` does that, and reads everything.

    Args:
        path: what ``Checkpoint.open`` takes, or a patch file, or a folder with ``PATCH_FILE``.
        base: what the patch was made against.

    Raises:
        CheckpointError: as ``Checkpoint.open``.
        PatchError: the patch is damaged, behind a URL, or does not fit ``base``.
    """
    checkpoint = Checkpoint.open(path)
    if METADATA_KEY not in checkpoint.metadata:
        return checkpoint, None
    if isinstance(checkpoint.path, str):
        raise PatchError(f"{checkpoint.path} is a patch, and read at random: copy it here first")
    is_folder = checkpoint.path.is_dir()
    patch = Patch.open(checkpoint.path / PATCH_FILE if is_folder else checkpoint.path)
    return patched(base, patch), patch


def patched(base: Checkpoint, patch: Patch) -> Checkpoint:
    """The checkpoint after, with the tensors, formats and bits that ``apply_patch`` would write.

    Nothing is read: neither the base's fingerprint nor checksums are checked (``verify_patch``).
    A tied copy that the patch changes on its own is a tensor of its own.

    Raises:
        PatchError: a tensor is missing in the base, or of another shape or format there.
    """
    check_fit(base, patch)
    parts = {
        name: replace(patch, metadata={}, tensors={name: tensor}, data={name: patch.data[name]})
        for name, tensor in patch.tensors.items()
    }
    tensors: dict[str, TensorInfo] = {}
    for name, info in base.tensors.items():
        source = name if name in parts else base.tied.get(name, name)
        tensors[name] = info
        if source in parts:
            part, dtype = parts[source], parts[source].tensors[source].dtype
            tensors[name] = PatchedInfo(name, dtype, info.shape, patch.path, 0, info, part, source)
    tied = {name: owner for name, owner in base.tied.items() if _is_copy(patch, name, owner)}
    return Checkpoint(patch.path, tensors, base.metadata, tied, base.config)


def _is_copy(patch: Patch, name: str, owner: str) -> bool:
    one, other = patch.tensors.get(name), patch.tensors.get(owner)
    return one is None or (other is not None and one.xxh3_after == other.xxh3_after)
