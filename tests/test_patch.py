import json
import math
import pickle

import numpy as np
import planted
import pyarrow
import pytest
import safetensors
import xxhash
from damage import Parts, seal_index
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.patch import (
    CODECS,
    METADATA_KEY,
    Changes,
    Patch,
    TensorPair,
    apply_patch,
    new_patch,
    values,
    verify_patch,
    write_patch,
)
from rlsparse.patch.file import CHECKSUM_KEY
from rlsparse.patch.values import CODINGS
from rlsparse.patch.write import PIECE

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


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("density", [0.0, 0.0001, 0.02, 0.5, 1.0])
def test_any_slice_of_a_tensor_of_many_blocks(tmp_path, monkeypatch, density, coding):
    monkeypatch.setattr("rlsparse.patch.write.PIECE", 4096)
    monkeypatch.setattr("rlsparse.patch.write.BLOCK_CHANGES", 1000)
    rng = np.random.default_rng(2)
    before = rng.integers(0, 2**16, 200_003, np.uint16)
    after = before ^ (rng.random(before.size) < density).astype(np.uint16)
    tensor = TensorPair("t", "bf16", (before.size,), before, after)
    patch = write_patch(tmp_path / "p", [tensor], base_fingerprint="f", coding=coding)
    cuts = [0, 0, 1, 64, 4095, 4096, 65_535, 65_536, 65_537, 131_072, 199_999, 200_003]
    in_order = Changes(patch, "t")
    for start in cuts:
        for stop in cuts:
            if start <= stop:
                for changes in (in_order, Changes(patch, "t")):
                    bits = before[start:stop].copy()
                    changes.apply(bits, start)
                    assert np.array_equal(bits, after[start:stop])


def test_a_block_ends_with_enough_changes_or_with_the_tensor(tmp_path):
    """Between them, blocks of few changes are long."""
    before = np.zeros(3 * PIECE, np.uint16)
    after = before.copy()
    after[::2] = 1
    after[PIECE:-1] = 0
    tensor = TensorPair("t", "bf16", before.shape, before, after)
    table = write_patch(tmp_path / "p", [tensor], base_fingerprint="f").tensors["t"].blocks
    assert [(block.stop, block.num_changed) for block in table] == [
        (PIECE, PIECE // 2),
        (3 * PIECE, 0),
    ]


def test_a_block_has_no_more_elements_than_positions_can_count(tmp_path, monkeypatch):
    monkeypatch.setattr("rlsparse.patch.write.PIECE", 100)
    monkeypatch.setattr("rlsparse.patch.write.MAX_BLOCK", 350)
    before = np.zeros(1000, np.uint16)
    tensor = TensorPair("t", "bf16", before.shape, before, before + (np.arange(1000) % 400 == 0))
    patch = write_patch(tmp_path / "p", [tensor], base_fingerprint="f")
    table = [(block.stop, block.num_changed) for block in patch.tensors["t"].blocks]
    assert table == [(300, 1), (600, 1), (900, 1), (1000, 0)]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.45])
def test_the_smaller_codec_is_chosen(tmp_path, density):
    rng = np.random.default_rng(0)
    before = np.zeros(2**16, np.uint16)
    tensor = TensorPair("t", "bf16", before.shape, before, before + (rng.random(2**16) < density))
    sizes = {
        codec: write_patch(tmp_path / "p", [tensor], base_fingerprint="f", codec=codec).size_bytes
        for codec in (None, "gaps", "bitmap")
    }
    assert sizes[None] == min(sizes["gaps"], sizes["bitmap"]) < max(sizes.values())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("size", "density"), [(1, 1.0), (70_000, 0.0), (70_000, 0.1), (64, 1.0)])
def test_a_codec_gives_its_positions_back(codec, size, density):
    rng = np.random.default_rng(4)
    positions = np.flatnonzero(rng.random(size) < density).astype(np.uint32)
    stream = CODECS[codec].encode(positions, size)
    assert CODECS[codec].decode(stream, size, positions.size).tolist() == positions.tolist()


