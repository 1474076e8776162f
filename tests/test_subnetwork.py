"""The subnetwork optimizers against torch's dense ones, in TRL, with several workers."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from together import in_turn, refuse_on_workers, run_together, train_subnetwork
from torch.multiprocessing.reductions import StorageWeakRef

from rlsparse import masks
from rlsparse.algorithms import ALGORITHMS, context
from rlsparse.errors import CheckpointError, ConfigError, TrialError
from rlsparse.fp32_moments import Fp32MomentAdamW, Fp32MomentSgd
from rlsparse.kernels import popcount
from rlsparse.models import TINY
from rlsparse.models.loading import load_model
from rlsparse.sharded import load_own_state, own_state
from rlsparse.subnetwork import (
    SubnetworkAdamW,
    SubnetworkMask,
    SubnetworkSGD,
    assert_outside_unchanged,
    load_mask,
    outside_digests,
)
from rlsparse.subnetwork.packed import PackedGradient

ADAM = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 3e-2, "momentum": 0.9, "weight_decay": 0.1}
NARROW = torch.bfloat16


def mask_of(model, density: float, seed: int = 0, without: tuple[str, ...] = ()) -> SubnetworkMask:
    """A random mask; tensors of ``without`` have no bit."""
    generator = np.random.default_rng(seed)
    return SubnetworkMask(
        {
            name: (
                tuple(weight.shape),
                masks.pack(generator.random(weight.numel()) < (0 if name in without else density)),
            )
            for name, weight in model.named_parameters()
        }
    )


def bools(mask: SubnetworkMask, name: str) -> torch.Tensor:
    shape, packed = mask.bits[name]
    return torch.from_numpy(masks.unpack(packed, int(np.prod(shape))).reshape(shape))


def tiny(dtype: torch.dtype = torch.float32):
    return load_model(TINY, "bf16").to(dtype)


def batch(number: int) -> torch.Tensor:
    return torch.randint(1, 24, (2, 12), generator=torch.Generator().manual_seed(number))


def backward(model, number: int, accumulation: int = 2) -> None:
    for part in range(accumulation):
        ids = batch(accumulation * number + part)
        (model(input_ids=ids, labels=ids).loss / accumulation).backward()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    as_bytes = [t.detach().contiguous().view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and torch.equal(*as_bytes)


def differing(one, other) -> list[str]:
    """Names of the weights that have other bits."""
    return [
        name
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True)
        if not same_bits(a, b)
    ]


def dense_adamw(weights, **settings):
    return torch.optim.AdamW(weights, **settings, foreach=False, fused=False)


def dense_sgd(weights, **settings):
    return torch.optim.SGD(weights, **settings, foreach=False, fused=False)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)


# --- a mask of all weights: torch's bits -----------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "in_fp32", "ours", "theirs", "limit"),
    [
        (torch.float32, "masters", SubnetworkAdamW, dense_adamw, 0.5),
        (torch.float32, "moments", SubnetworkSGD, dense_sgd, None),
        (NARROW, "nothing", SubnetworkAdamW, dense_adamw, 0.5),
        (NARROW, "moments", SubnetworkAdamW, Fp32MomentAdamW, None),
        (NARROW, "nothing", SubnetworkSGD, dense_sgd, 0.5),
        (NARROW, "moments", SubnetworkSGD, Fp32MomentSgd, None),
    ],
)
def test_a_mask_of_all_weights_gives_the_bits_of_torch(dtype, in_fp32, ours, theirs, limit):
    """With gradient accumulation, a schedule, weight decay, and clipping, which always acts."""
    model, reference = tiny(dtype), tiny(dtype)
    settings = ADAM if ours is SubnetworkAdamW else SGD
    mine = ours(
        model, mask_of(model, 1.1), **settings, in_fp32=in_fp32, max_grad_norm=limit, path="torch"
    )
    dense = theirs(reference.parameters(), **settings)
    schedules = [schedule(mine), schedule(dense)]
    for step in range(5):
        backward(model, step)
        backward(reference, step)
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit or float("inf"))
        for optimizer in (mine, dense):
            optimizer.step()
            optimizer.zero_grad()
        for one in schedules:
            one.step()
        assert mine.last_grad_norm == norm.item()
        assert limit is None or norm > limit
        assert not differing(model, reference)
    assert len(differing(model, tiny(dtype))) > 25  # in bf16, norms stay at 1


# --- a part of the weights -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "in_fp32"),
    [(torch.float32, "masters"), (NARROW, "masters"), (NARROW, "moments"), (NARROW, "nothing")],
)
def test_weights_in_the_mask_follow_the_dense_optimizer_and_no_other_moves(dtype, in_fp32):
    """The oracle trains all weights, bit for bit, then puts back what lies outside."""
    model, reference = tiny(dtype), tiny(dtype)
    mask = mask_of(model, 0.1)
    mine = SubnetworkAdamW(model, mask, **ADAM, in_fp32=in_fp32, path="torch")
    names = dict(reference.named_parameters())
    kept = {name: weight.detach().clone() for name, weight in names.items()}
    has_masters = (dtype, in_fp32) == (NARROW, "masters")
    weights = {n: w.detach().float() if has_masters else w for n, w in names.items()}
    wide = (dtype, in_fp32) == (NARROW, "moments")
    dense = (Fp32MomentAdamW if wide else dense_adamw)(weights.values(), **ADAM)
    for step in range(4):
        backward(model, step)
        backward(reference, step)
        for name, weight in names.items():
            weights[name].grad = weight.grad.to(weights[name].dtype)
        mine.step()
        dense.step()
        with torch.no_grad():
            for name, weight in names.items():
                weight.copy_(torch.where(bools(mask, name), weights[name], kept[name]))
        for one in (mine, dense, reference):
            one.zero_grad()
        assert not differing(model, reference)
    assert len(differing(model, tiny(dtype))) > 25


def test_clipping_is_by_the_norm_over_the_mask():
    """float64 over the dense gradients of a copy; the norm of all weights is another."""
    model, reference = tiny(), tiny()
    mask = mask_of(model, 0.05)
    optimizer = SubnetworkAdamW(model, mask, lr=0.0, max_grad_norm=0.1)
    assert optimizer.last_grad_norm is None
    backward(model, 0)
    backward(reference, 0)
    inside = {n: w.grad[bools(mask, n)].double() for n, w in reference.named_parameters()}
    norm = torch.cat(list(inside.values())).norm().item()
    optimizer.step()
    assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    assert norm < 0.5 * torch.cat([w.grad.flatten() for w in reference.parameters()]).norm()
    for name, weight in model.named_parameters():
        expected = inside[name] * 0.1 / (norm + 1e-6)
        assert torch.allclose(weight.grad.elements.double(), expected, rtol=1e-6, atol=1e-9)


def test_odd_bits_outside_the_mask_stay():
    """-0, NaNs with payloads, infinities and subnormals, under weight decay, in fp32 and bf16."""
    for dtype, odd in [
        (torch.float32, [0x80000000, 0x7FC12345, 0xFF812345, 0x7F800000, 0x00000001]),
        (NARROW, [0x8000, 0x7FC3, 0xFF81, 0x7F80, 0x0001]),
    ]:
        model = torch.nn.Linear(5, 4, bias=False).to(dtype)
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        bits = torch.from_numpy(np.array(odd, np.int64).astype(f"i{dtype.itemsize}"))
        with torch.no_grad():
            model.weight[1::2] = bits.view(dtype)
        before = model.weight.detach().clone().view(integer)
        inside = np.repeat([[True], [False]] * 2, 5, axis=1)
        mask = SubnetworkMask({"weight": ((4, 5), masks.pack(inside))})
        digests = outside_digests(model, mask)
        optimizer = SubnetworkAdamW(model, mask, **ADAM)
        for _ in range(3):
            model.weight[::2].float().square().sum().backward()
            optimizer.step()
        after = model.weight.detach().view(integer)
        assert torch.equal(after[1::2], before[1::2])
        assert not (after[::2] == before[::2]).any()
        assert_outside_unchanged(model, mask, digests)
        with torch.no_grad():
            after[1, 1] ^= 1  # another payload of a NaN
        with pytest.raises(TrialError, match="outside the mask have changed in 1 tensors, weight"):
            assert_outside_unchanged(model, mask, digests)


def test_a_tensor_without_weights_in_the_mask_is_frozen_until_release():
    model = tiny()
    name = "model.layers.1.mlp.up_proj.weight"
    mask = mask_of(model, 0.1, without=(name,))
    weight = model.get_parameter(name)
    start = weight.detach().clone()
    optimizer = SubnetworkAdamW(model, mask, **ADAM)
    backward(model, 0)
    optimizer.step()
    assert not weight.requires_grad
    assert weight.grad is None
    assert same_bits(weight, start)
    optimizer.release()
    assert weight.requires_grad
    model.zero_grad()
    backward(model, 1)
    assert not any(isinstance(w.grad, PackedGradient) for w in model.parameters())


def test_an_optimizer_that_is_gone_leaves_the_model_whole():
    model = tiny()
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3)
    backward(model, 0)
    del optimizer
    backward(model, 0)
    torch.optim.AdamW(model.parameters()).step()
    assert not any(isinstance(w.grad, PackedGradient) for w in model.parameters())


# --- memory ----------------------------------------------------------------------------------


def live_dense_gradients(model) -> list[int]:
    """Dense gradients that live whenever another one comes, in a backward pass of ``model``."""
    seen, counts = [], []

    def look(gradient: torch.Tensor) -> None:
        seen.append(StorageWeakRef(gradient.untyped_storage()))
        counts.append(sum(not one.expired() for one in seen))

    for weight in model.parameters():
        weight.register_hook(look)
    backward(model, 0)
    return counts


def test_dense_gradients_never_live_all_at_once():
    """The one that is compacted, and the next; a plain backward pass has all 38."""
    assert max(live_dense_gradients(tiny())) >= 38
    model = tiny()
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3)
    counts = live_dense_gradients(model)
    assert len(counts) == 2 * 38  # two passes are accumulated
    assert max(counts) <= 2
    assert all(isinstance(w.grad, PackedGradient) for w in model.parameters())
    optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "in_fp32", "moments", "masters"),
    [(torch.float32, "masters", 8, 0), (NARROW, "masters", 8, 4), (NARROW, "nothing", 4, 0)],
)
def test_bytes_are_those_of_the_weights_in_the_mask(dtype, in_fp32, moments, masters):
    model = tiny(dtype)
    mask = mask_of(model, 0.3)
    optimizer = SubnetworkAdamW(model, mask, lr=1e-3, in_fp32=in_fp32)
    backward(model, 0)
    optimizer.step()
    count, steps = mask.num_selected, 4 * 38
    assert optimizer.state_bytes() == {
        "gradients": dtype.itemsize * count,
        "moments": moments * count + steps,
        "masters": masters * count,
        "index": sum(8 * -(-w.numel() // 64) for w in model.parameters()),  # a bit per weight
    }
    few = mask_of(model, 0.02)
    index = SubnetworkAdamW(tiny(dtype), few, lr=1e-3).state_bytes()["index"]
    smaller = (min(4 * popcount(bits), bits.size) for _, bits in few.bits.values())
    assert index == sum(smaller) < 4 * few.num_selected

    assert sum(w.grad.elements.nbytes for w in model.parameters()) == dtype.itemsize * count
    whole = SubnetworkAdamW(tiny(dtype), mask_of(model, 1.1), lr=1e-3)
    assert whole.state_bytes()["index"] == 0


# --- gradients as trainers treat them --------------------------------------------------------


@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_add_up_until_somebody_sets_them_to_zero(by, set_to_none):
    model, once = tiny(), tiny()
    mask = mask_of(model, 0.1)
    optimizer = SubnetworkAdamW(model, mask, lr=0.0)
    backward(model, 0)
    (optimizer if by == "optimizer" else model).zero_grad(set_to_none=set_to_none)
    assert all((w.grad is None) == set_to_none for w in model.parameters())
    backward(model, 1, accumulation=3)
    backward(once, 1, accumulation=3)
    for name, weight in once.named_parameters():
        packed = model.get_parameter(name).grad.elements
        assert same_bits(packed + 0, weight.grad[bools(mask, name)] + 0)  # + 0: -0 is 0 here


def test_gradients_can_be_scaled_and_their_norm_read():
    model = tiny()
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=0.0)
    backward(model, 0)
    weight = model.lm_head.weight
    before = weight.grad.elements.clone()
    weight.grad.mul_(0.5)
    assert torch.equal(weight.grad.elements, before / 2)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    assert optimizer.last_grad_norm == total.item()


def unscale(weight: torch.Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.unscale_(torch.optim.SGD([weight], lr=0.1))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda w: torch.nn.utils.clip_grad_norm_([w], 1e9),  # refused though it would not act
        lambda w: torch.nn.utils.clip_grad_norm_([w], 1.0, foreach=True),
        lambda w: torch.nn.utils.clip_grad_value_([w], 1.0),
        lambda w: w.grad.isnan(),
        lambda w: w.grad.mul_(torch.ones_like(w)),
        lambda w: torch.zeros(w.shape).copy_(w.grad),
        lambda w: torch.optim.SGD([w], lr=0.1).step(),
        unscale,
    ],
)
def test_what_needs_dense_gradients_says_so(misuse):
    model = tiny()
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3)
    backward(model, 0)
    before = model.lm_head.weight.grad.elements.clone()
    with pytest.raises(ConfigError, match="max_grad_norm of the subnetwork optimizer"):
        misuse(model.lm_head.weight)
    assert torch.equal(model.lm_head.weight.grad.elements, before)
    optimizer.step()


def test_a_dense_gradient_that_somebody_sets_is_packed():
    model = torch.nn.Linear(2, 2, bias=False)
    mask = SubnetworkMask({"weight": ((2, 2), masks.pack(np.array([1, 0, 0, 1], bool)))})
    optimizer = SubnetworkSGD(model, mask, lr=1.0)
    start = model.weight.detach().clone()
    model.weight.grad = torch.arange(4.0).reshape(2, 2)
    optimizer.step()
    assert torch.equal(start - model.weight, torch.tensor([[0.0, 0.0], [0.0, 3.0]]))


def test_a_closure_is_called_with_gradients():
    model = torch.nn.Linear(2, 1, bias=False)
    mask = SubnetworkMask({"weight": ((1, 2), masks.pack(np.array([1, 0], bool)))})
    optimizer, start = SubnetworkSGD(model, mask, lr=1.0), model.weight.detach().clone()

    def closure() -> float:
        loss = model.weight.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == start.sum().item()
    assert torch.equal(start - model.weight, torch.tensor([[1.0, 0.0]]))


def test_two_optimizers_of_one_weight_are_refused():
    model = tiny()
    both = [SubnetworkAdamW(model, mask_of(model, 0.1, seed), lr=1e-3) for seed in (0, 1)]
    with pytest.raises(ConfigError, match=r"call release\(\) of the first"):
        backward(model, 0)
    assert len(both) == 2


# --- state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_fp32", ["masters", "moments", "nothing"])
def test_a_run_that_is_continued_ends_with_the_same_bits(in_fp32, tmp_path):
    """Saved as trials are: ``own_state``, a file of torch without pickled code."""
    whole, model = tiny(NARROW), tiny(NARROW)
    mask = mask_of(whole, 0.1)

    def begin(of):
        optimizer = SubnetworkAdamW(of, mask, **ADAM, in_fp32=in_fp32)
        return optimizer, schedule(optimizer)

    def go_on(of, optimizer, rates, steps) -> None:
        for step in steps:
            backward(of, step)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

    go_on(whole, *begin(whole), range(6))
    optimizer, rates = begin(model)
    go_on(model, optimizer, rates, range(3))
    torch.save({**own_state(model, optimizer), "rates": rates.state_dict()}, tmp_path / "save.pt")
    size = (tmp_path / "save.pt").stat().st_size
    bytes_each = {"masters": 12, "moments": 8, "nothing": 4}[in_fp32]
    assert size < 2 * 856_192 + bytes_each * mask.num_selected + 100_000  # packed
    resumed = tiny(NARROW)
    optimizer, rates = begin(resumed)
    saved = torch.load(tmp_path / "save.pt", weights_only=True)
    load_own_state(resumed, optimizer, saved)
    rates.load_state_dict(saved["rates"])
    go_on(resumed, optimizer, rates, range(3, 6))
    assert not differing(resumed, whole)


def test_what_is_no_model_or_mask_is_refused():
    model = tiny(NARROW)
    mask = mask_of(model, 0.1)
    with pytest.raises(ConfigError, match="the mask is a str; give a SubnetworkMask, as of load_"):
        SubnetworkAdamW(model, "mask.safetensors")
    with pytest.raises(ConfigError, match="the model is a generator; give the model itself"):
        SubnetworkAdamW(model.parameters(), mask)


def test_no_parameters_are_added():
    model = tiny(NARROW)
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3)
    with pytest.raises(ConfigError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


def test_a_second_optimizer_is_told_of_the_first():
    model = tiny(NARROW)
    bits = dict(mask_of(model, 0.1).bits)
    name = "model.norm.weight"
    without = {**bits, name: (bits[name][0], np.zeros_like(bits[name][1]))}
    one_more = {**bits, name: (bits[name][0], np.full_like(bits[name][1], 255))}
    first = SubnetworkAdamW(model, SubnetworkMask(without), lr=1e-3)
    with pytest.raises(ConfigError, match=r"frozen, model.norm.weight; .*release\(\) of the sub"):
        SubnetworkAdamW(model, SubnetworkMask(one_more), lr=1e-3)
    first.release()
    SubnetworkAdamW(model, SubnetworkMask(one_more), lr=1e-3)


def test_state_of_another_mask_is_refused():
    model = tiny(NARROW)
    mask, other = mask_of(model, 0.1), mask_of(model, 0.1, seed=1)
    state = SubnetworkAdamW(model, mask, lr=1e-3).state_dict()
    with pytest.raises(CheckpointError, match=f"mask .{mask.fingerprint}.*{other.fingerprint}"):
        SubnetworkAdamW(tiny(NARROW), other, lr=1e-3).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"another in_fp32 \(masters\).*\(moments\)"):
        SubnetworkAdamW(tiny(NARROW), mask, lr=1e-3, in_fp32="moments").load_state_dict(state)
    dense = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(CheckpointError, match="another mask and in_fp32 and rule"):
        SubnetworkAdamW(tiny(NARROW), mask, lr=1e-3).load_state_dict(dense)
    rules = r"another rule \(SubnetworkAdamW\).*\(SubnetworkSGD\)"
    with pytest.raises(CheckpointError, match=rules):
        SubnetworkSGD(tiny(NARROW), mask, lr=1e-3).load_state_dict(state)


# --- masks -----------------------------------------------------------------------------------


def written(mask: SubnetworkMask, path: Path) -> Path:
    masks.write_masks(path, mask.bits, "f" * 64)
    return path


def test_a_mask_file_comes_back(tmp_path):
    mask = mask_of(tiny(), 0.1)
    loaded = load_mask(written(mask, tmp_path / "a.mask.safetensors"))
    assert loaded.fingerprint == mask.fingerprint != mask_of(tiny(), 0.1, seed=1).fingerprint
    assert loaded.base_fingerprint == "f" * 64
    num_set = sum(int(bools(mask, name).sum()) for name in mask.bits)
    assert (loaded.num_selected, loaded.density) == (num_set, num_set / 856_192)


def test_a_mask_file_cut_short_or_without_any_weight_is_refused(tmp_path):
    path = written(mask_of(tiny(), 0.1), tmp_path / "a.mask.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"a\.mask\.safetensors"):
        load_mask(path)
    masks.write_masks(path, {"w": ((9,), np.zeros(2, np.uint8))}, "")
    with pytest.raises(CheckpointError, match="has no weight in it"):
        load_mask(path)


def test_the_mask_that_a_trial_leaves_fits_its_base(trained, tiny_trial, base):
    trial = trained(tiny_trial(), base)
    mask = load_mask(trial.folder / "ever_changed.mask.safetensors")
    assert mask.base_fingerprint == base.fingerprint
    model = tiny(NARROW)
    optimizer = SubnetworkAdamW(model, mask, lr=1e-3)
    before = outside_digests(model, mask)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    optimizer.step()
    assert_outside_unchanged(model, mask, before)
    assert 0 < optimizer.state_bytes()["masters"] == 4 * mask.num_selected


def changed(mask: SubnetworkMask, **bits) -> SubnetworkMask:
    kept = {name: one for name, one in {**mask.bits, **bits}.items() if one is not None}
    return SubnetworkMask(kept)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"model.norm.weight": None}, r"1 names differ, model.norm.weight \(only the model has it"),
        ({"more": ((8,), np.ones(1, np.uint8))}, r"1 names differ, more \(only the mask has it"),
        (
            {"model.norm.weight": ((64, 2), np.ones(16, np.uint8))},
            r"model.norm.weight has shape \[128\] in the model and \[64, 2\] in the mask",
        ),
        (
            {HEAD: ((24, 128), np.ones(384, np.uint8))},
            "lm_head.weight and model.embed_tokens.weight are one tied weight",
        ),
    ],
)
def test_a_mask_of_another_model_is_refused(bits, message):
    model = tiny()
    with pytest.raises(CheckpointError, match=message):
        SubnetworkAdamW(model, changed(mask_of(model, 0.1), **bits), lr=1e-3)
    assert not any(w._post_accumulate_grad_hooks for w in model.parameters())


def test_a_tied_weight_counts_once():
    model = tiny()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mask = mask_of(model, 0.1)
    both = changed(mask, **{HEAD: mask.bits[EMBEDDING]})
    optimizer = SubnetworkAdamW(model, both, lr=1e-3)
    backward(model, 0)
    optimizer.step()
    assert optimizer.state_bytes()["gradients"] == 4 * mask.num_selected
    assert 0 < (model.lm_head.weight != tiny().lm_head.weight).sum() <= bools(mask, EMBEDDING).sum()


def test_a_mask_with_a_head_of_its_own_does_not_fit_a_tied_model_and_vice_versa():
    model = tiny()
    tied = mask_of(model, 0.1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"lm_head.weight \(only the model has it"):
        SubnetworkAdamW(model, tied, lr=1e-3)
    with pytest.raises(CheckpointError, match="one tied weight"):
        SubnetworkAdamW(tiny(), mask_of(model, 0.1), lr=1e-3)


# --- what else is refused before the first step ----------------------------------------------


def test_settings_and_models_that_cannot_be_trained_are_refused():
    model = tiny()
    mask = mask_of(model, 0.1)
    with pytest.raises(ConfigError, match="max_grad_norm is 0; give a positive one, or None"):
        SubnetworkAdamW(model, mask, lr=1e-3, max_grad_norm=0)
    with pytest.raises(
        ConfigError, match="in_fp32 is 'all'; give one of masters, moments, nothing"
    ):
        SubnetworkAdamW(model, mask, lr=1e-3, in_fp32="all")
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"1 tensors in the mask are frozen, model.norm.weight"):
        SubnetworkAdamW(model, mask, lr=1e-3)
    turned = torch.nn.Linear(3, 4, bias=False)
    turned.weight = torch.nn.Parameter(torch.zeros(3, 4).t())
    with pytest.raises(ConfigError, match="1 tensors in the mask are not contiguous, weight"):
        SubnetworkAdamW(turned, mask_of(turned, 1.1), lr=1e-3)


def test_weights_without_gradients_are_refused_at_the_first_step():
    model = tiny()
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3)
    start = copy.deepcopy(model)
    with pytest.raises(TrialError, match=r"38 of 38 tensors .* no gradient.*call backward before"):
        optimizer.step()
    model.model.embed_tokens(batch(0)).sum().backward()
    with pytest.raises(TrialError, match="37 of 38 tensors"):
        optimizer.step()
    assert not differing(model, start)


def test_later_a_weight_without_a_gradient_is_left_as_it_is():
    """As in torch: an expert without tokens, or a step that PRIME skips, be it the first."""
    model = tiny()
    optimizer = SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3)
    start = copy.deepcopy(model)
    backward(model, 0)
    assert model.lm_head.weight.grad.any()
    optimizer.zero_grad()
    optimizer.step()
    assert not differing(model, start)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    model.model.embed_tokens(batch(0)).sum().backward()
    before = copy.deepcopy(model)
    optimizer.step()
    assert differing(model, before) == [EMBEDDING]


# --- trainers --------------------------------------------------------------------------------


CHECKPOINTING = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
"""It is TRL's default."""


