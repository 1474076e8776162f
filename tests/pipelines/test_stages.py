"""A stage is done once for the same inputs, and only if it came to its end."""

from pathlib import Path

import pytest

from pipelines.stages import run_stage
from pipelines.storage import Storage


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