def test_positions_far_apart():
    positions = np.array([0, 1, 127, 300, 2**14, 2**21 + 5, 2**28 + 9, 2**31 - 1], np.uint32)
    for codec in (CODECS["gaps"], CODECS["indices"]):
        stream = codec.encode(positions, 2**31)
        assert codec.decode(stream, 2**31, positions.size).tolist() == positions.tolist()


def leb128(numbers) -> bytes:
    """An independent writer of gaps."""
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number % 128 + 128)
            number //= 128
        out.append(number)
    return bytes(out)


def test_codecs_write_what_they_say():
    positions = np.array([0, 1, 5, 200, 20_000], np.uint32)
    assert CODECS["gaps"].encode(positions, 30_000).tobytes() == leb128([0, 0, 3, 194, 19_799])
    changed = np.isin(np.arange(30_000), positions)
    expected = np.packbits(changed, bitorder="little")
    assert np.array_equal(CODECS["bitmap"].encode(positions, 30_000), expected)
    assert (
        CODECS["indices"].encode(positions, 30_000).tobytes() == positions.astype("<u4").tobytes()
    )


@pytest.mark.parametrize(
    ("codec", "stream", "num_changed"),
    [
        ("gaps", b"\x05\x80", 2),  # a number does not end
        ("gaps", b"\x05\x06", 1),  # more than there should be
        ("gaps", b"\x05", 2),
        ("gaps", b"\x63\x00", 2),  # 99 and 100 of 100 elements
        ("gaps", b"\xff\xff\xff\xff\xff\x01", 1),
        ("bitmap", bytes(12), 0),
        ("bitmap", b"\x01" + bytes(12), 2),
        ("bitmap", bytes(12) + b"\x10", 1),  # beyond the last of 100
        ("indices", bytes(4), 2),
        ("indices", np.array([3, 3], "<u4").tobytes(), 2),
        ("indices", np.array([100], "<u4").tobytes(), 1),
    ],
)
def test_streams_that_make_no_sense(codec, stream, num_changed):
    with pytest.raises(PatchError):
        CODECS[codec].decode(np.frombuffer(stream, np.uint8), 100, num_changed)


