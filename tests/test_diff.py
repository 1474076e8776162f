import json
import math

import ml_dtypes
import numpy as np
import planted
import pytest
from planted import FLOATS, Tensor

from rlsparse import checkpoint, diff, tables
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.definitions import DEFINITIONS, NUM_EXPONENTS
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.masks import read_masks, write_masks
from rlsparse.patch import Patch, TensorPair, write_patch

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def weights(tensor: Tensor) -> np.ndarray:
    return tensor.bits.view(FLOATS[tensor.dtype]).astype(np.float64)


def naive_changed(before: Tensor, after: Tensor) -> dict[str, np.ndarray]:
    """Which weights changed, by definition; finite weights only."""
    a, b = weights(before), weights(after)
    delta = np.abs(b - a)
    changed = {"bitwise": before.bits != after.bits}
    for name in DEFINITIONS[1:]:
        kind, tolerance = name.split("_")
        scale = np.maximum(np.abs(a), np.abs(b)) if kind == "rel" else 1
        changed[name] = delta > float(tolerance) * scale
    return changed


def cast(tensor: Tensor, dtype: str) -> Tensor:
    values = weights(tensor).astype(np.float32).astype(FLOATS[dtype])
    return Tensor(dtype, tensor.shape, values.view(planted.unsigned(dtype)))


def make_patch(pair: planted.Pair) -> Patch:
    return write_patch(
        pair.before.parent / "p",
        [
            TensorPair(name, t.dtype, t.shape, t.bits, pair.tensors_after[name].bits)
            for name, t in pair.tensors_before.items()
        ],
        base_fingerprint=fingerprint(Checkpoint.open(pair.before)),
    )


