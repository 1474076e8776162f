"""What changed between two checkpoints, or between a base and its patch, chunk by chunk.

Streams: at most one chunk of each side is in memory. ``measure_patch`` is the serial reference of
the distributed diff stage.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsparse.checkpoint import Checkpoint, Chunk, chunks, fingerprint
from rlsparse.definitions import DEFINITIONS, VIEWS
from rlsparse.errors import CheckpointError
from rlsparse.kernels import FLOATS, ChunkCounts, cast_bits, magnitude_histogram, measure
from rlsparse.masks import MaskFile
from rlsparse.names import layer_and_module
from rlsparse.patch import Patch, check_base, reconstruct
from rlsparse.tensor_file import Bits, TensorInfo

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
                    **_place(info, chunk),
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
        _check_view(view, VIEWS)
    check_base(base, patch, base_fingerprint)
    deltas: list[Row] = []
    masks: list[Row] = []
    for info in base.counted:
        dtype = patch.tensors[info.name].dtype if info.name in patch.tensors else info.dtype
        for chunk, before, after in reconstruct(base, patch, info.name):
            place = _place(info, chunk)
            for view in views:
                counts = _measure_view(before, after, dtype, dtype, view)
                if dtype != info.dtype:
                    stored = info.read(chunk.start, chunk.stop)
                    counts = _binned_by(counts, stored, info.dtype)
                row = {"trial_id": trial_id, "view": view, **place}
                delta = {"step_before": 0, "step_after": step, "dtype": dtype, **counts.columns()}
                deltas.append(row | delta)
                masks.append(row | {"step": step, "kind": kind, "mask": counts.mask})
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
        packed = mask_file.packed(info.name)
        for chunk in chunks(info.shape):
            # Chunks start at a multiple of 64 elements, so at a whole byte.
            bits = packed[chunk.start // 8 : -(-chunk.stop // 8)]
            row = {"trial_id": trial_id, "view": "stored", **_place(info, chunk)}
            rows.append(row | {"step": step, "kind": kind, "mask": bits.tobytes()})
    return rows


def _place(info: TensorInfo, chunk: Chunk) -> Row:
    layer, module = layer_and_module(info.name, info.shape)
    return {
        "tensor": info.name,
        "layer": layer,
        "module": module,
        "chunk": chunk.index,
        "start": chunk.start,
        "num_elements": chunk.num_elements,
    }


def _measure_view(
    before: Bits, after: Bits, dtype_before: str, dtype_after: str, view: str
) -> ChunkCounts:
    """Compare in a view; tensors without values (integers) are compared as stored."""
    if view == "stored" or (dtype_before == dtype_after and dtype_before not in FLOATS):
        return measure(before, after, dtype_before)
    counts = measure(
        cast_bits(before, dtype_before, view), cast_bits(after, dtype_after, view), view
    )
    return _binned_by(counts, before, dtype_before)


def _binned_by(counts: ChunkCounts, before: Bits, dtype: str) -> ChunkCounts:
    """``counts`` with the changed weights binned by the magnitude of ``before``."""
    mask = np.frombuffer(counts.mask, np.uint8)
    changed = np.unpackbits(mask, count=before.size, bitorder="little").view(np.bool_)
    histogram, _ = magnitude_histogram(before[changed], dtype)
    return replace(counts, magnitude_histogram_changed=histogram.tolist())


def _check_view(view: str, allowed: Sequence[str]) -> None:
    if view not in allowed:
        raise CheckpointError(f"unknown number format {view!r}; choose of {', '.join(allowed)}")


# --- two checkpoints -------------------------------------------------------------------------


@dataclass(frozen=True)
class Diff:
    """Result of ``diff_checkpoints``.

    Attributes:
        before: path, number of tensors and of elements, and elements by format, of one side.
        after: likewise.
        accounting: elements: ``total_before``, ``total_after``, ``compared``, ``tied_before``,
            ``tied_after``, ``removed``, ``added``, ``reshaped_before``, ``reshaped_after``; and
            the names of ``tied_tensors``, ``removed_tensors``, ``added_tensors``,
            ``reshaped_tensors`` and ``resized_tensors`` (compared in their common rows).
        tensors: per compared tensor, as in the JSON.
        rows: per chunk, the columns of ``tensor_deltas``; trial and steps are None.
    """

    before: Row
    after: Row
    accounting: Row
    tensors: list[Row]
    rows: list[Row]

    @property
    def num_elements(self) -> int:
        """Compared weights."""
        return int(self.accounting["compared"])

    @property
    def sparsity(self) -> dict[str, float]:
        """Fraction of the compared weights that is unchanged, by definition."""
        return _sparsity(self.rows)

    def to_json(self) -> Row:
        """The content of ``rlsparse diff --json``."""
        return {
            "before": self.before,
            "after": self.after,
            "num_elements": self.num_elements,
            "accounting": self.accounting,
            "sparsity": self.sparsity,
            "tensors": self.tensors,
        }


def diff_checkpoints(before: Path | str, after: Path | str, *, cast: str | None = None) -> Diff:
    """Compare two checkpoints tensor by tensor.

    Where only the number of rows of an embedding or output head differs (a resized vocabulary),
    the common rows are compared and the others count as added or removed.

    Args:
        before: folder or file.
        after: folder or file.
        cast: number format to which both sides are rounded first; needed where formats differ.

    Raises:
        CheckpointError: unreadable, formats differ without ``cast``, or nothing in common.
    """
    if cast is not None:
        _check_view(cast, VIEWS[1:])
    left, right = Checkpoint.open(before), Checkpoint.open(after)
    accounting, pairs = _match(left, right)
    for one, other, _ in pairs:
        if one.dtype != other.dtype and cast is None:
            raise CheckpointError(
                f"{one.name} is {one.dtype} in {left.path} and {other.dtype} in {right.path}; "
                f"choose the format to compare them in: --cast {one.dtype} or --cast {other.dtype}"
            )
    rows: list[Row] = []
    tensors: list[Row] = []
    for one, other, shape in pairs:
        of_tensor = list(_compare(one, other, shape, cast))
        rows += of_tensor
        layer, module = layer_and_module(one.name, shape)
        tensors.append(
            {
                "name": one.name,
                "layer": layer,
                "module": module,
                "shape": list(shape),
                "dtype_before": one.dtype,
                "dtype_after": other.dtype,
                "num_elements": math.prod(shape),
                "sparsity": _sparsity(of_tensor),
            }
        )
    return Diff(_side(left), _side(right), accounting, tensors, rows)


_Pair = tuple[TensorInfo, TensorInfo, tuple[int, ...]]


def _match(left: Checkpoint, right: Checkpoint) -> tuple[Row, list[_Pair]]:
    """The accounting, and the tensors to compare with the shape that they have in common."""
    ours, theirs = ({info.name: info for info in side.counted} for side in (left, right))
    listed: dict[str, list[str]] = {
        "tied": sorted({*left.tied, *right.tied}),
        "removed": sorted(ours.keys() - theirs.keys()),
        "added": sorted(theirs.keys() - ours.keys()),
        "reshaped": [],
        "resized": [],
    }
    count = Counter(
        tied_before=sum(left.tensors[name].num_elements for name in left.tied),
        tied_after=sum(right.tensors[name].num_elements for name in right.tied),
        removed=sum(ours[name].num_elements for name in listed["removed"]),
        added=sum(theirs[name].num_elements for name in listed["added"]),
    )
    pairs: list[_Pair] = []
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        shape = _common_shape(one, other)
        if shape is None:
            listed["reshaped"].append(name)
            count.update(reshaped_before=one.num_elements, reshaped_after=other.num_elements)
            continue
        if one.shape != other.shape:
            listed["resized"].append(name)
        num_common = math.prod(shape)
        count.update(
            compared=num_common,
            removed=one.num_elements - num_common,
            added=other.num_elements - num_common,
        )
        pairs.append((one, other, shape))
    if not count["compared"]:
        raise CheckpointError(
            f"{left.path} and {right.path} have no weights in common: "
            f"{len(listed['reshaped'])} tensors differ in shape, {len(listed['removed'])} are only "
            f"in the first, {len(listed['added'])} only in the second; are they of one model?"
        )
    total_before = sum(info.num_elements for info in left.tensors.values())
    total_after = sum(info.num_elements for info in right.tensors.values())
    assert total_before == sum(
        count[part] for part in ("compared", "tied_before", "removed", "reshaped_before")
    )
    assert total_after == sum(
        count[part] for part in ("compared", "tied_after", "added", "reshaped_after")
    )
    accounting: Row = {"total_before": total_before, "total_after": total_after}
    accounting |= {part: count[part] for part in _PARTS}
    return accounting | {f"{part}_tensors": names for part, names in listed.items()}, pairs


_PARTS = (
    "compared", "tied_before", "tied_after", "removed", "added", "reshaped_before",
    "reshaped_after",
)  # fmt: skip


def _common_shape(one: TensorInfo, other: TensorInfo) -> tuple[int, ...] | None:
    """The shape that is compared: the common rows of a resized vocabulary; None for reshaped."""
    if one.shape == other.shape:
        return one.shape
    is_vocabulary = layer_and_module(one.name, one.shape)[1] in ("embed", "head")
    if not is_vocabulary or not one.shape or one.shape[1:] != other.shape[1:]:
        return None
    return min(one.shape[0], other.shape[0]), *one.shape[1:]


def _compare(
    one: TensorInfo, other: TensorInfo, shape: tuple[int, ...], cast: str | None
) -> Iterator[Row]:
    """Rows of one pair of tensors; common rows come first in both, so positions agree."""
    for chunk in chunks(shape):
        before = one.read(chunk.start, chunk.stop)
        after = other.read(chunk.start, chunk.stop)
        counts = _measure_view(before, after, one.dtype, other.dtype, cast or "stored")
        nobody = {"trial_id": None, "step_before": None, "step_after": None}
        place = _place(one, chunk) | {"view": cast or "stored", "dtype": other.dtype}
        yield nobody | place | counts.columns()


def _sparsity(rows: Sequence[Row]) -> dict[str, float]:
    """Fraction unchanged by definition; 1 for an empty tensor."""
    num_elements = sum(row["num_elements"] for row in rows)
    return {
        name: 1 - sum(row[f"num_changed_{name}"] for row in rows) / max(num_elements, 1)
        for name in DEFINITIONS
    }


def _side(checkpoint: Checkpoint) -> Row:
    by_dtype: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        by_dtype[info.dtype] += info.num_elements
    return {
        "path": str(checkpoint.path),
        "num_tensors": len(checkpoint.tensors),
        "num_elements": by_dtype.total(),
        "num_elements_by_dtype": dict(sorted(by_dtype.items())),
    }
