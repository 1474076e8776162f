"""What a real trial notes of every step, against full copies of all weights at every step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import Base, Trained
from memory import Largest, held_bytes
from transformers import TrainerCallback

from rlsparse import masks, tables, trajectory
from rlsparse.algorithms import ALGORITHMS
from rlsparse.config import STORED_DTYPE, TrialConfig
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch
from rlsparse.tables import EVER_CHANGED, snapshot_folder, step_mask_file
from rlsparse.trajectory import (
    all_finite,
    all_finite_on_device,
    compare_bits,
    compare_on_device,
    count_bits,
    count_bits_on_device,
)

NUM_STEPS = 9
WINDOWS = (2, 4, 8)


class Recorder(TrainerCallback):
    """Keeps the bits of all weights, at the start and after every step."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.bits: list[dict[str, np.ndarray]] = []

    def record(self) -> None:
        kind = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[self.dtype]
        self.bits.append(
            {
                name: weight.detach().to(self.dtype, copy=True).view(kind).numpy()
                for name, weight in self.model.named_parameters()
            }
        )

    def on_train_begin(self, args, state, control, **_) -> None:
        self.record()

    def on_step_end(self, args, state, control, **_) -> None:
        assert state.global_step == len(self.bits)
        self.record()


@dataclass(frozen=True)
class Watched:
    """A trial, and the bits of all weights at each step of it."""

    trial: Trained
    steps: list[dict[str, np.ndarray]]

    def flat(self, step: int) -> np.ndarray:
        return np.concatenate([bits.ravel() for bits in self.steps[step].values()])

    @property
    def rows(self) -> list[dict]:
        return tables.read(self.trial.folder / "steps.parquet", "steps").to_pylist()


@pytest.fixture(scope="module")
def watch(run_trial) -> Callable[[TrialConfig, Base], Watched]:
    def run(config: TrialConfig, base: Base) -> Watched:
        name, recorders = config.algorithm.name, []
        dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        build = ALGORITHMS[name]

        def with_recorder(context):
            trainer = build(context)
            recorders.append(Recorder(context.model, dtype))
            trainer.add_callback(recorders[0])
            return trainer

        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(ALGORITHMS, name, with_recorder)
            trial = run_trial(config, base)
        return Watched(trial, recorders[0].bits)

    return run


@pytest.fixture(scope="module", params=list(STORED_DTYPE))
def watched(request, watch, tiny_trial, base, wide_base) -> Watched:
    """A trial whose weights come back, too; in fp32 also against a base on no bf16 grid."""
    precision = request.param
    probe = {"snapshots": [3, 6], "k_steps": list(WINDOWS), "step_masks": True}
    config = tiny_trial(
        num_steps=NUM_STEPS, precision=precision, learning_rate=1e-5, probe=probe,
        trainable_layers=[0, 2],
    )  # fmt: skip
    return watch(config, base if precision == "bf16" else wide_base)


def test_sparsity_of_every_step_and_window(watched):
    for row in watched.rows[1:]:
        step = row["step"]
        after = watched.flat(step)
        for k in (1, *WINDOWS):
            expected = None
            if step % k == 0:
                expected = 1 - np.count_nonzero(after != watched.flat(step - k)) / after.size
            assert row[f"update_sparsity_k{k}"] == expected
        assert row["update_sparsity_k16"] is None
    some = [row["update_sparsity_k1"] for row in watched.rows[1:]]
    assert 0 < min(some) < 1


def test_first_row_has_no_step_before_it(watched):
    first = watched.rows[0]
    assert first["step"] == 0
    assert first["update_sparsity_k1"] is first["ever_changed_fraction"] is None
    assert first["outside_final"] is None


def ever_changed(watched: Watched, last: int) -> np.ndarray:
    base = watched.flat(0)
    return np.any([watched.flat(step) != base for step in range(1, last + 1)], axis=0)


def test_ever_changed_after_every_step(watched):
    for row in watched.rows[1:]:
        assert row["ever_changed_fraction"] == ever_changed(watched, row["step"]).mean()


