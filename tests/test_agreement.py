"""Agreement of weights, against counts over whole arrays; and which trials are compared."""

import itertools

import numpy as np
import pytest
from planted import FLOATS, LLAMA_SHAPES, Tensor, random_tensor, unsigned, weights, write_folder

from rlsparse.agreement import agreement_rows, trial_pairs
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.mask_config import TrialMask
from rlsparse.patch import PATCH_FILE, Patch, TensorPair, write_patch
from rlsparse.study import Study, expand

HEAD = "lm_head.weight"
TAU = {"bitwise": None, "abs_1e-05": 1e-5, "abs_1e-04": 1e-4}


def rounded(values, dtype, shape):
    bits = values.astype(np.float32).astype(FLOATS[dtype]).view(unsigned(dtype))
    return Tensor(dtype, shape, bits)


def moved(rng, tensors, share):
    """Some weights moved by up to 3e-4, some of them by much less, and special ones."""
    after = {}
    for name, tensor in tensors.items():
        step = rng.normal(size=tensor.bits.size) * 10.0 ** rng.uniform(-7, -3.5, tensor.bits.size)
        values = weights(tensor) + step * (rng.random(tensor.bits.size) < share)
        after[name] = rounded(values, tensor.dtype, tensor.shape)
    return after


def patch_of(path, before, after, dtype, base="b"):
    """A patch in ``dtype`` against the base cast to it."""
    pairs = [
        TensorPair(
            name,
            dtype,
            tensor.shape,
            rounded(weights(before[name]), dtype, tensor.shape).bits,
            tensor.bits,
        )
        for name, tensor in after.items()
    ]
    return write_patch(path, pairs, base_fingerprint=base)


def naive(base, theta, full):
    """Counts and sums over whole arrays: bits, and values in float64."""
    bits = [np.concatenate([t[name].bits for name in full]) for t in (base, theta, full)]
    values = [np.concatenate([weights(t[name]) for name in full]) for t in (base, theta, full)]
    rows = []
    for scope, kept in (("all", bits[0] == bits[0]), ("changed", bits[0] != bits[2])):
        row = {"scope": scope, "num_elements": int(kept.sum())}
        for side, key in ((1, "equal"), (0, "base_equal")):
            same, delta = bits[side] == bits[2], np.abs(values[side] - values[2])
            usual = np.isfinite(values[side]) & np.isfinite(values[2])
            for name, tau in TAU.items():
                equal = same if tau is None else np.where(usual, delta <= tau, same)
                row[f"num_{key}_{name}"] = int((equal & kept).sum())
        for side, key in ((1, "difference"), (0, "update")):
            delta = (values[side] - values[2])[kept]
            row[f"sum_sq_{key}"] = float((delta[np.isfinite(delta)] ** 2).sum())
        rows.append(row)
    return rows


def assert_alike(found, expected):
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            if key.startswith("sum"):
                assert one[key] == pytest.approx(value, rel=1e-12, abs=0), key
            else:
                assert one[key] == value, key


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")]
)
def test_counts_and_sums_are_those_of_whole_arrays(tmp_path, stored, dtype):
    rng = np.random.default_rng(3)
    base = {name: random_tensor(rng, stored, shape) for name, shape in LLAMA_SHAPES.items()}
    special = base["model.norm.weight"].bits
    special[:6] = rounded(np.array([0, -0.0, np.inf, np.nan, 1, 2]), stored, (6,)).bits
    folder = write_folder(tmp_path / "base", base)
    cast = {n: rounded(weights(t), dtype, t.shape) for n, t in base.items()}
    full, theta = moved(rng, cast, 0.6), moved(rng, cast, 0.4)
    for name, tensor in theta.items():  # some of it as in the full run
        np.copyto(tensor.bits, full[name].bits, where=rng.random(tensor.bits.size) < 0.3)
    signs = np.array([-0.0, -0.0, 1, np.inf, np.nan, 2])
    full["model.norm.weight"].bits[:6] = rounded(signs, dtype, (6,)).bits
    patches = [
        patch_of(tmp_path / f"{name}.patch.safetensors", base, after, dtype)
        for name, after in (("theta", theta), ("full", full))
    ]
    checkpoint = Checkpoint.open(folder)
    found = agreement_rows(checkpoint, *patches, base_fingerprint="b")
    expected = naive(cast, theta, full)
    assert_alike(found, expected)
    every, inside = found
    assert inside["num_base_equal_bitwise"] == 0
    assert 0 < inside["num_equal_bitwise"] < inside["num_equal_abs_1e-05"]
    assert inside["num_equal_abs_1e-05"] < inside["num_equal_abs_1e-04"] < inside["num_elements"]
    assert inside["num_elements"] < every["num_elements"] == sum(t.bits.size for t in base.values())
    assert inside["sum_sq_update"] == pytest.approx(every["sum_sq_update"], rel=1e-12, abs=0)
    assert inside["sum_sq_difference"] < every["sum_sq_difference"]


def test_chunks_add_up_and_tied_weights_count_once(tmp_path):
    """The embedding is of two chunks; the head is its copy, also where a patch does not list it."""
    rng = np.random.default_rng(4)
    shape = (70_000, 64)  # above 2^22 weights
    embedding = random_tensor(rng, "bf16", shape)
    base = {"model.embed_tokens.weight": embedding, HEAD: embedding}
    folder = write_folder(tmp_path / "base", base, {"tie_word_embeddings": True})
    own = {"model.embed_tokens.weight": embedding}
    full, theta = moved(rng, own, 0.1), moved(rng, own, 0.1)
    patches = [
        patch_of(tmp_path / f"{i}.patch.safetensors", own, after, "bf16")
        for i, after in enumerate((theta, full))
    ]
    found = agreement_rows(Checkpoint.open(folder), *patches, base_fingerprint="b")
    assert found[0]["num_elements"] == embedding.bits.size
    assert_alike(found, naive(own, theta, full))


