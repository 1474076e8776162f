"""Trials that train the weights in a mask alone, against their full checkpoints."""

import copy
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from conftest import SMALL, Trained
from safetensors.torch import load_file
from shelf import Shelf, assert_went_on, cut, save_and_go_on
from test_subnetwork import backward, bools, mask_of

from rlsparse import tables
from rlsparse.algorithms import ALGORITHMS
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import STORED_DTYPE, TrainConfig, TrialConfig
from rlsparse.costs import ModelSize, trial_memory
from rlsparse.errors import CheckpointError, ConfigError, TrialError
from rlsparse.models import TINY
from rlsparse.models.loading import load_model
from rlsparse.names import layer_and_module
from rlsparse.optim import build_optimizer
from rlsparse.subnetwork import SubnetworkAdamW, SubnetworkMask, load_mask
from rlsparse.tables import SUBNETWORK
from rlsparse.update_probe import count_updates

MASK = {"file": "a.mask.safetensors"}
"""What a configuration says; these trials are given the mask itself."""
PRECISIONS = list(STORED_DTYPE)


@pytest.fixture(scope="module")
def model():
    return load_model(TINY, "bf16")


def steps_of(trial: Trained) -> list[dict]:
    rows = tables.read(trial.folder / "steps.parquet", "steps").to_pylist()
    return [{k: v for k, v in row.items() if k != "trial_id"} for row in rows]


def moved(trial: Trained) -> dict[str, torch.Tensor]:
    """Which weights of the checkpoint that a trial left have other bits than the base."""
    before = load_file(trial.base.path / "model.safetensors")
    after = load_file(trial.folder / "checkpoint" / "model.safetensors")
    integer = torch.int16 if trial.config.stored_dtype == "bf16" else torch.int32
    return {
        name: before[name].to(weight.dtype).view(integer) != weight.view(integer)
        for name, weight in after.items()
    }


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, PRECISIONS[number % 4]) for number, name in enumerate(ALGORITHMS)],
)
def test_every_algorithm_trains_the_mask_alone(run_trial, tiny_trial, base, model, name, precision):
    mask = mask_of(model, 0.1)
    config = tiny_trial(
        name, precision=precision, mask=MASK, learning_rate=1e-3, weight_decay=0.5,
        max_grad_norm=0.01, gradient_accumulation_steps=2, batch_size=16, keep_checkpoints=True,
        probe={"update_interval": 1},
    )  # fmt: skip
    trial = run_trial(config, base, mask)
    found = moved(trial)
    assert not any((differs & ~bools(mask, n)).any() for n, differs in found.items())
    num_moved = sum(int(differs.sum()) for differs in found.values())
    assert num_moved > 0.2 * mask.num_selected
    assert trial.summary["num_final"] == num_moved
    assert trial.summary["mask_density"] == mask.num_selected / sum(
        w.numel() for w in model.parameters()
    )
    assert trial.summary["num_in_mask"] == mask.num_selected
    assert trial.summary["mask_fingerprint"] == mask.fingerprint
    assert load_mask(trial.folder / SUBNETWORK).fingerprint == mask.fingerprint
    rows = steps_of(trial)[1:]
    assert len(rows) == 2
    norms = [row["grad_norm"] for row in rows]
    assert 0 < max(norms) < math.inf
    assert [row["clipped_fraction"] for row in rows] == [float(norm > 0.01) for norm in norms]
    assert all(0 <= row["update_below_half_ulp"] <= 1 for row in rows if row["half_ulp_recall"])


FULL = [
    ("sft", "fp32", "adamw"), ("sft", "bf16-mixed", "adamw"), ("sft", "bf16", "sgd-momentum"),
    ("sft", "bf16-weights", "sgd"), ("grpo", "fp32", "adamw"), ("grpo", "bf16-mixed", "adamw"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "precision", "optimizer"), FULL)