def test_split_into_untouched_cancelled_and_final(watched):
    ever = ever_changed(watched, NUM_STEPS)
    final = watched.flat(NUM_STEPS) != watched.flat(0)
    summary = watched.trial.summary
    assert summary["num_untouched"] == np.count_nonzero(~ever) > 0
    assert summary["num_cancelled"] == np.count_nonzero(ever & ~final)
    assert summary["num_final"] == np.count_nonzero(final) > 0


def test_masks_of_steps_and_what_of_them_is_outside_the_final_one(watched):
    final = watched.flat(NUM_STEPS) != watched.flat(0)
    for row in watched.rows[1:]:
        step = row["step"]
        file = tables.read(watched.trial.folder / step_mask_file(step), "masks").to_pylist()
        assert {(r["kind"], r["step"], r["trial_id"]) for r in file} == {
            ("step", step, watched.trial.summary["trial_id"])
        }
        found = np.concatenate(
            [masks.unpack(np.frombuffer(r["mask"], np.uint8), r["num_elements"]) for r in file]
        )
        expected = watched.flat(step) != watched.flat(step - 1)
        assert np.array_equal(found, expected)
        outside = np.count_nonzero(expected & ~final) / np.count_nonzero(expected)
        assert row["outside_final"] == pytest.approx(outside, rel=1e-12)


def test_files_are_those_of_a_probe_that_holds_the_base(watched, tmp_path):
    """Patches and the mask of what ever changed, made again of the copies: equal byte for byte."""
    trial = watched.trial
    dtype = trial.config.stored_dtype
    unsigned = np.uint32 if dtype == "fp32" else np.uint16
    for step in (3, 6, NUM_STEPS):
        before, after = watched.steps[0], watched.steps[step]
        pairs = (
            TensorPair(
                name, dtype, bits.shape, bits.ravel().view(unsigned),
                after[name].ravel().view(unsigned),
            )
            for name, bits in before.items()
        )  # fmt: skip
        expected = tmp_path / f"{step}.patch.safetensors"
        write_patch(expected, pairs, base_fingerprint=trial.base.fingerprint)
        found = trial.folder / snapshot_folder(step) / PATCH_FILE
        assert found.read_bytes() == expected.read_bytes()
    ever = {
        name: np.any([step[name] != bits for step in watched.steps], axis=0)
        for name, bits in watched.steps[0].items()
    }
    expected = tmp_path / EVER_CHANGED
    masks.write_masks(
        expected,
        {name: (mask.shape, masks.pack(mask)) for name, mask in ever.items()},
        base_fingerprint=trial.base.fingerprint,
        metadata={"kind": "ever_changed", "interval_steps": "1"},
    )
    assert (trial.folder / EVER_CHANGED).read_bytes() == expected.read_bytes()


def test_some_weights_came_back(watch, tiny_trial, base):
    """Else nothing above tells untouched from cancelled."""
    found = watch(tiny_trial(num_steps=6, precision="bf16-mixed", learning_rate=1e-5), base)
    final = found.flat(6) != found.flat(0)
    cancelled = np.count_nonzero(ever_changed(found, 6) & ~final)
    assert found.trial.summary["num_cancelled"] == cancelled > 0
    assert not (found.trial.folder / step_mask_file(1)).exists()
    assert all(row["outside_final"] is None for row in found.rows)


