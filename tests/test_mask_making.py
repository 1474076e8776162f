"""Masks of subnetworks: of pairs, patches and trials, and their controls, by brute force."""

import hashlib
import json
import math
import shutil
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from planted import Tensor, cast, make_pair, plant, random_tensor, weights, write_folder

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.definitions import Direction, Size, Take
from rlsparse.errors import CheckpointError, ConfigError, PatchError
from rlsparse.mask_making import (
    MadeMask,
    by_direction,
    by_magnitude,
    changed,
    chosen,
    complement,
    difference,
    held,
    intersection,
    of_trial,
    random_like,
    random_within_magnitude,
    step_of,
    uniform,
    union,
    write,
)
from rlsparse.masks import Mask, pack, read_masks, unpack, write_masks
from rlsparse.models import TINY
from rlsparse.overlap.mask_set import compare_masks
from rlsparse.overlap.strata import magnitude_labels
from rlsparse.patch import TensorPair, write_patch
from rlsparse.subnetwork import SubnetworkAdamW, load_mask
from rlsparse.tables import EVER_CHANGED

ODD_SHAPES = {
    "model.embed_tokens.weight": (37, 16),
    "model.layers.0.mlp.down_proj.weight": (5, 3, 7),
    "model.layers.0.self_attn.q_proj.weight": (13, 21),
    "model.norm.weight": (150,),
}


def bits_of(mask: Mask) -> dict[str, np.ndarray]:
    return {
        name: unpack(mask.packed(name), math.prod(shape)) for name, shape in mask.shapes.items()
    }


def counts_of(mask: Mask) -> dict[str, int]:
    return {name: int(bits.sum()) for name, bits in bits_of(mask).items()}