def test_a_reference_that_changed_nothing_has_nothing_inside(tmp_path):
    base = {n: random_tensor(np.random.default_rng(0), "bf16", s) for n, s in LLAMA_SHAPES.items()}
    folder = write_folder(tmp_path / "base", base)
    patch = patch_of(tmp_path / PATCH_FILE, base, base, "bf16")
    _, inside = agreement_rows(Checkpoint.open(folder), patch, patch, base_fingerprint="b")
    assert {inside.pop("scope"), *inside.values()} == {"changed", 0}


def test_other_bases_formats_and_damage_are_refused(tmp_path):
    rng = np.random.default_rng(5)
    base = {name: random_tensor(rng, "bf16", shape) for name, shape in LLAMA_SHAPES.items()}
    checkpoint = Checkpoint.open(write_folder(tmp_path / "base", base))
    mark = fingerprint(checkpoint)
    files = [tmp_path / f"{name}.patch.safetensors" for name in ("good", "wide", "other")]
    after = moved(rng, base, 0.5)
    good = patch_of(files[0], base, after, "bf16", mark)
    wide = {n: rounded(weights(t), "fp32", t.shape) for n, t in after.items()}
    with pytest.raises(PatchError, match=r"is bf16 in .* and fp32 in .*compare trials of one"):
        agreement_rows(
            checkpoint, good, patch_of(files[1], base, wide, "fp32", mark), base_fingerprint=mark
        )
    other = patch_of(files[2], base, after, "bf16", "e")
    with pytest.raises(PatchError, match="belongs to the base with fingerprint e"):
        agreement_rows(checkpoint, good, other, base_fingerprint=mark)
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(PatchError, match=r"good.*another checksum"):
        agreement_rows(checkpoint, Patch.open(files[0]), good, base_fingerprint=mark)


# --- pairs -----------------------------------------------------------------------------------

MASKS = (None, {"from": "cell"}, {"like": {"from": "cell"}})


def planned(masks=MASKS, seeds=(3, 1, 2), **changes):
    study = Study.model_validate(
        {
            "name": "masks",
            "question": "Which trials are compared?",
            "baseline": {"algorithm": {"name": "sft"}},
            "factors": {"train.mask": list(masks), "train.learning_rate": [1e-5, 3e-5]},
            "seeds": list(seeds),
            "controls": ["same_seed", "lr_zero", "lr_times_3"],
        }
        | changes
    )
    return study, expand(study, fingerprint=lambda model: "b", data_version=lambda config: "1")


def named(trial):
    train = trial.config.train
    return trial.config.seed, train.learning_rate, train.mask, trial.control


def test_each_trial_under_a_mask_meets_the_full_run_and_each_full_run_the_next_seed():
    study, trials = planned()
    pairs = trial_pairs(trials, study.seeds)
    found = {relation: set() for relation in ("subnetwork", "rerun", "other seed")}
    for trial, reference, relation in pairs:
        assert reference.config.train.mask is None
        assert reference.replicate == 0
        found[relation].add((named(trial), named(reference)))
    cell = TrialMask.model_validate({"from": "cell"})
    masks = {trial.config.train.mask for trial in trials} - {None}
    assert len(masks) == 2
    assert cell in masks
    # 3e-5 is of the factor: lr_times_3 of the first cell is the same trial.
    full = set(itertools.product(study.seeds, (1e-5, 3e-5), [None], [None]))
    assert found["subnetwork"] == {((s, lr, m, None), (s, lr, None, None))
                                   for s, lr, _, _ in full for m in masks}  # fmt: skip
    assert found["rerun"] == {((3, 1e-5, None, "same_seed"), (3, 1e-5, None, None))}
    following = {3: 1, 1: 2, 2: 3}
    assert found["other seed"] == {(one, (following[one[0]], *one[1:])) for one in full}
    assert len(pairs) == len({trial.trial_id for trial, _, _ in pairs}) == 12 + 1 + 6


def test_without_a_mask_nothing_is_compared():
    study, trials = planned(masks=[None])
    assert trial_pairs(trials, study.seeds) == []


def test_one_seed_has_no_other_and_a_mask_without_full_run_no_pair():
    study, trials = planned(seeds=[7])
    assert {pair.relation for pair in trial_pairs(trials, study.seeds)} == {"subnetwork", "rerun"}
    alone = [trial for trial in trials if trial.config.train.mask is not None]
    assert trial_pairs(alone, study.seeds) == []


def test_a_masked_replicate_meets_the_full_run_too():
    """The rerun is of the first cell, which has the mask here."""
    study, trials = planned(masks=[{"from": "cell"}, None], controls=["same_seed"])
    (again,) = [trial for trial in trials if trial.replicate]
    assert again.config.train.mask is not None
    (pair,) = [pair for pair in trial_pairs(trials, study.seeds) if pair.trial is again]
    assert (pair.relation, pair.reference.replicate) == ("subnetwork", 0)
    assert pair.reference.config.train.mask is None
