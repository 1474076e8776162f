"""Gradients and updates of real trials, against full copies of masters and gradients.

The oracle makes the optimizer's step anew, in numpy, of all gradients since the first.
"""

import math

import numpy as np
import pytest
import torch
from conftest import Trained
from memory import Largest
from transformers import TrainerCallback

from rlsparse import tables, update_probe
from rlsparse.algorithms import ALGORITHMS
from rlsparse.config import TrainConfig
from rlsparse.optim import build_optimizer
from rlsparse.update_probe import count_updates, half_ulp

NUM_STEPS = 4
COLUMNS = (
    "gradient_nonzero_fraction", "update_below_half_ulp", "half_ulp_precision", "half_ulp_recall",
)  # fmt: skip


class Recorder(TrainerCallback):
    """Copies, before every optimizer step, of all gradients and weights, and of those after it."""

    def __init__(self, model) -> None:
        self.model = model
        self.gradients, self.before, self.after, self.rates = [], [], [], []

    def weights(self, part: str) -> np.ndarray:
        trained = [w for w in self.model.parameters() if w.grad is not None]
        chosen = [w.grad if part == "grad" else w.detach() for w in trained]
        return torch.cat([w.flatten() for w in chosen]).double().numpy()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_) -> None:
        self.gradients.append(self.weights("grad"))
        self.before.append(self.weights("data"))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_optimizer_step(self, args, state, control, **_) -> None:
        self.after.append(self.weights("data"))


def as_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bf16 (to nearest, ties to even), by the bits of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def steps_of(train: TrainConfig, recorder: Recorder) -> list[np.ndarray]:
    """What the optimizer adds at each step: float64, but rounded where torch's numbers are bf16."""
    ours = train.precision == "bf16-weights" and train.optimizer != "sgd"
    is_exact = ours or train.precision in ("bf16-mixed", "fp32")
    kept = as_bf16 if not is_exact else lambda values: values
    mean = square = velocity = np.zeros_like(recorder.before[0])
    found = []
    for t, (gradient, weight, rate) in enumerate(
        zip(recorder.gradients, recorder.before, recorder.rates, strict=True), 1
    ):
        if train.optimizer == "adamw":
            mean = kept(mean + (1 - train.adam_beta1) * (gradient - mean))
            square = kept(train.adam_beta2 * square)
            square = kept(square + (1 - train.adam_beta2) * gradient**2)
            scale = kept(kept(np.sqrt(square)) / math.sqrt(1 - train.adam_beta2**t))
            scale = kept(scale + train.adam_epsilon)
            step = mean / scale / (1 - train.adam_beta1**t) + train.weight_decay * weight
        else:
            step = kept(gradient + train.weight_decay * weight)
            if train.optimizer == "sgd-momentum":
                step = velocity = kept(kept(train.momentum * velocity) + step)
        found.append(-rate * step)
    return found


def expected(recorder: Recorder, step: int, update: np.ndarray) -> dict[str, float]:
    before, after = as_bf16(recorder.before[step]), as_bf16(recorder.after[step])
    changed = (before != after) | (np.signbit(before) != np.signbit(after))
    _, exponent = np.frexp(before)  # |w| = f 2^e with 1/2 <= f < 1
    reaches = np.abs(update) >= np.where(before == 0, 2.0**-134, 2.0 ** (exponent - 9))
    values = (
        np.count_nonzero(recorder.gradients[step]) / before.size,
        np.count_nonzero(~reaches) / before.size,
        np.count_nonzero(reaches & changed) / np.count_nonzero(reaches),
        np.count_nonzero(reaches & changed) / np.count_nonzero(changed),
    )
    return dict(zip(COLUMNS, values, strict=True))


@pytest.fixture(scope="module")
def watch(run_trial):
    def run(config, base) -> tuple[Trained, Recorder]:
        name, recorders = config.algorithm.name, []
        build = ALGORITHMS[name]

        def with_recorder(context):
            trainer = build(context)
            recorders.append(Recorder(context.model))
            trainer.add_callback(recorders[0])
            return trainer

        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(ALGORITHMS, name, with_recorder)
            return run_trial(config, base), recorders[0]

    return run