def code_of(bits: int, width: int) -> int:
    """Place of a code among all of its width in the order of their values."""
    top = 1 << (width - 1)
    return (~bits if bits & top else bits | top) % (1 << width)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_relative_values_are_zigzag_steps_between_codes_in_order(width):
    rng = np.random.default_rng(0)
    top, item = 1 << (width - 1), np.dtype(f"u{width // 8}")
    pairs = [(0, top), (top, 0), (5, 6), (6, 4), (0, 1), (top + 1, 1), (0, 2**width - 1), (7, 7)]
    drawn = (
        rng.integers(0, 2**width, (2, 200), item, endpoint=False)
        if width < 64
        else (rng.integers(0, 2**63, (2, 200), np.uint64) * np.uint64(2))
    )
    before, after = np.concatenate([np.array(pairs, item).T, drawn], axis=1)
    everywhere = np.arange(before.size, dtype=np.uint32)
    steps = values.find("relative", before, after, everywhere)
    for number, low, high in zip(steps.tolist(), before.tolist(), after.tolist(), strict=True):
        step = (code_of(high, width) - code_of(low, width)) % (1 << width)
        assert number == (2 * step if step < top else 2 * ((1 << width) - step) - 1)
    assert np.array_equal(values.find("absolute", before, after, everywhere), after)
    some = np.array([3, 4, 50, 51], np.uint32)
    for coding in CODINGS:
        bits = before.copy()
        values.apply(coding, values.find(coding, before, after, everywhere), everywhere, bits)
        assert np.array_equal(bits, after)
        found, bits = values.find(coding, before, after, some), before.copy()
        values.apply(coding, found[1:3], some[1:3], bits)
        assert np.flatnonzero(bits != before).tolist() == [
            i for i in (4, 50) if after[i] != before[i]
        ]
        assert np.array_equal(bits[[4, 50]], after[[4, 50]])


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("coding", CODINGS)
def test_streams_of_values(coding, width, size):
    numbers = np.random.default_rng(0).integers(0, 2**width - 1, size, f"<u{width // 8}")
    numbers[: size // 2] &= numbers.dtype.type(255)
    stored = values.streams(coding, numbers)
    assert [stream.size for stream in stored] == values.stream_bytes(coding, width // 8, size)
    assert np.array_equal(values.of_streams(coding, stored, size), numbers)
    if coding == "relative" and size == 7:
        low = (numbers & numbers.dtype.type(15)).astype(np.uint8)
        assert stored[0].tolist() == [*(low[:6:2] | low[1::2] << 4), low[6]]


def test_file_is_deterministic_and_open_to_others(tmp_path, pair):
    one, two = make_patch(pair, tmp_path / "one"), make_patch(pair, tmp_path / "two")
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.size_bytes == one.path.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after", "before", "one", "two"]
    name = "model.layers.0.self_attn.q_proj.weight"
    with safetensors.safe_open(one.path, "numpy") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
        stored = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
    index = stored.pop("index")
    assert content["index"]["xxh3"] == xxhash.xxh3_128_hexdigest(index)
    text = pyarrow.decompress(index, content["index"]["size_bytes"], codec="zstd", asbytes=True)
    rows = json.loads(text)["tensors"]
    assert [row["name"] for row in rows] == [*pair.tensors_before]
    at = 0
    for row in rows:
        name, changed = row["name"], pair.changed[row["name"]]
        before, after = pair.tensors_before[name], pair.tensors_after[name]
        skipped = np.diff(np.flatnonzero(changed), prepend=-1) - 1
        (block,) = row["blocks"] or [[0, 0, 0, 0, 0, []]]
        size = sum(block[-1])
        payload = stored["data"][at : at + size]
        assert row == {
            "name": name,
            "dtype": "bf16",
            "shape": [*before.shape],
            "num_changed": int(changed.sum()),
            "xxh3_before": xxhash.xxh3_128_hexdigest(before.bits.tobytes()),
            "xxh3_after": xxhash.xxh3_128_hexdigest(after.bits.tobytes()),
            "blocks": [[
                before.bits.size, int(changed.sum()), [*CODECS].index("gaps"),
                len(leb128(skipped)), xxhash.xxh3_64_intdigest(payload), block[-1],
            ]] if changed.any() else [],
        }  # fmt: skip
        assert len(block[-1]) == (4 if changed.any() else 0)
        at += size
    assert at == len(stored.pop("data")) > 0
    assert not stored
    assert not rows[[*pair.tensors_before].index("model.norm.weight")]["blocks"]


@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("coding", CODINGS)
def test_all_ways_to_write_give_the_same_checkpoint(tmp_path, pair, coding, compression, codec):
    patch = write_patch(
        tmp_path / "p", pairs(pair.tensors_before, pair.tensors_after), base_fingerprint="f",
        coding=coding, compression=compression, codec=codec,
    )  # fmt: skip
    entries = [block for one in patch.tensors.values() for block in one.blocks]
    assert entries
    if codec is not None:
        assert {entry.codec for entry in entries} == {list(CODECS).index(codec)}
    apply_patch(pair.before, patch.path, tmp_path / "out")
    assert fingerprint(Checkpoint.open(tmp_path / "out")) == fingerprint(
        Checkpoint.open(pair.after)
    )


@pytest.mark.parametrize("coding", CODINGS)
def test_absolute_patches_need_no_weights_before(tmp_path, pair, coding):
    patch = write_patch(
        tmp_path / "p", pairs(pair.tensors_before, pair.tensors_after), base_fingerprint="f",
        coding=coding,
    )  # fmt: skip
    name = "model.layers.0.self_attn.q_proj.weight"
    bits = np.zeros(256, np.uint16)
    Changes(patch, name).apply(bits, 0)
    changed = pair.changed[name].ravel()
    is_after = np.array_equal(bits[changed], pair.tensors_after[name].bits.ravel()[changed])
    assert is_after == (coding == "absolute")


def test_stored_tensors_are_read_piece_by_piece(tmp_path, pair):
    sides = [Checkpoint.open(folder) for folder in (pair.before, pair.after)]
    infos = [[side.tensors[name] for side in sides] for name in pair.tensors_before]
    stored = [TensorPair(one.name, one.dtype, one.shape, one, other) for one, other in infos]
    one = write_patch(tmp_path / "one", stored, base_fingerprint=fingerprint(sides[0]))
    assert one.path.read_bytes() == make_patch(pair, tmp_path / "two").path.read_bytes()


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
        "belongs to another base: model.embed": pair.tensors_after,
        "which .* lacks; give the checkpoint that": {
            name: one for name, one in pair.tensors_before.items() if name != first
        },
        r"is bf16 \[16, 37\] .*; give the checkpoint that": {
            **pair.tensors_before, first: Tensor("bf16", (16, 37), tensor.bits),
        },
        "is u8": {
            **pair.tensors_before, first: Tensor("u8", tensor.shape, tensor.bits.astype(np.uint8)),
        },
        # Another float format is cast, so only the fingerprint tells.
        "another base": {
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
    codecs = {[*CODECS][block.codec] for one in patch.tensors.values() for block in one.blocks}
    assert codecs == {"bitmap", "gaps"}
    whole = patch.path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        patch.path.write_bytes(damaged)
        with pytest.raises(PatchError):
            verify_patch(base, Patch.open(patch.path))


def make_patch_of(base, path, before, after) -> Patch:
    tensor = TensorPair("t", "bf16", before.shape, before, after)
    return write_patch(path, [tensor], base_fingerprint=fingerprint(Checkpoint.open(base)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_an_error_and_never_wrong_weights(tmp_path_factory, data):
    """What makes the checksums agree is in ``fuzz_patches``."""
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(1)
    before = rng.integers(0, 2**16, 300, np.uint16)
    after = before ^ (rng.random(300) < 0.3).astype(np.uint16)
    base = planted.write_folder(folder / "base", {"t": Tensor("bf16", (300,), before)})
    patch = make_patch_of(base, folder / "p", before, after)
    content = bytearray(patch.path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "overwrite", "insert"]))
    place = data.draw(st.integers(0, len(content) - 1))
    more = data.draw(st.binary(min_size=1, max_size=20))
    end = {"cut": len(content), "overwrite": place + len(more), "insert": place}[kind]
    content[place:end] = b"" if kind == "cut" else more
    patch.path.write_bytes(content)
    try:
        apply_patch(base, patch.path, folder / "out")
    except PatchError:
        assert not (folder / "out").exists()
    else:
        found = Checkpoint.open(folder / "out").read_bits("t")
        assert np.array_equal(found, after)


@pytest.fixture
def forged(tmp_path, monkeypatch):
    """Gives a patch of three blocks that says something else, with the checksums of that."""
    monkeypatch.setattr("rlsparse.patch.write.PIECE", 100)
    monkeypatch.setattr("rlsparse.patch.write.BLOCK_CHANGES", 1)
    before = np.arange(300, dtype=np.uint16)
    base = planted.write_folder(tmp_path / "base", {"t": Tensor("bf16", (300,), before)})
    path = make_patch_of(base, tmp_path / "p", before, before + (before % 10 == 0)).path

    def forge(change) -> Patch:
        parts = Parts.of(path.read_bytes())
        index = parts.index()
        change(index["tensors"][0], parts.arrays)
        seal_index(parts, json.dumps(index))
        path.write_bytes(parts.content())
        return Patch.open(path)

    return forge


def block(row: int, column: int, number: int):
    """Puts a number into the table of a tensor."""
    return lambda tensor, _: tensor["blocks"][row].__setitem__(column, number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (block(2, 0, 299), "blocks of t"),  # the last stop
        (block(1, 0, 100), "blocks of t"),  # without an element
        (lambda t, _: (t.update(num_changed=121), t["blocks"][0].__setitem__(1, 101)), "blocks of"),
        (block(0, 3, 801), "blocks of t"),  # bytes to make room
        (block(0, 5, [1, 2, 3]), "blocks of t"),  # a stream is missing
        (lambda t, _: (t.update(shape=[2**32]), t["blocks"][2].__setitem__(0, 2**32)), "blocks of"),
        (lambda t, _: t.update(num_changed=31), "blocks of t"),
        (lambda t, _: t["blocks"].clear(), "blocks of t"),
        (block(0, 5, [100, 2, 3, 4]), "bytes of data, "),
        (block(0, 1, 10.0), "numbers of t"),
        (block(0, 5, [-1, 2, 3, 4]), "numbers of t"),
        (block(0, 5, 7), "TypeError"),
        (lambda t, _: t["blocks"].__setitem__(0, []), "not enough values"),
        (lambda t, _: t["blocks"][0].pop(2), "TypeError"),
        (lambda t, _: t.update(num_changed=301), "301 changes of t"),
        (lambda t, _: t.update(part=[0, 301]), "elements 0 to 301 of t"),
        (lambda t, _: t.update(shape=[300.0]), "numbers of t"),
        (lambda t, _: t.update(xxh3_before=5), "checksums of t"),
        (lambda t, _: t.update(xxh3_after=t["xxh3_before"]), "30 changes and the checksums of t"),
        (lambda t, _: (t.update(num_changed=0), t["blocks"].clear()), "changes and the checksums"),
        (lambda t, _: t.update(dtype="bf17"), "KeyError"),
        (lambda t, _: t.pop("name"), "KeyError"),
        (lambda t, _: t.update(name="a\nb"), "names are text without control"),
        (lambda _, arrays: arrays.pop("data"), r"arrays \{'index'"),
        (lambda _, arrays: arrays.update(other=arrays["data"]), "'other': "),
        (lambda _, arrays: arrays.update(data=("I8", *arrays["data"][1:])), "'data': .'i8', 1"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(forged, change, message):
    assert len(forged(lambda tensor, arrays: None).tensors["t"].blocks) == 3
    with pytest.raises(PatchError, match=rf"p has a damaged patch header .*{message}"):
        forged(change)


def test_a_tensor_that_an_index_has_twice(tmp_path, pair):
    parts = Parts.of(make_patch(pair, tmp_path / "p").path.read_bytes())
    index = parts.index()
    unchanged = next(one for one in index["tensors"] if not one["blocks"])
    seal_index(parts, json.dumps({"tensors": [*index["tensors"], unchanged]}))
    (tmp_path / "p").write_bytes(parts.content())
    with pytest.raises(PatchError, match=f"{unchanged['name']} comes twice"):
        Patch.open(tmp_path / "p")


@pytest.mark.parametrize(
    ("column", "number", "message"),
    [(2, 3, "codec 3 is unknown; known: 0 to 2"), (3, 1, r"\d+ bytes stand for 1")],
)
def test_blocks_that_make_no_sense(forged, column, number, message):
    patch = forged(block(1, column, number))
    with pytest.raises(PatchError, match=rf"p is damaged at tensor t: {message}"):
        Changes(patch, "t").check()


def damage_ends(stored: bytearray) -> None:
    for place in (0, -1):
        stored[place] ^= 1


def test_a_stretch_is_read_without_the_blocks_beside_it(forged):
    patch = forged(lambda tensor, arrays: damage_ends(arrays["data"][2]))
    before = np.arange(100, 200, dtype=np.uint16)
    bits = before.copy()
    Changes(patch, "t").apply(bits, 100)
    assert np.flatnonzero(bits != before).tolist() == [*range(0, 100, 10)]
    for start in (99, 101):
        with pytest.raises(PatchError, match="another checksum"):
            Changes(patch, "t").apply(bits, start)


def test_another_result_than_was_written_is_refused(forged, tmp_path):
    patch = forged(lambda tensor, arrays: tensor.update(xxh3_after="0" * 32))
    with pytest.raises(PatchError, match="is damaged: the result of t has another checksum"):
        verify_patch(Checkpoint.open(tmp_path / "base"), patch)
    with pytest.raises(PatchError, match="is damaged: the result of t has another checksum"):
        apply_patch(tmp_path / "base", patch.path, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_base_with_other_tensors_beside_those_of_the_patch_is_another(tmp_path, pair):
    patch = make_patch(pair, tmp_path / "p")
    more = {**pair.tensors_before, "more": pair.tensors_before["model.norm.weight"]}
    base = Checkpoint.open(planted.write_folder(tmp_path / "more", more))
    own, other = patch.base_fingerprint[:12], fingerprint(base)[:12]
    with pytest.raises(PatchError, match=f"the base with fingerprint {own}, .*more has {other}"):
        verify_patch(base, patch)


def test_a_patch_of_a_part_is_not_applied_alone(tmp_path):
    before = np.zeros(8, np.uint16)
    base = planted.write_folder(tmp_path / "base", {"t": Tensor("bf16", (8,), before)})
    with new_patch(tmp_path / "p", base_fingerprint="f") as builder:
        tensor = builder.tensor("t", "bf16", (8,), (2, 6))
        tensor.compare(before[2:6], before[2:6] + np.uint16(1))
        tensor.close()
    with pytest.raises(PatchError, match="is of a part of t, as one of several workers wrote it"):
        apply_patch(base, tmp_path / "p", tmp_path / "out")
    with pytest.raises(PatchError, match="is of a part of t"):
        verify_patch(Checkpoint.open(base), Patch.open(tmp_path / "p"))


def test_damage_found_while_applying_leaves_no_model(tmp_path, pair):
    patch = make_patch(pair, tmp_path / "p")
    content = bytearray(patch.path.read_bytes())
    content[-1] ^= 1
    patch.path.write_bytes(content)
    with pytest.raises(PatchError, match="checksum"):
        apply_patch(pair.before, patch.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_no_patches(tmp_path, pair):
    with pytest.raises(PatchError, match="is not a patch"):
        Patch.open(pair.before / "model.safetensors")
    with pytest.raises(PatchError, match="cannot read"):
        Patch.open(tmp_path / "missing")
    planted.write_file(tmp_path / "future", {}, {METADATA_KEY: json.dumps({"version": "9"})})
    with pytest.raises(PatchError, match="format 9, this release reads 3"):
        Patch.open(tmp_path / "future")
    index = {"size_bytes": 14, "xxh3": xxhash.xxh3_128_hexdigest(b'{"tensors":[]}')}
    good = {
        "version": "3", "values": "absolute", "base_fingerprint": "f", "metadata": {},
        "index": index,
    }  # fmt: skip
    text = np.frombuffer(b'{"tensors":[]}', np.uint8)
    stored = {"index": Tensor("u8", (14,), text), "data": Tensor("u8", (0,), text[:0])}
    for text, message in {
        json.dumps(good | {"values": "other"}): "values are 'other'",
        json.dumps(good | {"base_fingerprint": 5}): "the fingerprint or a note is no text",
        json.dumps(good | {"metadata": {"version": 5}}): "the fingerprint or a note is no text",
        json.dumps(good | {"metadata": 5}): "AttributeError",
        json.dumps(good | {"index": {"size_bytes": 2**40}}): "an index of 1099511627776 bytes",
        json.dumps(good | {"index": {"size_bytes": True}}): "an index of True bytes",
        json.dumps(good | {"index": index | {"size_bytes": 13}}): "14 bytes stand for 13",
        json.dumps(good | {"index": index | {"size_bytes": 15}}): "cannot be decompressed",
        json.dumps(good | {"index": index | {"xxh3": "0"}}): "another checksum of the in",
        "[" * 100_000: "nested too deep",
    }.items():
        notes = {METADATA_KEY: text, CHECKSUM_KEY: xxhash.xxh3_128_hexdigest(text.encode())}
        planted.write_file(tmp_path / "other", stored, notes)
        with pytest.raises(PatchError, match=f"damaged patch header .*{message}"):
            Patch.open(tmp_path / "other")
    text = json.dumps(good)
    notes = {METADATA_KEY: text, CHECKSUM_KEY: xxhash.xxh3_128_hexdigest(text.encode())}
    planted.write_file(tmp_path / "other", stored, notes)
    assert Patch.open(tmp_path / "other").tensors == {}


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
