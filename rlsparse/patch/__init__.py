"""Lossless difference of two checkpoints, as small as the change.

A patch is one safetensors file of two byte arrays. Its metadata entry ``rlsparse_patch`` is JSON:
format version, coding of the values, fingerprint of the base, notes, size and checksum of the
index; another entry has the checksum of that JSON. Array ``index``, again JSON, compressed where
the patch is, has of every tensor of the model its name, format, shape, number of changes, the
checksums of all its bytes before and after, and the table of its blocks (``blocks.Entry``). Tensors
of the base that a patch does not list are unchanged; an unlisted tied head follows its embedding. A
patch may be in another float format than the stored base: it is then against the base *cast* to
that format first (upcast, or rounded to nearest, ties to even), as training casts it.

A changed tensor is cut into blocks of some thousand changes, each encoded and compressed on its
own, so that any stretch can be read without the rest. Array ``data`` has the blocks of all tensors
in the order of the index, of each its streams. See ``blocks``, ``codec`` and ``values``.
"""

from rlsparse.patch.apply import (
    apply_patch,
    check_base,
    check_weights,
    reconstruct,
    verify_patch,
)
from rlsparse.patch.blocks import CODECS
from rlsparse.patch.file import METADATA_KEY, PATCH_FILE, Changes, Patch, PatchedTensor
from rlsparse.patch.write import TensorPair, new_patch, write_patch

__all__ = [
    "CODECS", "METADATA_KEY", "PATCH_FILE", "Changes", "Patch", "PatchedTensor", "TensorPair",
    "apply_patch", "check_base", "check_weights", "new_patch", "reconstruct", "verify_patch",
    "write_patch",
]  # fmt: skip
