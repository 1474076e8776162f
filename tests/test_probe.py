"""The probe on a model of a few weights that the test moves by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError, TrialError
from rlsparse.masks import read_masks, unpack
from rlsparse.patch import PATCH_FILE, Changes, Patch
from rlsparse.probe import Probe
from rlsparse.tables import EVER_CHANGED
from rlsparse.tasks.generate import Score


class Tied(torch.nn.Module):
    """An embedding, and a head that is the same tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(3, 5, dtype=dtype)
        self.head = torch.nn.Linear(5, 3, bias=True, dtype=dtype)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.fill_(1.0)
            self.head.bias.fill_(2.0)


class Bench:
    """A probe with its model, its scores and its rows."""

    def __init__(self, config, folder) -> None:
        precision = config.train.precision
        self.model = Tied(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.folder = folder
        self.num_scored = 0
        self.progress: list[dict] = []
        checkpoint = folder.parent / f"{folder.name}-base.safetensors"
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        safetensors.torch.save_file(weights, checkpoint)
        self.probe = Probe(
            config,
            self.model,
            trial_id="t",
            base=Checkpoint.open(checkpoint),
            base_fingerprint="f",
            out_dir=folder,
            score=self.score,
            distance=lambda: self.num_scored / 100,
            on_progress=self.progress.append,
        )

    def score(self) -> Score:
        self.num_scored += 1
        return Score((1.0,) * self.num_scored + (0.0,) * (10 - self.num_scored))

    def step(self, number: int, **logs: float) -> None:
        state = SimpleNamespace(global_step=number)
        self.probe.on_step_end(None, state, None)
        if logs:
            self.probe.on_log(None, state, None, logs=logs)

    def set(self, weight: str, index: int, value: float) -> None:
        with torch.no_grad():
            self.model.get_parameter(weight).view(-1)[index] = value

    def patch(self, step: int) -> Patch:
        return Patch.open(self.folder / f"snapshots/step-{step:06d}" / PATCH_FILE)


@pytest.fixture
def bench(tiny_trial, tmp_path):
    return Bench(tiny_trial(num_steps=4, probe={"snapshots": [2]}), tmp_path)


def test_a_patch_at_each_snapshot(bench):
    bench.set("embed.weight", 7, 3.0)
    bench.step(1)
    assert not list(bench.folder.iterdir())
    bench.set("head.bias", 2, -0.0)
    bench.step(2)
    bench.step(3)
    bench.set("embed.weight", 7, 1.0)
    bench.step(4)
    assert sorted(p.name for p in (bench.folder / "snapshots").iterdir()) == [
        "step-000002", "step-000004",
    ]  # fmt: skip
    second, last = bench.patch(2), bench.patch(4)
    assert set(second.tensors) == {"embed.weight", "head.bias"}  # the tied head once
    assert second.base_fingerprint == "f"
    ones = np.full(15, 0x3F80, np.uint16)
    after = ones.copy()
    Changes(second, "embed.weight").apply(after, 0)
    assert (np.flatnonzero(after != ones).tolist(), after[7]) == ([7], 0x4040)
    twos = np.full(3, 0x4000, np.uint16)
    Changes(second, "head.bias").apply(twos, 0)
    assert twos.tolist() == [0x4000, 0x4000, 0x8000]
    assert [last.tensors[name].num_changed for name in ("embed.weight", "head.bias")] == [0, 1]
    assert bench.probe.patch_bytes == second.size_bytes + last.size_bytes
    assert bench.probe.finish() == {"num_untouched": 16, "num_cancelled": 1, "num_final": 1}


def test_ever_changed_keeps_what_came_back(bench):
    bench.set("embed.weight", 7, 3.0)
    bench.step(1)  # no snapshot sees it
    bench.set("embed.weight", 7, 1.0)
    bench.set("head.bias", 0, 5.0)
    for number in (2, 3, 4):
        bench.step(number)
    bench.probe.finish()
    masks = read_masks(bench.folder / EVER_CHANGED)
    assert masks.shapes == {"embed.weight": (3, 5), "head.bias": (3,)}
    assert np.flatnonzero(unpack(masks.packed("embed.weight"), 15)).tolist() == [7]
    assert np.flatnonzero(unpack(masks.packed("head.bias"), 3)).tolist() == [0]
    assert masks.base_fingerprint == "f"
    assert masks.metadata == {"kind": "ever_changed", "interval_steps": "1"}
    with safetensors.safe_open(bench.folder / EVER_CHANGED, "np") as other:  # open to others
        assert other.keys()


@pytest.mark.parametrize(
    ("precision", "num_changed"), [("bf16-mixed", 1), ("bf16-weights", 1), ("fp32", 2)]
)
def test_masters_are_rounded_to_what_is_stored(tiny_trial, tmp_path, precision, num_changed):
    bench = Bench(tiny_trial(precision=precision), tmp_path)
    bench.set("embed.weight", 0, 1 + 2**-9)  # under half the bf16 gap above 1
    bench.set("embed.weight", 1, 1 + 2**-8 + 2**-20)  # just over it
    bench.step(1)
    bench.step(2)
    assert bench.patch(2).num_changed == num_changed
    assert bench.patch(2).tensors["embed.weight"].dtype == (
        "fp32" if precision == "fp32" else "bf16"
    )


def test_a_model_that_is_not_what_its_files_hold_is_refused(tiny_trial, tmp_path):
    """Its patches would fit no base."""
    bench = Bench(tiny_trial(), tmp_path)
    bench.set("head.bias", 1, 7.0)
    given = {"trial_id": "t", "base_fingerprint": "f", "out_dir": tmp_path, "score": bench.score,
             "distance": float, "on_progress": print}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"other weights head\.bias than .*save_pretr"):
        Probe(bench.probe.config, bench.model, base=bench.probe.base, **given)
    bench.set("head.bias", 1, 2.0)
    del bench.probe.base.tensors["head.bias"]
    with pytest.raises(CheckpointError, match=r"other weights head\.bias"):
        Probe(bench.probe.config, bench.model, base=bench.probe.base, **given)


