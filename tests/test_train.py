"""One trial: its patches are its weights, its bits depend on nothing else, its files are whole."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from rlsparse import masks, tables
from rlsparse.algorithms import ALGORITHMS
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import STORED_DTYPE
from rlsparse.definitions import STEP_WINDOWS, VIEWS
from rlsparse.deltas import base_rows, measure_patch
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import PatchError, TrialError
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.patch import Changes, Patch, TensorPair, apply_patch, verify_patch, write_patch
from rlsparse.tasks import load_task
from rlsparse.tasks.generate import Score, complete, kl_divergence
from rlsparse.train import environment

TORCH_FORMATS = {"bf16": (torch.bfloat16, torch.int16), "fp32": (torch.float32, torch.int32)}


def stored_bits(folder: Path, dtype: str) -> dict[str, np.ndarray]:
    """Bits of all tensors cast to ``dtype``, read and cast by safetensors and torch."""
    number, integer = TORCH_FORMATS[dtype]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return {name: t.to(number).view(integer).numpy().ravel() for name, t in tensors.items()}


# --- the patch is what training did ----------------------------------------------------------


@pytest.mark.parametrize("precision", list(STORED_DTYPE))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_patch_applied_to_the_base_is_the_trained_model(
    trained, tiny_trial, base, tmp_path, name, precision
):
    trial = trained(tiny_trial(name, precision=precision, keep_checkpoints=True), base)
    kept, dtype = trial.folder / "checkpoint", trial.config.stored_dtype
    apply_patch(base.path, trial.patch(), tmp_path / "out")
    raw = [
        {key: (t.dtype, t.shape, t.numpy(force=True).tobytes() if t.dtype != torch.bfloat16
               else t.view(torch.int16).numpy().tobytes())
         for key, t in safetensors.torch.load_file(folder / "model.safetensors").items()}
        for folder in (tmp_path / "out", kept)
    ]  # fmt: skip
    assert raw[0] == raw[1]
    before, after = stored_bits(base.path, dtype), stored_bits(kept, dtype)
    count = sum(int((before[key] != after[key]).sum()) for key in before)
    assert 0 < count == Patch.open(trial.patch()).num_changed
    diff = diff_checkpoints(base.path, kept, casts=[dtype])
    rows = [row for row in diff.tables["tensor_deltas"] if row["view"] == diff.views[0]]
    assert sum(row["num_changed_bitwise"] for row in rows) == count
    assert diff.sparsity["bitwise"] == 1 - count / sum(bits.size for bits in before.values())


@pytest.mark.parametrize("precision", list(STORED_DTYPE))
def test_a_base_in_a_wider_format_is_rounded_first(
    trained, tiny_trial, wide_base, tmp_path, precision
):
    trial = trained(tiny_trial("sft", precision=precision, keep_checkpoints=True), wide_base)
    kept, dtype = trial.folder / "checkpoint", trial.config.stored_dtype
    patch, stored = Patch.open(trial.patch()), Checkpoint.open(wide_base.path)
    verify_patch(stored, patch)
    apply_patch(wide_base.path, trial.patch(), tmp_path / "out")
    after, again = stored_bits(kept, dtype), stored_bits(tmp_path / "out", dtype)
    assert {t.dtype for t in Checkpoint.open(tmp_path / "out").tensors.values()} == {dtype}
    before = stored_bits(wide_base.path, dtype)
    count = {key: int((before[key] != after[key]).sum()) for key in before}
    assert all(np.array_equal(after[key], again[key]) for key in after)
    assert 0 < patch.num_changed == sum(count.values())
    if dtype == "bf16":  # unrounded, nearly every weight would differ
        assert patch.num_changed < 0.9 * sum(bits.size for bits in after.values())
    deltas, found = measure_patch(
        stored, patch, base_fingerprint=wide_base.fingerprint, trial_id="t", step=2,
        views=["stored", "bf16"], kind="final",
    )  # fmt: skip
    assert {
        row["tensor"]: row["num_changed_bitwise"] for row in deltas if row["view"] == "stored"
    } == count
    masks_of = {row["tensor"]: row["mask"] for row in found if row["view"] == "stored"}
    for key in before:
        assert masks_of[key] == masks.pack(before[key] != after[key]).tobytes()
    # The bins are those of the base as it is stored, so that they divide by those of base_tensors.
    whole = {row["tensor"]: row["magnitude_histogram"] for row in base_rows(stored)}
    for row in deltas:
        binned = np.array(row["magnitude_histogram_changed"])
        assert binned.sum() == row["num_changed_bitwise"]
        assert (binned <= whole[row["tensor"]]).all()


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_patches_against_a_rounded_base(tmp_path, stored):
    """Without training: bf16 patches over a base that is stored otherwise."""
    rng = np.random.default_rng(0)
    number = {"fp32": np.float32, "fp16": np.float16}[stored]
    weights = (rng.standard_normal((64, 9)) * 0.02).astype(number)
    (tmp_path / "base").mkdir()
    tensor = torch.from_numpy(weights)
    safetensors.torch.save_file({"w": tensor}, tmp_path / "base" / "model.safetensors")
    before = weights.ravel().astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    changed = rng.random(before.size) < 0.1
    after = np.where(changed, before ^ 1, before).astype(np.uint16)
    base = Checkpoint.open(tmp_path / "base")
    patch = write_patch(
        tmp_path / "p",
        [TensorPair("w", "bf16", weights.shape, before, after)],
        base_fingerprint=fingerprint(base),
    )
    apply_patch(tmp_path / "base", patch.path, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.tensors["w"].dtype == "bf16"
    assert np.array_equal(out.read_bits("w"), after)
    (row,), _ = measure_patch(
        base, patch, base_fingerprint=fingerprint(base), trial_id="t", step=1, views=["stored"],
        kind="final",
    )  # fmt: skip
    assert row["num_changed_bitwise"] == changed.sum()
    integers = {"w": torch.zeros(64, 9, dtype=torch.int16)}
    safetensors.torch.save_file(integers, tmp_path / "base" / "model.safetensors")
    with pytest.raises(PatchError, match="tensor w is i16"):
        verify_patch(Checkpoint.open(tmp_path / "base"), patch)


# --- determinism -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tiny_trial):
    return {
        name: tiny_trial(name, precision="bf16-mixed", keep_checkpoints=True) for name in ALGORITHMS
    }


def test_a_reused_process_gives_the_same_bits(run_trial, trained, tiny_trial, base, mixed):
    """Other algorithms, precisions and seeds run in between."""
    first = {name: trained(mixed[name], base) for name in ALGORITHMS}
    run_trial(tiny_trial("grpo", precision="fp32", num_steps=1, seed=9), base)
    for name in reversed(ALGORITHMS):
        again = run_trial(mixed[name], base)
        assert again.patch().read_bytes() == first[name].patch().read_bytes()
        for file in (tables.EVER_CHANGED, "steps.parquet", "config.json"):
            assert (again.folder / file).read_bytes() == (first[name].folder / file).read_bytes()


def test_a_fresh_process_gives_the_same_bits(trained, base, mixed, tmp_path):
    code = """
