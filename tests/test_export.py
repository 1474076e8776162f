"""Plain indices and values of patches: what other programs read is what changed."""

import json

import numpy as np
import planted
import pytest
import safetensors
import torch
from planted import Tensor
from safetensors.torch import load_file

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.patch import Patch, TensorPair, new_patch, write_patch
from rlsparse.patch.export import EXPORT_KEY, export_patch
from rlsparse.patch.values import CODINGS

TORCH = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "i64": torch.int64,
    "u8": torch.uint8,
}  # fmt: skip


def patch_of(before, after, path, coding="relative", base="f") -> Patch:
    pairs = [
        TensorPair(name, one.dtype, one.shape, one.bits, after[name].bits)
        for name, one in before.items()
    ]
    notes = {"step": "3"}
    return write_patch(path, pairs, base_fingerprint=base, metadata=notes, coding=coding)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("density", [0.01, 1.0])
def test_load_file_reads_what_changed_in_every_format(tmp_path, monkeypatch, coding, density):
    monkeypatch.setattr("rlsparse.patch.export.PIECE", 100)
    monkeypatch.setattr("rlsparse.patch.write.PIECE", 64)
    monkeypatch.setattr("rlsparse.patch.write.BLOCK_CHANGES", 50)
    rng = np.random.default_rng(0)
    before, after = {"same": planted.random_tensor(rng, "bf16", (3,))}, {}
    after["same"] = before["same"]
    for dtype in TORCH:
        item = planted.unsigned(dtype)
        old, new = rng.integers(0, np.iinfo(item).max, (2, 500), item, endpoint=True)
        is_changed = rng.random(500) < density
        is_changed[7] = True
        new = np.where(is_changed, new, old)
        new[7] = old[7] ^ item.type(1)
        before[dtype], after[dtype] = (Tensor(dtype, (5, 100), bits) for bits in (old, new))
    base = Checkpoint.open(planted.write_folder(tmp_path / "base", before))
    patch = patch_of(before, after, tmp_path / "p", coding, fingerprint(base))
    export_patch(patch, tmp_path / "out.safetensors", base)
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == {f"{name}.{key}" for name in TORCH for key in ("idx", "val")}
    for name, dtype in TORCH.items():
        places = np.flatnonzero(before[name].bits != after[name].bits)
        indices, values = found[f"{name}.idx"], found[f"{name}.val"]
        assert (indices.dtype, values.dtype) == (torch.int32, dtype)
        assert np.array_equal(indices.numpy(), places)
        assert bits_of(values) == after[name].bits[places].tobytes()
    if coding == "absolute":
        export_patch(patch, tmp_path / "alone")
        assert (tmp_path / "alone").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_metadata(tmp_path):
    one, other = (Tensor("bf16", (1, 2), np.array([0, n], np.uint16)) for n in (1, 2))
    patch = patch_of({"a": one, "b": one}, {"a": other, "b": one}, tmp_path / "p", "absolute")
    export_patch(patch, tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out", "numpy") as file:
        assert json.loads(file.metadata()[EXPORT_KEY]) == {
            "version": "1",
            "base_fingerprint": "f",
            "metadata": {"step": "3"},
            "tensors": {"a": {"dtype": "bf16", "shape": [1, 2]}},
        }


def test_a_patch_of_nothing_and_another_format_than_the_base(tmp_path):
    narrow = planted.random_tensor(np.random.default_rng(0), "bf16", (4,))
    wide = narrow.bits.astype(np.uint32) << 16
    before, after = (Tensor("fp32", (4,), wide + np.uint32(n)) for n in (0, 1))
    base = Checkpoint.open(planted.write_folder(tmp_path / "base", {"w": narrow}))
    nothing, cast = ({"w": before}, {"w": before}), ({"w": before}, {"w": after})
    export_patch(patch_of(*nothing, tmp_path / "p"), tmp_path / "nothing", base)
    assert load_file(tmp_path / "nothing") == {}
    export_patch(patch_of(*cast, tmp_path / "p"), tmp_path / "cast", base)
    assert bits_of(load_file(tmp_path / "cast")["w.val"]) == after.bits.tobytes()


def test_indices_are_int64_where_int32_does_not_suffice(tmp_path):
    """A tensor of 2^31 elements, of which the last one changed."""
    same, after = np.zeros(2**28, np.uint8), np.zeros(2**28, np.uint8)
    after[-1] = 9
    with new_patch(tmp_path / "p", base_fingerprint="f", coding="absolute") as builder:
        tensor = builder.tensor("t", "u8", (2, 2**30))
        for number in range(8):
            is_last = number == 7
            places = np.array([same.size - 1] if is_last else [], np.uint32)
            tensor.add(same, after if is_last else same, places)
        tensor.close()
    export_patch(Patch.open(tmp_path / "p"), tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert found["t.idx"].dtype == torch.int64
    assert (found["t.idx"].tolist(), found["t.val"].tolist()) == ([2**31 - 1], [9])


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    one, other = (Tensor("bf16", (2,), np.array([0, n], np.uint16)) for n in (1, 2))
    base = Checkpoint.open(planted.write_folder(tmp_path / "base", {"t": one}))
    another = Checkpoint.open(planted.write_folder(tmp_path / "another", {"t": other}))
    relative = patch_of({"t": one}, {"t": other}, tmp_path / "relative")
    absolute = patch_of({"t": one}, {"t": other}, tmp_path / "absolute", "absolute")
    rest = {"t": one, "u": one}, {"t": other, "u": one}
    two = patch_of(*rest, tmp_path / "two", "absolute")
    moved = Checkpoint.open(planted.write_folder(tmp_path / "moved", {"t": one, "u": other}))
    with new_patch(tmp_path / "part", base_fingerprint="f", coding="absolute") as builder:
        builder.tensor("t", "bf16", (2,), (0, 1)).close()
    part = Patch.open(tmp_path / "part")
    damaged = patch_of({"t": one}, {"t": other}, tmp_path / "damaged", "absolute")
    content = bytearray(damaged.path.read_bytes())
    content[-1] ^= 1
    damaged.path.write_bytes(content)
    for patch, side, message in (
        (relative, None, r"has relative values, .*give that too \(--base\)"),
        (relative, another, "belongs to another base: t of"),
        (absolute, another, "belongs to another base: t of"),
        (two, moved, "belongs to another base: u of"),  # which did not change
        (part, base, "is of a part of t"),
        (part, None, "is of a part of t"),
        (damaged, base, "damaged at tensor t"),
        (damaged, None, "damaged at tensor t"),
    ):
        files = {file.name for file in tmp_path.iterdir()}
        with pytest.raises(PatchError, match=message):
            export_patch(patch, tmp_path / "out", side)
        assert {file.name for file in tmp_path.iterdir()} == files