def test_a_mask_of_all_weights_is_the_whole_trial(
    run_trial, tiny_trial, base, model, name, precision, optimizer
):
    """Bit for bit, all that is measured included; clipping and weight decay act."""
    own = {
        "precision": precision, "optimizer": optimizer, "weight_decay": 0.1, "num_steps": 3,
        "max_grad_norm": 0.05, "probe": {"update_interval": 1, "step_masks": True},
    }  # fmt: skip
    whole = run_trial(tiny_trial(name, **own), base)
    masked = run_trial(tiny_trial(name, mask=MASK, **own), base, mask_of(model, 1.1))
    assert masked.patch().read_bytes() == whole.patch().read_bytes()
    assert steps_of(masked) == steps_of(whole)
    assert whole.summary["num_final"] > 0
    assert any(row["clipped_fraction"] for row in steps_of(whole))
    assert "mask_density" not in whole.summary
    assert not (whole.folder / SUBNETWORK).exists()


@pytest.mark.parametrize(
    ("precision", "optimizer", "in_fp32"),
    [("fp32", "adamw", "masters"), ("bf16-mixed", "sgd", "nothing"), ("bf16", "adamw", "nothing"),
     ("bf16-weights", "adamw", "moments"), ("bf16-weights", "sgd-momentum", "moments"),
     ("bf16-weights", "sgd", "nothing")],
)  # fmt: skip
def test_settings_of_training_reach_the_optimizer(model, precision, optimizer, in_fp32):
    config = TrainConfig(
        precision=precision, optimizer=optimizer, learning_rate=0.3, weight_decay=0.2,
        adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3, momentum=0.7, max_grad_norm=0.4,
    )  # fmt: skip
    found = build_optimizer(copy.deepcopy(model), config, mask_of(model, 0.1))
    own = {
        "adamw": {"betas": (0.5, 0.6), "eps": 1e-3}, "sgd": {"momentum": 0.0},
        "sgd-momentum": {"momentum": 0.7},
    }  # fmt: skip
    expected = {"lr": 0.3, "weight_decay": 0.2, **own[optimizer]}
    assert expected.items() <= found.param_groups[0].items()
    assert found.state_dict()["subnetwork"]["in_fp32"] == in_fp32
    assert found._max_grad_norm == 0.4


def test_of_a_mask_what_is_trained_is_what_trainable_modules_leave(
    run_trial, tiny_trial, base, model
):
    mask = mask_of(model, 0.2)
    config = tiny_trial(
        mask=MASK, trainable_modules=["q", "down"], trainable_layers=[1], learning_rate=1e-2,
        keep_checkpoints=True,
    )  # fmt: skip
    trial = run_trial(config, base, mask)
    written = load_mask(trial.folder / SUBNETWORK)
    found = moved(trial)
    for name, differs in found.items():
        layer, module = layer_and_module(name, tuple(differs.shape))
        inside = bools(mask, name) & (layer == 1 and module in ("q", "down"))
        assert torch.equal(bools(written, name), inside)
        assert not (differs & ~inside).any()
    assert any(differs.any() for differs in found.values())
    assert trial.summary["num_in_mask"] == written.num_selected < mask.num_selected


def test_what_of_a_mask_cannot_be_trained_is_refused(run_trial, tiny_trial, base, model):
    mask = mask_of(model, 0.1)
    nowhere = mask_of(model, 0.1, without=tuple(n for n in mask.bits if ".q_proj." in n))
    other = SubnetworkMask({"w": ((8,), np.ones(1, np.uint8))})
    for config, given, error, said in [
        (tiny_trial(mask=MASK), None, ConfigError, "got no mask, its configuration has one"),
        (tiny_trial(), mask, ConfigError, "got a mask, its configuration has none"),
        (tiny_trial(mask=MASK), other, CheckpointError, "the mask is of another model"),
        (tiny_trial(mask=MASK, trainable_modules=["q"]), nowhere, ConfigError,
         r"no weight of train\.mask .* is in train\.trainable_modules"),
    ]:  # fmt: skip
        with pytest.raises(error, match=said):
            run_trial(config, base, given)


def test_a_weight_outside_that_moves_ends_the_trial(
    run_trial, tiny_trial, base, model, monkeypatch
):
    """Whatever has moved it: here a callback, by the least that there is."""
    mask = mask_of(model, 0.1)
    build = ALGORITHMS["sft"]

    def building(context):
        trainer = build(context)
        name, weight = next(iter(context.model.named_parameters()))
        outside = int(torch.nonzero(~bools(mask, name).flatten())[0])

        def move(optimizer, *_):
            weight.detach().view(torch.int16).view(-1)[outside] += 1

        trainer.optimizer.register_step_post_hook(move)
        return trainer

    monkeypatch.setitem(ALGORITHMS, "sft", building)
    with pytest.raises(TrialError, match="outside the mask have changed in 1 tensors"):
        run_trial(tiny_trial(mask=MASK), base, mask)