def measure(pair: planted.Pair, patch: Patch, **changes):
    base = Checkpoint.open(pair.before)
    arguments = {
        "base_fingerprint": fingerprint(base), "trial_id": "t", "step": 10, "views": ["stored"],
        "kind": "final",
    }  # fmt: skip
    return diff.measure_patch(base, patch, **(arguments | changes))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 elements, so that small tensors have several."""

    def small(shape, max_elements=128):
        return checkpoint.chunks(shape, max_elements)

    monkeypatch.setattr("rlsparse.diff.chunks", small)
    monkeypatch.setattr("rlsparse.patch.chunks", small)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3"])
def test_diff_agrees_with_a_naive_script(tmp_path, small_chunks, dtype):
    pair = planted.make_pair(tmp_path, dtype)
    found = diff.diff_checkpoints(pair.before, str(pair.after)).to_json()
    json.dumps(found, allow_nan=False)
    total = sum(t.bits.size for t in pair.tensors_before.values())
    assert found["num_elements"] == total
    changed = {
        name: naive_changed(tensor, pair.tensors_after[name])
        for name, tensor in pair.tensors_before.items()
    }
    assert changed[QUERY]["bitwise"].tolist() == pair.changed[QUERY].tolist()
    for definition in DEFINITIONS:
        count = sum(int(of[definition].sum()) for of in changed.values())
        assert found["sparsity"][definition] == 1 - count / total
    assert [tensor["name"] for tensor in found["tensors"]] == sorted(planted.LLAMA_SHAPES)
    query = next(tensor for tensor in found["tensors"] if tensor["name"] == QUERY)
    assert query == {
        "name": QUERY, "layer": 0, "module": "q", "shape": [16, 16], "dtype_before": dtype,
        "dtype_after": dtype, "num_elements": 256,
        "sparsity": {d: 1 - int(changed[QUERY][d].sum()) / 256 for d in DEFINITIONS},
    }  # fmt: skip
    assert set(found) == {
        "before", "after", "num_elements", "accounting", "sparsity", "tensors",
    }  # fmt: skip
    assert found["before"] == {
        "path": str(pair.before), "num_tensors": 6, "num_elements": total,
        "num_elements_by_dtype": {dtype: total},
    }  # fmt: skip


def test_rows_fit_the_table(tmp_path, small_chunks):
    pair = planted.make_pair(tmp_path)
    rows = diff.diff_checkpoints(pair.before, pair.after).rows
    table = tables.from_rows(rows, "tensor_deltas")
    assert table.column_names == tables.SCHEMAS["tensor_deltas"].names
    assert sum(table["num_elements"].to_pylist()) == sum(
        math.prod(shape) for shape in planted.LLAMA_SHAPES.values()
    )


def test_accounting(tmp_path):
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> Tensor:
        return planted.random_tensor(rng, "bf16", shape)

    embed, query, norm = tensor(10, 4), tensor(4, 4), tensor(4)
    grown = Tensor("bf16", (13, 4), np.concatenate([embed.bits ^ 1, tensor(3, 4).bits]))
    before = {EMBED: embed, "lm_head.weight": embed, QUERY: query, NORM: norm, "gone": tensor(5)}
    after = {
        EMBED: grown,
        "lm_head.weight": grown,
        QUERY: tensor(4, 2),
        NORM: norm,
        "new": tensor(7),
    }
    tie = {"tie_word_embeddings": True}
    found = diff.diff_checkpoints(
        planted.write_folder(tmp_path / "a", before, tie),
        planted.write_folder(tmp_path / "b", after, tie),
    )
    assert found.accounting == {
        "total_before": 40 + 40 + 16 + 4 + 5, "total_after": 52 + 52 + 8 + 4 + 7,
        "compared": 40 + 4, "tied_before": 40, "tied_after": 52, "removed": 5, "added": 12 + 7,
        "reshaped_before": 16, "reshaped_after": 8, "tied_tensors": ["lm_head.weight"],
        "removed_tensors": ["gone"], "added_tensors": ["new"], "reshaped_tensors": [QUERY],
        "resized_tensors": [EMBED],
    }  # fmt: skip
    assert found.num_elements == 44
    assert found.sparsity["bitwise"] == 1 - 40 / 44
    shrunk = diff.diff_checkpoints(tmp_path / "b", tmp_path / "a")
    assert (shrunk.accounting["removed"], shrunk.accounting["added"]) == (12 + 7, 5)
    assert shrunk.sparsity == found.sparsity


def test_only_vocabularies_are_resized(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": 6, EMBED: 6}
    folders = []
    for extra in (0, 2):
        tensors = {
            name: planted.random_tensor(rng, "bf16", (rows + extra, 2))
            for name, rows in shapes.items()
        }
        folders.append(planted.write_folder(tmp_path / str(extra), tensors))
    accounting = diff.diff_checkpoints(*folders).accounting
    assert accounting["resized_tensors"] == [EMBED]
    assert accounting["reshaped_tensors"] == ["model.layers.0.mlp.up_proj.weight"]


def test_mixed_formats_need_a_cast(tmp_path):
    pair = planted.make_pair(tmp_path / "bf16")
    wide = {
        name: Tensor(
            "fp32", t.shape,
            (t.bits.astype(np.uint32) << 16) + np.where(pair.changed[name], 2**16, 5).astype("u4"),
        )
        for name, t in pair.tensors_before.items()
    }  # fmt: skip
    after = planted.write_folder(tmp_path / "wide", wide)
    with pytest.raises(CheckpointError, match=r"is bf16 in .* and fp32 in .*--cast bf16"):
        diff.diff_checkpoints(pair.before, after)
    total = sum(t.bits.size for t in wide.values())
    num_changed = sum(int(changed.sum()) for changed in pair.changed.values())
    rounded = diff.diff_checkpoints(pair.before, after, cast="bf16")
    assert rounded.sparsity["bitwise"] == 1 - num_changed / total
    assert rounded.tensors[0]["dtype_before"] == "bf16"
    assert rounded.tensors[0]["dtype_after"] == "fp32"
    exact = diff.diff_checkpoints(pair.before, after, cast="fp32")
    assert exact.sparsity["bitwise"] == 0
    for wrong in ("stored", "int4"):
        with pytest.raises(CheckpointError, match="choose of fp32, bf16"):
            diff.diff_checkpoints(pair.before, after, cast=wrong)


def test_nothing_in_common(tmp_path):
    tensor = Tensor("bf16", (2,), np.zeros(2, "<u2"))
    one = planted.write_folder(tmp_path / "one", {"a": tensor})
    other = planted.write_folder(tmp_path / "other", {"b": tensor})
    with pytest.raises(CheckpointError, match="no weights in common"):
        diff.diff_checkpoints(one, other)


def test_integers_and_empty_tensors(tmp_path):
    before = {
        "ids": Tensor("i64", (3,), np.array([1, 2, 3], "<u8")),
        "none": Tensor("bf16", (0,), np.array([], "<u2")),
        "w": Tensor("bf16", (1,), np.array([0], "<u2")),
    }
    after = {**before, "ids": Tensor("i64", (3,), np.array([1, 2, 4], "<u8"))}
    folders = (
        planted.write_folder(tmp_path / "a", before),
        planted.write_folder(tmp_path / "b", after),
    )
    for view in (None, "fp16"):
        found = diff.diff_checkpoints(*folders, cast=view)
        assert found.sparsity["bitwise"] == 1 - 1 / 4
        assert [t["sparsity"]["bitwise"] for t in found.tensors] == [1 - 1 / 3, 1.0, 1.0]


# --- base and patch --------------------------------------------------------------------------


def test_base_rows(tmp_path, small_chunks):
    pair = planted.make_pair(tmp_path)
    base = Checkpoint.open(pair.before)
    rows = diff.base_rows(base)
    table = tables.from_rows(rows, "base_tensors")
    assert table.column_names == tables.SCHEMAS["base_tensors"].names
    assert rows == diff.base_rows(base, base_fingerprint=fingerprint(base))
    assert {row["base"] for row in rows} == {fingerprint(base)}
    of_embed = [row for row in rows if row["tensor"] == EMBED]
    assert [(row["start"], row["num_elements"]) for row in of_embed] == [
        (0, 128), (128, 128), (256, 128), (384, 128), (512, 80),
    ]  # fmt: skip
    values = weights(pair.tensors_before[EMBED])
    assert sum(sum(row["magnitude_histogram"]) for row in of_embed) == values.size
    for row in of_embed:
        part = values[row["start"] : row["start"] + row["num_elements"]]
        assert row["sum_sq"] == pytest.approx(float((part**2).sum()), rel=1e-12)


def test_patch_measures_as_the_two_checkpoints_do(tmp_path, small_chunks):
    pair = planted.make_pair(tmp_path)
    deltas, masks = measure(pair, make_patch(pair))
    reference = diff.diff_checkpoints(pair.before, pair.after).rows
    identity = {"trial_id": "t", "step_before": 0, "step_after": 10}
    assert deltas == [row | identity for row in reference]
    for name, rows in (("tensor_deltas", deltas), ("masks", masks)):
        assert tables.from_rows(rows, name).column_names == tables.SCHEMAS[name].names
    for name, changed in pair.changed.items():
        parts = [row for row in masks if row["tensor"] == name]
        bits = [
            np.unpackbits(np.frombuffer(r["mask"], np.uint8), bitorder="little")[
                : r["num_elements"]
            ]
            for r in parts
        ]
        assert np.concatenate(bits).astype(bool).tolist() == changed.tolist()
        assert {(row["step"], row["kind"], row["view"]) for row in parts} == {
            (10, "final", "stored")
        }


def test_views_cast_both_sides(tmp_path):
    pair = planted.make_pair(tmp_path, "fp32", density=0.5)
    views = ["stored", "fp32", "bf16", "fp16", "fp8_e4m3"]
    deltas, _ = measure(pair, make_patch(pair), views=views)
    assert [row["view"] for row in deltas] == views * 6
    assert {row["dtype"] for row in deltas} == {"fp32"}
    for row in deltas:
        before, after = pair.tensors_before[row["tensor"]], pair.tensors_after[row["tensor"]]
        dtype = "fp32" if row["view"] == "stored" else row["view"]
        changed = naive_changed(cast(before, dtype), cast(after, dtype))
        for definition in DEFINITIONS:
            assert row[f"num_changed_{definition}"] == changed[definition].sum()
    stored, same = deltas[:2]
    assert {**stored, "view": "fp32"} == same


def test_magnitudes_of_a_view_are_those_of_the_stored_base(tmp_path):
    """Rounding to fp8 would move weights to exact powers of two, where the base has few."""
    pair = planted.make_pair(tmp_path, "bf16", density=1.0)
    deltas, masks = measure(pair, make_patch(pair), views=["fp8_e4m3"])
    base = {row["tensor"]: row for row in diff.base_rows(Checkpoint.open(pair.before))}
    some = 0
    for row, mask in zip(deltas, masks, strict=True):
        bits = np.unpackbits(np.frombuffer(mask["mask"], np.uint8), bitorder="little")
        before = weights(pair.tensors_before[row["tensor"]])
        moved = np.abs(before[bits[: before.size].astype(bool)])
        exact = int((np.frexp(moved)[0] == 0.5).sum())
        histogram = np.array(row["magnitude_histogram_changed"])
        assert histogram[1 + NUM_EXPONENTS :].sum() == exact
        assert (histogram <= base[row["tensor"]]["magnitude_histogram"]).all()
        some += int(histogram.sum())
    assert some > 0


def test_fp32_patch_of_a_bf16_base(tmp_path):
    pair = planted.make_pair(tmp_path, "bf16")
    before = {n: t.bits.astype(np.uint32) << 16 for n, t in pair.tensors_before.items()}
    after = {n: bits + np.uint32(3) * (pair.changed[n]) for n, bits in before.items()}
    patch = write_patch(
        tmp_path / "p",
        [
            TensorPair(n, "fp32", t.shape, before[n], after[n].astype(np.uint32))
            for n, t in pair.tensors_before.items()
        ],
        base_fingerprint=fingerprint(Checkpoint.open(pair.before)),
    )
    deltas, _ = measure(pair, patch, views=["stored", "bf16"])
    assert {row["dtype"] for row in deltas} == {"fp32"}
    for row in deltas:
        planted_here = int(pair.changed[row["tensor"]].sum())
        assert row["num_changed_bitwise"] == (planted_here if row["view"] == "stored" else 0)


def test_rows_of_a_mask_file_are_those_of_the_patch(tmp_path, small_chunks):
    pair = planted.make_pair(tmp_path)
    shapes = planted.LLAMA_SHAPES
    packed = {n: (shapes[n], np.packbits(c, bitorder="little")) for n, c in pair.changed.items()}
    write_masks(tmp_path / "m", packed, "base")
    base = Checkpoint.open(pair.before)
    rows = diff.mask_rows(base, read_masks(tmp_path / "m"), trial_id="t", step=10, kind="final")
    assert rows == measure(pair, make_patch(pair))[1]
    del packed[QUERY]
    write_masks(tmp_path / "m", packed, "base")
    fewer = diff.mask_rows(base, read_masks(tmp_path / "m"), trial_id="t", step=10, kind="final")
    assert fewer == [row for row in rows if row["tensor"] != QUERY]
    write_masks(tmp_path / "m", {NORM: ((4, 4), packed[NORM][1])}, "base")
    with pytest.raises(CheckpointError, match=r"\[16\] in .* its mask in .* \[4, 4\]"):
        diff.mask_rows(base, read_masks(tmp_path / "m"), trial_id="t", step=10, kind="final")


def test_tied_head_is_measured_once(tmp_path):
    rng = np.random.default_rng(0)
    embed = planted.random_tensor(rng, "bf16", (4, 4))
    tensors = {EMBED: embed, "lm_head.weight": embed}
    base = planted.write_folder(tmp_path / "base", tensors, {"tie_word_embeddings": True})
    pair = planted.Pair(base, base, {EMBED: embed}, {EMBED: embed}, {})
    deltas, _ = measure(pair, make_patch(pair))
    assert [row["tensor"] for row in deltas] == [EMBED]
    assert [row["tensor"] for row in diff.base_rows(Checkpoint.open(base))] == [EMBED]


def test_wrong_patches_and_views_are_refused(tmp_path):
    pair = planted.make_pair(tmp_path)
    patch = make_patch(pair)
    with pytest.raises(PatchError, match="belongs to the base with fingerprint"):
        measure(pair, patch, base_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="unknown number format 'fp4'; choose of stored"):
        measure(pair, patch, views=["fp4"])
    damaged = bytearray(patch.path.read_bytes())
    damaged[-1] ^= 1
    patch.path.write_bytes(damaged)
    with pytest.raises(PatchError, match="checksum"):
        measure(pair, patch)


def test_bf16_oracle_is_sound():
    """The naive cast of this file against the definition of bf16: the upper half of fp32."""
    tensor = Tensor("fp32", (3,), np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001], np.uint32))
    assert cast(tensor, "bf16").bits.tolist() == [0x3F80, 0x3F82, 0x3F81]
    assert FLOATS["bf16"] == ml_dtypes.bfloat16