import sys
from pathlib import Path
from rlsparse.config import TrialConfig
from rlsparse.train import train_trial
config, base, fingerprint, out = sys.argv[1:]
train_trial(TrialConfig.model_validate_json(config), trial_id="0123456789ab", base_dir=Path(base),
            base_fingerprint=fingerprint, out_dir=Path(out))
"""
    first = trained(mixed["grpo"], base)
    subprocess.run(
        [sys.executable, "-c", code, mixed["grpo"].model_dump_json(), str(base.path),
         base.fingerprint, str(tmp_path)],
        check=True, capture_output=True,
    )  # fmt: skip
    fresh = tmp_path / first.patch().relative_to(first.folder)
    assert fresh.read_bytes() == first.patch().read_bytes()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_another_seed_gives_other_bits(run_trial, trained, base, mixed, name):
    other = run_trial(mixed[name].model_copy(update={"seed": 1}), base)
    assert other.patch().read_bytes() != trained(mixed[name], base).patch().read_bytes()


@pytest.fixture(scope="module")
def watched(trained, tiny_trial, base):
    """A trial with a snapshot after every step, all scored."""
    probe = {"snapshots": [1, 2, 3]}
    return trained(tiny_trial("grpo", num_steps=4, probe=probe, learning_rate=3e-4), base)


def test_watching_changes_nothing(watched, trained, tiny_trial, base):
    alone = trained(tiny_trial("grpo", num_steps=4, learning_rate=3e-4), base)
    unscored = {"snapshots": [2], "score_snapshots": False}
    half = trained(tiny_trial("grpo", num_steps=4, learning_rate=3e-4, probe=unscored), base)
    for other in (alone, half):
        assert other.patch().read_bytes() == watched.patch().read_bytes()
        ever = tables.EVER_CHANGED
        assert (other.folder / ever).read_bytes() == (watched.folder / ever).read_bytes()


def test_ever_changed_is_the_union_over_all_steps(watched, base):
    before = {key: bits.view(np.uint16) for key, bits in stored_bits(base.path, "bf16").items()}
    ever = masks.read_masks(watched.folder / tables.EVER_CHANGED)
    assert set(ever.shapes) == set(before)
    num_final = num_ever = 0
    for key, bits in before.items():
        union = np.zeros(bits.size, bool)
        for step in (1, 2, 3, 4):
            patch = Patch.open(watched.patch(step))
            after = bits.copy()
            Changes(patch, key).apply(after, 0)
            union |= after != bits
        assert np.array_equal(masks.unpack(ever.packed(key), bits.size), union)
        num_final += patch.tensors[key].num_changed
        num_ever += int(union.sum())
    assert num_ever > num_final > 0  # some weights came back


# --- what can go wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_divergence_ends_the_trial(run_trial, tiny_trial, base, name):
    config = tiny_trial(
        name, optimizer="sgd", learning_rate=1e29, max_grad_norm=None, num_steps=4, batch_size=16
    )
    with pytest.raises(TrialError, match=r"(finite|loss is) .*lower train.learning_rate"):
        run_trial(config, base)


def test_completions_too_short_for_any_solution(run_trial, tiny_trial, base):
    config = tiny_trial("sft", task={"max_completion_tokens": 2})
    with pytest.raises(TrialError, match=r"is 2, but the shortest train .* takes 3 tokens"):
        run_trial(config, base)
    run_trial(tiny_trial("sft", num_steps=1, task={"max_completion_tokens": 3}), base)


@pytest.mark.parametrize("name", ["sft", "rft", "dpo"])
def test_the_loss_of_supervised_training_is_the_nll_of_its_data(trained, tiny_trial, base, name):
    rows = tables.read(trained(tiny_trial(name), base).folder / "steps.parquet", "steps")
    losses = rows["loss"].to_pylist()
    assert rows["data_nll"].to_pylist() == (losses if name != "dpo" else [None] * 3)


def test_only_a_kl_to_the_base_is_called_kl(trained, tiny_trial, base):
    """KTO logs the log-ratio of mismatched completions under this name."""
    rows = tables.read(trained(tiny_trial("kto"), base).folder / "steps.parquet", "steps")
    assert rows["kl"].null_count == rows.num_rows == 3


@pytest.mark.parametrize("precision", list(STORED_DTYPE))
def test_a_model_that_is_the_base_has_no_distance_to_it(trained, tiny_trial, base, precision):
    config = tiny_trial("sft", precision=precision, learning_rate=0.0)
    assert trained(config, base).summary["kl_final"] == 0


def test_the_distance_along_training_is_that_of_the_snapshots(trained, tiny_trial, base, tmp_path):
    probe = {"snapshots": [1, 2]}
    config = tiny_trial("grpo", num_steps=3, precision="fp32", learning_rate=1e-3, probe=probe)
    trial = trained(config, base)
    rows = tables.read(trial.folder / "steps.parquet", "steps").to_pylist()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["kl_base"] == 0
    assert rows[3]["kl_base"] == trial.summary["kl_final"]
    tokenizer, model = load_tokenizer(base.path), load_model(base.path, "fp32").eval()
    prompts = [problem.prompt for problem in load_task(config.task).problems("test", 16)]
    for step in (1, 2, 3):
        name = f"snapshots/step-{step:06d}/weights.patch.safetensors"
        apply_patch(base.path, trial.folder / name, tmp_path / str(step))
        torch.manual_seed(config.sampling_seed)
        distance = kl_divergence(
            load_model(tmp_path / str(step), "fp32").eval(),
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.task.max_completion_tokens,
        )
        assert rows[step]["kl_base"] == pytest.approx(distance, rel=1e-5, abs=0)
    assert rows[1]["kl_base"] < rows[3]["kl_base"]


# --- the files -------------------------------------------------------------------------------


def test_files(watched):
    snapshots = {f"snapshots/step-00000{step}/weights.patch.safetensors" for step in (1, 2, 3, 4)}
    files = {str(p.relative_to(watched.folder)) for p in watched.folder.rglob("*") if p.is_file()}
    names = {"config.json", "steps.parquet", "eval.parquet", "summary.json", tables.EVER_CHANGED}
    assert files == names | snapshots
    assert {p.name for p in watched.folder.iterdir()} == names | {"snapshots"}
    text = (watched.folder / "config.json").read_text()
    assert type(watched.config).model_validate_json(text) == watched.config


def test_steps_table(watched):
    table = tables.read(watched.folder / "steps.parquet", "steps")
    assert table.column_names == tables.SCHEMAS["steps"].names
    rows = table.to_pylist()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {row["trial_id"] for row in rows} == {"0123456789ab"}
    assert all(row["score"] is not None for row in rows)
    assert {key for key, value in rows[0].items() if value is not None} == {
        "trial_id", "step", "score", "kl_base",
    }  # fmt: skip
    for row in rows[1:]:
        present = {key for key, value in row.items() if value is not None}
        asked = {
            "outside_final", "gradient_nonzero_fraction", "update_below_half_ulp",
            "half_ulp_precision", "half_ulp_recall",
            *(f"update_sparsity_k{k}" for k in STEP_WINDOWS[1:]),
            *(f"changed_fraction_{view}" for view in VIEWS[1:]),
        }  # fmt: skip
        assert present == set(table.column_names) - {"data_nll", *asked}
        assert row["learning_rate"] == 3e-4
        assert row["clipped_fraction"] == (row["grad_norm"] > 1.0)
        assert 0 <= row["reward"] <= 1
    tokens = [row["num_tokens"] for row in rows[1:]]
    assert tokens == sorted(set(tokens))
    assert tokens[0] > 0
    logged = [{k: v for k, v in row.items() if v is not None and k != "trial_id"} for row in rows]
    assert watched.progress == logged[1:]


def test_scores_only_at_snapshots(trained, tiny_trial, base):
    trial = trained(tiny_trial("grpo", num_steps=4, learning_rate=3e-4), base)
    rows = tables.read(trial.folder / "steps.parquet", "steps").to_pylist()
    assert [row["step"] for row in rows if row["score"] is not None] == [0, 4]


def test_the_error_of_a_gain_is_that_of_paired_grades():
    before, after = Score((0.0, 0.0, 1.0, 1.0)), Score((1.0, 1.0, 1.0, 0.0))
    assert after.gain_se(before) == pytest.approx((11 / 12) ** 0.5 / 2, rel=1e-12)
    assert after.gain_se(after) == 0
    assert Score((1.0,)).gain_se(Score((0.0,))) is None


@pytest.mark.parametrize("precision", list(STORED_DTYPE))
def test_summary(trained, tiny_trial, base, precision):
    trial = trained(tiny_trial("grpo", precision=precision, keep_checkpoints=True), base)
    summary = trial.summary
    task = load_task(trial.config.task)
    problems = task.problems("test", 16)
    tokenizer = load_tokenizer(base.path)
    stored = "fp32" if precision == "fp32" else "bf16"

    def grades(folder: Path) -> np.ndarray:
        texts = complete(
            load_model(folder, stored), tokenizer, [p.prompt for p in problems],
            max_new_tokens=task.max_completion_tokens,
        )  # fmt: skip
        return np.array([task.grade(t, p.answer) for t, p in zip(texts, problems, strict=True)])

    before = grades(base.path)
    assert summary["score_base"] == before.mean()
    if precision != "bf16-mixed":  # there autocast differs from bf16 weights
        assert summary["score_before"] == before.mean()
        after = grades(trial.folder / "checkpoint")
        assert summary["score_after"] == after.mean()
        error = np.std(after - before, ddof=1) / np.sqrt(16)
        assert summary["score_gain_se"] == pytest.approx(error, rel=1e-12)
    scored = tables.read(trial.folder / "eval.parquet", "eval").to_pylist()
    assert [row["gain_se"] for row in scored] == [None, summary["score_gain_se"]]
    weights = safetensors.torch.load_file(base.path / "model.safetensors").values()
    median = np.median(np.abs(np.concatenate([w.float().numpy().ravel() for w in weights])))
    assert summary["gate_ratio"] == pytest.approx(256 * 1e-4 / median, rel=1e-3)
    rows = tables.read(trial.folder / "steps.parquet", "steps").to_pylist()
    assert summary["num_clipped_steps"] == sum(row["grad_norm"] > 1 for row in rows[1:])
    assert summary["patch_bytes"] == trial.patch().stat().st_size
    assert (summary["trial_id"], summary["num_eval_problems"]) == ("0123456789ab", 16)
    assert 0 < summary["kl_final"] < 0.1
    assert summary["cpu_s"] > 0
    assert 0 < summary["wall_s"] < 600
    assert summary["peak_bytes"] > 1e6
    assert json.loads((trial.folder / "summary.json").read_text()) == summary
    assert set(summary) < {*tables.SCHEMAS["trials"].names}


def test_environment_names_versions_and_hardware():
    found = environment()
    assert {"python", "torch", "transformers", "trl", "rlsparse", "device", "cpu"} <= set(found)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(isinstance(value, str) and value for value in found.values())
