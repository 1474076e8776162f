"""Lossless difference of two checkpoints, as small as the change.

A patch is one safetensors file. For each changed tensor ``t`` it holds the arrays of a codec
(``t.idx`` and ``t.val``, or ``t.bitmap``, ``t.rank`` and ``t.val``); values are the bit patterns
*after*, not differences, so NaN payloads and signed zeros survive. The metadata entry
``rlsparse_patch`` is JSON: format version, fingerprint of the base, and of every tensor its
format, shape, codec, number of changes and the sha256 of the result. Tensors of the base that a
patch does not list are unchanged; an unlisted tied head follows its embedding. A patch may be
in another float format than the stored base: it is then against the base *cast* to that format
first (upcast, or rounded to nearest, ties to even), as training casts it.

A new codec is one file with the contract in ``codec`` and one line in ``CODECS``.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsparse.checkpoint import Checkpoint, Chunk, chunks, fingerprint
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.kernels import FLOATS, cast_bits
from rlsparse.patch.bitmap import Bitmap
from rlsparse.patch.codec import Codec
from rlsparse.patch.indices import Indices
from rlsparse.tensor_file import (
    ITEMSIZE,
    Bits,
    TensorInfo,
    atomic_write,
    bits_dtype,
    header_bytes,
    read_header,
    save_checkpoint,
)

FORMAT_VERSION = "1"
METADATA_KEY = "rlsparse_patch"
PATCH_FILE = "weights.patch.safetensors"

CODECS: dict[str, Codec] = {"indices": Indices(), "bitmap": Bitmap()}
"""For each tensor the codec that takes the fewest bytes is used, the first on a tie."""


class TensorPair(NamedTuple):
    """One tensor before and after: flat bits of equal length, in format ``dtype``."""

    name: str
    dtype: str
    shape: Sequence[int]
    before_bits: Bits
    after_bits: Bits


@dataclass(frozen=True)
class PatchedTensor:
    """What a patch says of one tensor; ``codec`` is None where nothing changed.

    Attributes:
        sha256: of the bytes of the whole tensor after.
    """

    dtype: str
    shape: tuple[int, ...]
    codec: str | None
    num_changed: int
    sha256: str


# --- writing ---------------------------------------------------------------------------------


def write_patch(
    path: Path,
    pairs: Iterable[TensorPair],
    *,
    base_fingerprint: str,
    metadata: Mapping[str, str] | None = None,
) -> "Patch":
    """Write a patch, atomically, and open it; the same input gives the same bytes.

    Args:
        path: file to write, by convention ``*.patch.safetensors``.
        pairs: every tensor of the model, changed or not; taken one at a time.
        base_fingerprint: ``checkpoint.fingerprint`` of the base on disk.
        metadata: further notes, kept as ``Patch.metadata``.

    Raises:
        PatchError: bits do not fit their shape or format, or a name comes twice.
    """
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    tensors: dict[str, PatchedTensor] = {}
    # The header precedes the data and needs its sizes, so the data waits in an unnamed file.
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for pair in pairs:
            if pair.name in tensors:
                raise PatchError(f"cannot write {path}: tensor {pair.name} is given twice")
            tensors[pair.name], arrays = _encode(pair)
            for key, array in arrays.items():
                entries.append((f"{pair.name}.{key}", f"u{8 * array.itemsize}", array.shape))
                spool.write(array.data)
        content = {
            "version": FORMAT_VERSION,
            "base_fingerprint": base_fingerprint,
            "metadata": dict(metadata or {}),
            "tensors": {name: asdict(tensor) for name, tensor in tensors.items()},
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        spool.seek(0)
        with atomic_write(path) as stream:
            stream.write(header_bytes(entries, {METADATA_KEY: text}))
            shutil.copyfileobj(spool, stream, 2**20)
    return Patch.open(path)


def _encode(pair: TensorPair) -> tuple[PatchedTensor, dict[str, NDArray[Any]]]:
    name, dtype, shape, before, after = pair
    item, expected = bits_dtype(dtype), (math.prod(shape),)
    if {before.dtype, after.dtype} != {item} or {before.shape, after.shape} != {expected}:
        raise PatchError(
            f"tensor {name}: {dtype} {list(shape)} needs flat {item} bits of shape "
            f"{list(expected)} on both sides, got {before.dtype}{list(before.shape)} and "
            f"{after.dtype}{list(after.shape)}"
        )
    after = np.ascontiguousarray(after)
    sha256 = hashlib.sha256(after.data).hexdigest()
    changed: NDArray[np.bool_] = before != after
    num_changed = int(np.count_nonzero(changed))
    if not num_changed:
        return PatchedTensor(dtype, tuple(shape), None, 0, sha256), {}
    sizes = {codec: _stored_bytes(codec, after.size, num_changed, dtype) for codec in CODECS}
    codec = min(sizes, key=sizes.__getitem__)
    tensor = PatchedTensor(dtype, tuple(shape), codec, num_changed, sha256)
    return tensor, CODECS[codec].encode(changed, after)


def _value_dtype(dtype: str) -> str:
    return f"u{8 * ITEMSIZE[dtype]}"


def _stored_bytes(codec: str, num_elements: int, num_changed: int, dtype: str) -> int:
    layout = CODECS[codec].layout(num_elements, num_changed, _value_dtype(dtype))
    return sum(ITEMSIZE[array_dtype] * count for array_dtype, count in layout.values())


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """An opened patch; holds no file handle, so it pickles and needs no closing.

    Attributes:
        path: the file.
        base_fingerprint: of the checkpoint that it applies to.
        metadata: notes of whoever wrote it.
        tensors: name -> what it says of that tensor.
        arrays: the codecs' arrays in the file, ``<tensor>.<array>``.
    """

    path: Path
    base_fingerprint: str
    metadata: dict[str, str]
    tensors: dict[str, PatchedTensor]
    arrays: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> "Patch":
        """Open a patch and check that all its parts are there.

        Raises:
            PatchError: not a patch, of another format version, or damaged.
        """
        path = Path(path)
        try:
            arrays, notes = read_header(path)
        except CheckpointError as error:
            raise PatchError(f"not a readable patch: {error}") from error
        if METADATA_KEY not in notes:
            raise PatchError(f"{path} is not a patch: no {METADATA_KEY} in its metadata")
        try:
            content = json.loads(notes[METADATA_KEY])
            if content["version"] != FORMAT_VERSION:
                raise PatchError(
                    f"{path} is a patch of format {content['version']}, this release reads "
                    f"{FORMAT_VERSION}"
                )
            tensors = {
                name: PatchedTensor(**{**entry, "shape": tuple(entry["shape"])})
                for name, entry in content["tensors"].items()
            }
            patch = cls(path, content["base_fingerprint"], content["metadata"], tensors, arrays)
            for name, tensor in tensors.items():
                patch._check_layout(name, tensor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PatchError):
                raise
            raise PatchError(f"{path} has a damaged patch header: {error!r}") from error
        return patch

    def _check_layout(self, name: str, tensor: PatchedTensor) -> None:
        if tensor.codec is None and tensor.num_changed == 0:
            return
        if tensor.codec not in CODECS:
            raise PatchError(
                f"{self.path}: tensor {name} has the codec {tensor.codec}; known: "
                f"{', '.join(CODECS)}"
            )
        num_elements = math.prod(tensor.shape)
        layout = CODECS[tensor.codec].layout(
            num_elements, tensor.num_changed, _value_dtype(tensor.dtype)
        )
        for key, (dtype, count) in layout.items():
            array = self.arrays.get(f"{name}.{key}")
            if array is None or (array.dtype, array.shape) != (dtype, (count,)):
                raise PatchError(
                    f"{self.path} is damaged: tensor {name} needs an array {key} of {count} {dtype}"
                )

    def after_bits(self, name: str, before_bits: Bits, start: int, stop: int) -> Bits:
        """Bits after of the flat elements [start, stop) of tensor ``name``.

        Args:
            name: a tensor; one that the patch does not list comes back as it is.
            before_bits: the base's bits of the same elements, in the patch's format.
            start: first element.
            stop: one past the last.

        Raises:
            PatchError: the patch is damaged, or ``before_bits`` has another length.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tensor.codec is None:
            return before_bits
        if before_bits.shape != (stop - start,) or before_bits.dtype != bits_dtype(tensor.dtype):
            raise PatchError(
                f"elements [{start}, {stop}) of {name} in {tensor.dtype} given as "
                f"{before_bits.dtype}{list(before_bits.shape)}"
            )
        try:
            positions, after = CODECS[tensor.codec].decode(
                lambda key, first, last: self.arrays[f"{name}.{key}"].read(first, last),
                math.prod(tensor.shape),
                tensor.num_changed,
                start,
                stop,
            )
        except (PatchError, CheckpointError) as error:
            raise PatchError(f"{self.path} is damaged at tensor {name}: {error}") from error
        result = before_bits.copy()
        result[positions] = after
        return result

    @property
    def num_changed(self) -> int:
        """Weights whose bits differ, over all tensors."""
        return sum(tensor.num_changed for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


# --- applying --------------------------------------------------------------------------------


def check_base(base: Checkpoint, patch: Patch, base_fingerprint: str) -> None:
    """Refuse a base that the patch was not made against.

    A base stored in another float format fits: ``reconstruct`` casts it to the patch's.

    Raises:
        PatchError: another fingerprint, a tensor missing, of another shape, or of a format that
            cannot be cast.
    """
    for name, tensor in patch.tensors.items():
        info = base.tensors.get(name)
        if info is None:
            raise PatchError(f"{patch.path} changes tensor {name}, which {base.path} lacks")
        fits = info.dtype == tensor.dtype or {info.dtype, tensor.dtype} <= FLOATS.keys()
        if info.shape != tensor.shape or not fits:
            raise PatchError(
                f"tensor {name} is {info.dtype} {list(info.shape)} in {base.path}, "
                f"{patch.path} expects {tensor.dtype} {list(tensor.shape)}"
            )
    if base_fingerprint != patch.base_fingerprint:
        raise PatchError(
            f"{patch.path} belongs to the base with fingerprint {patch.base_fingerprint[:12]}, "
            f"{base.path} has {base_fingerprint[:12]}"
        )


def reconstruct(base: Checkpoint, patch: Patch, name: str) -> Iterator[tuple[Chunk, Bits, Bits]]:
    """Chunks of one tensor as (chunk, bits before, bits after), checked at the end.

    ``before`` is the base cast to the patch's format.

    Raises:
        PatchError: damaged, or the whole result does not have the recorded checksum.
    """
    if name not in patch.tensors:
        name = base.tied.get(name, name)
    info, tensor = base.tensors[name], patch.tensors.get(name)
    dtype = info.dtype if tensor is None else tensor.dtype
    digest = hashlib.sha256()
    for chunk in chunks(info.shape):
        before = cast_bits(info.read(chunk.start, chunk.stop), info.dtype, dtype)
        after = patch.after_bits(name, before, chunk.start, chunk.stop)
        digest.update(np.ascontiguousarray(after).data)
        yield chunk, before, after
    if tensor is not None and digest.hexdigest() != tensor.sha256:
        raise PatchError(f"{patch.path} is damaged: the result of {name} has another checksum")


def verify_patch(base: Checkpoint, patch: Patch) -> None:
    """Check that ``patch`` belongs to ``base`` and that every result has its checksum.

    Raises:
        PatchError: it does not, or it is damaged.
    """
    check_base(base, patch, fingerprint(base))
    for name in patch.tensors:
        for _ in reconstruct(base, patch, name):
            pass


def apply_patch(base_path: Path, patch_path: Path, out_path: Path) -> None:
    """Write the checkpoint after as folder ``out_path``, with the base's configuration files.

    Everything is checked before the first byte is written, checksums while writing;
    ``model.safetensors`` appears only once all of them agree. Results are in the
    patch's format, whatever that of the base and whatever ``config.json`` says.

    Raises:
        PatchError: wrong base, damaged patch, or ``out_path`` is not empty.
    """
    base, patch = Checkpoint.open(base_path), Patch.open(patch_path)
    if out_path.exists() and (not out_path.is_dir() or any(out_path.iterdir())):
        raise PatchError(f"{out_path} is there already and is not an empty folder")
    check_base(base, patch, fingerprint(base))
    tensors: dict[str, tuple[str, Sequence[int], Iterator[Bits]]] = {}
    for name, info in base.tensors.items():
        source = name if name in patch.tensors else base.tied.get(name, name)
        dtype = patch.tensors[source].dtype if source in patch.tensors else info.dtype
        pieces = (after for _, _, after in reconstruct(base, patch, name))
        tensors[name] = dtype, info.shape, pieces
    extra = base.path if isinstance(base.path, Path) and base.path.is_dir() else None
    save_checkpoint(out_path, tensors, base.metadata or None, extra)
