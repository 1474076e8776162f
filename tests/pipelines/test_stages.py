"""A stage is done once for the same inputs, and only if it came to its end."""

from pathlib import Path

import pytest
from rich.console import Console

from pipelines.session import RaySession
from pipelines.stages import conclude_study, run_stage
from pipelines.storage import Storage
from rlsparse.errors import StorageError
from rlsparse.overlap.comparison import RULES, MeasuredRun
from rlsparse.study import Study


def test_a_stage_runs_once_for_the_same_inputs(tmp_path: Path) -> None:
    storage, calls = Storage(str(tmp_path)), list[int]()
    storage.write_bytes("made", b"")

    def stage(inputs: dict[str, object]) -> int:
        run_stage(storage, "mine", inputs, ["made"], lambda: calls.append(1))
        return len(calls)

    assert stage({"a": 1}) == 1
    assert stage({"a": 1}) == 1
    assert stage({"a": 2}) == 2
    storage.delete("made")
    assert stage({"a": 2}) == 3


def test_a_stage_that_breaks_is_not_done(tmp_path: Path) -> None:
    def break_off() -> None:
        raise ArithmeticError

    for _ in range(2):
        with pytest.raises(ArithmeticError):
            run_stage(Storage(str(tmp_path)), "mine", {}, [], break_off)


def test_overlaps_are_counted_anew_under_other_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RaySession, "start", lambda self: None)  # nothing to compare needs no Ray
    fields = {
        "name": "s",
        "question": "?",
        "baseline": {"algorithm": {"name": "sft"}},
        "seeds": [0],
    }
    study, calls = Study.model_validate(fields), list[int]()

    def measured() -> list[MeasuredRun]:
        calls.append(1)
        return []

    def num_counted() -> int:
        with pytest.raises(StorageError, match=r"study\.json"):  # what the next stage reads first
            conclude_study(
                study, Storage(str(tmp_path)), RaySession(), Console(quiet=True), states={},
                seeds=[], measured=measured, collect=lambda: None, allow_missing=False,
            )  # fmt: skip
        return len(calls)

    assert num_counted() == 1
    assert num_counted() == 1
    monkeypatch.setattr("pipelines.stages.RULES", RULES + 1)
    assert num_counted() == 2
