"""Optimizers against algorithm 2 of 1711.05101 in float64, and against torch's own."""

import ml_dtypes
import numpy as np
import pytest
import torch

from rlsparse.config import TrainConfig
from rlsparse.errors import ConfigError
from rlsparse.fp32_moments import Fp32MomentAdamW, Fp32MomentSgd
from rlsparse.models.loading import load_model
from rlsparse.optim import build_optimizer, select_trainable
from rlsparse.patch import Patch

NUM_STEPS = 60
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = 10.0 ** torch.randint(-6, 2, (50,), generator=generator)
    return [(torch.randn(50, generator=generator) * scales).to(dtype) for _ in range(NUM_STEPS)]


def start(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(2)).to(dtype))


def adamw(weights: np.ndarray, grads: list[np.ndarray], rounded) -> np.ndarray:
    """Algorithm 2 in float64; ``rounded`` maps the new weights to what is stored."""
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    beta1, beta2 = SETTINGS["betas"]
    for step, grad in enumerate(grads, 1):
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
        direction = (mean / (1 - beta1**step)) / (
            np.sqrt(square / (1 - beta2**step)) + SETTINGS["eps"]
        )
        weights = rounded(
            weights
            - SETTINGS["lr"] * direction
            - SETTINGS["lr"] * SETTINGS["weight_decay"] * weights
        )
    return weights


def train(optimizer, weight: torch.nn.Parameter, grads: list[torch.Tensor]) -> np.ndarray:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach().float().numpy()


def test_fp32_weights_follow_the_definition():
    """60 steps in fp32 stay within 60 roundings of a unit in the last place of the largest."""
    weight, grads = start(), gradients()
    exact = adamw(
        weight.detach().double().numpy(), [g.double().numpy() for g in grads], lambda w: w
    )
    got = train(Fp32MomentAdamW([weight], **SETTINGS), weight, grads)
    assert np.abs(got - exact).max() <= 60 * np.spacing(np.float32(np.abs(exact).max()))
    assert np.abs(exact - start().detach().numpy()).max() > 0.05  # it moved


def test_fp32_weights_follow_torch():
    ours, theirs = start(), start()
    got = train(Fp32MomentAdamW([ours], **SETTINGS), ours, gradients())
    expected = train(torch.optim.AdamW([theirs], **SETTINGS, foreach=False), theirs, gradients())
    ulps = np.abs(got - expected) / np.spacing(np.abs(expected))
    assert ulps.max() <= 64
    assert np.median(ulps) <= 2


def test_bf16_weights_are_rounded_once_each_step():
    """Equal to the float64 definition with one rounding to nearest even, but for near ties."""
    weight, grads = start(torch.bfloat16), gradients(torch.bfloat16)
    optimizer = Fp32MomentAdamW([weight], **SETTINGS)
    rounded = adamw(
        weight.detach().double().numpy(),
        [g.double().numpy() for g in grads],
        lambda w: w.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64),
    )
    got = train(optimizer, weight, grads)
    assert np.mean(got == rounded) >= 0.96
    assert weight.dtype == torch.bfloat16
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_bf16_step_is_the_rounded_fp32_step():
    """One step from the same weights: bit for bit the fp32 result, rounded to nearest even."""
    narrow = start(torch.bfloat16)
    wide = torch.nn.Parameter(narrow.detach().float())
    one, other = Fp32MomentAdamW([narrow], **SETTINGS), Fp32MomentAdamW([wide], **SETTINGS)
    for grad in gradients(torch.bfloat16):
        with torch.no_grad():
            wide.copy_(narrow.float())
        fp32 = train(other, wide, [grad.float()])
        bf16 = train(one, narrow, [grad])
        assert np.array_equal(bf16, fp32.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_small_updates_of_bf16_weights_are_lost():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    settings = {**SETTINGS, "weight_decay": 0.0, "lr": 2.0**-10}
    grads = [torch.full((1,), -1.0, dtype=torch.bfloat16)] * 20
    assert train(Fp32MomentAdamW([weight], **settings), weight, grads) == 1.0
    settings["lr"] = 2.0**-8 * 1.5  # over half the gap above 1, which is 2^-7
    assert train(Fp32MomentAdamW([weight], **settings), weight, grads[:1]) == 1 + 2.0**-7


def test_weights_without_gradient_stay():
    still, moved = start(), start()
    optimizer = Fp32MomentAdamW([still, moved], **SETTINGS)
    moved.grad = torch.ones(50)
    assert optimizer.step(lambda: 0.5) == 0.5
    assert torch.equal(still, start())
    assert not torch.equal(moved, start())


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("bf16", torch.optim.AdamW),
        ("bf16-weights", Fp32MomentAdamW),
        ("bf16-mixed", torch.optim.AdamW),
        ("fp32", torch.optim.AdamW),
    ],
)
def test_the_optimizer_of_each_regime(precision, kind):
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    config = TrainConfig(
        precision=precision, learning_rate=0.01, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-3,
        weight_decay=0.2,
    )  # fmt: skip
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["params"] == [model.weight]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        0.01, (0.8, 0.7), 1e-3, 0.2,
    )  # fmt: skip
    if kind is torch.optim.AdamW:
        assert (group["foreach"], group["fused"], group["amsgrad"]) == (False, False, False)


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "bf16-mixed", "fp32"])
def test_sgd_is_plain(precision):
    model = torch.nn.Linear(3, 2)
    config = TrainConfig(precision=precision, optimizer="sgd", learning_rate=0.5, weight_decay=0.25)
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is torch.optim.SGD
    before = [weight.detach().clone() for weight in model.parameters()]
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    for weight, old in zip(model.parameters(), before, strict=True):
        once = old - 0.5 * (1 + 0.25 * old)
        torch.testing.assert_close(weight.detach(), once - 0.5 * (1 + 0.25 * once))


