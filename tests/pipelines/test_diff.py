"""The distributed diff gives the tables of the serial one, once, whatever is run again."""

from pathlib import Path

import pyarrow as pa
import pytest
from command import StudyRun

from pipelines import diff
from pipelines.plan import load_base, make_plan
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.deltas import base_rows, mask_rows, measure_patch
from rlsparse.diff import diff_checkpoints
from rlsparse.masks import read_masks
from rlsparse.models import TINY
from rlsparse.patch import PATCH_FILE, Patch


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


def test_parts_of_trials_that_left_the_study_are_not_read(study_copy: StudyRun) -> None:
    kept = study_copy.plan.trials[0].trial_id
    read = diff.read_parts(study_copy.plan.storage, "tensor_deltas", [kept])
    assert set(read["trial_id"].to_pylist()) == {kept}
    assert diff.read_parts(study_copy.plan.storage, "masks", []).num_rows == 0


def test_a_table_is_replaced_as_a_whole(study_copy: StudyRun) -> None:
    storage = study_copy.plan.storage
    rows = tables.from_rows([{"trial_id": "a", "step": 1}], "steps")
    diff.write_table(storage, rows, "steps", "steps.parquet")
    file = Path(storage.path("tables/steps.parquet"))
    assert tables.read(file, "steps").equals(rows)
    assert isinstance(rows, pa.Table)


@pytest.mark.slow
def test_a_damaged_patch_is_one_line_that_names_trial_and_remedy(study_copy: StudyRun) -> None:
    trial = study_copy.plan.trials[0].trial_id
    (study_copy.folder / "tables" / "masks.parquet" / f"{trial}.parquet").unlink()
    patch = study_copy.folder / "trials" / trial / tables.snapshot_folder(2) / PATCH_FILE
    content = bytearray(patch.read_bytes())
    content[-1] ^= 1
    patch.write_bytes(content)
    result = study_copy.command.run("report", study_copy.folder)
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()
    assert line.startswith(f"rlsparse: trial {trial}: ")
    assert "has another checksum; delete " in line
    assert "Traceback" not in result.stderr