def readme_script() -> str:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return re.search(r"### Train a subnetwork alone\n.*?```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def mask_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return written(mask_of(tiny(), 0.1), Path("grpo.mask.safetensors"))


@CHECKPOINTING
def test_the_script_in_the_readme_trains_the_subnetwork(mask_file):
    """As printed, in a folder that holds the mask."""
    scope: dict = {}
    exec(readme_script(), scope)
    model, trainer = scope["model"], scope["trainer"]
    start = load_model(TINY, "bf16")
    assert len(differing(model, start)) > 20
    assert_outside_unchanged(model, scope["mask"], outside_digests(start, scope["mask"]))
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == trainer.state.max_steps
    assert norms[-1] == scope["optimizer"].last_grad_norm > 0


@CHECKPOINTING
def test_a_trainer_that_would_clip_is_refused_before_the_first_step(mask_file):
    script = readme_script()
    assert "max_grad_norm=0," in script
    scope: dict = {}
    with pytest.raises(ConfigError, match=r"clipped to 1\.0 outside.*the trainer's max_grad_no"):
        exec(script.replace("max_grad_norm=0,", ""), scope)
    assert not differing(scope["model"], load_model(TINY, "bf16"))


@CHECKPOINTING
def test_a_trainer_goes_on_from_its_checkpoint(mask_file):
    """Four steps at once, and two after two."""
    script = readme_script().replace("max_steps=3,", "max_steps=4, save_steps=2,")
    whole: dict = {}
    exec(script, whole)
    steps: list = []
    resumed: dict = {"count": lambda *_: steps.append(1)}
    resume = (
        "optimizer.register_step_post_hook(count)\n"
        'trainer.train(resume_from_checkpoint="out/checkpoint-2")'
    )
    exec(script.replace("trainer.train()", resume), resumed)
    assert len(steps) == 2
    assert not differing(resumed["model"], whole["model"])
    saved = Path("out/checkpoint-2/optimizer.pt").stat().st_size
    assert saved < 12 * whole["mask"].num_selected + 100_000


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, ("bf16-mixed", "bf16", "bf16-weights", "fp32")[number % 4])
        for number, name in enumerate(ALGORITHMS)
    ],
)
def test_every_algorithm_trains_a_subnetwork(
    name, precision, base, tiny_trial, context_of, monkeypatch
):
    config = tiny_trial(
        name, precision=precision, max_grad_norm=None, batch_size=16, gradient_accumulation_steps=2
    )
    optimizers = []

    def build(model, *_):
        optimizers.append(SubnetworkAdamW(model, mask_of(model, 0.1), lr=1e-3, max_grad_norm=1.0))
        return optimizers[-1]

    monkeypatch.setattr(context, "build_optimizer", build)
    of_trial = context_of(config, base)
    mask = mask_of(of_trial.model, 0.1)
    start, before = copy.deepcopy(of_trial.model), outside_digests(of_trial.model, mask)
    trainer = ALGORITHMS[name](of_trial)
    trainer.train()
    assert len(optimizers) == 1
    assert_outside_unchanged(of_trial.model, mask, before)
    assert len(differing(of_trial.model, start)) > 20


