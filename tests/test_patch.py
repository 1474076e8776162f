import hashlib
import json
import math
import pickle

import numpy as np
import planted
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.patch import (
    CODECS,
    METADATA_KEY,
    Patch,
    TensorPair,
    apply_patch,
    verify_patch,
    write_patch,
)

SHAPES = [(), (0,), (3, 0, 2), (1,), (7, 9), (2, 3, 5), (300,)]


def pairs(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[TensorPair]:
    return [
        TensorPair(name, after[name].dtype, after[name].shape, tensor.bits, after[name].bits)
        for name, tensor in before.items()
    ]


def make_patch(pair: planted.Pair, path) -> Patch:
    return write_patch(
        path,
        pairs(pair.tensors_before, pair.tensors_after),
        base_fingerprint=fingerprint(Checkpoint.open(pair.before)),
    )


@pytest.fixture
def pair(tmp_path) -> planted.Pair:
    return planted.make_pair(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_round_trip_of_any_bits(tmp_path_factory, data):
    """NaN payloads, signed zeros, subnormals: any bit pattern, any shape, any density."""
    folder = tmp_path_factory.mktemp("patch")
    dtype = data.draw(st.sampled_from(list(planted.TAGS)))
    shape = data.draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    item = planted.unsigned(dtype)
    size = math.prod(shape)
    before = rng.integers(0, np.iinfo(item).max, size, item, endpoint=True)
    other = rng.integers(0, np.iinfo(item).max, size, item, endpoint=True)
    after = np.where(
        rng.random(size) < data.draw(st.sampled_from([0, 0.01, 0.3, 1])), other, before
    )
    base = planted.write_folder(folder / "base", {"t": Tensor(dtype, shape, before)})
    patch = write_patch(
        folder / "p.safetensors",
        [TensorPair("t", dtype, shape, before, after)],
        base_fingerprint=fingerprint(Checkpoint.open(base)),
    )
    assert patch.num_changed == sum(a != b for a, b in zip(before, after, strict=True))
    apply_patch(base, patch.path, folder / "out")
    result = Checkpoint.open(folder / "out")
    assert result.read_bits("t").tobytes() == after.tobytes()
    assert (result.tensors["t"].dtype, result.tensors["t"].shape) == (dtype, shape)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_any_slice_of_a_tensor_of_many_blocks(tmp_path, density):
    rng = np.random.default_rng(2)
    before = rng.integers(0, 2**16, 200_003, np.uint16)
    after = before ^ (rng.random(before.size) < density).astype(np.uint16)
    tensor = TensorPair("t", "bf16", (before.size,), before, after)
    patch = write_patch(tmp_path / "p", [tensor], base_fingerprint="f")
    cuts = [0, 0, 1, 64, 65_535, 65_536, 65_537, 131_072, 199_999, 200_003]
    for start in cuts:
        for stop in cuts:
            if start <= stop:
                found = patch.after_bits("t", before[start:stop], start, stop)
                assert np.array_equal(found, after[start:stop])


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_hold_what_their_layout_says(codec):
    rng = np.random.default_rng(4)
    for size, density in [(1, 1.0), (70_000, 0.1), (65_536, 1.0)]:
        after = rng.integers(0, 2**32, size, np.uint32)
        changed = rng.random(size) < density
        arrays = CODECS[codec].encode(changed, after)
        layout = CODECS[codec].layout(size, int(changed.sum()), "u32")
        assert {k: (f"u{8 * a.itemsize}", a.size) for k, a in arrays.items()} == layout
        positions, values = CODECS[codec].decode(
            lambda key, first, last, arrays=arrays: arrays[key][first:last],
            size, int(changed.sum()), 0, size,
        )  # fmt: skip
        assert positions.tolist() == [i for i, c in enumerate(changed) if c]
        assert np.array_equal(values, after[changed])


def test_indices_are_wide_only_in_huge_tensors():
    assert CODECS["indices"].layout(2**32, 5, "u16")["idx"] == ("u32", 5)
    assert CODECS["indices"].layout(2**32 + 1, 5, "u16")["idx"] == ("u64", 5)


def test_the_smaller_codec_is_chosen(tmp_path):
    zeros = np.zeros(65_536, np.uint16)
    for num_changed in (1, 2049, 2050, 2051, 3000, 65_536):
        ones = np.where(np.arange(zeros.size) < num_changed, 1, 0).astype(np.uint16)
        tensor = TensorPair("t", "bf16", (zeros.size,), zeros, ones)
        patch = write_patch(tmp_path / "p", [tensor], base_fingerprint="f")
        # 4 bytes per index against 8192 bytes of mask and 8 of rank
        smaller = "indices" if 4 * num_changed <= 8192 + 8 else "bitmap"
        assert patch.tensors["t"].codec == smaller


def test_file_is_deterministic_and_open_to_others(tmp_path, pair):
    one, two = make_patch(pair, tmp_path / "one"), make_patch(pair, tmp_path / "two")
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.size_bytes == one.path.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after", "before", "one", "two"]
    name = "model.layers.0.self_attn.q_proj.weight"
    with safetensors.safe_open(one.path, "numpy") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert content["tensors"][name] == {
        "dtype": "bf16",
        "shape": [16, 16],
        "codec": "bitmap",
        "num_changed": int(pair.changed[name].sum()),
        "sha256": hashlib.sha256(pair.tensors_after[name].bits.tobytes()).hexdigest(),
    }
    unpacked = np.unpackbits(stored[f"{name}.bitmap"], bitorder="little").astype(bool)
    assert np.array_equal(unpacked, pair.changed[name])
    expected = pair.tensors_after[name].bits[pair.changed[name]]
    assert np.array_equal(stored[f"{name}.val"], expected)
    assert content["tensors"]["model.norm.weight"]["codec"] is None
    assert not [key for key in stored if key.startswith("model.norm")]


def test_apply_gives_the_checkpoint_after(tmp_path, pair):
    patch = make_patch(pair, tmp_path / "p")
    assert patch.num_changed == sum(int(changed.sum()) for changed in pair.changed.values())
    (pair.before / "tokenizer.json").write_text("{}")
    verify_patch(Checkpoint.open(pair.before), patch)
    apply_patch(pair.before, patch.path, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert fingerprint(out) == fingerprint(Checkpoint.open(pair.after))
    assert out.metadata == {"format": "pt"}
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pair.before / name).read_bytes()
    with pytest.raises(PatchError, match="not an empty folder"):
        apply_patch(pair.before, patch.path, tmp_path / "out")


def test_patch_pickles_and_keeps_notes(tmp_path, pair):
    patch = write_patch(
        tmp_path / "p",
        iter(pairs(pair.tensors_before, pair.tensors_after)),
        base_fingerprint="f",
        metadata={"step": "10"},
    )
    assert (patch.metadata, patch.base_fingerprint) == ({"step": "10"}, "f")
    assert pickle.loads(pickle.dumps(patch)) == patch == Patch.open(patch.path)


@pytest.mark.parametrize("narrow", ["bf16", "fp16"])
def test_patch_against_the_upcast_base(tmp_path, narrow):
    pair = planted.make_pair(tmp_path, narrow)
    before, after = {}, {}
    for name, tensor in pair.tensors_before.items():
        wide = tensor.bits.view(planted.FLOATS[narrow]).astype(np.float32).view(np.uint32)
        before[name] = Tensor("fp32", tensor.shape, wide)
        after[name] = Tensor("fp32", tensor.shape, wide + pair.changed[name])
    base = Checkpoint.open(pair.before)
    patch = write_patch(tmp_path / "p", pairs(before, after), base_fingerprint=fingerprint(base))
    verify_patch(base, patch)
    apply_patch(pair.before, patch.path, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    for name, tensor in after.items():
        assert out.tensors[name].dtype == "fp32"
        assert np.array_equal(out.read_bits(name), tensor.bits)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_tied_head_follows_its_embedding(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tied = planted.random_tensor(rng, "bf16", (5, 8))
    norm = planted.random_tensor(rng, "bf16", (8,))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    base = planted.write_folder(
        tmp_path / "base",
        {head: tied, embedding: tied, "norm.weight": norm},
        {"tie_word_embeddings": True},
    )
    before = tied.bits if dtype == "bf16" else tied.bits.astype(np.uint32) << 16
    after, _ = planted.plant(rng, Tensor(dtype, (5, 8), before), 0.5)
    patch = write_patch(
        tmp_path / "p",
        [TensorPair(embedding, dtype, (5, 8), before, after.bits)],
        base_fingerprint=fingerprint(Checkpoint.open(base)),
    )
    apply_patch(base, patch.path, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    for name, tensor in ((head, after), (embedding, after), ("norm.weight", norm)):
        assert out.tensors[name].dtype == tensor.dtype
        assert np.array_equal(out.read_bits(name), tensor.bits)


def test_another_base_is_refused_before_anything_is_written(tmp_path, pair):
    patch = make_patch(pair, tmp_path / "p")
    first = "model.embed_tokens.weight"
    tensor = pair.tensors_before[first]
    others = {
        "belongs to the base with fingerprint": pair.tensors_after,
        "which .* lacks": {k: v for k, v in pair.tensors_before.items() if k != first},
        r"is bf16 \[16, 37\]": {
            **pair.tensors_before, first: Tensor("bf16", (16, 37), tensor.bits),
        },
        "is u8": {
            **pair.tensors_before, first: Tensor("u8", tensor.shape, tensor.bits.astype(np.uint8)),
        },
        # Another float format is cast, so only the fingerprint tells.
        "belongs to the base": {
            **pair.tensors_before, first: Tensor("fp16", tensor.shape, tensor.bits),
        },
    }  # fmt: skip
    for number, (message, tensors) in enumerate(others.items()):
        base = planted.write_folder(tmp_path / f"base{number}", tensors)
        with pytest.raises(PatchError, match=message):
            apply_patch(base, patch.path, tmp_path / "out")
        with pytest.raises(PatchError, match=message):
            verify_patch(Checkpoint.open(base), patch)
        assert not (tmp_path / "out").exists()


def test_every_damaged_byte_is_noticed(tmp_path):
    """A flipped bit anywhere, in the header, the codecs' arrays or the values."""
    rng = np.random.default_rng(0)
    before = {n: planted.random_tensor(rng, "bf16", (24,)) for n in ("dense", "sparse", "same")}
    densities = {"dense": 0.6, "sparse": 0.05, "same": 0.0}
    after = {n: planted.plant(rng, tensor, densities[n])[0] for n, tensor in before.items()}
    base = Checkpoint.open(planted.write_folder(tmp_path / "base", before))
    patch = write_patch(tmp_path / "p", pairs(before, after), base_fingerprint=fingerprint(base))
    assert {t.codec for t in patch.tensors.values()} == {"bitmap", "indices", None}
    whole = patch.path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        patch.path.write_bytes(damaged)
        with pytest.raises(PatchError):
            verify_patch(base, Patch.open(patch.path))


def test_damage_found_while_applying_leaves_no_model(tmp_path, pair):
    patch = make_patch(pair, tmp_path / "p")
    content = bytearray(patch.path.read_bytes())
    content[-1] ^= 1
    patch.path.write_bytes(content)
    with pytest.raises(PatchError, match="checksum"):
        apply_patch(pair.before, patch.path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_other_files_are_no_patches(tmp_path, pair):
    with pytest.raises(PatchError, match="is not a patch"):
        Patch.open(pair.before / "model.safetensors")
    with pytest.raises(PatchError, match="cannot read"):
        Patch.open(tmp_path / "missing")
    planted.write_file(tmp_path / "future", {}, {METADATA_KEY: json.dumps({"version": "9"})})
    with pytest.raises(PatchError, match="format 9, this release reads 1"):
        Patch.open(tmp_path / "future")


def test_wrong_input_writes_nothing(tmp_path):
    bits = np.zeros(4, np.uint16)
    good = TensorPair("t", "bf16", (4,), bits, bits)
    wrong = {
        "given twice": [good, good],
        "needs flat uint16 bits": [good._replace(after_bits=bits[:3])],
        r"of shape \[4\]": [good._replace(before_bits=bits.view(np.int16))],
        "needs flat uint32": [good._replace(dtype="fp32")],
    }
    for message, tensors in wrong.items():
        with pytest.raises(PatchError, match=message):
            write_patch(tmp_path / "p", tensors, base_fingerprint="f")
        assert list(tmp_path.iterdir()) == []
