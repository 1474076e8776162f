"""A base changed by a patch while it is read is the checkpoint after, in every way of reading."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse import checkpoint
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.diff import EXTRA_TABLES, diff_checkpoints
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.patch import PATCH_FILE, Patch, TensorPair, apply_patch, write_patch
from rlsparse.patch.side import patched

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def patch_of(base: Path, before: dict[str, Tensor], after: dict[str, Tensor], path: Path) -> Patch:
    """The patch to ``after``, against ``before`` rounded to its formats."""
    pairs = []
    for name, tensor in after.items():
        start = before[name]
        if start.dtype != tensor.dtype:
            start = planted.cast(start, tensor.dtype)
        pairs.append(TensorPair(name, tensor.dtype, tensor.shape, start.bits, tensor.bits))
    return write_patch(path, pairs, base_fingerprint=fingerprint(Checkpoint.open(base)))


def in_format(pair: planted.Pair, dtype: str, seed: int = 1) -> dict[str, Tensor]:
    """What training in another format may leave: the base rounded to it, with changes."""
    rng = np.random.default_rng(seed)
    max_steps = {"bf16": 3, "fp16": 2**5, "fp32": 2**18}[dtype]  # seen in bf16, too
    return {
        name: planted.plant(rng, planted.cast(tensor, dtype), 0.2, max_steps)[0]
        for name, tensor in pair.tensors_before.items()
    }


@pytest.fixture
def pair(tmp_path) -> planted.Pair:
    return planted.make_pair(tmp_path, density=0.2)


@pytest.fixture
def file(pair, tmp_path) -> Path:
    path = tmp_path / "one.patch.safetensors"
    patch_of(pair.before, pair.tensors_before, pair.tensors_after, path)
    return path


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_range_through_any_buffer(tmp_path_factory, data):
    """Any bits, any density (so both codecs), formats of the patch other than the base's."""
    folder = tmp_path_factory.mktemp("side")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    stored, dtype = data.draw(
        st.sampled_from([("bf16", "bf16"), ("i64", "i64"), ("bf16", "fp32"), ("fp32", "bf16")])
    )
    shape = data.draw(st.sampled_from([(), (0,), (1,), (7, 9), (300,)]))
    item, size = planted.unsigned(stored), math.prod(shape)
    if stored == dtype:
        bits = rng.integers(0, np.iinfo(item).max, size, item, endpoint=True)
        before = Tensor(stored, shape, bits)
        start = before
    else:
        before = planted.random_tensor(rng, stored, shape)
        start = planted.cast(before, dtype)
    changed = rng.random(size) < data.draw(st.sampled_from([0, 0.02, 0.5, 1]))
    after = Tensor(dtype, shape, start.bits ^ changed.astype(start.bits.dtype))
    base = planted.write_folder(folder / "base", {"w": before})
    patch = patch_of(base, {"w": before}, {"w": after}, folder / "p.patch.safetensors")
    info = pickle.loads(pickle.dumps(patched(Checkpoint.open(base), patch))).tensors["w"]
    assert (info.name, info.dtype, info.shape) == ("w", dtype, shape)
    assert info.read().tolist() == after.bits.tolist()
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    buffer = np.empty(data.draw(st.sampled_from([1, 5, 64, 1000])), after.bits.dtype)
    pieces = [piece.copy() for piece in info.pieces(first, last, buffer)]
    assert np.concatenate([*pieces, buffer[:0]]).tolist() == after.bits[first:last].tolist()
    assert all(piece.size == buffer.size for piece in pieces[:-1])


def test_a_slice_reads_its_own_part(pair, file):
    info = patched(Checkpoint.open(pair.before), Patch.open(file)).tensors[QUERY]
    part = replace(info, shape=(5, 16), offset=info.offset + 3 * 16 * 2)
    expected = pair.tensors_after[QUERY].bits[48:128]
    assert part.read().tolist() == expected.tolist()
    assert part.read(10, 20).tolist() == expected[10:20].tolist()
    with pytest.raises(CheckpointError, match="has 80 elements"):
        part.read(0, 81)


def test_pickles_hold_only_what_the_patch_says_of_the_tensor(pair, file):
    info = patched(Checkpoint.open(pair.before), Patch.open(file)).tensors[QUERY]
    assert list(info.patch.tensors) == [QUERY]
    assert list(info.patch.data) == [QUERY]


def test_what_the_patch_does_not_list_is_the_base(pair, tmp_path):
    after = {QUERY: pair.tensors_after[QUERY]}
    path = tmp_path / "part.patch.safetensors"
    patch = patch_of(pair.before, pair.tensors_before, after, path)
    base = Checkpoint.open(pair.before)
    side = patched(base, patch)
    assert side.tensors.keys() == base.tensors.keys()
    assert side.tensors[EMBED] == base.tensors[EMBED]
    assert side.read_bits(QUERY).tolist() == after[QUERY].bits.tolist()
    assert (side.path, side.config, side.metadata) == (path, base.config, base.metadata)