CASES = {
    "mixed": {"precision": "bf16-mixed", "weight_decay": 0.1},
    "fp32": {"precision": "fp32"},
    "weights": {"precision": "bf16-weights"},
    "bf16": {"precision": "bf16"},
    "sgd": {"precision": "bf16-weights", "optimizer": "sgd", "learning_rate": 0.03,
            "weight_decay": 0.01},
    "momentum": {"precision": "bf16-mixed", "optimizer": "sgd-momentum", "learning_rate": 0.03,
                 "weight_decay": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_the_step_made_anew(case, watch, tiny_trial, base):
    """Frozen weights are left out; the rate falls, so that it must be that of the very step."""
    config = tiny_trial(
        num_steps=NUM_STEPS, lr_schedule="linear", trainable_layers=[0, 2], max_grad_norm=0.5,
        probe={"update_interval": 2}, **CASES[case],
    )  # fmt: skip
    trial, recorder = watch(config, base)
    rows = tables.read(trial.folder / "steps.parquet", "steps").to_pylist()
    updates = steps_of(config.train, recorder)
    for row in rows:
        found = {column: row[column] for column in COLUMNS}
        if row["step"] % 2 or not row["step"]:
            assert set(found.values()) == {None}
            continue
        step = row["step"] - 1
        wanted = expected(recorder, step, updates[step])
        assert found["gradient_nonzero_fraction"] == wanted["gradient_nonzero_fraction"]
        # The oracle is float64: a few weights lie within its distance from fp32 of the threshold.
        assert found == pytest.approx(wanted, abs=2e-4)
        assert 0.01 < found["update_below_half_ulp"] < 1
        if case in ("weights", "bf16", "sgd"):  # torch's SGD rounds the rate to bf16, too
            assert found["half_ulp_precision"] > (0.99 if case == "sgd" else 0.999)
        else:
            assert found["half_ulp_precision"] < 0.99


def test_measuring_changes_no_weight(trained, run_trial, tiny_trial, base):
    plain = tiny_trial(num_steps=3, optimizer="sgd", learning_rate=0.03)
    asked = plain.model_copy(
        update={"probe": plain.probe.model_copy(update={"update_interval": 1, "casts": True})}
    )
    assert trained(plain, base).patch().read_bytes() == run_trial(asked, base).patch().read_bytes()


def planted(precision: str, weights: list[float], gradients: list[float], **train):
    """Counts of one step of SGD at rate 1 that is made by hand."""
    model = torch.nn.Linear(1, 1, bias=False)
    dtype = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    model.weight = torch.nn.Parameter(torch.tensor([weights], dtype=dtype))
    before = model.weight.detach().clone().flatten().to(torch.bfloat16)
    config = TrainConfig(precision=precision, optimizer="sgd", learning_rate=1.0, **train)
    optimizer = build_optimizer(model, config)
    model.weight.grad = torch.tensor([gradients], dtype=dtype)
    optimizer.step()
    return count_updates(model, optimizer, {"weight": before}.__getitem__)


HALF = 2.0**-8  # of the distance of bf16 from 1 to the next number


@pytest.mark.parametrize(
    ("weight", "gradient", "nonzero", "predicted", "changed"),
    [
        (1.0, 0.0, 0, 0, 0),
        (1.0, -0.99 * HALF, 1, 0, 0),
        (1.0, -1.01 * HALF, 1, 1, 1),
        (1.0, -HALF, 1, 1, 0),  # a tie goes to the even neighbour: back
        (1.0 + 2 * HALF, -HALF, 1, 1, 1),  # and here on
        (1.0, 0.6 * HALF, 1, 0, 1),  # below a power of two the distance is half as wide
        (0.0, -(2.0**-134), 1, 1, 0),
        (0.0, 2.0**-134, 1, 1, 1),  # -0 has other bits
        (-1.0, 1.01 * HALF, 1, 1, 1),
    ],
)
def test_one_weight(weight, gradient, nonzero, predicted, changed):
    found = planted("bf16-mixed", [weight], [gradient])
    assert (found.num_elements, found.num_nonzero) == (1, nonzero)
    assert (found.num_predicted, found.num_changed) == (predicted, changed)
    assert found.num_both == predicted * changed


def test_masters_between_two_numbers():
    """One crosses a tie by a small update, one is held back from one that is large enough."""
    found = planted("bf16-mixed", [1 + 0.95 * HALF, 1 - 0.4 * HALF], [-0.1 * HALF, -1.1 * HALF])
    assert (found.num_predicted, found.num_changed, found.num_both) == (1, 1, 0)
    assert found.fractions() == dict(zip(COLUMNS, (1.0, 0.5, 0.0, 0.0), strict=True))


def test_shares_of_nothing_are_not_there():
    found = planted("bf16", [1.0, 2.0], [0.0, 0.0])
    assert found.fractions() == dict(zip(COLUMNS, (0.0, 1.0, None, None), strict=True))
    model = torch.nn.Linear(2, 2)
    empty = count_updates(model, build_optimizer(model, TrainConfig()), {}.__getitem__)
    assert set(empty.fractions().values()) == {None}


def test_half_an_ulp_of_every_number():
    codes = torch.arange(0x7F80, dtype=torch.int16)
    values = codes.view(torch.bfloat16)
    expected = [
        2.0 ** (max(math.frexp(value)[1], -125) - 9) if value else 2.0**-134
        for value in values.double().tolist()
    ]
    assert half_ulp(values)[:-1].tolist() == expected[:-1]
    assert torch.equal(half_ulp(-values), half_ulp(values))


def test_pieces_add_up_and_nothing_larger_is_made(monkeypatch):
    """Of 4 bytes per weight of a piece."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=generator).bfloat16().tolist()
    gradients = (0.01 * torch.randn(1000, generator=generator)).tolist()
    whole = planted("bf16-mixed", weights, gradients, weight_decay=0.01)
    monkeypatch.setattr(update_probe, "_PIECE", 128)
    assert planted("bf16-mixed", weights, gradients, weight_decay=0.01) == whole
    assert 0 < whole.num_both < whole.num_changed < 1000
    model = torch.nn.Linear(1000, 1, bias=False)
    optimizer = build_optimizer(model, TrainConfig())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    before = model.weight.detach().flatten().bfloat16()
    with Largest() as largest:
        count_updates(model, optimizer, {"weight": before}.__getitem__)
    assert 0 < largest.num_bytes <= 4 * 128
