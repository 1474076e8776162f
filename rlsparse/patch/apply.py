"""From the base and a patch to the checkpoint after: checked, in pieces, or as a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from rlsparse.checkpoint import Checkpoint, Chunk, chunks, fingerprint
from rlsparse.errors import PatchError
from rlsparse.kernels import FLOATS, cast_bits
from rlsparse.patch.file import Changes, Patch
from rlsparse.patch.write import cast_pieces
from rlsparse.tensor_file import Bits, save_checkpoint

_GIVE_BASE = "give the checkpoint that it was made against"


def check_whole(patch: Patch) -> None:
    """Refuse a patch that is of parts of tensors.

    Raises:
        PatchError: it is.
    """
    for name, tensor in patch.tensors.items():
        if tensor.part is not None:
            raise PatchError(
                f"{patch.path} is of a part of {name}, as one of several workers wrote it: apply "
                "it together with the others (rlsparse.weight_sync)"
            )


def check_fit(base: Checkpoint, patch: Patch) -> None:
    """Refuse a base whose tensors are others than the patch was made against.

    A base stored in another float format fits: it is cast to the patch's.

    Raises:
        PatchError: a tensor is missing, of another shape, or of a format that cannot be cast, or
            the patch is of parts of tensors.
    """
    check_whole(patch)
    for name, tensor in patch.tensors.items():
        info = base.tensors.get(name)
        if info is None:
            raise PatchError(
                f"{patch.path} is of tensor {name}, which {base.path} lacks; {_GIVE_BASE}"
            )
        fits = info.dtype == tensor.dtype or {info.dtype, tensor.dtype} <= FLOATS.keys()
        if info.shape != tensor.shape or not fits:
            raise PatchError(
                f"tensor {name} is {info.dtype} {list(info.shape)} in {base.path}, "
                f"{patch.path} expects {tensor.dtype} {list(tensor.shape)}; {_GIVE_BASE}"
            )


def check_base(base: Checkpoint, patch: Patch, base_fingerprint: str) -> None:
    """Refuse a base that the patch was not made against, by the fingerprint; nothing is read.

    Versions of a weight sync name no fingerprint: of them checksums alone tell, when they are read.

    Raises:
        PatchError: as ``check_fit``, or another fingerprint.
    """
    check_fit(base, patch)
    if base_fingerprint != patch.base_fingerprint and "base_version" not in patch.metadata:
        raise PatchError(
            f"{patch.path} belongs to the base with fingerprint {patch.base_fingerprint[:12]}, "
            f"{base.path} has {base_fingerprint[:12]}; {_GIVE_BASE}"
        )


class _Checksums:
    """Of one tensor before and after, to be held against what a patch says of it."""

    def __init__(self, base: Checkpoint, patch: Patch, name: str) -> None:
        self._base, self._patch, self._name = base, patch, name
        self.before, self.after = xxhash.xxh3_128(), xxhash.xxh3_128()

    def check_before(self) -> None:
        """Refuse another base."""
        tensor, found = self._patch.tensors.get(self._name), self.before.hexdigest()
        if tensor is not None and found != tensor.xxh3_before:
            raise PatchError(
                f"{self._patch.path} belongs to another base: {self._name} of {self._base.path} "
                f"has the checksum {found[:12]}, not {tensor.xxh3_before[:12]}; "
                f"{_GIVE_BASE}"
            )

    def check(self) -> None:
        """Refuse another base, and a result that is not what was there when it was written."""
        self.check_before()
        tensor = self._patch.tensors.get(self._name)
        if tensor is not None and self.after.hexdigest() != tensor.xxh3_after:
            raise PatchError(
                f"{self._patch.path} is damaged: the result of {self._name} has another checksum"
            )


def check_weights(base: Checkpoint, patch: Patch) -> None:
    """Read all tensors that a patch is of, and refuse a base in which one is another.

    Raises:
        PatchError: as ``check_fit``, or a tensor has another checksum.
    """
    check_fit(base, patch)
    for name, tensor in patch.tensors.items():
        sums = _Checksums(base, patch, name)
        for piece in cast_pieces(base.tensors[name], tensor.dtype):
            sums.before.update(piece.data)
        sums.check_before()


def after_pieces(base: Checkpoint, patch: Patch, name: str) -> Iterator[Bits]:
    """Pieces of one tensor after, in order; each is valid until the next.

    Raises:
        PatchError: damaged, or, at the end, the tensor has another checksum before or after.
    """
    source = _source(base, patch, name)
    changes, sums, at = Changes(patch, source), _Checksums(base, patch, source), 0
    for piece in cast_pieces(base.tensors[source], _dtype_after(base, patch, source)):
        sums.before.update(piece.data)
        changes.apply(piece, at)
        sums.after.update(piece.data)
        yield piece
        at += piece.size
    sums.check()


def reconstruct(base: Checkpoint, patch: Patch, name: str) -> Iterator[tuple[Chunk, Bits, Bits]]:
    """Chunks of one tensor as (chunk, bits before, bits after).

    ``before`` is the base cast to the patch's format.

    Raises:
        PatchError: damaged, or, at the end, the tensor has another checksum before or after.
    """
    source = _source(base, patch, name)
    info, dtype = base.tensors[source], _dtype_after(base, patch, source)
    changes, sums = Changes(patch, source), _Checksums(base, patch, source)
    for chunk in chunks(info.shape):
        before = cast_bits(info.read(chunk.start, chunk.stop), info.dtype, dtype)
        after = before.copy()
        changes.apply(after, chunk.start)
        sums.before.update(before.data)
        sums.after.update(after.data)
        yield chunk, before, after
    sums.check()


def _source(base: Checkpoint, patch: Patch, name: str) -> str:
    """The tensor of a patch that says what becomes of one of the base."""
    return name if name in patch.tensors else base.tied.get(name, name)


def _dtype_after(base: Checkpoint, patch: Patch, source: str) -> str:
    return (patch.tensors if source in patch.tensors else base.tensors)[source].dtype


def verify_patch(base: Checkpoint, patch: Patch) -> None:
    """Check that a patch is of a base, whole, and that every result has its checksum.

    Raises:
        PatchError: it is not, or it is damaged.
    """
    check_fit(base, patch)
    for name in patch.tensors:
        for _ in after_pieces(base, patch, name):
            pass
    check_base(base, patch, fingerprint(base))


def check_empty(folder: Path) -> None:
    """Refuse to write a checkpoint where there is something.

    Raises:
        PatchError: it is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PatchError(f"{folder} is there already and is not an empty folder; give another")


def apply_patch(base_path: str | Path, patch_path: Path, out_path: Path) -> None:
    """Write the checkpoint after as folder ``out_path``, with the base's configuration files.

    The base's weights and the patch's blocks are checked before the first byte is written, the
    results while writing; ``model.safetensors`` appears only once all of them agree. Results are
    in the patch's format, whatever that of the base and whatever ``config.json`` says.

    Raises:
        PatchError: wrong base, damaged patch, or ``out_path`` is not empty.
    """
    base, patch = Checkpoint.open(base_path), Patch.open(patch_path)
    check_empty(out_path)
    check_weights(base, patch)
    for name in patch.tensors:
        Changes(patch, name).check()
    tensors: dict[str, tuple[str, Sequence[int], Iterator[Bits]]] = {}
    for name, info in base.tensors.items():
        dtype = _dtype_after(base, patch, _source(base, patch, name))
        tensors[name] = dtype, info.shape, after_pieces(base, patch, name)
    extra = base.path if isinstance(base.path, Path) and base.path.is_dir() else None
    save_checkpoint(out_path, tensors, base.metadata or None, extra)
