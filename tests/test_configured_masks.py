"""A trial's configuration says which masks are made, of which leaves, with which seed."""

import numpy as np
import pytest

from rlsparse import masks
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrialConfig
from rlsparse.definitions import Direction, Size
from rlsparse.errors import CheckpointError
from rlsparse.kernels import popcount
from rlsparse.mask_config import leaves
from rlsparse.mask_making import (
    MadeMask,
    by_direction,
    by_magnitude,
    make_mask,
    random_like,
    random_within_magnitude,
    uniform,
)
from rlsparse.models import TINY

FILES = {"a": 0, "b": 1, "c": 2}


def of_file(leaf) -> MadeMask:
    """What stands for a mask file: another one for each name."""
    return uniform(TINY, 0.3, seed=FILES[leaf.file])


def config(mask):
    whole = {"algorithm": {"name": "sft"}, "train": {"mask": mask}}
    return TrialConfig.model_validate(whole).train.mask


def made(mask, seed: int = 0) -> str:
    """Fingerprint of what a configuration gives."""
    return masks.fingerprint(masks.bits_of(make_mask(config(mask), of_file, TINY, seed=seed)))


def bools(mask: masks.Mask) -> dict[str, np.ndarray]:
    return {
        name: masks.unpack(packed, int(np.prod(shape)))
        for name, (shape, packed) in masks.bits_of(mask).items()
    }


def test_masks_are_combined_as_sets():
    nested = {"union": [{"file": "a"}, {"intersection": [{"file": "b"}, {"file": "c"}]}]}
    found = bools(make_mask(config(nested), of_file, TINY, seed=0))
    one, two, three = (bools(uniform(TINY, 0.3, seed=seed)) for seed in range(3))
    for name, expected in ((n, one[n] | (two[n] & three[n])) for n in one):
        assert np.array_equal(found[name], expected)


GIVEN = uniform(TINY, 0.3, seed=0)


@pytest.mark.parametrize(
    ("pick", "expected"),
    [
        ("random", lambda: random_like(GIVEN, 4)),
        ("random_within_magnitude", lambda: random_within_magnitude(GIVEN, TINY, 4)),
        ("low_magnitude", lambda: by_magnitude(GIVEN, TINY, Size.LOW)),
        ("high_magnitude", lambda: by_magnitude(GIVEN, TINY, Size.HIGH)),
        ("principal", lambda: by_direction(GIVEN, TINY, Direction.PRINCIPAL)),
        ("other", lambda: by_direction(GIVEN, TINY, Direction.OTHER)),
    ],
)
def test_each_pick_is_that_mask_and_as_dense(pick, expected):
    mask = expected()
    assert made({"like": {"file": "a"}, "pick": pick}, seed=4) == masks.fingerprint(
        masks.bits_of(mask)
    )
    for name in GIVEN.shapes:
        assert popcount(mask.packed(name)) == popcount(GIVEN.packed(name))


def test_draws_follow_the_seed_of_the_trial_unless_they_have_their_own():
    like = {"like": {"file": "a"}}
    assert made(like, 1) == made({**like, "mask_seed": 1}, 2) != made(like, 2)
    assert made({**like, "mask_seed": 1}, 1) == made({**like, "mask_seed": 1}, 2)


def test_leaves_are_read_in_the_order_in_which_they_are_listed():
    mask = config({"union": [{"file": "a"}, {"like": {"file": "b"}}, {"from": "baseline"}]})
    read = []
    make_mask(mask, lambda leaf: read.append(leaf) or GIVEN, TINY, seed=0)
    assert read == list(leaves(mask))


def test_masks_of_different_models_do_not_combine():
    other = MadeMask({**GIVEN.shapes, "d": (8,)}, "", {}, GIVEN.make)
    mask = config({"intersection": [{"file": "a"}, {"file": "b"}]})
    with pytest.raises(CheckpointError, match=r"is of another model than .*: only it has d"):
        make_mask(mask, lambda leaf: {"a": GIVEN, "b": other}[leaf.file], TINY, seed=0)


def test_a_mask_file_is_read_by_path_and_by_url(tmp_path):
    file, bits = tmp_path / "a.mask.safetensors", masks.bits_of(GIVEN)
    masks.write_masks(file, bits, fingerprint(Checkpoint.open(TINY)))
    for place in (file, str(file), f"file://{file}"):
        assert masks.fingerprint(masks.bits_of(masks.read_masks(place))) == masks.fingerprint(bits)
    with pytest.raises(CheckpointError, match="is a folder; give a mask file"):
        masks.read_masks(f"file://{tmp_path}")