def test_scores_and_rows(bench):
    bench.probe.on_train_begin(None, SimpleNamespace(global_step=0), None)
    assert bench.probe.rows == {0: {"step": 0, "score": 0.1, "kl_base": 0.0}}
    for number in (1, 2, 3, 4):
        bench.step(number, loss=0.5, grad_norm=number / 2, learning_rate=1e-4, other=3.0)
    assert bench.num_scored == 3  # before, at the snapshot, at the end
    rows = bench.probe.rows
    assert {step: row.get("score") for step, row in rows.items()} == {
        0: 0.1, 1: None, 2: 0.2, 3: None, 4: 0.3,
    }  # fmt: skip
    assert [rows[step]["clipped_fraction"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert rows[3] == {
        "step": 3, "loss": 0.5, "grad_norm": 1.5, "learning_rate": 1e-4, "clipped_fraction": 1.0,
        "data_nll": 0.5, "update_sparsity_k1": 1.0, "ever_changed_fraction": 0.0,
    }  # fmt: skip
    assert bench.progress == [rows[step] for step in (1, 2, 3, 4)]
    bench.probe.on_log(None, SimpleNamespace(global_step=4), None, logs={"train_runtime": 1.0})
    assert len(bench.progress) == 4


def test_scores_of_snapshots_can_be_left_out(tiny_trial, tmp_path):
    probe = {"snapshots": [1], "score_snapshots": False}
    bench = Bench(tiny_trial("grpo", probe=probe, max_grad_norm=None), tmp_path)
    bench.step(1, loss=0.0, grad_norm=9.0, reward=0.25, kl=0.125, entropy=2.0, num_tokens=64.0)
    assert bench.num_scored == 0
    row = bench.probe.rows[1]
    assert (row["reward"], row["kl"], row["entropy"], row["num_tokens"]) == (0.25, 0.125, 2.0, 64.0)
    assert row["clipped_fraction"] == 0  # there is no clipping
    assert "data_nll" not in row
    bench.step(2)
    assert bench.num_scored == 1
    assert bench.patch(1).num_changed == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_trial(bench, loss):
    with pytest.raises(TrialError, match=r"loss is .* at step 1; lower train.learning_rate"):
        bench.step(1, loss=loss)
    assert bench.progress == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_ends_the_trial(bench, value):
    bench.set("head.bias", 1, value)
    with pytest.raises(TrialError, match=r"not finite after step 2; lower train.learning_rate"):
        bench.step(2)
    assert not list(bench.folder.iterdir())


def test_masters_that_what_is_stored_cannot_hold_end_the_trial(tiny_trial, tmp_path):
    """The greatest float is finite; rounded to bf16 it is not."""
    bench = Bench(tiny_trial(precision="bf16-mixed"), tmp_path)
    bench.set("head.bias", 1, torch.finfo(torch.float32).max)
    with pytest.raises(TrialError, match=r"not finite after step 1; lower train.learning_rate"):
        bench.step(1)