# --- saves -----------------------------------------------------------------------------------

CASES = {
    "sft": {"precision": "bf16-mixed", "lr_schedule": "linear", "weight_decay": 0.1},
    "grpo": {"precision": "bf16-weights", "optimizer": "sgd-momentum", "learning_rate": 0.3},
    "ppo": {"precision": "bf16"},
    "prime": {
        "precision": "fp32",
        "algorithm": {"reward_learning_rate": 1e-3, "min_accuracy": 0.0, "max_accuracy": 1.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_trial_of_a_mask_goes_on_to_the_same_bits(name, base, tmp_path, model):
    shelf, mask = Shelf(tmp_path / "shelf"), mask_of(model, 0.1)
    save_and_go_on(0, cut(name, mask=MASK, **CASES[name]), base, shelf, [3], mask=mask)
    assert_went_on(shelf, 3)
    state = torch.load(shelf.save(3) / "worker-0" / "rlsparse.pt", weights_only=False)
    kept = [v for one in state["optimizer"]["state"].values() for v in one.values()]
    sizes = [value.numel() for value in kept if isinstance(value, torch.Tensor) and value.dim()]
    assert 0 < sum(sizes) <= 2 * mask.num_selected  # packed


# --- what is measured --------------------------------------------------------------------------


def test_updates_are_counted_over_the_weights_in_the_mask(model):
    """Against Adam's first step, lr g / (|g| + eps), on dense gradients."""
    mask, rate = mask_of(model, 0.1, without=(next(iter(dict(model.named_parameters()))),)), 3e-5
    dense, masked = (copy.deepcopy(model).float() for _ in range(2))
    optimizer = SubnetworkAdamW(masked, mask, lr=rate)
    before = {name: w.detach().clone().flatten() for name, w in masked.named_parameters()}
    backward(dense, 0)
    backward(masked, 0)
    optimizer.step()
    found = count_updates(masked, optimizer, before.__getitem__)
    counts = np.zeros(5, int)
    for (name, weight), after in zip(dense.named_parameters(), masked.parameters(), strict=True):
        inside = bools(mask, name).flatten()
        gradient, old, new = (t.flatten()[inside] for t in (weight.grad, weight, after.detach()))
        _, exponent = torch.frexp(old.detach().double())  # |w| = f 2^e with 1/2 <= f < 1
        reaches = rate * (gradient / (gradient.abs() + 1e-8)).abs() >= 2.0 ** (exponent - 9)
        differs = old.detach().bfloat16() != new.bfloat16()
        sums = (inside, gradient != 0, reaches, differs, reaches & differs)
        counts += [int(one.sum()) for one in sums]
    assert counts.min() > 0
    assert counts[2] < counts[1]
    assert list(astuple(found)) == list(counts)


# --- costs -----------------------------------------------------------------------------------


def test_memory_is_that_of_the_weights_in_the_mask():
    size = ModelSize.of(Checkpoint.open(TINY))
    train = {**SMALL["train"], "precision": "bf16-mixed", "batch_size": 256}

    def parts(mask, num_in_mask=None) -> dict[str, int]:
        config = TrialConfig.model_validate(
            {"algorithm": {"name": "sft"}, "task": SMALL["task"], "train": {**train, "mask": mask}}
        )
        return trial_memory(config, size, num_in_mask=num_in_mask).parts

    whole, unknown, tenth = parts(None), parts(MASK), parts(MASK, size.num_weights // 10)
    assert "mask" not in whole
    assert unknown["optimizer"] == whole["optimizer"] == 8 * size.num_weights
    assert unknown["gradients"] >= whole["gradients"]  # an upper bound
    assert tenth["optimizer"] == 8 * (size.num_weights // 10)
    assert tenth["mask"] == 4 * (size.num_weights // 10)
    assert tenth["gradients"] < whole["gradients"] / 2
    assert tenth["autocast"] == whole["autocast"]  # of whole tensors