def keys_of(choice: str, seed: int, name: str, size: int) -> np.ndarray:
    digest = hashlib.sha256(repr((choice, seed, name)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)


def a_mask(base, density: float = 0.3, seed: int = 0, **metadata: str) -> MadeMask:
    """Some weights of a base, each tensor more densely than the one before."""
    rng, opened = np.random.default_rng(seed), Checkpoint.open(base)
    shapes = {name: info.shape for name, info in opened.tensors.items()}
    packed = {
        name: pack(rng.random(math.prod(shape)) < density * (1 + number / 8))
        for number, (name, shape) in enumerate(shapes.items())
    }
    return MadeMask(shapes, fingerprint(opened), metadata, packed.__getitem__)


@pytest.fixture(params=[64, 2**18], ids=["in pieces", "whole"])
def pieces(request, monkeypatch):
    """Weights that are in memory at a time."""
    monkeypatch.setattr(chosen, "_PIECE", request.param)


@pytest.fixture(params=["bf16", "fp32", "fp64", "fp8_e4m3", "fp16"])
def stored(request, tmp_path):
    """A base in some format, with equal weights and zeros: its folder and its tensors."""
    rng = np.random.default_rng(3)
    tensors = {name: random_tensor(rng, request.param, shape) for name, shape in ODD_SHAPES.items()}
    for tensor in tensors.values():
        tensor.bits[1:60:2] = tensor.bits[2]
        tensor.bits[60:70] = 0
    return write_folder(tmp_path / "base", tensors), tensors


# --- what changed ----------------------------------------------------------------------------


def test_what_changed_between_checkpoints(tmp_path):
    pair = make_pair(tmp_path)
    mask = changed(pair.before, pair.after)
    found = bits_of(mask)
    assert list(found) == sorted(pair.changed)
    assert all((found[name] == pair.changed[name]).all() for name in found)
    assert mask.base_fingerprint == fingerprint(Checkpoint.open(pair.before))
    assert (mask.metadata["kind"], mask.metadata["view"]) == ("changed", "stored")
    for name, shape, packed in mask:
        assert shape == pair.tensors_before[name].shape
        assert (packed == pack(pair.changed[name])).all()


@pytest.mark.parametrize("view", ["bf16", "fp16", "fp8_e4m3"])
def test_a_view_rounds_both_sides_first(tmp_path, view):
    pair = make_pair(tmp_path, "fp32", density=0.5)
    for name, found in bits_of(changed(pair.before, pair.after, view)).items():
        sides = (cast(side[name], view).bits for side in (pair.tensors_before, pair.tensors_after))
        one, other = sides
        assert (found == (one != other)).all()


def test_a_tensor_longer_than_a_piece(tmp_path):
    pair = make_pair(tmp_path, shapes={"model.layers.0.mlp.up_proj.weight": (700, 771)})
    (found,) = bits_of(changed(pair.before, pair.after)).values()
    assert (found == pair.changed["model.layers.0.mlp.up_proj.weight"]).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_patch_gives_the_mask_of_its_checkpoint(tmp_path, dtype):
    """One in another format than the base is against the base in its own."""
    pair = make_pair(tmp_path)
    rng = np.random.default_rng(1)
    before = {name: cast(tensor, dtype) for name, tensor in pair.tensors_before.items()}
    planted = {name: plant(rng, tensor, 0.2) for name, tensor in before.items()}
    pairs = [
        TensorPair(name, dtype, before[name].shape, before[name].bits, after.bits)
        for name, (after, _) in planted.items()
    ]
    own = fingerprint(Checkpoint.open(pair.before))
    write_patch(tmp_path / "p.patch.safetensors", pairs, base_fingerprint=own)
    found = bits_of(changed(pair.before, tmp_path / "p.patch.safetensors"))
    assert all((found[name] == mask).all() for name, (_, mask) in planted.items())
    write_patch(tmp_path / "other.patch.safetensors", pairs, base_fingerprint="0" * 64)
    with pytest.raises(PatchError, match="belongs to the base with fingerprint 000000000000"):
        changed(pair.before, tmp_path / "other.patch.safetensors")


def test_a_tied_head_is_in_the_mask_once_under_the_name_of_the_embedding(tmp_path):
    rng = np.random.default_rng(0)
    embedding = random_tensor(rng, "bf16", (37, 16))
    moved, mask = plant(rng, embedding, 0.4)
    for folder, weight in (("before", embedding), ("after", moved)):
        write_folder(
            tmp_path / folder,
            {"model.embed_tokens.weight": weight, "lm_head.weight": weight},
            {"tie_word_embeddings": True},
        )
    found = changed(tmp_path / "before", tmp_path / "after")
    assert list(found.shapes) == ["model.embed_tokens.weight"]
    assert (bits_of(found)["model.embed_tokens.weight"] == mask).all()
    assert list(uniform(tmp_path / "before", 0.5, 0).shapes) == ["model.embed_tokens.weight"]


def test_pairs_of_different_models_say_what_differs(tmp_path):
    pair = make_pair(tmp_path)
    others = {
        "lacks": {n: t for n, t in pair.tensors_after.items() if "v_proj" not in n},
        "has more": pair.tensors_after | {"extra.weight": pair.tensors_after["model.norm.weight"]},
        "resized": pair.tensors_after
        | {"model.embed_tokens.weight": random_tensor(np.random.default_rng(0), "bf16", (39, 16))},
    }
    for name, tensors in others.items():
        write_folder(tmp_path / name, tensors)
    for name, message in {
        "lacks": "it lacks model.layers.1.self_attn.v_proj.weight",
        "has more": "only it has extra.weight",
        "resized": r"model.embed_tokens.weight is \[39, 16\], not \[37, 16\]",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            changed(pair.before, tmp_path / name)


def test_pairs_that_cannot_be_compared(tmp_path):
    pair = make_pair(tmp_path)
    wide = {name: cast(tensor, "fp32") for name, tensor in pair.tensors_before.items()}
    write_folder(tmp_path / "wide", wide)
    with pytest.raises(CheckpointError, match=r"is bf16 in .* and fp32 in .*: --view bf16"):
        changed(pair.before, tmp_path / "wide")
    with pytest.raises(CheckpointError, match="no weight is in this mask"):
        write(tmp_path / "m.mask.safetensors", changed(pair.before, tmp_path / "wide", "bf16"))
    assert not list(tmp_path.glob("*mask*"))
    with pytest.raises(CheckpointError, match="unknown number format 'int4'"):
        changed(pair.before, pair.after, "int4")


# --- of a trial ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(trained, tiny_trial, base):
    config = tiny_trial(probe={"snapshots": [1]}, keep_checkpoints=True, num_steps=3)
    return trained(config, base)


def stored_weights(folder) -> dict[str, np.ndarray]:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return {name: tensor.reshape(-1) for name, tensor in tensors.items()}


def test_masks_of_a_trial(trial, base):
    before, after = stored_weights(base.path), stored_weights(trial.folder / "checkpoint")
    final = of_trial(trial.folder, Take.FINAL)
    found = bits_of(final)
    for name in found:
        differs = before[name].view(np.uint16) != after[name].view(np.uint16)
        assert (found[name] == differs).all(), name
    assert set(found) == set(before) - {"lm_head.weight"}
    assert final.base_fingerprint == base.fingerprint
    told = {
        "source": f"trial {trial.folder.name}", "trial_id": trial.folder.name,
        "algorithm": "sft", "seed_of_trial": str(trial.config.seed), "num_steps": "3",
    }  # fmt: skip
    assert final.metadata == {**told, "kind": "final", "step": "3", "view": "stored"}
    assert held(final).metadata == final.metadata
    early = of_trial(trial.folder, Take.SNAPSHOT, step=1)
    by_patch = changed(base.path, trial.patch(1))
    assert all((early.packed(name) == by_patch.packed(name)).all() for name in found)
    assert sum(counts_of(early).values()) != sum(counts_of(final).values())
    ever = of_trial(trial.folder, Take.EVER_CHANGED)
    assert sum(counts_of(ever).values()) == sum(
        trial.summary[key] for key in ("num_cancelled", "num_final")
    )
    assert {**told, "kind": "ever_changed", "interval_steps": "1"}.items() <= ever.metadata.items()
    assert counts_of(difference([final, ever])) == dict.fromkeys(found, 0)


def test_a_trial_in_fp32_is_compared_with_the_base_in_fp32(trained, tiny_trial, base):
    trial = trained(tiny_trial(precision="fp32", keep_checkpoints=True), base)
    before, after = stored_weights(base.path), stored_weights(trial.folder / "checkpoint")
    found = bits_of(of_trial(trial.folder, Take.FINAL))
    for name, mask in found.items():
        wide = before[name].astype(np.float32)
        assert (mask == (wide.view(np.uint32) != after[name].view(np.uint32))).all()


def test_steps_by_fraction_of_training(tmp_path):
    config = {
        "algorithm": {"name": "sft"}, "model": {"source": "tiny"}, "seed": 0,
        "train": {"num_steps": 24},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [step_of(tmp_path, f) for f in (0.01, 0.05, 0.1, 0.25, 0.9, 1.0)] == [1, 1, 2, 6, 22, 24]
    for fraction in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
            step_of(tmp_path, fraction)


def test_a_written_mask_trains_and_is_compared(trial, base, tmp_path):
    from rlsparse.models.loading import load_model

    made = {"final": of_trial(trial.folder, Take.FINAL)}
    made["random"] = random_within_magnitude(made["final"], base.path, 0)
    files = {name: tmp_path / f"{name}.mask.safetensors" for name in made}
    for name, mask in made.items():
        write(files[name], mask)
    loaded = load_mask(files["random"])
    assert loaded.base_fingerprint == base.fingerprint
    optimizer = SubnetworkAdamW(load_model(base.path, "bf16"), loaded)
    optimizer.release()
    (row, *_) = compare_masks([str(file) for file in files.values()], base=str(base.path))
    assert row["num_a"] == row["num_b"] == loaded.num_selected
    assert row["num_both"] == pytest.approx(row["expected_magnitude"], rel=0.05)


def test_what_is_no_trial_is_named(trial, tmp_path):
    copy = tmp_path / "trial"
    shutil.copytree(trial.folder, copy)
    with pytest.raises(ConfigError, match="no snapshot of step 2; there are: step-000001, step-0"):
        of_trial(copy, Take.SNAPSHOT, step=2)
    for kind, step in ((Take.SNAPSHOT, None), (Take.FINAL, 1)):
        with pytest.raises(ConfigError, match="a step belongs to a snapshot"):
            of_trial(copy, kind, step=step)
    other = write_other_base(tmp_path)
    with pytest.raises(PatchError, match="belongs to another base"):
        of_trial(copy, Take.FINAL, base=other)
    (copy / EVER_CHANGED).write_bytes((copy / EVER_CHANGED).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        of_trial(copy, Take.EVER_CHANGED)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged or of another release"):
        of_trial(copy, Take.FINAL)
    with pytest.raises(ConfigError, match="no folder of a trial"):
        of_trial(tmp_path, Take.FINAL)


def write_other_base(folder):
    """The tiny base with one weight moved."""
    shutil.copytree(TINY, folder / "other")
    tensors = safetensors.numpy.load_file(folder / "other" / "model.safetensors")
    tensors["model.norm.weight"][0] += ml_dtypes.bfloat16(1)
    safetensors.numpy.save_file(tensors, folder / "other" / "model.safetensors")
    return folder / "other"


# --- at random -------------------------------------------------------------------------------


@pytest.mark.usefixtures("pieces")
def test_random_masks_are_the_smallest_of_random_keys(stored):
    like = a_mask(stored[0])
    mask = random_like(like, 5)
    for name, found in bits_of(mask).items():
        count = counts_of(like)[name]
        smallest = np.argsort(keys_of("uniform", 5, name, found.size))[:count]
        assert set(np.flatnonzero(found)) == set(smallest)
    assert mask.base_fingerprint == like.base_fingerprint


def test_random_masks_are_the_same_on_every_machine(tmp_path):
    """Recorded once; another draw would make finished studies unlike new ones."""
    path = write_folder(tmp_path / "b", {"w": Tensor("bf16", (40,), np.zeros(40, np.uint16))})
    found = {seed: np.flatnonzero(bits_of(uniform(path, 0.15, seed))["w"]) for seed in (0, 1)}
    assert found[0].tolist() == [6, 11, 12, 18, 38, 39]
    assert found[1].tolist() == [2, 4, 13, 17, 25, 31]


def test_random_masks_are_uniform_and_independent(tmp_path):
    names, size, count, draws = ("a.weight", "b.weight"), 50, 15, 400
    weight = Tensor("bf16", (size,), np.zeros(size, np.uint16))
    path = write_folder(tmp_path / "b", dict.fromkeys(names, weight))
    found = [bits_of(uniform(path, count / size, seed)) for seed in range(draws)]
    each = np.array([[bits[name] for name in names] for bits in found])  # [draws, 2, size]
    assert (each.sum(2) == count).all()
    p = count / size
    spread = math.sqrt(draws * p * (1 - p))
    assert (np.abs(each.sum(0) - draws * p) < 5 * spread).all()
    both = (each[:, 0] & each[:, 1]).sum()  # hypergeometric in each draw
    variance = count * p * (1 - p) * (size - count) / (size - 1)
    assert abs(both - draws * count * p) < 5 * math.sqrt(draws * variance)
    successive = (each[1:, 0] & each[:-1, 0]).sum()
    assert abs(successive - (draws - 1) * count * p) < 5 * math.sqrt(draws * variance)


def test_uniform_masks_have_the_density_in_each_tensor(stored):
    for density in (0.01, 0.1, 0.5, 0.999):
        counts = counts_of(uniform(stored[0], density, 0))
        for name, shape in ODD_SHAPES.items():
            assert counts[name] == math.floor(density * math.prod(shape) + 0.5)


@pytest.mark.parametrize("density", [0, 1, -0.1, 1.5, math.nan])
def test_densities_that_are_none(stored, density):
    with pytest.raises(ConfigError, match=r"density .*: must be above 0 and below 1"):
        uniform(stored[0], density, 0)


def test_seeds_that_are_none(stored):
    like = a_mask(stored[0])
    for make in (
        lambda: uniform(stored[0], 0.1, -1),
        lambda: random_like(like, -1),
        lambda: random_within_magnitude(like, stored[0], -1),
    ):
        with pytest.raises(ConfigError, match="seed -1: must be 0 or more"):
            make()


def powers(tensor: Tensor) -> np.ndarray:
    """Which power of two |w| lies above, and whether it is one; zeros apart."""
    digits, exponents = np.frexp(np.abs(weights(tensor)))
    return np.where(digits == 0, 10_000, 2 * exponents + (digits == 0.5))


@pytest.mark.usefixtures("pieces")
def test_random_masks_within_magnitude(stored):
    path, tensors = stored
    like = a_mask(path, 0.4)
    one, other = (random_within_magnitude(like, path, seed) for seed in (0, 1))
    target, found, second = bits_of(like), bits_of(one), bits_of(other)
    for name, tensor in tensors.items():
        strata = powers(tensor)
        for stratum in np.unique(strata):
            inside = np.flatnonzero(strata == stratum)
            count = int(target[name][inside].sum())
            keys = keys_of("within magnitude", 0, name, strata.size)[inside]
            assert set(inside[found[name][inside]]) == set(inside[np.argsort(keys)[:count]])
            assert second[name][inside].sum() == count
        assert (found[name] != second[name]).any()
        assert (found[name] != target[name]).any()


def test_within_magnitude_in_a_coarser_view_keeps_the_distance_to_the_tie(tmp_path):
    rng = np.random.default_rng(0)
    tensor = random_tensor(rng, "fp32", (64, 64))
    path = write_folder(tmp_path / "base", {"a.weight": tensor})
    like = a_mask(path, 0.4, view="bf16")
    mask = random_within_magnitude(like, path, 0)
    labels = magnitude_labels(tensor.bits, "fp32", "bf16")
    assert len(np.unique(labels)) > 2 * len(np.unique(powers(tensor)))
    found, target = bits_of(mask)["a.weight"], bits_of(like)["a.weight"]
    assert (np.bincount(labels, found) == np.bincount(labels, target)).all()
    assert mask.metadata["view"] == "bf16"


# --- by score --------------------------------------------------------------------------------


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("pick", list(Size))
def test_masks_by_magnitude(stored, pick):
    path, tensors = stored
    like = a_mask(path)
    found = bits_of(by_magnitude(like, path, pick))
    for name, tensor in tensors.items():
        sizes = np.abs(weights(tensor)).astype(np.float32)
        keys = keys_of("ties", 0, name, sizes.size)
        order = np.lexsort((keys >> np.uint64(32), sizes))
        order = order if pick is Size.LOW else order[::-1]
        assert set(np.flatnonzero(found[name])) == set(order[: counts_of(like)[name]])


def test_equal_weights_are_taken_at_random_not_in_order(tmp_path):
    tensor = Tensor("bf16", (64, 64), np.full(4096, 0x3F80, np.uint16))
    path = write_folder(tmp_path / "base", {"a.weight": tensor})
    like = a_mask(path, 0.25)
    found = bits_of(by_magnitude(like, path, Size.LOW))["a.weight"].reshape(64, 64)
    assert found.sum() == sum(counts_of(like).values())
    for counts in (found.sum(0), found.sum(1)):
        assert counts.var(ddof=1) / (64 * 0.25 * 0.75) == pytest.approx(1, abs=0.7)


@pytest.mark.usefixtures("pieces")
def test_smallest_and_largest_are_complements(stored):
    path = stored[0]
    like = a_mask(path)
    low, high = by_magnitude(like, path, Size.LOW), by_magnitude(complement(like), path, Size.HIGH)
    assert counts_of(low) == counts_of(like)
    for name, found in bits_of(low).items():
        assert (found == ~bits_of(high)[name]).all()


def scores_of(tensor: Tensor, rank: int) -> np.ndarray:
    """|rank-k reconstruction| by the full SVD in float64."""
    values = weights(tensor).reshape(tensor.shape[0], -1)
    left, sigma, right = np.linalg.svd(values, full_matrices=False)
    return np.abs((left[:, :rank] * sigma[:rank]) @ right[:rank]).reshape(-1)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("rank", [1, 3, 32])
def test_masks_by_direction(stored, rank):
    path, tensors = stored
    like = a_mask(path)
    principal = bits_of(by_direction(like, path, Direction.PRINCIPAL, rank))
    other = bits_of(by_direction(like, path, Direction.OTHER, rank))
    for name, tensor in tensors.items():
        count = counts_of(like)[name]
        assert principal[name].sum() == other[name].sum() == count
        scores = scores_of(tensor, rank)
        slack = 1e-5 * scores.max()  # fp32, in which weights near the edge change places
        assert scores[principal[name]].min() >= scores[~principal[name]].max() - slack
        assert scores[other[name]].max() <= scores[~other[name]].min() + slack


def test_principal_weights_of_a_vector_are_its_largest(stored):
    path = stored[0]
    like = a_mask(path)
    name = "model.norm.weight"
    for direction, size in ((Direction.PRINCIPAL, Size.HIGH), (Direction.OTHER, Size.LOW)):
        by_rank = by_direction(like, path, direction).packed(name)
        assert (by_rank == by_magnitude(like, path, size).packed(name)).all()


def test_a_matrix_of_zeros_has_principal_weights_at_random(tmp_path):
    zeros = Tensor("bf16", (16, 16), np.zeros(256, np.uint16))
    path = write_folder(tmp_path / "base", {"a.weight": zeros})
    like = a_mask(path)
    assert counts_of(by_direction(like, path, Direction.PRINCIPAL)) == counts_of(like)


def test_weights_that_cannot_be_ranked(tmp_path):
    nan = Tensor("bf16", (8, 8), np.full(64, 0x7FC0, np.uint16))
    whole = Tensor("i64", (64,), np.arange(64, dtype=np.uint64))
    path = write_folder(tmp_path / "base", {"a.weight": nan, "b.weight": whole})
    like = a_mask(path)
    with pytest.raises(CheckpointError, match=r"a.weight has a NaN or an infinity"):
        by_direction(like, path, Direction.OTHER).packed("a.weight")
    for make in (by_direction(like, path, Direction.OTHER), by_magnitude(like, path, Size.LOW)):
        with pytest.raises(CheckpointError, match=r"b.weight is i64, which has no values to rank"):
            make.packed("b.weight")
    with pytest.raises(ConfigError, match="rank 0: must be at least 1"):
        by_direction(like, path, Direction.OTHER, 0)


def test_nothing_and_all_of_a_tensor(stored):
    path, tensors = stored
    names = list(tensors)
    packed = {n: pack(np.full(t.bits.size, n == names[0])) for n, t in tensors.items()}
    shapes = {n: t.shape for n, t in tensors.items()}
    like = MadeMask(shapes, fingerprint(Checkpoint.open(path)), {}, packed.__getitem__)
    for made in (
        random_like(like, 0),
        random_within_magnitude(like, path, 0),
        *(by_magnitude(like, path, pick) for pick in Size),
        *(by_direction(like, path, pick) for pick in Direction),
    ):
        assert all((made.packed(name) == like.packed(name)).all() for name in names)


def test_controls_of_another_base_are_refused(tmp_path):
    pair = make_pair(tmp_path)
    like = a_mask(pair.before)
    for make in (
        lambda base: random_within_magnitude(like, base, 0),
        lambda base: by_magnitude(like, base, Size.LOW),
        lambda base: by_direction(like, base, Direction.OTHER),
    ):
        with pytest.raises(CheckpointError, match=r"is of the base .*give the checkpoint before"):
            make(pair.after)
        with pytest.raises(CheckpointError, match=r"is of another model than .*and \d+ more"):
            make(TINY)


def test_controls_on_the_real_base(base):
    like = uniform(base.path, 0.1, 0)
    counts = counts_of(like)
    for made in (
        random_within_magnitude(like, base.path, 0),
        by_magnitude(like, base.path, Size.LOW),
        by_direction(like, base.path, Direction.PRINCIPAL),
    ):
        assert counts_of(made) == counts
    before = stored_weights(base.path)
    low = bits_of(by_magnitude(like, base.path, Size.LOW))
    for name, mask in low.items():
        sizes = np.abs(before[name].astype(np.float32))
        assert sizes[mask].max() <= sizes[~mask].min()


@pytest.mark.parametrize("seed", range(20))
def test_of_equal_keys_the_first_are_chosen(seed):
    """Full keys of 64 bits are equal too seldom to meet them elsewhere."""
    rng = np.random.default_rng(seed)
    size, strata = int(rng.integers(1, 400)), rng.integers(0, 4, 400)
    keys = rng.choice(np.array([0, 1, 2**52 - 1, 2**52, 2**63, 2**64 - 1], np.uint64), 400)
    strata, keys = strata[:size], keys[:size]
    counts = np.array([rng.integers(0, (strata == s).sum() + 1) for s in range(4)])
    expected = np.zeros(size, bool)
    for stratum, count in enumerate(counts):
        inside = np.flatnonzero(strata == stratum)
        expected[inside[np.argsort(keys[inside], kind="stable")[:count]]] = True

    def pieces():
        for start in range(0, size, 64):
            yield strata[start : start + 64], keys[start : start + 64]

    assert (unpack(chosen._smallest(pieces, size, counts), size) == expected).all()


def test_scores_spread_over_the_buckets():
    """What shares a bucket with the last weight chosen is held in memory."""
    tensor = random_tensor(np.random.default_rng(0), "bf16", (100, 1000))
    buckets = chosen._ranks(weights(tensor)) >> (32 - chosen._BUCKET_BITS)
    assert np.bincount(buckets).max() < 0.05 * tensor.bits.size


# --- algebra, files --------------------------------------------------------------------------


def test_algebra(stored):
    path = stored[0]
    parts = [a_mask(path, 0.5, seed) for seed in range(3)]
    a, b, c = (bits_of(part) for part in parts)
    expected = {
        union: {n: a[n] | b[n] | c[n] for n in a},
        intersection: {n: a[n] & b[n] & c[n] for n in a},
        difference: {n: a[n] & ~b[n] & ~c[n] for n in a},
    }
    for combine, masks in expected.items():
        made = combine(parts)
        assert all((bits_of(made)[name] == masks[name]).all() for name in masks)
        assert made.base_fingerprint == parts[0].base_fingerprint
        assert made.metadata["kind"] == combine.__name__
    assert all((bits_of(complement(parts[0]))[n] == ~a[n]).all() for n in a)


def test_masks_of_several_bases_are_of_none(stored, tmp_path):
    path, tensors = stored
    moved = {n: Tensor(t.dtype, t.shape, t.bits ^ t.bits.dtype.type(1)) for n, t in tensors.items()}
    other = write_folder(tmp_path / "moved", moved)
    assert union([a_mask(path), a_mask(other)]).base_fingerprint == ""
    by_magnitude(union([a_mask(path), a_mask(other)]), path, Size.LOW)


def test_what_cannot_be_combined(stored, tmp_path):
    path, tensors = stored
    one = a_mask(path, kind="first")
    with pytest.raises(ConfigError, match="union takes two masks or more, got 1"):
        union([one])
    names = list(tensors)
    turned = one.shapes | {names[1]: tensors[names[1]].shape[::-1]}
    fewer = {n: s for n, s in one.shapes.items() if n != names[0]}
    for shapes, message in (
        (turned, rf"{names[1]} is \[7, 3, 5\], not \[5, 3, 7\]"),
        (fewer, f"it lacks {names[0]}"),
    ):
        other = MadeMask(shapes, "", {"kind": "second"}, one.make)
        with pytest.raises(
            CheckpointError, match=rf"second \[2\] is of another model than first \[1\]: {message}"
        ):
            intersection([one, other])


def test_an_empty_mask_is_not_written(stored, tmp_path):
    one = a_mask(stored[0], kind="first")
    file = tmp_path / "m.mask.safetensors"
    with pytest.raises(CheckpointError, match="no weight is in this mask"):
        write(file, intersection([one, complement(one)]))
    with pytest.raises(CheckpointError, match="no weight is in this mask"):
        write(file, uniform(stored[0], 1e-9, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_file_holds_the_mask_and_says_what_it_is(stored, tmp_path):
    made = random_like(a_mask(stored[0], kind="final"), 3)
    file = tmp_path / "m.mask.safetensors"
    write(file, made)
    read = read_masks(file)
    assert read.metadata == {"kind": "random", "source": "final", "seed": "3"}
    assert read.base_fingerprint == made.base_fingerprint
    assert all((read.packed(name) == made.packed(name)).all() for name in made.shapes)
    same = {name: (shape, packed) for name, shape, packed in made}
    write_masks(tmp_path / "same", same, made.base_fingerprint, made.metadata)
    assert (tmp_path / "same").read_bytes() == file.read_bytes()
    assert complement(read).metadata["source"] == f"random {file}"


def test_every_mask_says_what_it_takes_to_make_it_again(stored):
    base = str(stored[0])
    like = a_mask(base, kind="final", view="bf16")
    shared = {"source": "final", "view": "bf16"}
    scored = {**shared, "weights": base}
    told = [
        (uniform(base, 0.1, 3), {"source": base, "density": "0.1", "seed": "3"}, "uniform"),
        (random_like(like, 3), {**shared, "seed": "3"}, "random"),
        (random_within_magnitude(like, base, 3), {**scored, "seed": "3"},
         "random_within_magnitude"),
        (by_magnitude(like, base, Size.LOW), scored, "low_magnitude"),
        (by_magnitude(like, base, Size.HIGH), scored, "high_magnitude"),
        (by_direction(like, base, Direction.PRINCIPAL, 2), {**scored, "rank": "2"}, "principal"),
        (by_direction(like, base, Direction.OTHER, 2), {**scored, "rank": "2"}, "non_principal"),
        (complement(like), {"source": "final"}, "complement"),
        (union([like, complement(like)]), {"source": "final, complement"}, "union"),
    ]  # fmt: skip
    for mask, metadata, kind in told:
        assert mask.metadata == {**metadata, "kind": kind}


def test_one_tensor_is_in_memory_at_a_time(stored, tmp_path):
    like = a_mask(stored[0])
    alive: list[weakref.ref] = []

    def make(name):
        assert sum(ref() is not None for ref in alive) <= 1
        packed = like.packed(name).copy()
        alive.append(weakref.ref(packed))
        return packed

    write(tmp_path / "m.mask.safetensors", MadeMask(like.shapes, "", {}, make))
    assert len(alive) == len(ODD_SHAPES)
