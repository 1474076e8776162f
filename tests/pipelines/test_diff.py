"""The distributed diff gives the tables of the serial one, once, whatever is run again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from command import StudyRun
from safetensors.torch import load_file

from pipelines import diff
from pipelines.plan import load_base, make_plan
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.deltas import base_rows, mask_rows, measure_patch
from rlsparse.diff import diff_checkpoints
from rlsparse.masks import read_masks
from rlsparse.models import TINY
from rlsparse.patch import PATCH_FILE, Patch, TensorPair, write_patch


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return Checkpoint.open(load_base(ModelConfig()).path)


def test_deltas_and_masks_equal_the_serial_reference(study_run: StudyRun, base: Checkpoint) -> None:
    expected: dict[str, list[dict[str, object]]] = {"tensor_deltas": [], "masks": []}
    fingerprint = load_base(ModelConfig()).fingerprint
    trials = sorted(study_run.plan.trials, key=lambda trial: trial.trial_id)
    for trial in trials:
        folder = study_run.folder / "trials" / trial.trial_id
        for step in (1, 2):
            deltas, masks = measure_patch(
                base,
                Patch.open(folder / f"snapshots/step-{step:06d}/weights.patch.safetensors"),
                base_fingerprint=fingerprint,
                trial_id=trial.trial_id,
                step=step,
                views=["stored"],
                kind="snapshot",
            )
            expected["tensor_deltas"] += deltas
            expected["masks"] += masks
        ever = read_masks(folder / "ever_changed.mask.safetensors")
        expected["masks"] += mask_rows(
            base, ever, trial_id=trial.trial_id, step=2, kind="ever_changed"
        )
    for name, rows in expected.items():
        found = tables.read(study_run.folder / "tables" / f"{name}.parquet", name)
        assert found.equals(tables.from_rows(rows, name)), name


def test_base_tensors_equal_the_serial_reference(study_run: StudyRun, base: Checkpoint) -> None:
    found = tables.read(study_run.folder / "tables" / "base_tensors.parquet", "base_tensors")
    assert found.equals(tables.from_rows(base_rows(base), "base_tensors"))


def test_deltas_add_up_to_what_diff_says_of_the_checkpoint(study_run: StudyRun) -> None:
    trial = study_run.trial("dpo s1")
    said = diff_checkpoints(TINY, study_run.trial_folder("dpo s1") / "checkpoint").to_json()
    file = study_run.folder / "tables" / "tensor_deltas.parquet" / f"{trial.trial_id}.parquet"
    rows = [row for row in tables.read(file, "tensor_deltas").to_pylist() if row["step_after"] == 2]
    assert sum(row["num_elements"] for row in rows) == said["num_elements"]
    for definition, sparsity in said["sparsity"].items():
        changed = sum(row[f"num_changed_{definition}"] for row in rows)
        assert sparsity == 1 - changed / said["num_elements"]


def test_done_parts_are_not_pending(study_run: StudyRun) -> None:
    assert diff.pending(study_run.plan) == []


def test_only_parts_with_other_inputs_are_pending(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    assert diff.pending(plan) == [], "a study that was moved is not diffed again"

    trial = plan.trials[0].trial_id
    (study_copy.folder / "stages" / "diff" / f"{trial}.json").unlink()
    (item,) = diff.pending(plan)
    assert item["part"] == trial

    other = plan.trials[1].trial_id
    (study_copy.folder / "tables" / "masks.parquet" / f"{other}.parquet").unlink()
    assert {item["part"] for item in diff.pending(plan)} == {trial, other}

    more = plan.study.model_copy(update={"views": ("fp16",)})
    of_views = diff.pending(make_plan(more, str(study_copy.storage)))
    assert {item["part"] for item in of_views} == {t.trial_id for t in plan.trials}


def test_a_task_run_twice_changes_nothing(study_copy: StudyRun) -> None:
    part = study_copy.plan.trials[0].trial_id
    files = [study_copy.folder / "tables" / f"{n}.parquet" / f"{part}.parquet"
             for n in ("tensor_deltas", "masks")]  # fmt: skip
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    (item,) = diff.pending(study_copy.plan)
    for _ in range(2):
        diff.measure(item)
        assert [file.read_bytes() for file in files] == before
    assert part not in {item["part"] for item in diff.pending(study_copy.plan)}


def test_parts_of_trials_that_left_the_study_are_deleted(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    fewer = dataclasses.replace(plan, trials=plan.trials[1:])
    gone = [f"tables/{name}.parquet/{plan.trials[0].trial_id}.parquet"
            for name in ("tensor_deltas", "masks")]  # fmt: skip
    assert all(map(plan.storage.exists, gone))
    diff._drop_stale(fewer)
    assert not any(map(plan.storage.exists, gone))
    assert diff.pending(fewer) == []


# --- spectra ---------------------------------------------------------------------------------


def test_spectra_are_of_last_snapshots_of_all_but_controls(study_copy: StudyRun) -> None:
    assert not (study_copy.folder / "tables" / "spectra.parquet").exists()
    wanted = study_copy.plan.study.model_copy(update={"spectrum": "exact"})
    plan = make_plan(wanted, str(study_copy.storage))
    items = diff.pending(plan)
    real = [trial.trial_id for trial in plan.trials if trial.role != "control"]
    assert [item["part"] for item in items] == real
    trial = study_copy.trial("dpo s1")
    (item,) = (item for item in items if item["part"] == trial.trial_id)
    diff.measure(item)
    assert trial.trial_id not in {item["part"] for item in diff.pending(plan)}
    file = study_copy.folder / "tables" / "spectra.parquet" / f"{trial.trial_id}.parquet"
    before = file.read_bytes()
    rows = tables.read(file, "spectra").to_pylist()
    assert {row["kind"] for row in rows} == {"update", "null"}

    sides = [load_file(folder / "model.safetensors")
             for folder in (TINY, study_copy.trial_folder("dpo s1") / "checkpoint")]  # fmt: skip
    matrices = {name for name, tensor in sides[0].items() if tensor.ndim == 2}
    updates = {row["tensor"]: row for row in rows if row["kind"] == "update"}
    assert updates.keys() == matrices
    for name, row in updates.items():
        old, new = (side[name].double().numpy() for side in sides)
        sigma = np.linalg.svd(new - old, compute_uv=False)
        assert row["sigma_max"] == pytest.approx(sigma[0], rel=1e-9, abs=1e-15)
        assert row["rank_1e-04"] == np.sum(sigma > 1e-4 * sigma[0])
        assert (row["trial_id"], row["step_before"], row["step_after"], row["view"]) == (
            trial.trial_id, 0, 2, "stored"
        )  # fmt: skip
    file.unlink()
    diff.measure(item)
    assert file.read_bytes() == before, "the null is of a fixed seed"


def test_spectra_of_a_patch_in_another_format_are_measured_in_that(tmp_path: Path) -> None:
    """A patch of the regime fp32 is against the base cast to fp32, exactly."""
    base = Checkpoint.open(load_base(ModelConfig()).path)
    name, rng = "model.layers.0.self_attn.q_proj.weight", np.random.default_rng(0)
    before = base.tensors[name]
    values = (before.read(0, before.num_elements).astype(np.uint32) << 16).view(np.float32)
    after = values + rng.normal(size=values.size).astype(np.float32) * 1e-7
    folder = tmp_path / tables.snapshot_folder(3)
    folder.mkdir(parents=True)
    pair = TensorPair(name, "fp32", before.shape, values.view(np.uint32), after.view(np.uint32))
    write_patch(folder / PATCH_FILE, [pair], base_fingerprint="b")
    item = {"trial_id": "t", "steps": [1, 3], "spectrum": "exact"}
    rows = diff.measure_spectra(base, tmp_path, item).to_pylist()
    (row,) = (row for row in rows if row["tensor"] == name and row["kind"] == "update")
    delta = (after.astype(np.float64) - values).reshape(before.shape)
    sigma = np.linalg.svd(delta, compute_uv=False)
    assert row["sigma_max"] == pytest.approx(sigma[0], rel=1e-9, abs=0)
    assert row["num_changed"] == np.count_nonzero(delta)
    assert (row["view"], row["dtype"], row["step_after"]) == ("stored", "fp32", 3)
    others = [row for row in rows if row["tensor"] != name]
    assert others
    assert {row["num_changed"] for row in others} == {0}


@pytest.mark.slow
def test_a_damaged_patch_is_one_line_that_names_trial_and_remedy(study_copy: StudyRun) -> None:
    trial = study_copy.plan.trials[0].trial_id
    (study_copy.folder / "tables" / "masks.parquet" / f"{trial}.parquet").unlink()
    patch = study_copy.folder / "trials" / trial / tables.snapshot_folder(2) / PATCH_FILE
    content = bytearray(patch.read_bytes())
    content[-1] ^= 1
    patch.write_bytes(content)
    result = study_copy.command.run("run", study_copy.yaml, "--storage", study_copy.storage)
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()
    assert line.startswith(f"rlsparse: trial {trial}: ")
    assert "another checksum; delete " in line
    assert "Traceback" not in result.stderr
