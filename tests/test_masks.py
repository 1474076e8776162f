import json
import math
import re

import numpy as np
import planted
import pytest
import safetensors
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rlsparse import masks
from rlsparse.errors import CheckpointError

booleans = st.lists(st.booleans(), max_size=40)
two_masks = booleans.flatmap(
    lambda left: st.tuples(
        st.just(left), st.lists(st.booleans(), min_size=len(left), max_size=len(left))
    )
)


def packed(values: list[bool]) -> masks.Packed:
    return masks.pack(np.array(values, bool))


def unpacked(mask: masks.Packed, size: int) -> list[bool]:
    return masks.unpack(mask, size).tolist()


def test_bit_i_of_byte_j_is_element_8j_plus_i():
    mask = np.zeros((2, 6), bool)
    mask.flat[[0, 3, 9]] = True
    assert masks.pack(mask).tolist() == [0b1001, 0b10]
    assert masks.num_bytes(12) == masks.pack(mask).size


@given(two_masks)
def test_set_algebra(pair):
    left, right = pair
    size, a, b = len(left), packed(left), packed(right)
    assert unpacked(a, size) == left
    assert unpacked(masks.union(a, b), size) == [x or y for x, y in zip(*pair, strict=True)]
    assert unpacked(masks.intersection(a, b), size) == [x and y for x, y in zip(*pair, strict=True)]
    assert unpacked(masks.complement(a, size), size) == [not x for x in left]


@given(two_masks)
def test_laws(pair):
    size, a, b = len(pair[0]), packed(pair[0]), packed(pair[1])

    def negated(mask: masks.Packed) -> masks.Packed:
        return masks.complement(mask, size)

    both, either = masks.intersection(a, b), masks.union(a, b)
    assert np.array_equal(negated(either), masks.intersection(negated(a), negated(b)))
    assert np.array_equal(negated(both), masks.union(negated(a), negated(b)))
    assert np.array_equal(negated(negated(a)), a)
    count = masks.popcount
    assert count(a) + count(b) == count(either) + count(both)
    assert count(a) + count(negated(a)) == size
    if size:
        assert masks.density(a, size) == sum(pair[0]) / size


def test_malformed_masks():
    assert math.isnan(masks.density(packed([]), 0))
    with pytest.raises(CheckpointError, match=r"12 elements is uint8\[2\], got uint8\[3\]"):
        masks.unpack(np.zeros(3, np.uint8), 12)
    with pytest.raises(CheckpointError, match="beyond its 12 elements"):
        masks.complement(np.array([0, 16], np.uint8), 12)
    with pytest.raises(CheckpointError, match="different tensors: 1 and 2 bytes"):
        masks.union(np.zeros(1, np.uint8), np.zeros(2, np.uint8))


MASKS = {
    "b": ((3, 5), packed([True, False, True] * 5)),
    "a": ((), packed([True])),
    "empty": ((0, 4), packed([])),
}


def test_file_round_trip(tmp_path):
    path = tmp_path / "m.mask.safetensors"
    masks.write_masks(path, MASKS, "base", {"kind": "ever_changed"})
    found = masks.read_masks(path)
    assert found.shapes == {name: shape for name, (shape, _) in MASKS.items()}
    assert list(found.shapes) == sorted(MASKS)
    assert (found.base_fingerprint, found.metadata) == ("base", {"kind": "ever_changed"})
    for name, (_, mask) in MASKS.items():
        assert found.packed(name).tobytes() == mask.tobytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert file.get_tensor("b").tolist() == MASKS["b"][1].tolist()
    again = tmp_path / "again"
    masks.write_masks(again, dict(reversed(MASKS.items())), "base", {"kind": "ever_changed"})
    assert again.read_bytes() == path.read_bytes()


def test_files_that_are_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="15 elements"):
        masks.write_masks(tmp_path / "m", {"b": ((3, 5), packed([True]))}, "base")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "m"
    tensor = planted.Tensor("u8", (2,), np.array([255, 255], "u1"))
    content = {
        "version": "2",
        "base_fingerprint": "",
        "metadata": {},
        "shapes": {"b": [3, 5]},
        "checksums": {"b": xxhash.xxh3_128_hexdigest(b"\xff\xff")},
    }
    cases = {
        "not a mask file": None,
        "format 1, this release reads 2: make it again": {"version": "1"},
        "do not fit": {**content, "shapes": {"b": [3, 6]}},
        "its masks do not fit": {**content, "checksums": {}},
        r"damaged mask header \(KeyError\('shapes'\)\)": {"version": "2"},
        "damaged mask header": ["version"],
    }
    for message, header in cases.items():
        planted.write_file(path, {"b": tensor}, header and notes(header))
        with pytest.raises(CheckpointError, match=message):
            masks.read_masks(path)
    planted.write_file(path, {"b": tensor}, notes(content) | {masks.CHECKSUM_KEY: "0" * 32})
    with pytest.raises(CheckpointError, match="another checksum than it says"):
        masks.read_masks(path)
    planted.write_file(path, {"b": tensor}, notes(content))
    with pytest.raises(CheckpointError, match="beyond its 15 elements"):
        masks.read_masks(path).packed("b")


def notes(content: object) -> dict[str, str]:
    text = json.dumps(content)
    checksum = xxhash.xxh3_128_hexdigest(text.encode())
    return {masks.METADATA_KEY: text, masks.CHECKSUM_KEY: checksum}


def test_every_damaged_byte_is_noticed(tmp_path):
    """A flipped bit anywhere, in the header, its checksums or the masks."""
    path = tmp_path / "m"
    masks.write_masks(path, MASKS, "base", {"kind": "ever_changed"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            masks.bits_of(masks.read_masks(path))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    message = f"{path} is damaged: the mask of b has another checksum; make it again"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        masks.bits_of(masks.read_masks(path))
