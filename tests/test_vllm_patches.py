"""Patches for vLLM's loader: what it is given, and when it is given nothing.

vLLM itself is not installed with the tests: modules with the fields of its class stand in for it,
and a loader that does what its documentation says. Where it is there, its own loader runs.
"""

import sys
from dataclasses import make_dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import planted
import pytest
import torch
from planted import Tensor

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.patch import Patch, TensorPair, write_patch
from rlsparse.patch.values import CODINGS
from rlsparse.vllm_patches import FIELDS, MODULE, vllm_patches


class Documented(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def install(monkeypatch, made) -> None:
    """Put a package in the place of vLLM."""
    parts = MODULE.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.CheckpointWeightPatch = made


def load(weights: dict[str, torch.Tensor], patches) -> None:
    """Scatter, by way of a tensor of NaNs, as vLLM's documentation says."""
    for patch in patches:
        assert patch.dtype == patch.values.dtype == weights[patch.name].dtype
        staged = torch.full(patch.shape, torch.nan, dtype=patch.dtype).view(-1)
        staged[patch.indices] = patch.values
        staged = staged.view(patch.shape)
        weights[patch.name].copy_(torch.where(staged.isnan(), weights[patch.name], staged))


def patch_of(before, after, path, coding="absolute", base="f") -> Patch:
    pairs = [
        TensorPair(name, one.dtype, one.shape, one.bits, after[name].bits)
        for name, one in before.items()
    ]
    return write_patch(path, pairs, base_fingerprint=base, coding=coding)


def pair_of_weights(dtypes=("bf16", "fp16", "fp32")) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    before = {f"{t}.weight": planted.random_tensor(rng, t, (6, 50)) for t in dtypes}
    before["scalar"] = planted.random_tensor(rng, "bf16", ())
    after = {
        name: planted.plant(rng, one, density)[0]
        for (name, one), density in zip(before.items(), (0.1, 1.0, 0.02, 1.0), strict=False)
    }
    return before | {"same": before["scalar"]}, after | {"same": before["scalar"]}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(one.bits.copy())
        .view(getattr(torch, planted.FLOATS[one.dtype].name))
        .view(one.shape)
        for name, one in tensors.items()
    }


def assert_equal(weights: dict[str, torch.Tensor], tensors: dict[str, Tensor]) -> None:
    for name, one in tensors.items():
        assert weights[name].reshape(-1).view(torch.uint8).numpy().tobytes() == one.bits.tobytes()


@pytest.mark.parametrize("made", [Documented, make_dataclass("Other", reversed(FIELDS))])
@pytest.mark.parametrize("coding", CODINGS)
def test_a_loader_gets_the_weights_after(tmp_path, monkeypatch, coding, made):
    install(monkeypatch, made)
    monkeypatch.setattr("rlsparse.patch.write.PIECE", 64)
    monkeypatch.setattr("rlsparse.patch.export.PIECE", 100)
    before, after = pair_of_weights()
    base = Checkpoint.open(planted.write_folder(tmp_path / "base", before))
    patch = patch_of(before, after, tmp_path / "p", coding, fingerprint(base))
    for side in [base] if coding == "relative" else [base, None]:
        found = list(vllm_patches(patch, side))
        assert {one.name for one in found} == {n for n in before if n != "same"}
        for one in found:
            assert isinstance(one, made)
            assert one.values.is_contiguous()
            assert one.indices.is_contiguous()
            assert one.indices.dtype == torch.int64
            assert one.values.shape == one.indices.shape == (patch.tensors[one.name].num_changed,)
            assert bool((one.indices.diff() > 0).all())
        weights = weights_of(before)
        load(weights, found)
        assert_equal(weights, after)


