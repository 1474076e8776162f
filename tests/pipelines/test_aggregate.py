"""Verdicts and report come from the tables alone, on any machine, and are the same again."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from command import StudyRun
from pandas.testing import assert_frame_equal
from rich.console import Console

from pipelines import aggregate, study
from pipelines.table_files import read_parts, read_table, write_table
from rlsparse.effects.changes import sum_changes, sum_magnitudes
from rlsparse.errors import TableError

ABSENT = (
    "torch", "transformers", "trl", "ray", "mlflow", "datasets", "accelerate", "safetensors",
    "reasoning_gym", "tokenizers",
)  # fmt: skip
ELSEWHERE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from pipelines.cli import main
sys.argv = ["rlsparse", *sys.argv[1:]]
main()
"""


def report_elsewhere(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``rlsparse report`` where nothing but the analysis is installed."""
    command = [sys.executable, "-c", ELSEWHERE, "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def tables_alone(study_copy: StudyRun) -> StudyRun:
    """The study as somebody gets it who was sent ``study.json`` and ``tables/``."""
    for name in ("trials", "ledger", "stages", "report"):
        shutil.rmtree(study_copy.folder / name)
    for name in aggregate.CONCLUDED:
        (study_copy.folder / "tables" / f"{name}.parquet").unlink()
    shutil.rmtree(study_copy.folder / "tables" / "masks.parquet")
    return study_copy


def test_a_report_needs_the_tables_alone(tables_alone: StudyRun, study_run: StudyRun) -> None:
    copy = tables_alone.storage / "copy.json"
    result = report_elsewhere(tables_alone.folder, "--json", copy)
    assert result.returncode == 0, result.stderr
    for name in ("report.json", "index.html"):
        made = (tables_alone.folder / "report" / name).read_bytes()
        assert made == (study_run.folder / "report" / name).read_bytes(), name
    assert copy.read_bytes() == (study_run.folder / "report" / "report.json").read_bytes()
    for name in aggregate.CONCLUDED:
        file = f"tables/{name}.parquet"
        found = tables_alone.plan.storage.read_bytes(file)
        assert found == study_run.plan.storage.read_bytes(file), name
    told = study_run.result.stdout.splitlines()
    assert result.stdout.splitlines()[:-1] == told[: told.index(next(
        line for line in told if line.startswith("tables ")))]  # fmt: skip
    assert result.stderr == ""


def test_missing_tables_are_one_line(tables_alone: StudyRun) -> None:
    names = ("tables/overlaps.parquet", "tables/consensus.parquet")
    for name in names:
        (tables_alone.folder / name).unlink()
    result = report_elsewhere(tables_alone.folder)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith(f"rlsparse: {tables_alone.folder} lacks {' '.join(names[:1])}")
    assert "copy the whole folder tables/" in line
    assert not (tables_alone.folder / "report").exists()


def test_missing_parts_are_named_with_the_command_that_makes_them(study_copy: StudyRun) -> None:
    folder = study_copy.folder / "tables" / "tensor_deltas.parquet"
    gone = sorted(folder.iterdir())[:6]
    for file in gone:
        file.unlink()
    with pytest.raises(TableError, match=r"lacks .* and 2 more: `rlsparse run`") as raised:
        aggregate.rebuild(study_copy.plan.storage, allow_missing=False)
    named = [file.name for file in gone if file.name in str(raised.value)]
    assert named == [file.name for file in gone[:4]]


def test_tables_of_an_earlier_release_are_told(study_copy: StudyRun) -> None:
    storage = study_copy.plan.storage
    trials = read_table(storage, "trials").drop_columns(["base"])
    write_table(storage, trials, "trials")
    with pytest.raises(TableError, match=r"trials lacks the column base .*`rlsparse run`"):
        aggregate.rebuild(storage, allow_missing=False)


def test_parts_are_summed_as_the_whole_would_be(study_run: StudyRun) -> None:
    storage, names = study_run.plan.storage, [t.trial_id for t in study_run.plan.trials]
    trials = read_table(storage, "trials")
    deltas = read_parts(storage, "tensor_deltas", names)
    (base,) = set(trials["base"].to_pylist())
    changes, magnitudes = aggregate.sum_parts(storage, trials)
    keys = [(name, "ascending") for name in ("trial_id", "step", "view", "layer", "module")]
    assert changes.sort_by(keys).equals(sum_changes(deltas))
    whole = sum_magnitudes(deltas, read_table(storage, "base_tensors", base[:12]))
    assert magnitudes.sort_by(keys[:3]).equals(whole)
    assert set(magnitudes["step"].to_pylist()) == {2}
    assert read_table(storage, "changes").equals(changes)
    total = pc.sum(deltas["num_changed_bitwise"])
    assert pc.sum(changes["num_changed_bitwise"]) == total


def test_trials_that_did_not_finish_have_no_part(study_copy: StudyRun) -> None:
    storage = study_copy.plan.storage
    lost = study_copy.plan.trials[3].trial_id
    storage.delete(f"tables/tensor_deltas.parquet/{lost}.parquet")
    trials = read_table(storage, "trials")
    status = ["failed" if t == lost else "finished" for t in trials["trial_id"].to_pylist()]
    index = trials.column_names.index("status")
    changes, magnitudes = aggregate.sum_parts(
        storage, trials.set_column(index, "status", pa.array(status))
    )
    for table in (changes, magnitudes):
        found = set(table["trial_id"].to_pylist())
        assert found == {t.trial_id for t in study_copy.plan.trials} - {lost}


class Seen:
    """What ``write_report`` and ``judge`` were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.provenance: dict[str, Any] = {}
        self.allow_missing: list[bool] = []
        build, judge = aggregate.build_report, aggregate.judge

        def build_report(*given: Any, provenance: dict[str, Any], links: Any) -> Path:
            self.provenance = provenance
            self.links = links
            return build(*given, provenance=provenance, links=links)

        def judge_claims(*given: Any, allow_missing: bool, num_dropped: int) -> pa.Table:
            self.allow_missing.append(allow_missing)
            return judge(*given, allow_missing=allow_missing, num_dropped=num_dropped)

        monkeypatch.setattr(aggregate, "build_report", build_report)
        monkeypatch.setattr(aggregate, "judge", judge_claims)


def test_the_report_says_what_made_the_study(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    aggregate.rebuild(study_copy.plan.storage, allow_missing=True, links=[25.0])
    assert seen.links == [25.0]
    trials = read_table(study_copy.plan.storage, "trials").to_pylist()
    made = seen.provenance
    assert made["command"].startswith("rlsparse run ")
    assert made["command"].endswith(f"{study_copy.yaml} --storage {study_copy.command.cwd}/runs")
    assert made["wall_s"] == pytest.approx(sum(t["wall_s"] for t in trials), rel=1e-12, abs=0)
    assert made["cpu_s"] == pytest.approx(sum(t["cpu_s"] for t in trials), rel=1e-12, abs=0)
    assert made["hosts"] == sorted({t["host"] for t in trials})
    assert made["allow_missing"] is True
    assert {"study_sha256", "claims_sha256", "versions"} <= made.keys()
    assert seen.allow_missing == [True]
    json.dumps(made)


def test_allowing_missing_trials_judges_again(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is there already: only what the option changes is done."""
    monkeypatch.chdir(study_copy.command.cwd)  # not in git, as when it was run
    seen = Seen(monkeypatch)
    for allowed, expected in ((False, []), (True, [True]), (True, [True]), (False, [True, False])):
        study.run_study(study_copy.plan, console=Console(file=io.StringIO()), allow_missing=allowed)
        assert seen.allow_missing == expected


def test_a_report_does_not_stand_for_what_a_run_would_say(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    aggregate.rebuild(study_copy.plan.storage, allow_missing=True)
    study.run_study(study_copy.plan, console=Console(file=io.StringIO()))
    assert seen.allow_missing == [True, False]
    assert seen.provenance["allow_missing"] is False


def test_read_again_the_tables_are_those_that_were_concluded(study_copy: StudyRun) -> None:
    storage = study_copy.plan.storage
    _, found = aggregate.rebuild(storage, allow_missing=False)
    again = aggregate.load(storage)
    assert again.keys() == found.keys() == {*aggregate.GIVEN, *aggregate.CONCLUDED}
    for name, table in found.items():
        assert_frame_equal(again[name].to_pandas(), table.to_pandas())
