import ml_dtypes
import numpy as np
import planted
import pytest
from planted import FLOATS, Tensor, cast, naive_changed, weights

from rlsparse import checkpoint, tables
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.definitions import DEFINITIONS, NUM_EXPONENTS
from rlsparse.deltas import base_rows, mask_rows, measure_patch
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.masks import read_masks, write_masks
from rlsparse.patch import Patch, TensorPair, write_patch

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


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
    return measure_patch(base, patch, **(arguments | changes))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 elements, so that small tensors have several."""

    def small(shape, max_elements=128):
        return checkpoint.chunks(shape, max_elements)

    monkeypatch.setattr("rlsparse.deltas.chunks", small)
    monkeypatch.setattr("rlsparse.diff.chunks", small)
    monkeypatch.setattr("rlsparse.patch.apply.chunks", small)


def test_base_rows(tmp_path, small_chunks):
    pair = planted.make_pair(tmp_path)
    base = Checkpoint.open(pair.before)
    rows = base_rows(base)
    table = tables.from_rows(rows, "base_tensors")
    assert table.column_names == tables.SCHEMAS["base_tensors"].names
    assert rows == base_rows(base, base_fingerprint=fingerprint(base))
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
    reference = diff_checkpoints(pair.before, pair.after).tables["tensor_deltas"]
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
    base = {row["tensor"]: row for row in base_rows(Checkpoint.open(pair.before))}
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
    rows = mask_rows(base, read_masks(tmp_path / "m"), trial_id="t", step=10, kind="final")
    assert rows == measure(pair, make_patch(pair))[1]
    del packed[QUERY]
    write_masks(tmp_path / "m", packed, "base")
    fewer = mask_rows(base, read_masks(tmp_path / "m"), trial_id="t", step=10, kind="final")
    assert fewer == [row for row in rows if row["tensor"] != QUERY]
    write_masks(tmp_path / "m", {NORM: ((4, 4), packed[NORM][1])}, "base")
    with pytest.raises(CheckpointError, match=r"\[16\] in .* its mask in .* \[4, 4\]"):
        mask_rows(base, read_masks(tmp_path / "m"), trial_id="t", step=10, kind="final")


def test_tied_head_is_measured_once(tmp_path):
    rng = np.random.default_rng(0)
    embed = planted.random_tensor(rng, "bf16", (4, 4))
    tensors = {EMBED: embed, "lm_head.weight": embed}
    base = planted.write_folder(tmp_path / "base", tensors, {"tie_word_embeddings": True})
    pair = planted.Pair(base, base, {EMBED: embed}, {EMBED: embed}, {})
    deltas, _ = measure(pair, make_patch(pair))
    assert [row["tensor"] for row in deltas] == [EMBED]
    assert [row["tensor"] for row in base_rows(Checkpoint.open(base))] == [EMBED]


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
