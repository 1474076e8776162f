"""What trials left becomes two tables: failed and missing trials stay rows."""

import shutil

import pyarrow.compute as pc
import pytest
from command import StudyRun

from pipelines import collect
from pipelines.table_files import read_table
from rlsparse import tables


def test_failed_and_missing_trials_are_rows(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    failed, missing = (plan.trials[k].trial_id for k in (0, 1))
    plan.ledger.fail(failed, "it broke")
    plan.storage.delete(f"ledger/{missing}.json")
    collect.collect(plan)
    rows = {row["trial_id"]: row for row in read_table(plan.storage, "trials").to_pylist()}
    assert list(rows) == [trial.trial_id for trial in plan.trials]
    assert (rows[failed]["status"], rows[failed]["error"]) == ("failed", "it broke")
    assert rows[missing]["status"] == "planned"
    assert rows[failed]["score_after"] is None
    assert rows[missing]["score_after"] is None
    finished = rows[plan.trials[2].trial_id]
    assert finished["status"] == "finished"
    assert finished["score_after"] is not None
    steps = read_table(plan.storage, "steps")
    assert len(pc.unique(steps["trial_id"])) == len(plan.trials) - 2


def test_steps_are_those_that_trials_wrote(study_run: StudyRun) -> None:
    found = collect.steps_table(study_run.plan)
    for trial in study_run.plan.trials:
        file = study_run.folder / "trials" / trial.trial_id / "steps.parquet"
        ours = found.filter(pc.equal(found["trial_id"], trial.trial_id))
        assert ours.equals(tables.read(file, "steps"))


def test_trials_name_their_base(study_run: StudyRun) -> None:
    bases = {row["base"] for row in collect.trials_table(study_run.plan).to_pylist()}
    (base,) = bases
    parts = (study_run.folder / "tables" / "base_tensors.parquet").iterdir()
    assert [part.stem for part in parts] == [base[:12]]


def test_replicates_are_identical_until_a_bit_differs(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    again = [study_copy.trial(f"{a} s0 same_seed").trial_id for a in ("grpo", "dpo", "sft")]

    def identical() -> dict[str, bool]:
        rows = collect.trials_table(plan).to_pylist()
        return {row["trial_id"]: row["identical"] for row in rows if row["identical"] is not None}

    assert identical() == dict.fromkeys(again, True)
    patch = "snapshots/step-000001/weights.patch.safetensors"
    shutil.copy(
        study_copy.trial_folder("dpo s1") / patch,
        study_copy.trial_folder("dpo s0 same_seed") / patch,
    )
    assert identical() == {**dict.fromkeys(again, True), again[1]: False}


@pytest.mark.parametrize("unfinished", ["grpo s0", "grpo s0 same_seed"])
def test_a_replicate_without_its_original_is_not_compared(
    study_copy: StudyRun, unfinished: str
) -> None:
    study_copy.plan.ledger.fail(study_copy.trial(unfinished).trial_id, "it broke")
    rows = {row["label"]: row for row in collect.trials_table(study_copy.plan).to_pylist()}
    assert rows["grpo s0 same_seed"]["identical"] is None
    assert rows["dpo s0 same_seed"]["identical"] is True