@pytest.mark.parametrize("change", ["unlisted", "alike", "apart"])
def test_a_tied_head_follows_its_embedding_unless_changed_apart(tmp_path, change):
    embed = planted.random_tensor(np.random.default_rng(0), "bf16", (10, 4))
    before = {EMBED: embed, HEAD: embed}
    base = planted.write_folder(tmp_path / "base", before, {"tie_word_embeddings": True})
    moved = replace(embed, bits=embed.bits ^ 1)
    after = {
        "unlisted": {EMBED: moved},
        "alike": {EMBED: moved, HEAD: moved},
        "apart": {EMBED: moved, HEAD: replace(embed, bits=embed.bits ^ 2)},
    }[change]
    side = patched(
        Checkpoint.open(base), patch_of(base, before, after, tmp_path / "p.patch.safetensors")
    )
    assert side.tied == ({} if change == "apart" else {HEAD: EMBED})
    assert side.read_bits(EMBED).tolist() == moved.bits.tolist()
    assert side.read_bits(HEAD).tolist() == after.get(HEAD, moved).bits.tolist()


# --- as a side of a diff ---------------------------------------------------------------------


def assert_same(found, expected) -> None:
    np.testing.assert_equal(found.tables, expected.tables)
    assert (found.tensors, found.accounting) == (expected.tensors, expected.accounting)
    assert found.views == expected.views
    assert {**found.after, "path": ""} == {**expected.after, "path": ""}


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("casts", [["bf16"], ["fp32", "fp8_e4m3"]])
def test_a_diff_against_a_patch_is_the_diff_against_what_it_gives(
    pair, tmp_path, monkeypatch, dtype, casts
):
    monkeypatch.setattr("rlsparse.diff.chunks", lambda shape: checkpoint.chunks(shape, 128))
    path = tmp_path / "p.patch.safetensors"
    patch_of(pair.before, pair.tensors_before, in_format(pair, dtype), path)
    apply_patch(pair.before, path, tmp_path / "applied")
    options = {"casts": casts, "extra_tables": EXTRA_TABLES}
    expected = diff_checkpoints(pair.before, tmp_path / "applied", **options)
    assert 0 < expected.sparsity["bitwise"] < 1
    found = diff_checkpoints(pair.before, str(path), **options)
    assert_same(found, expected)
    assert found.to_json()["after"]["path"] == str(path)


def test_a_patch_in_another_format_needs_a_cast(pair, tmp_path):
    path = tmp_path / "p.patch.safetensors"
    patch_of(pair.before, pair.tensors_before, in_format(pair, "fp32"), path)
    with pytest.raises(CheckpointError, match=r"is bf16 in .* and fp32 in .*p\.patch\.safetensors"):
        diff_checkpoints(pair.before, path)


def test_the_folder_of_a_snapshot_stands_for_its_patch(pair, tmp_path):
    (tmp_path / "step").mkdir()
    path = tmp_path / "step" / PATCH_FILE
    patch_of(pair.before, pair.tensors_before, pair.tensors_after, path)
    found = diff_checkpoints(pair.before, path.parent)
    assert_same(found, diff_checkpoints(pair.before, pair.after))


def test_a_patch_that_changes_nothing(pair, tmp_path):
    (tmp_path / "step").mkdir()
    path = tmp_path / "step" / PATCH_FILE
    patch_of(pair.before, pair.tensors_before, pair.tensors_before, path)
    for after in (path, path.parent):
        assert diff_checkpoints(pair.before, after).sparsity["bitwise"] == 1


def test_a_patch_of_another_base_is_refused(pair, file):
    with pytest.raises(PatchError, match="belongs to another base: model"):
        diff_checkpoints(pair.after, file)
    with pytest.raises(CheckpointError, match="is a patch; give its base before"):
        diff_checkpoints(file, file)


def test_a_base_of_another_shape_is_refused_without_reading_it(file, tmp_path):
    shapes = {**planted.LLAMA_SHAPES, QUERY: (16, 8)}
    other = planted.make_pair(tmp_path / "other", shapes=shapes)
    with pytest.raises(PatchError, match=r"q_proj.weight is bf16 \[16, 8\] in"):
        patched(Checkpoint.open(other.before), Patch.open(file))


def test_a_damaged_patch_is_refused_by_its_checksum(pair, file):
    info = Patch.open(file).data[QUERY]
    content = bytearray(file.read_bytes())
    content[info.offset] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        PatchError, match=r"q_proj.weight: the bytes of a block have another checksum"
    ):
        diff_checkpoints(pair.before, file)


def test_a_patch_behind_a_url_is_refused(pair, file):
    system = fsspec.filesystem("memory")
    system.pipe("/side/p.patch.safetensors", file.read_bytes())
    try:
        with pytest.raises(PatchError, match="copy it here first"):
            diff_checkpoints(pair.before, "memory://side/p.patch.safetensors")
    finally:
        system.rm("/side", recursive=True)
