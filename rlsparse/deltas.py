"""Rows of the tables that a trial's files give: base, patches, masks, chunk by chunk.

At most one chunk of each side is in memory. The serial reference of the distributed diff stage.
"""

from collections.abc import Sequence
from typing import Any

from rlsparse.checkpoint import Checkpoint, Chunk, chunks, fingerprint
from rlsparse.errors import CheckpointError
from rlsparse.kernels import magnitude_histogram, new_workspace
from rlsparse.masks import MaskFile, Packed, unpack
from rlsparse.names import layer_and_module
from rlsparse.patch import Patch, check_base, reconstruct
from rlsparse.tensor_file import TensorInfo
from rlsparse.views import ViewScan, check_view

Row = dict[str, Any]


def base_rows(base: Checkpoint, *, base_fingerprint: str | None = None) -> list[Row]:
    """Rows of table ``base_tensors``: one per chunk, tied tensors once, in order of name.

    Args:
        base: the base checkpoint.
        base_fingerprint: its fingerprint, column ``base``; computed if None.
    """
    base_fingerprint = base_fingerprint or fingerprint(base)
    rows = []
    for info in base.counted:
        for chunk in chunks(info.shape):
            histogram, sum_sq = magnitude_histogram(info.read(chunk.start, chunk.stop), info.dtype)
            rows.append(
                {
                    "base": base_fingerprint,
                    **place_of(info, chunk),
                    "shape": list(info.shape),
                    "dtype": info.dtype,
                    "sum_sq": sum_sq,
                    "magnitude_histogram": histogram.tolist(),
                }
            )
    return rows


def measure_patch(
    base: Checkpoint,
    patch: Patch,
    *,
    base_fingerprint: str,
    trial_id: str,
    step: int,
    views: Sequence[str],
    kind: str,
) -> tuple[list[Row], list[Row]]:
    """Rows of ``tensor_deltas`` and of ``masks`` of one snapshot, for every tensor of the base.

    One row of each per view and chunk, tensors in order of name, tied ones once. ``dtype`` is the
    stored format of the patch. ``magnitude_histogram_changed`` bins the base *as stored*, under
    every view, so that it divides by ``magnitude_histogram`` of ``base_tensors``.

    Args:
        base: the base checkpoint.
        patch: of the snapshot; its results are checked against their checksums.
        base_fingerprint: ``checkpoint.fingerprint`` of ``base``, computed once by the caller.
        trial_id: for the rows.
        step: of the snapshot; ``step_before`` is 0.
        views: number formats of ``definitions.VIEWS`` in which both sides are compared.
        kind: of the masks: final or snapshot.

    Raises:
        PatchError: the patch is damaged or belongs to another base.
        CheckpointError: unknown view.
    """
    for view in views:
        check_view(view)
    check_base(base, patch, base_fingerprint)
    deltas: list[Row] = []
    masks: list[Row] = []
    workspace = new_workspace()
    for info in base.counted:
        dtype = patch.tensors[info.name].dtype if info.name in patch.tensors else info.dtype
        for chunk, before, after in reconstruct(base, patch, info.name):
            place = place_of(info, chunk)
            for view in views:
                scan = ViewScan(chunk.num_elements, dtype, dtype, view)
                scan.add(before, after, workspace)
                counts = scan.counts()
                row = {"trial_id": trial_id, "view": view, **place}
                delta = {"step_before": 0, "step_after": step, "dtype": dtype, **counts.columns()}
                if dtype != info.dtype:  # the patch is against the cast base; bin the stored one
                    stored = info.read(chunk.start, chunk.stop)[unpack(counts.mask, before.size)]
                    histogram, _ = magnitude_histogram(stored, info.dtype)
                    delta["magnitude_histogram_changed"] = histogram.tolist()
                deltas.append(row | delta)
                mask = counts.mask.tobytes()
                masks.append(row | {"step": step, "kind": kind, "mask": mask})
    return deltas, masks


def mask_rows(
    base: Checkpoint, mask_file: MaskFile, *, trial_id: str, step: int, kind: str
) -> list[Row]:
    """Rows of ``masks`` from a mask file, in the stored view; chunked as ``measure_patch`` does.

    Args:
        base: the base checkpoint; a tensor that the file lacks has no rows.
        mask_file: masks over its weights.
        trial_id: for the rows.
        step: last step that the masks cover.
        kind: of the masks, such as ever_changed.

    Raises:
        CheckpointError: a mask has another shape than its tensor, or is damaged.
    """
    rows: list[Row] = []
    for info in base.counted:
        if info.name not in mask_file.shapes:
            continue
        if mask_file.shapes[info.name] != info.shape:
            raise CheckpointError(
                f"{info.name} is {list(info.shape)} in {base.path}, its mask in {mask_file.path} "
                f"{list(mask_file.shapes[info.name])}"
            )
        rows += tensor_mask_rows(
            info, mask_file.packed(info.name), trial_id=trial_id, step=step, kind=kind
        )
    return rows


def tensor_mask_rows(
    info: TensorInfo, packed: Packed, *, trial_id: str, step: int, kind: str
) -> list[Row]:
    """``mask_rows`` of one tensor, from its packed mask."""
    rows: list[Row] = []
    for chunk in chunks(info.shape):
        # Chunks start at a multiple of 64 elements, so at a whole byte.
        bits = packed[chunk.start // 8 : -(-chunk.stop // 8)]
        row = {"trial_id": trial_id, "view": "stored", **place_of(info, chunk)}
        rows.append(row | {"step": step, "kind": kind, "mask": bits.tobytes()})
    return rows


def place_of(info: TensorInfo, chunk: Chunk) -> Row:
    """The columns that say which weights a row is about."""
    layer, module = layer_and_module(info.name, info.shape)
    return {
        "tensor": info.name,
        "layer": layer,
        "module": module,
        "chunk": chunk.index,
        "start": chunk.start,
        "num_elements": chunk.num_elements,
    }
