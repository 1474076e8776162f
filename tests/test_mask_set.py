"""Masks from files, trials, patches and checkpoints, compared with brute force."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.masks import pack, write_masks
from rlsparse.overlap.mask_set import compare_masks
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch

SHAPES = {"model.layers.0.mlp.up_proj.weight": (64, 48), "model.norm.weight": (48,)}
STEP = ml_dtypes.bfloat16(2**-4)


def save(folder, tensors):
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def world(tmp_path):
    """A base, and three runs that change each weight with probability .3."""
    rng = np.random.default_rng(0)
    base = {
        name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in SHAPES.items()
    }
    save(tmp_path / "base", base)
    masks = [{n: rng.random(s) < 0.3 for n, s in SHAPES.items()} for _ in range(3)]
    for i, mask in enumerate(masks):
        after = {n: np.where(mask[n], w + STEP * (1 + abs(w)), w) for n, w in base.items()}
        after = {n: w.astype(ml_dtypes.bfloat16) for n, w in after.items()}
        masks[i] = {n: after[n].view(np.uint16) != base[n].view(np.uint16) for n in base}
        save(tmp_path / f"run{i}", after)
    return tmp_path, base, masks


def both(masks, a, b, names=SHAPES):
    return sum(int((masks[a][n] & masks[b][n]).sum()) for n in names)


def test_checkpoints(world):
    folder, _, masks = world
    places = [str(folder / f"run{i}") for i in range(3)]
    rows = compare_masks(places, base=str(folder / "base"))
    whole = [row for row in rows if row["module"] is None]
    ends = [(places.index(row["trial_a"]), places.index(row["trial_b"])) for row in whole]
    assert ends == [(0, 1), (0, 2), (1, 2)]
    for (a, b), row in zip(ends, whole, strict=True):
        assert row["num_both"] == both(masks, a, b)
        assert (row["num_a"], row["num_b"]) == (both(masks, a, a), both(masks, b, b))
        assert row["expected_uniform"] == row["num_a"] * row["num_b"] / row["num_elements"]
        # The third run is independent of the pair.
        assert row["update_size_of"] == places[3 - a - b]
    norms = [row for row in rows if row["module"] == "norm"]
    assert [r["num_both"] for r in norms] == [both(masks, *e, ["model.norm.weight"]) for e in ends]


def test_mask_files_patches_and_trials(world):
    folder, base, masks = world
    own = fingerprint(Checkpoint.open(folder / "base"))
    file = folder / "some.mask.safetensors"
    write_masks(file, {n: (SHAPES[n], pack(masks[0][n])) for n in SHAPES}, own)
    trial = folder / "trial"
    snapshot = trial / "snapshots" / "step-000004"
    snapshot.mkdir(parents=True)
    after = safetensors.numpy.load_file(folder / "run1" / "model.safetensors")
    pairs = [
        TensorPair(n, "bf16", SHAPES[n], base[n].view(np.uint16).ravel(),
                   after[n].view(np.uint16).ravel())
        for n in SHAPES
    ]  # fmt: skip
    write_patch(snapshot / PATCH_FILE, pairs, base_fingerprint=own)
    (trial / "snapshots" / "step-000002").mkdir()
    config = {"model": {"source": str(folder / "base")}}
    (trial / "config.json").write_text(json.dumps(config))
    patch = shutil.copy(snapshot / PATCH_FILE, folder / "copy.patch.safetensors")
    rows = compare_masks([str(file), str(trial), str(patch)])
    whole = [row["num_both"] for row in rows if row["module"] is None]
    assert whole == [both(masks, 0, 1), both(masks, 0, 1), both(masks, 1, 1)]


def test_a_mask_of_a_trial_is_not_independent_of_it(world):
    folder, _, masks = world
    own = fingerprint(Checkpoint.open(folder / "base"))
    file = folder / "run0" / "ever_changed.mask.safetensors"
    write_masks(file, {n: (SHAPES[n], pack(masks[0][n])) for n in SHAPES}, own)
    places = [str(folder / "run0"), str(file), str(folder / "run1")]
    rows = compare_masks(places, base=str(folder / "base"))
    chosen = {
        (row["trial_a"], row["trial_b"]): row["update_size_of"]
        for row in rows
        if row["module"] is None
    }
    assert chosen[places[0], places[1]] == places[2]
    assert chosen[places[1], places[2]] is None
    assert chosen[places[0], places[2]] is None


def test_a_mask_of_a_view_is_compared_in_that_view(world):
    folder, _, masks = world
    own = fingerprint(Checkpoint.open(folder / "base"))
    file = folder / "some.mask.safetensors"
    write_masks(file, {n: (SHAPES[n], pack(masks[0][n])) for n in SHAPES}, own, {"view": "fp16"})
    places = [str(file), str(folder / "run1")]
    (row, *_) = compare_masks(places, base=str(folder / "base"), view="fp16")
    assert row["num_a"] == both(masks, 0, 0)
    with pytest.raises(ConfigError, match=r"some.mask.safetensors is a mask file.* or --view fp16"):
        compare_masks(places, base=str(folder / "base"))


def test_a_mask_of_another_base_is_refused(world):
    folder, _, masks = world
    file = folder / "some.mask.safetensors"
    write_masks(file, {n: (SHAPES[n], pack(masks[0][n])) for n in SHAPES}, "0" * 64)
    with pytest.raises(CheckpointError, match="is of the base 000000000000"):
        compare_masks([str(file), str(folder / "run0")], base=str(folder / "base"))


@pytest.mark.parametrize(
    ("places", "base", "message"),
    [
        (["run0"], "base", "two or more different masks, got 1"),
        (["run0", "run0"], "base", "two or more different masks, got 2"),
        (["run0", "run1"], None, "give --base"),
    ],
)
def test_what_is_missing_is_named(world, places, base, message):
    folder = world[0]
    with pytest.raises(ConfigError, match=message):
        compare_masks([str(folder / p) for p in places], base=base and str(folder / base))


def test_a_damaged_config_is_named(world):
    folder = world[0]
    trial = folder / "trial"
    snapshot = trial / "snapshots" / "step-000004"
    snapshot.mkdir(parents=True)
    (snapshot / PATCH_FILE).touch()
    (trial / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"trial/config.json is damaged; give --base"):
        compare_masks([str(trial), str(folder / "run0")])


def test_what_holds_no_mask_is_refused(world):
    folder, _, masks = world
    (folder / "study" / "trials").mkdir(parents=True)
    (folder / "trial" / "snapshots").mkdir(parents=True)
    own = fingerprint(Checkpoint.open(folder / "base"))
    file = folder / "some.mask.safetensors"
    write_masks(file, {n: (SHAPES[n], pack(masks[0][n])) for n in SHAPES}, own)
    cases = {
        "study": (
            "is the folder of a study; give those of its trials: .*study/trials/ID",
            "stored",
        ),
        "trial": ("trial is the folder of a trial without any snapshot", "stored"),
        "base": ("base is the base itself, in which nothing changed", "stored"),
        "some.mask.safetensors": ("--view bf16: .* is a mask file", "bf16"),
    }
    for place, (message, view) in cases.items():
        with pytest.raises(ConfigError, match=message):
            compare_masks(
                [str(folder / "run0"), str(folder / place)], base=str(folder / "base"), view=view
            )