@pytest.mark.parametrize("code", ["of the CPU", "torch alone"])
def test_pieces_of_a_tensor_add_up(monkeypatch, code):
    """In the code for GPUs, too, run on the CPU."""
    monkeypatch.setattr(trajectory, "_CPU_PIECE", 128)
    if code == "torch alone":
        monkeypatch.setattr(trajectory, "compare_bits", compare_on_device)
        monkeypatch.setattr(trajectory, "count_bits", count_bits_on_device)
        monkeypatch.setattr(trajectory, "all_finite", all_finite_on_device)
    model = torch.nn.Linear(101, 7)
    followed = trajectory.Trajectory(model, torch.float32, [2])
    before = model.weight.detach().numpy().ravel().copy()
    generator = torch.Generator().manual_seed(0)
    ever = np.zeros(before.size, bool)
    for step in (1, 2):
        with torch.no_grad():
            model.weight += torch.rand(model.weight.shape, generator=generator) < 0.3
        given = {}
        changes = followed.advance(step, lambda name, mask, given=given: given.update({name: mask}))
        now = model.weight.detach().numpy().ravel().copy()
        ever |= now != before
        found = masks.unpack(given["weight"], before.size)
        if step == 1:
            assert np.array_equal(found, now != before)
            first = now
    assert np.array_equal(found, now != first)
    assert changes.num_changed == {
        1: np.count_nonzero(now != first), 2: np.count_nonzero(now != before)
    }  # fmt: skip
    assert changes.num_ever_changed == np.count_nonzero(ever)
    assert np.array_equal(masks.unpack(dict(followed.ever_changed())["weight"], ever.size), ever)
    assert followed.num_elements == before.size + 7
    assert changes.is_finite is True
    now[-1] = math.inf
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(now).view_as(model.weight))
    assert followed.advance(3).is_finite is False


@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 1000])
@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_bits_are_compared_alike_everywhere(size, kind):
    generator = torch.Generator().manual_seed(size)
    before = torch.randint(-(2**15), 2**15, (size,), generator=generator).to(kind)
    changed = torch.rand(size, generator=generator) < 0.4
    after = torch.where(changed, before ^ (-(2**15)), before)  # the sign, for -0 and +0
    expected = np.packbits(changed.numpy(), bitorder="little")
    for compare in (compare_bits, compare_on_device):
        words = torch.full((-(-size // 64),), -1)
        assert int(compare(before, after, words)) == int(changed.sum())
        packed = words.numpy().view(np.uint8)
        assert np.array_equal(packed[: expected.size], expected)
        assert not packed[expected.size :].any()


def test_bits_are_counted_alike_everywhere():
    words = torch.randint(-(2**63), 2**63 - 1, (999,), generator=torch.Generator().manual_seed(0))
    words[0], words[1] = -1, 0
    expected = sum((int(word) % 2**64).bit_count() for word in words)
    assert int(count_bits(words)) == int(count_bits_on_device(words)) == expected


@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        (torch.bfloat16, torch.arange(-(2**15), 2**15)),
        (torch.float32, torch.arange(-(2**31), 2**31, 65537 * 101)),
    ],
)
def test_what_is_finite_everywhere(kind, codes):
    """Of bf16 every code, of fp32 some of all kinds, each beside a finite weight."""
    integers = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[kind]
    codes = codes.to(integers)
    expected = torch.isfinite(codes.view(kind))
    assert 0 < expected.sum() < expected.numel()
    for code, is_finite in list(zip(codes, expected.tolist(), strict=True))[::7]:
        bits = torch.stack([torch.zeros_like(code), code])
        assert all_finite(bits) == bool(all_finite_on_device(bits)) == is_finite
    assert all_finite(codes[expected])
    assert bool(all_finite_on_device(codes[expected]))


@pytest.mark.parametrize("windows", [(), (2, 8)])
def test_memory_is_a_copy_and_a_bit_per_weight(monkeypatch, windows):
    """In the stored format, of fp32 masters; beyond it a piece, and the bits of a tensor."""
    monkeypatch.setattr(trajectory, "_CPU_PIECE", 1024)
    model = torch.nn.Linear(300, 200)
    followed = trajectory.Trajectory(model, torch.bfloat16, windows)
    size = 300 * 200 + 200
    copies = 2 * size * (1 + len(windows))
    assert copies + size / 8 <= held_bytes(followed) <= copies + size / 8 + 16
    for step in (1, 2):
        with torch.no_grad():
            model.weight += 1
        with Largest() as largest:
            followed.advance(step)
        assert 0 < largest.num_bytes <= max(4 * 1024, size / 8 + 8)
    assert held_bytes(followed) <= copies + size / 8 + 16
