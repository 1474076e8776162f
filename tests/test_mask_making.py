"""Masks are what other trials changed, bit for bit, or others of the same size."""

import numpy as np
import pytest
from safetensors.torch import load_file

from rlsparse import masks
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrialConfig
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.kernels import popcount
from rlsparse.mask_config import leaves
from rlsparse.mask_making import changed, make_mask, random_like
from rlsparse.models import TINY
from rlsparse.patch import Patch

BASE = Checkpoint.open(TINY)


def config(mask):
    whole = {"algorithm": {"name": "sft"}, "train": {"mask": mask}}
    return TrialConfig.model_validate(whole).train.mask


def bits_of(seed: int, density: float = 0.3) -> masks.Bits:
    generator = np.random.default_rng(seed)
    return {
        name: (shape, masks.pack(generator.random(np.prod(shape)) < density))
        for name, shape in {"a": (7, 9), "b": (130,), "c": (40, 1000)}.items()
    }


def bools(bits: masks.Bits) -> dict[str, np.ndarray]:
    return {n: masks.unpack(packed, int(np.prod(shape))) for n, (shape, packed) in bits.items()}


def counts(bits: masks.Bits) -> list[int]:
    return [popcount(packed) for _, packed in bits.values()]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_a_trial_changed_is_what_differs_in_its_checkpoint(
    trained, tiny_trial, base, precision
):
    trial = trained(tiny_trial(precision=precision, keep_checkpoints=True), base)
    found = bools(changed(BASE, base.fingerprint, Patch.open(trial.patch())))
    before = load_file(base.path / "model.safetensors")
    after = load_file(trial.folder / "checkpoint" / "model.safetensors")
    assert found.keys() == after.keys()
    for name, mask in found.items():
        differs = before[name].to(after[name].dtype).ne(after[name]).flatten().numpy()
        assert np.array_equal(mask, differs)
    assert sum(mask.sum() for mask in found.values()) > 0


def test_a_patch_of_another_base_has_no_mask(trained, tiny_trial, base, wide_base):
    trial = trained(tiny_trial(keep_checkpoints=True, precision="bf16"), base)
    with pytest.raises(PatchError, match="belongs to the base with fingerprint"):
        changed(Checkpoint.open(wide_base.path), wide_base.fingerprint, Patch.open(trial.patch()))


def test_random_masks_have_the_counts_of_each_tensor_and_are_drawn_uniformly():
    given = bits_of(0)
    drawn = [random_like(given, BASE, seed) for seed in range(200)]
    assert all(counts(one) == counts(given) for one in drawn)
    assert [shape for shape, _ in drawn[0].values()] == [shape for shape, _ in given.values()]
    share = np.mean([bools(one)["b"] for one in drawn], axis=0)  # of each element
    expected = counts(given)[1] / 130
    assert abs(share - expected).max() < 5 * (expected * (1 - expected) / 200) ** 0.5
    again, other = random_like(given, BASE, 0), bools(drawn[1])["c"]
    assert masks.fingerprint(again) == masks.fingerprint(drawn[0])
    inside = bools(drawn[0])["c"]
    assert abs((inside & other).mean() - 0.09) < 0.01  # as of independent ones
    for density in (0.0, 1.1):
        assert counts(random_like(bits_of(0, density), BASE, 0)) == counts(bits_of(0, density))


def test_masks_are_combined_as_sets():
    given = [bits_of(seed) for seed in range(3)]
    files = [{"file": name} for name in "xyz"]
    of = dict(zip("xyz", given, strict=True))
    mask = config({"union": [files[0], {"intersection": files[1:]}]})
    found = bools(make_mask(mask, lambda leaf: of[leaf.file], BASE, seed=0))
    one, two, three = map(bools, given)
    for name, expected in ((n, one[n] | (two[n] & three[n])) for n in one):
        assert np.array_equal(found[name], expected)


def test_draws_follow_the_seed_of_the_trial_unless_they_have_their_own():
    def make(mask, seed):
        return masks.fingerprint(make_mask(config(mask), lambda _: bits_of(0), BASE, seed=seed))

    like = {"like": {"file": "a"}}
    assert make(like, 1) == make({**like, "mask_seed": 1}, 2) != make(like, 2)
    assert make({**like, "mask_seed": 1}, 1) == make({**like, "mask_seed": 1}, 2)


def test_leaves_are_read_in_the_order_in_which_they_are_listed():
    mask = config({"union": [{"file": "a"}, {"like": {"file": "b"}}, {"from": "baseline"}]})
    read = []
    make_mask(mask, lambda leaf: read.append(leaf) or bits_of(0), BASE, seed=0)
    assert read == list(leaves(mask))


def test_masks_of_different_models_do_not_combine():
    other = {**bits_of(1), "d": ((8,), np.zeros(1, np.uint8))}
    of = {"a": bits_of(0), "b": other}
    mask = config({"intersection": [{"file": "a"}, {"file": "b"}]})
    with pytest.raises(CheckpointError, match="1 tensors are in one of them alone, d; combine"):
        make_mask(mask, lambda leaf: of[leaf.file], BASE, seed=0)


def test_a_mask_file_is_read_by_path_and_by_url(tmp_path):
    file = tmp_path / "a.mask.safetensors"
    masks.write_masks(file, bits_of(0), fingerprint(BASE))
    for place in (file, str(file), f"file://{file}"):
        assert masks.fingerprint(masks.read_masks(place).bits()) == masks.fingerprint(bits_of(0))
    with pytest.raises(CheckpointError, match="is a folder; give a mask file"):
        masks.read_masks(f"file://{tmp_path}")
