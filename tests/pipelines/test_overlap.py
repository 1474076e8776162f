"""The distributed overlap gives the table of the serial one."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from command import StudyRun

from pipelines import overlap
from pipelines.plan import Plan, make_plan
from rlsparse import tables
from rlsparse.claim_config import AboveNullClaim, At
from rlsparse.overlap import overlaps
from rlsparse.study import Study


def read(run: StudyRun, name: str) -> pa.Table:
    return tables.read(run.folder / "tables" / f"{name}.parquet", name)


def test_overlaps_equal_the_serial_reference(study_run: StudyRun) -> None:
    last = [(trial.trial_id, 2, "stored") for trial in study_run.plan.trials]
    inputs = [read(study_run, name) for name in ("masks", "tensor_deltas", "base_tensors")]
    expected = overlaps(*inputs, last)
    keys = [(name, "ascending") for name in ("trial_a", "trial_b", "module")]
    found = read(study_run, "overlaps")
    assert found.num_rows > 12 * 11 / 2
    assert found.sort_by(keys).equals(expected.sort_by(keys))


def test_runs_are_last_snapshots_and_those_that_claims_name(study_run: StudyRun) -> None:
    plan = study_run.plan
    trials = list(plan.trials[:2])
    one, other = (trial.trial_id for trial in trials)
    assert overlap.runs_of(plan, trials) == [(one, 2, "stored"), (other, 2, "stored")]
    claim = AboveNullClaim(id="recurs", kind="above_null", at=At(step=1))
    study = plan.study.model_copy(update={"claims": (claim,), "views": ("fp16",)})
    assert overlap.runs_of(make_plan(study, str(study_run.storage)), trials[:1]) == [
        (one, step, view) for step in (1, 2) for view in ("stored", "fp16")
    ]


def test_masks_of_different_bases_are_not_compared(
    wide_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {
        "name": "bases",
        "question": "?",
        "baseline": {"algorithm": {"name": "sft"}},
        "factors": {
            "model.source": ["tiny", str(wide_base.path)],
            "task.name": ["chain_sum", "products"],
        },
        "seeds": [0],
    }
    plan = make_plan(Study.model_validate(fields), str(tmp_path))
    monkeypatch.setattr(Plan, "finished", lambda self: list(self.trials))
    compared: dict[str, list[tuple[str, str]]] = {}

    def count(plan: Plan, base: str, trials: list[Any]) -> pa.Table:
        compared[base] = [(t.config.model.source, t.config.task.name) for t in trials]
        return tables.SCHEMAS["overlaps"].empty_table()

    monkeypatch.setattr(overlap, "_run_base", count)
    assert overlap.run(plan).num_rows == 0
    assert sorted(compared.values()) == sorted(
        [(source, task) for task in ("chain_sum", "products")]
        for source in ("tiny", str(wide_base.path))
    )
    assert wide_base.fingerprint in compared
