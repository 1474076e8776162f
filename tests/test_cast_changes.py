"""What differs after casts, against torch's casts of full copies of the masters."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rlsparse import cast_changes as module
from rlsparse import tables
from rlsparse.algorithms import ALGORITHMS
from rlsparse.cast_changes import cast_changes

FORMATS = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}  # fmt: skip


class Masters(TrainerCallback):
    """Copies of all weights as they are trained, before training and after each step."""

    def __init__(self, model) -> None:
        self.model = model
        self.copies: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, **_) -> None:
        weights = [weight.detach().flatten() for weight in self.model.parameters()]
        self.copies.append(torch.cat(weights).clone())

    on_step_end = on_train_begin


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp32", "bf16"])
def test_share_that_changed_in_every_format(precision, run_trial, tiny_trial, wide_base, base):
    """A base on no bf16 grid, where there are masters: they start from it as it is rounded."""
    watched = []

    def with_copies(context, build=ALGORITHMS["sft"]):
        trainer = build(context)
        watched.append(Masters(context.model))
        trainer.add_callback(watched[0])
        return trainer

    config = tiny_trial(
        num_steps=3, precision=precision, learning_rate=3e-5,
        probe={"snapshots": [1], "casts": True, "score_snapshots": False},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ALGORITHMS, "sft", with_copies)
        trial = run_trial(config, base if precision == "bf16" else wide_base)
    before, *after = watched[0].copies
    for row in tables.read(trial.folder / "steps.parquet", "steps").to_pylist():
        found = {name: row[f"changed_fraction_{name}"] for name in FORMATS}
        if row["step"] not in (1, 3):
            assert set(found.values()) == {None}
            continue
        for name, kind in FORMATS.items():
            one, other = (w.to(kind).view(torch.uint8) for w in (before, after[row["step"] - 1]))
            differs = (one != other).view(before.numel(), -1).any(-1)
            assert found[name] == differs.double().mean().item()
        if precision == "bf16":
            assert found["fp32"] == found["bf16"]
        else:
            assert found["fp8_e4m3"] < found["bf16"] < found["fp16"] < found["fp32"]


def test_pieces_add_up_and_numbers_beyond_a_format(monkeypatch):
    """fp8_e4m3 ends at 448, fp16 at 65504: beyond, all are one NaN, or one infinity."""
    monkeypatch.setattr(module, "_PIECE", 2)
    values = np.array([1.0, 300.0, 500.0, 7e4, 0.0], np.float32)
    moved = np.array([1.0 + 2**-9, 500.0, 600.0, 8e4, -0.0], np.float32)
    found = cast_changes([(values.view(np.uint32), moved.view(np.uint32))] * 2, "fp32", "fp32")
    assert found == {"fp32": 10, "bf16": 8, "fp16": 8, "fp8_e4m3": 4}