# --- several workers -------------------------------------------------------------------------


def test_several_workers(tmp_path):
    """Two train as one with the whole batch; models wrapped and different masks are refused."""
    path = written(mask_of(tiny(), 0.1), tmp_path / "a.mask.safetensors")
    batches = torch.stack([torch.cat([batch(2 * n), batch(2 * n + 1)]) for n in range(4)])
    calls = [(train_subnetwork, (path, batches, tmp_path)), (refuse_on_workers, (tmp_path,))]
    run_together(in_turn, calls)
    train_subnetwork(0, path, batches, tmp_path)
    (one, norm), (first, _), (second, _) = (
        torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")
    )
    assert all(same_bits(first[name], second[name]) for name in first)
    start = dict(tiny().named_parameters())
    moved = sum((one[n] - w).double().square().sum() for n, w in start.items()).sqrt()
    apart = sum((one[n] - first[n]).double().square().sum() for n in start).sqrt()
    assert apart < 1e-4 * moved
    norms = [torch.load(tmp_path / f"2-{rank}.pt")[1] for rank in range(2)]
    assert norms[0] == norms[1] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.5  # it was clipped
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert "wrapped in DistributedDataParallel" in said[0]
        assert "use neither a GradScaler nor DistributedDataParallel" in said[1]
        assert "each worker holds a part of the model (FSDP)" in said[2]
        assert "workers have different masks" in said[3]