# --- momentum --------------------------------------------------------------------------------

MOMENTUM = {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.1}


def momentum(weights: np.ndarray, grads: list[np.ndarray], rounded=lambda w: w) -> np.ndarray:
    """torch's SGD in float64: v = m v + (g + d w), w = w - lr v."""
    velocity = np.zeros_like(weights)
    for grad in grads:
        velocity = MOMENTUM["momentum"] * velocity + grad + MOMENTUM["weight_decay"] * weights
        weights = rounded(weights - MOMENTUM["lr"] * velocity)
    return weights


def test_momentum_follows_the_definition():
    weight, grads = start(), gradients()
    exact = momentum(weight.detach().double().numpy(), [g.double().numpy() for g in grads])
    ours = train(Fp32MomentSgd([weight], **MOMENTUM), weight, grads)
    weight = start()
    theirs = train(torch.optim.SGD([weight], **MOMENTUM, foreach=False), weight, grads)
    unit = np.spacing(np.float32(np.abs(exact).max()))
    for got in (ours, theirs):
        assert np.abs(got - exact).max() <= NUM_STEPS * unit
    assert np.array_equal(ours, theirs)
    assert np.abs(exact - start().detach().numpy()).max() > 0.05


def test_momentum_of_bf16_weights_is_fp32():
    weight, grads = start(torch.bfloat16), gradients(torch.bfloat16)
    optimizer = Fp32MomentSgd([weight], **MOMENTUM)
    rounded = momentum(
        weight.detach().double().numpy(),
        [g.double().numpy() for g in grads],
        lambda w: w.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64),
    )
    assert np.mean(train(optimizer, weight, grads) == rounded) >= 0.96
    assert weight.dtype == torch.bfloat16
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "bf16-mixed", "fp32"])
def test_sgd_with_momentum(precision):
    model = torch.nn.Linear(3, 2)
    settings = {"learning_rate": 0.5, "weight_decay": 0.25, "momentum": 0.75}
    config = TrainConfig(precision=precision, optimizer="sgd-momentum", **settings)
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is (Fp32MomentSgd if precision == "bf16-weights" else torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.75, 0.25)
    if precision != "bf16-weights":
        assert (group["nesterov"], group["dampening"], group["foreach"]) == (False, 0, False)


# --- what is trained -------------------------------------------------------------------------

MATRICES = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def model(base):
    return load_model(base.path, "fp32")


def trained_names(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_all_is_trained_unless_asked_otherwise(model):
    select_trainable(model, TrainConfig())
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("modules", "layers"), [(("q", "v"), None), (("down",), (1,)), (None, (0, 2)), (("q",), (2,))]
)
def test_modules_and_layers_select(model, modules, layers):
    num_layers = model.config.num_hidden_layers
    select_trainable(model, TrainConfig(trainable_modules=modules, trainable_layers=layers))
    chosen = range(num_layers) if layers is None else layers
    if modules is None:
        prefixes = tuple(f"model.layers.{layer}." for layer in chosen)
        expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
        assert len(expected) == 2 * 9
    else:
        expected = {f"model.layers.{k}.{MATRICES[m]}.weight" for k in chosen for m in modules}
    assert trained_names(model) == expected


def test_a_selection_may_be_widened_again(model):
    select_trainable(model, TrainConfig(trainable_modules=("q",)))
    select_trainable(model, TrainConfig(trainable_modules=("norm",)))
    assert all("norm" in name for name in trained_names(model))
    assert "model.norm.weight" in trained_names(model)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"trainable_modules": ("router",)},
         r"trainable_modules \[router\] in train.trainable_layers all select nothing"),
        ({"trainable_layers": (0, 7)}, r"\[0, 7\] select nothing to train or a layer that is not "
         r"there: this model has layers 0 to 3, in them q, k, v, o, gate, up, down, norm, "
         r"outside them norm, embed"),
        ({"trainable_modules": ("embed",), "trainable_layers": (0,)}, r"\[embed\] in .* \[0\]"),
        ({"trainable_modules": ("head",)}, "outside them norm, embed"),  # tied
    ],
)  # fmt: skip
def test_nothing_to_train_is_an_error(model, chosen, said):
    with pytest.raises(ConfigError, match=said):
        select_trainable(model, TrainConfig(**chosen))


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_frozen_weights_stay_bit_for_bit(base, tiny_trial, trained, name):
    """Through a whole trial; that of weight decay alone would move them."""
    config = tiny_trial(
        name,
        precision="fp32",
        learning_rate=1e-3,
        weight_decay=0.1,
        trainable_modules=["q", "down"],
        trainable_layers=[1, 3],
    )
    patch = Patch.open(trained(config, base).patch())
    moved = {tensor for tensor, entry in patch.tensors.items() if entry.num_changed}
    assert moved == {
        f"model.layers.{layer}.{matrix}.weight"
        for layer in (1, 3)
        for matrix in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert len(patch.tensors) > 30
