"""Patches as vLLM takes them: ``CheckpointWeightPatch`` of its checkpoint loader.

vLLM maps names of the checkpoint to its own tensors, and splits and packs them, so that a patch
goes to any number of workers as it is. What it does with one: it fills a tensor of the whole shape
with NaN, for *unchanged*, puts the values in, and copies what is not NaN. So values are floats and
none is NaN. It is not transactional: where loading fails half way, a worker has some of the new
weights, and must be loaded anew. What it is sent must be contiguous (vllm issue 57130). Values of
float8 it cannot put in on the CPU, where torch has no ``index_copy_`` of them.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import PatchError
from rlsparse.kernels import FLOATS
from rlsparse.patch import Patch
from rlsparse.patch.apply import check_fit
from rlsparse.patch.export import changed_values, check_source

MODULE = "vllm.model_executor.model_loader.checkpoint_weight_patch"
FIELDS = ("name", "shape", "dtype", "values", "indices")
"""Fields of ``CheckpointWeightPatch`` that are known here, by name."""

_REMEDY = "use the plain file of `rlsparse patch export` instead"


def vllm_patches(patch: Patch, base: Checkpoint | None = None) -> Iterator[Any]:
    """What changed, for ``load_checkpoint_weight_patches`` of vLLM; all is checked at once.

    One ``CheckpointWeightPatch`` for each changed tensor, made when it is asked for: ``values``
    [k], those after in the tensor's format, and ``indices`` [k], flat, int64, ascending; both are
    contiguous and on the CPU.

    Args:
        patch: what to load.
        base: the checkpoint that it was made against; relative values need it.

    Raises:
        PatchError: vLLM is not installed or has other fields; a value is NaN, a tensor is not of
            floats; and as ``export_patch``. Nothing was given then.
    """
    made = _patch_class()
    check_source(patch, base)
    if base is not None:
        check_fit(base, patch)
    names = [name for name, one in patch.tensors.items() if one.num_changed]
    for name in names:
        _check_values(patch, name, base)
    return (_made(made, patch, name, base) for name in names)


def _patch_class() -> Any:
    try:
        found = importlib.import_module(MODULE).CheckpointWeightPatch
    except (ImportError, AttributeError) as error:
        raise PatchError(
            f"no CheckpointWeightPatch of vLLM here ({error}): install a vLLM that has "
            f"{MODULE}, or {_REMEDY}"
        ) from error
    fields = [*inspect.signature(found).parameters]
    if {*fields} != {*FIELDS}:
        raise PatchError(
            f"CheckpointWeightPatch of this vLLM has the fields {', '.join(fields)}; known are "
            f"{', '.join(FIELDS)}: update rlsparse, or {_REMEDY}"
        )
    return found


def _check_values(patch: Patch, name: str, base: Checkpoint | None) -> None:
    dtype = patch.tensors[name].dtype
    if dtype not in FLOATS:
        raise PatchError(
            f"{patch.path} changes {name}, which is {dtype}: vLLM takes changes of "
            f"{', '.join(FLOATS)}; {_REMEDY}"
        )
    for indices, bits in changed_values(patch, name, base):
        is_nan = np.isnan(bits.view(FLOATS[dtype]))
        if is_nan.any():
            raise PatchError(
                f"{patch.path} makes element {indices[is_nan.argmax()]} of {name} NaN, by which "
                f"vLLM knows what is unchanged: {_REMEDY}"
            )


def _made(made: Any, patch: Patch, name: str, base: Checkpoint | None) -> Any:
    one = patch.tensors[name]
    indices, bits = map(np.concatenate, zip(*changed_values(patch, name, base), strict=True))
    dtype = getattr(torch, FLOATS[one.dtype].name)
    return made(
        name=name,
        shape=one.shape,
        dtype=dtype,
        values=torch.from_numpy(bits).view(dtype),
        indices=torch.from_numpy(indices),
    )