def test_float8_is_given_as_it_is(tmp_path, monkeypatch):
    install(monkeypatch, Documented)
    before, after = pair_of_weights(("fp8_e4m3", "fp8_e5m2"))
    expected = weights_of(after)
    for one in vllm_patches(patch_of(before, after, tmp_path / "p")):
        assert one.values.dtype == expected[one.name].dtype
        raw = expected[one.name].reshape(-1, 1).view(torch.uint8)[one.indices]
        assert torch.equal(one.values.view(-1, 1).view(torch.uint8), raw)


@pytest.mark.parametrize("dtype", [*planted.FLOATS])
def test_nan_is_refused_before_anything_is_given(tmp_path, monkeypatch, dtype):
    install(monkeypatch, Documented)
    before, after = (planted.random_tensor(np.random.default_rng(n), dtype, (9,)) for n in (0, 1))
    after.bits[4] = np.array(np.nan, planted.FLOATS[dtype]).view(after.bits.dtype)
    first = {"a": Tensor(dtype, (9,), before.bits)}, {"a": Tensor(dtype, (9,), before.bits + 1)}
    patch = patch_of(first[0] | {"b": before}, first[1] | {"b": after}, tmp_path / "p")
    with pytest.raises(PatchError, match=r"p makes element 4 of b NaN.*rlsparse patch export"):
        vllm_patches(patch)


def test_what_vllm_cannot_take_is_refused_before_anything_is_given(tmp_path, monkeypatch):
    install(monkeypatch, Documented)
    one, other = (Tensor("i64", (2,), np.array([0, n], np.uint64)) for n in (1, 2))
    base = Checkpoint.open(planted.write_folder(tmp_path / "base", {"t": one}))
    integers = patch_of({"t": one}, {"t": other}, tmp_path / "p")
    with pytest.raises(PatchError, match="changes t, which is i64: vLLM takes changes of fp64, "):
        vllm_patches(integers)
    before, after = pair_of_weights()
    relative = patch_of(before, after, tmp_path / "q", "relative")
    with pytest.raises(PatchError, match="has relative values"):
        vllm_patches(relative)
    with pytest.raises(PatchError, match=r"which .*base lacks"):
        vllm_patches(relative, base)
    another = Checkpoint.open(planted.write_folder(tmp_path / "another", after))
    with pytest.raises(PatchError, match="belongs to another base"):
        vllm_patches(relative, another)


def test_a_class_with_other_fields_is_not_guessed_at(tmp_path, monkeypatch):
    install(monkeypatch, make_dataclass("Newer", [*FIELDS, "scale"]))
    patch = patch_of(*pair_of_weights(), tmp_path / "p")
    message = (
        "has the fields name, shape, dtype, values, indices, scale; known are name, shape, dtype, "
        "values, indices: update rlsparse, or use the plain file of `rlsparse patch export`"
    )
    with pytest.raises(PatchError, match=message):
        vllm_patches(patch)


def test_without_vllm_or_its_class_one_clear_error(tmp_path, monkeypatch):
    patch = patch_of(*pair_of_weights(), tmp_path / "p")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PatchError, match=r"no CheckpointWeightPatch of vLLM here \(.*: install"):
        vllm_patches(patch)
    install(monkeypatch, Documented)
    del sys.modules[MODULE].CheckpointWeightPatch
    with pytest.raises(PatchError, match=r"no CheckpointWeightPatch of vLLM here \(.*: install"):
        vllm_patches(patch)


class Model(torch.nn.Module):
    """Loads as models of vLLM do: the final write is one copy."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def load_weights(self, weights) -> set[str]:
        names = set()
        for name, loaded in weights:
            self.weights[name].copy_(loaded)
            names.add(name)
        return names


def test_the_loader_of_vllm_itself(tmp_path):
    vllm = pytest.importorskip(MODULE)
    before, after = pair_of_weights()
    weights = weights_of(before)
    patches = vllm_patches(patch_of(before, after, tmp_path / "p"))
    vllm.load_checkpoint_weight_patches(Model(weights), patches)
    assert_equal(weights, after)
