"""Small tables: failed and missing trials stay rows, and edits of claims are told."""

import json
import shutil

import pyarrow.compute as pc
from command import StudyRun

from pipelines import aggregate
from pipelines.plan import make_plan
from rlsparse.claim_config import ExactClaim


def test_failed_and_missing_trials_are_rows(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    failed, missing = (plan.trials[k].trial_id for k in (0, 1))
    plan.ledger.fail(failed, "it broke")
    plan.storage.delete(f"ledger/{missing}.json")
    rows = {row["trial_id"]: row for row in aggregate.trials_table(plan).to_pylist()}
    assert list(rows) == [trial.trial_id for trial in plan.trials]
    assert (rows[failed]["status"], rows[failed]["error"]) == ("failed", "it broke")
    assert rows[missing]["status"] == "planned"
    assert rows[failed]["score_after"] is None
    assert rows[missing]["score_after"] is None
    finished = rows[plan.trials[2].trial_id]
    assert finished["status"] == "finished"
    assert finished["score_after"] is not None
    steps = aggregate.steps_table(plan)
    assert len(pc.unique(steps["trial_id"])) == len(plan.trials) - 2


def test_replicates_are_identical_until_a_bit_differs(study_copy: StudyRun) -> None:
    plan = study_copy.plan
    again = [study_copy.trial(f"{a} s0 same_seed").trial_id for a in ("grpo", "dpo", "sft")]
    assert aggregate.identical_replicates(plan) == dict.fromkeys(again, True)
    patch = "snapshots/step-000001/weights.patch.safetensors"
    shutil.copy(
        study_copy.trial_folder("dpo s1") / patch,
        study_copy.trial_folder("dpo s0 same_seed") / patch,
    )
    assert aggregate.identical_replicates(plan) == {**dict.fromkeys(again, True), again[1]: False}


def test_later_claims_are_post_hoc_and_later_seeds_extend(study_run: StudyRun) -> None:
    plan = study_run.plan
    assert set(aggregate.registration(plan).values()) == {"registered"}
    kept, edited = plan.study.claims
    assert isinstance(edited, ExactClaim)
    claims = (kept, edited.model_copy(update={"value": 0.5}),
              ExactClaim(id="new", kind="exact"))  # fmt: skip
    study = plan.study.model_copy(update={"claims": claims})
    changed = make_plan(study, str(study_run.storage))
    assert aggregate.registration(changed) == {
        kept.id: "registered", edited.id: "post hoc", "new": "post hoc"
    }  # fmt: skip
    more = make_plan(plan.study.model_copy(update={"seeds": (0, 1, 2)}), str(study_run.storage))
    assert set(aggregate.registration(more).values()) == {"extended"}


def test_the_registration_is_frozen_in_the_study_file(study_run: StudyRun) -> None:
    written = json.loads((study_run.folder / "study.json").read_text())
    assert list(written["registered"]["claims"]) == [c.id for c in study_run.plan.study.claims]
    assert written["registered"]["seeds"] == [0, 1]
    assert len(written["registered_sha256"]) == 64
    assert {"torch", "trl", "ray", "mlflow"} <= written["versions"].keys()


def test_claims_under_other_settings_are_post_hoc(study_copy: StudyRun) -> None:
    study = study_copy.plan.study
    assert set(aggregate.registration(study_copy.plan).values()) == {"registered"}
    longer = study.baseline.train.model_copy(update={"num_steps": 3})
    other = study.model_copy(
        update={"baseline": study.baseline.model_copy(update={"train": longer})}
    )
    plan = make_plan(other, str(study_copy.storage))
    assert set(aggregate.registration(plan).values()) == {"post hoc"}
