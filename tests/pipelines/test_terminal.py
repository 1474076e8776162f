"""What people read of a study in the terminal: every number as the tables have it."""

from typing import Any

import pyarrow as pa
import pytest

from pipelines import terminal
from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.study import StudyBase

STUDY = StudyBase(name="s", question="Does it?")


def trial(name: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "trial_id": name, "status": "finished", "cell": "{}", "seed": seed, "replicate": 0,
        "role": "baseline", "num_steps": 10, "label": f"grpo s{seed}", "score_before": 0.25,
        "score_after": 0.5, **more,
    }  # fmt: skip


def changed(name: str, step: int, bitwise: int) -> dict[str, Any]:
    counts = {f"num_changed_{d}": bitwise if d == "bitwise" else 1 for d in DEFINITIONS}
    return {"trial_id": name, "step": step, "view": "stored", "module": "q", "num_elements": 200,
            **counts}  # fmt: skip


def claim(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "verdict": "supported", "registered": "registered", "scope": "base tiny",
            "note": "", **more}  # fmt: skip


def shown(
    capsys: pytest.CaptureFixture[str], trials: list[dict[str, Any]], **rows: list[dict[str, Any]]
) -> list[list[str]]:
    """Cells of all lines that are printed."""
    given = {"trials": trials, "changes": [], "overlaps": [], "claims": [], **rows}
    made: dict[str, pa.Table] = {name: tables.from_rows(r, name) for name, r in given.items()}
    terminal.print_results(STUDY, made)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in lines]


def test_runs_are_shown_at_their_last_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 9 and 10 are in another order as texts."""
    overlap = {
        "trial_a": "a", "trial_b": "b", "step_a": 10, "step_b": 10, "view": "stored",
        "definition": "bitwise", "num_elements": 200, "num_a": 40, "num_b": 40, "num_both": 20,
        "expected_tensor": 8.0, "expected_magnitude": 10.0,
    }  # fmt: skip
    rows = shown(
        capsys,
        [trial("a", 0), trial("b", 1, score_before=None), trial("c", 0, role="control")],
        changes=[changed("a", 10, 40), changed("a", 9, 2)],
        overlaps=[overlap],
    )
    assert ["grpo s0", "0", "0.250 -> 0.500", "80.00 %", "99.50 %", "2.50"] in rows
    dash = "\N{EN DASH}"
    assert ["grpo s1", "1", "0.500", dash, dash, "2.50"] in rows
    assert any("overlap / tensor null" in " ".join(row) for row in rows)
    assert len([row for row in rows if row[0].startswith("grpo")]) == 2
    assert not any(row[0] in ("trials by cell", "claims") for row in rows)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(0.25, 0.5, "0.250 -> 0.500"), (None, 0.5, "0.500"), (0.25, None, "0.250 ->"),
     (None, None, "")],
)  # fmt: skip
def test_scores_are_shown_as_far_as_they_are_known(
    capsys: pytest.CaptureFixture[str], before: float | None, after: float | None, text: str
) -> None:
    rows = shown(capsys, [trial("a", 0, score_before=before, score_after=after)])
    assert next(row for row in rows if row[0] == "grpo s0")[2] == text


def test_cells_are_counted_when_trials_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(
        capsys,
        [
            trial("a", 0, label="grpo s0 x=1"),
            trial("b", 1, label="grpo s1 x=1", status="failed"),
            trial("c", 0, label="grpo s0 x=2", status="planned"),
            trial("d", 0, label="grpo s0 x=1 lr_zero", role="control", control="lr_zero"),
        ],
    )
    assert ["grpo x=1", "2", "1", "1"] in rows
    assert ["grpo x=2", "1", "0", "0"] in rows
    assert ["grpo x=1 lr_zero", "1", "1", "0"] in rows
    assert any(row[0] == "grpo s1 x=1 (failed)" for row in rows)


def test_claims_are_shown_with_their_scope(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(
        capsys,
        [trial("a", 0)],
        claims=[
            claim("first", estimate=1.23456, ci_low=0.5, ci_high=20000.0, note="robust"),
            claim("second", registered="post hoc", note="late", verdict="undecided"),
            claim("third", registered="extended", scope="base other"),
        ],
    )
    assert ["first", "supported", "1.235", "0.5000 .. 2e+04", "robust"] in rows
    assert ["second", "undecided", "", "", "post hoc; late"] in rows
    assert ["third", "supported", "", "", "extended"] in rows
    assert [row[0] for row in rows[-2:]] == ["scope   base tiny", "scope   base other"]


def test_places_are_as_short_as_can_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert terminal.relative(f"{tmp_path}/runs/s") == "runs/s"
    assert terminal.relative("s3://bucket/runs") == "s3://bucket/runs"
    terminal.print_places({"tables": "here", "report": "there"})
    assert capsys.readouterr().out == "tables  here\nreport  there\n"
