import json
import math

import numpy as np
import planted
import pytest
from planted import Tensor

from rlsparse import checkpoint, tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import CheckpointError

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 elements, so that small tensors have several."""

    def small(shape, max_elements=128):
        return checkpoint.chunks(shape, max_elements)

    monkeypatch.setattr("rlsparse.diff.chunks", small)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3"])
def test_diff_agrees_with_a_naive_script(tmp_path, small_chunks, dtype):
    pair = planted.make_pair(tmp_path, dtype)
    found = diff_checkpoints(pair.before, str(pair.after)).to_json()
    json.dumps(found, allow_nan=False)
    total = sum(t.bits.size for t in pair.tensors_before.values())
    assert found["num_elements"] == total
    changed = {
        name: planted.naive_changed(tensor, pair.tensors_after[name])
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
        "before", "after", "num_elements", "accounting", "view", "sparsity", "views", "tensors",
    }  # fmt: skip
    assert found["before"] == {
        "path": str(pair.before), "num_tensors": 6, "num_elements": total,
        "num_elements_by_dtype": {dtype: total},
    }  # fmt: skip


def test_rows_fit_the_table(tmp_path, small_chunks):
    pair = planted.make_pair(tmp_path)
    rows = diff_checkpoints(pair.before, pair.after).tables["tensor_deltas"]
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
    found = diff_checkpoints(
        planted.write_folder(tmp_path / "a", before, tie),
        planted.write_folder(tmp_path / "b", after, tie),
    )
    assert found.accounting == {
        "total_before": 40 + 40 + 16 + 4 + 5, "total_after": 52 + 52 + 8 + 4 + 7,
        "compared": 40 + 4, "tied_before": 40, "tied_after": 52, "removed": 5, "added": 12 + 7,
        "reshaped_before": 16, "reshaped_after": 8, "tied_tensors": ["lm_head.weight"],
        "removed_tensors": ["gone"], "added_tensors": ["new"], "reshaped_tensors": [QUERY],
        "resized_tensors": [EMBED], "renamed_tensors": {}, "mapped_tensors": {},
    }  # fmt: skip
    assert found.num_elements == 44
    assert found.sparsity["bitwise"] == 1 - 40 / 44
    shrunk = diff_checkpoints(tmp_path / "b", tmp_path / "a")
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
    accounting = diff_checkpoints(*folders).accounting
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
        diff_checkpoints(pair.before, after)
    total = sum(t.bits.size for t in wide.values())
    num_changed = sum(int(changed.sum()) for changed in pair.changed.values())
    rounded = diff_checkpoints(pair.before, after, casts=["bf16"])
    assert rounded.sparsity["bitwise"] == 1 - num_changed / total
    assert rounded.views == ("bf16", "stored")
    assert rounded.sparsity_in("stored")["bitwise"] == 0  # both held exactly in fp32
    assert rounded.tensors[0]["dtype_before"] == "bf16"
    assert rounded.tensors[0]["dtype_after"] == "fp32"
    exact = diff_checkpoints(pair.before, after, casts=["fp32"])
    assert exact.sparsity["bitwise"] == 0
    for casts, message in ((["stored"], "--cast bf16"), (["int4"], "choose of stored, fp32, bf16")):
        with pytest.raises(CheckpointError, match=message):
            diff_checkpoints(pair.before, after, casts=casts)


def test_stored_among_the_casts(tmp_path):
    pair = planted.make_pair(tmp_path)
    found = diff_checkpoints(pair.before, pair.after, casts=["stored", "fp8_e4m3"])
    assert found.views == ("stored", "fp8_e4m3")
    assert found.sparsity == diff_checkpoints(pair.before, pair.after).sparsity


def test_nothing_in_common(tmp_path):
    tensor = Tensor("bf16", (2,), np.zeros(2, "<u2"))
    one = planted.write_folder(tmp_path / "one", {"a": tensor})
    other = planted.write_folder(tmp_path / "other", {"b": tensor})
    with pytest.raises(CheckpointError, match="no weights in common"):
        diff_checkpoints(one, other)


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
    for casts in ([], ["fp16"]):
        found = diff_checkpoints(*folders, casts=casts)
        assert found.sparsity["bitwise"] == 1 - 1 / 4
        assert [t["sparsity"]["bitwise"] for t in found.tensors] == [1 - 1 / 3, 1.0, 1.0]


def test_the_same_checkpoint_twice(tmp_path):
    pair = planted.make_pair(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(pair.before)
    for same in (pair.before, link, pair.before / "model.safetensors"):
        with pytest.raises(CheckpointError, match="both sides are the same checkpoint"):
            diff_checkpoints(pair.before, same)


def test_a_head_that_differs_is_not_tied(tmp_path):
    """As transformers: a stored head that is no copy of the embedding is a tensor of its own."""
    rng = np.random.default_rng(0)
    embed, head = (planted.random_tensor(rng, "bf16", (4, 4)) for _ in range(2))
    tie = {"tie_word_embeddings": True}
    before = planted.write_folder(tmp_path / "a", {EMBED: embed, "lm_head.weight": embed}, tie)
    after = planted.write_folder(tmp_path / "b", {EMBED: embed, "lm_head.weight": head}, tie)
    again = planted.write_folder(tmp_path / "c", {EMBED: head, "lm_head.weight": head}, tie)
    other = Tensor("bf16", (4, 4), head.bits ^ 1)
    free = planted.write_folder(tmp_path / "d", {EMBED: embed, "lm_head.weight": other}, tie)
    found = diff_checkpoints(after, free)
    assert found.accounting["tied_tensors"] == []
    assert found.sparsity["bitwise"] == 1 - 16 / 32
    assert diff_checkpoints(before, again).accounting["tied_before"] == 16
    assert diff_checkpoints(before, after).accounting["added"] == 16


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (("bf16", "i64"), "i64 has no values to compare: dequantise"),
        (("fp8_e4m3", "fp8_e5m2"), "--cast fp8_e4m3 or --cast fp32$"),
        (("bf16", "fp32"), "--cast bf16 or --cast fp32$"),
        (("fp64", "bf16"), "--cast bf16$"),
    ],
)
def test_a_mixed_pair_is_refused_with_what_helps(tmp_path, formats, message):
    folders = [
        planted.write_folder(
            tmp_path / dtype, {"w": Tensor(dtype, (4,), np.ones(4, planted.unsigned(dtype)))}
        )
        for dtype in formats
    ]
    with pytest.raises(CheckpointError, match=message):
        diff_checkpoints(*folders)
    if "i64" not in formats:
        cast = message.removesuffix("$").split()[-1]
        assert diff_checkpoints(*folders, casts=cast).views == (cast, "stored")


def test_arguments_are_checked(tmp_path):
    pair = planted.make_pair(tmp_path)
    with pytest.raises(CheckpointError, match=r"no extra tables \['foo'\]; choose of"):
        diff_checkpoints(pair.before, pair.after, extra_tables=["foo"])
    with pytest.raises(CheckpointError, match="num_threads is 0"):
        diff_checkpoints(pair.before, pair.after, num_threads=0)


def test_extra_tables_of_several_chunks_and_pieces(tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr("rlsparse.diff.PIECE_BYTES", 128)  # 64 weights of bf16
    pair = planted.make_pair(tmp_path, density=0.3)
    progress = []
    found = diff_checkpoints(
        pair.before, pair.after, extra_tables=["base_tensors", "stripes", "masks"],
        on_progress=lambda *told: progress.append(told),
    )  # fmt: skip
    assert {row["tensor"] for row in found.tables["stripes"]} == {
        name for name, shape in planted.LLAMA_SHAPES.items() if len(shape) == 2
    }
    for row in found.tables["stripes"]:
        changed = pair.changed[row["tensor"]].reshape(planted.LLAMA_SHAPES[row["tensor"]])
        assert (row["num_rows"], row["num_columns"]) == changed.shape
        assert row["row_counts"].tolist() == changed.sum(1).tolist()
        assert row["column_counts"].tolist() == changed.sum(0).tolist()
    for name, changed in pair.changed.items():
        masks = [row for row in found.tables["masks"] if row["tensor"] == name]
        packed = b"".join(row["mask"] for row in masks)
        assert packed == np.packbits(changed, bitorder="little").tobytes()
    for row in found.tables["base_tensors"]:
        part = slice(row["start"], row["start"] + row["num_elements"])
        values = planted.weights(pair.tensors_before[row["tensor"]])[part]
        assert sum(row["magnitude_histogram"]) == values.size
        assert row["sum_sq"] == pytest.approx(float((values**2).sum()), rel=1e-12)
        assert row["shape"] == list(planted.LLAMA_SHAPES[row["tensor"]])
    done, total = zip(*progress, strict=True)
    num_bytes = 2 * sum(2 * changed.size for changed in pair.changed.values())
    assert set(total) == {num_bytes}
    assert list(done) == sorted(set(done))
    assert done[-1] == num_bytes


def test_rows_of_the_base_cover_what_is_compared(tmp_path):
    rng = np.random.default_rng(0)
    folders = [
        planted.write_folder(
            tmp_path / str(rows), {EMBED: planted.random_tensor(rng, "bf16", (rows, 4))}
        )
        for rows in (13, 10)
    ]
    (row,) = diff_checkpoints(*folders, extra_tables=["base_tensors"]).tables["base_tensors"]
    assert (row["shape"], row["num_elements"]) == ([10, 4], 40)
