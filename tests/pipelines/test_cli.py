"""The command line: light to start, and every mistake is one clear line."""

import importlib
import io
import json
import pkgutil
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from command import StudyRun
from rich.console import Console

import pipelines
import rlsparse
from pipelines import aggregate, cli, collect, diff, study
from pipelines.plan import Plan, _load_base, make_plan
from pipelines.session import RaySession
from pipelines.sweep import _spec, run_trial
from rlsparse import tables
from rlsparse.errors import CheckpointError
from rlsparse.mask_making import uniform
from rlsparse.masks import write_masks
from rlsparse.models import TINY
from rlsparse.study import Study
from rlsparse.tables import SCHEMAS

STUDY = """
question: Is a mistake told in one line?
baseline:
  algorithm: {name: sft}
seeds: [0, 1]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a study file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def rlsparse_(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["rlsparse", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_help_is_light() -> None:
    code = """
import runpy, sys
sys.argv = ["rlsparse", "--help"]
try:
    runpy.run_module("pipelines", run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = {"torch", "ray", "mlflow", "pandas", "numba", "transformers", "scipy"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("run", "status", "report", "diff", "make-base", "mlflow"):
        assert re.search(rf"\b{command}\b", result.stdout)


@pytest.mark.parametrize("package", [rlsparse, pipelines])
def test_every_module_imports(package: object) -> None:
    names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    assert len(names) > 10
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


MISTAKES = {
    "wrong key": (["study.yaml", "--set", "train.learning_rte=1"],
                  r"study\.yaml:\d+: unknown key .*learning_rte; did you mean learning_rate\?"),
    "wrong value": (["study.yaml", "--set", "train.num_steps=0"],
                    r"greater than or equal to 1 \(got 0\)"),
    "no seeds": (["study.yaml", "--set", "seeds=[]"], r"seeds: .*at least 1 item"),
    "no study file": (["other.yaml"], r"cannot read study file other\.yaml"),
    "no model": (["study.yaml", "--set", "model.source=./nowhere"],
                 r"model\.source './nowhere': no such folder"),
    "unwritable": (["study.yaml", "--storage", "study.yaml/runs"], r"cannot write .*--storage"),
    "unknown trial": (["study.yaml", "--only", "zzz"], r"--only zzz: no such trial"),
    "unknown storage": (["study.yaml", "--storage", "floppy://a"], r"cannot use storage floppy"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    mistake: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = MISTAKES[mistake]
    assert rlsparse_(monkeypatch, "run", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("rlsparse: ")
    assert re.search(message, line), line
    assert [path.name for path in folder.iterdir()] == ["study.yaml"]


def test_no_cluster_at_the_address_is_said_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert rlsparse_(monkeypatch, "run", "study.yaml", "--address", address) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rlsparse: no Ray cluster at {address}: ")
    assert not (folder / "runs" / "study").exists()


def test_a_mistake_shows_no_traceback(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pipelines", "status", "nowhere"],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"rlsparse: {folder}/nowhere is no study: no study.json in it")


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_that_is_no_study(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rlsparse_(monkeypatch, command, folder) == 1
    assert "is no study" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["study.yaml"]


def test_dry_run_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rlsparse_(monkeypatch, "run", "study.yaml", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "Is a mistake told in one line?" in out
    assert "1 cells, 2 trials (0 done)" in out
    assert [path.name for path in folder.iterdir()] == ["study.yaml"]


def test_mask_files_are_checked_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["study.yaml", "--set", "train.mask={file: own.mask.safetensors}", "--dry-run"]
    write_masks(folder / "own.mask.safetensors", {"w": ((8,), np.ones(1, np.uint8))}, "")
    assert rlsparse_(monkeypatch, "run", *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlsparse: train.mask of trial sft s")
    assert "mask own.mask.safetensors is of another model than the base tiny: it lacks" in line
    mask = uniform(TINY, 0.1, 0)
    write_masks(folder / "own.mask.safetensors", {n: (s, p) for n, s, p in mask}, "f" * 64)
    assert rlsparse_(monkeypatch, "run", *options) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("mask own.mask.safetensors is of the base ffffffffffff, trials start")


def test_status_of_a_study_file_and_of_its_folder(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = study_copy.plan.trials[0]
    study_copy.plan.ledger.fail(failed.trial_id, "it broke")
    study_copy.plan.storage.write_json(f"saves/{failed.trial_id}/step-000001/save.json", {})
    study_copy.plan.storage.write_bytes(f"saves/{failed.trial_id}/step-000002/optimizer.pt", b"")
    assert rlsparse_(monkeypatch, "status", study_copy.folder) == 0
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "study: 11/12 done, 0 running, 1 failed, 0 left",
        f"  failed      {failed.trial_id} {failed.label} it broke, saved at step 1",
    ]
    assert (
        rlsparse_(monkeypatch, "status", study_copy.yaml, "--storage", study_copy.storage, "--json")
        == 0
    )
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {
        "finished": 11, "running": 0, "interrupted": 0, "failed": 1, "planned": 0,
    }  # fmt: skip
    assert [row["error"] for row in status["trials"]] == ["it broke"] + [None] * 11
    assert [row["saved_step"] for row in status["trials"]] == [1] + [None] * 11


def test_diff_prints_json_that_equals_the_tables(
    study_run: StudyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = study_run.trial_folder("grpo s1") / "checkpoint"
    assert rlsparse_(monkeypatch, "diff", TINY, checkpoint, "--json", "-") == 0
    said = json.loads(capsys.readouterr().out)
    shown = json.loads((study_run.folder / "report" / "report.json").read_text())
    assert shown
    from rlsparse import tables

    file = study_run.folder / "tables" / "tensor_deltas.parquet"
    rows = [
        row
        for row in tables.read(file, "tensor_deltas").to_pylist()
        if row["trial_id"] == study_run.trial("grpo s1").trial_id and row["step_after"] == 2
    ]
    assert len(said["tensors"]) == len({row["tensor"] for row in rows})
    for tensor in said["tensors"]:
        ours = [row for row in rows if row["tensor"] == tensor["name"]]
        for definition, sparsity in tensor["sparsity"].items():
            changed = sum(row[f"num_changed_{definition}"] for row in ours)
            assert sparsity == 1 - changed / tensor["num_elements"]
    for definition, sparsity in said["sparsity"].items():
        changed = sum(row[f"num_changed_{definition}"] for row in rows)
        assert sparsity == 1 - changed / said["num_elements"]


def test_diff_prints_a_table_and_writes_json(
    study_run: StudyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = study_run.trial_folder("sft s0 lr_zero") / "checkpoint"
    assert rlsparse_(monkeypatch, "diff", TINY, checkpoint, "--json", tmp_path / "d.json") == 0
    assert re.search(r"unchanged bitwise +100", capsys.readouterr().out)
    assert set(json.loads((tmp_path / "d.json").read_text())["sparsity"].values()) == {1.0}


@pytest.mark.slow
def test_a_run_makes_what_is_missing_again(study_copy: StudyRun) -> None:
    names = ("tables/trials.parquet", "tables/overlaps.parquet", "tables/consensus.parquet")
    kept = {name: (study_copy.folder / name).read_bytes() for name in names}
    for name in names:
        (study_copy.folder / name).unlink()
    shutil.rmtree(study_copy.folder / "tables" / "masks.parquet")
    result = study_copy.command.run("run", study_copy.yaml, "--storage", study_copy.storage)
    assert result.returncode == 0, result.stderr
    for name, content in kept.items():
        assert (study_copy.folder / name).read_bytes() == content, name
    attempts = [study_copy.plan.ledger.get(t.trial_id).attempts for t in study_copy.plan.trials]
    assert attempts == [1] * 12


@pytest.mark.parametrize("option", [[], ["--allow-missing"]])
def test_a_failed_trial_fails_the_run_unless_it_may_be_missing(
    option: list[str],
    study_copy: StudyRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command as typed is on record, and claims are judged as it says."""
    failed, given = study_copy.plan.trials[0], list[dict[str, object]]()

    def run_study(plan: Plan, **settings: object) -> dict[str, pa.Table]:
        given.append(settings)
        plan.ledger.fail(failed.trial_id, "it broke")
        collect.collect(plan)
        return aggregate.load(plan.storage)

    monkeypatch.setattr(study, "run_study", run_study)
    arguments = ["run", study_copy.yaml, "--storage", study_copy.storage, *option]
    assert rlsparse_(monkeypatch, *arguments) == (0 if option else 1)
    out, err = capsys.readouterr()
    assert err == f"failed: {failed.label} ({failed.trial_id}): it broke\n"
    assert re.search(r"grpo +│ +2 │ +1 │ +1 │", out)
    assert f"{failed.label} (failed)" in out
    (settings,) = given
    assert settings["allow_missing"] == bool(option)
    assert settings["command"] == " ".join(["rlsparse", *map(str, arguments)])


def test_the_command_on_record_can_be_pasted(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[str]()
    monkeypatch.setattr(
        study, "run_study", lambda plan, *, command, **_: given.append(command) or {}
    )
    arguments = ["run", study_copy.yaml, "--storage", study_copy.storage, "--set", "question=A b?"]
    rlsparse_(monkeypatch, *arguments, "--only", study_copy.plan.trials[0].trial_id)
    assert shlex.split(given[0]) == ["rlsparse", *map(str, arguments), "--only",
                                     study_copy.plan.trials[0].trial_id]  # fmt: skip
    assert "'question=A b?'" in given[0]


def test_report_writes_its_json_where_asked(
    study_copy: StudyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "copy.json"
    assert rlsparse_(monkeypatch, "report", study_copy.folder, "--json", place) == 0
    kept = (study_copy.folder / "report" / "report.json").read_bytes()
    assert place.read_bytes() == kept
    assert capsys.readouterr().out.splitlines()[-1].startswith("report  xdg-open ")
    (study_copy.folder / "tables" / "steps.parquet").unlink()
    assert rlsparse_(monkeypatch, "report", study_copy.folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks tables/steps.parquet: `rlsparse run` with its study file" in line
    assert rlsparse_(monkeypatch, "report", tmp_path) == 1
    assert "is no study: no study.json in it" in capsys.readouterr().err


@pytest.fixture
def moved_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A finished study, whose data and base changed after it had run; the plan it ran by."""
    shutil.copytree(TINY, folder / "base")
    (folder / "own.csv").write_text(
        "prompt,answer\n" + "".join(f"{i} + 1,{i + 1}\n" for i in range(100))
    )
    task = {"name": "dataset", "source": "own.csv", "num_train_problems": 16,
            "num_eval_problems": 4, "max_completion_tokens": 4}  # fmt: skip
    train = {"num_steps": 1, "batch_size": 8, "learning_rate": 1e-4}
    baseline = {"model": {"source": "./base"}, "task": task, "algorithm": {"name": "sft"}}
    fields = {
        "name": "s",
        "question": "?",
        "baseline": {**baseline, "train": train},
        "seeds": [0, 1],
    }
    plan = make_plan(Study.model_validate(fields), str(folder / "runs"))
    study.write_study(plan)
    for trial in plan.trials:
        run_trial(_spec(plan, trial))
    for item in diff.pending(plan):
        diff.measure(item)
    assert len(plan.finished()) == 2, [entry.error for entry in plan.entries().values()]
    # What counts overlaps runs in Ray, which is not the matter here.
    monkeypatch.setattr(RaySession, "start", lambda self: None)
    nothing = tuple(SCHEMAS[name].empty_table() for name in ("overlaps", "consensus"))
    monkeypatch.setattr("pipelines.overlap.run", lambda *_: nothing)
    study.run_study(plan, console=Console(file=io.StringIO()))
    tokenizer = folder / "base" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    (folder / "own.csv").write_text("prompt,answer\n1 + 1,3\n")
    _load_base.cache_clear()  # as in another process
    return plan


@pytest.mark.parametrize("gone", [False, True])
def test_a_folder_is_reported_by_what_it_holds(
    gone: bool,
    moved_on: Plan,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = moved_on.storage.path("")
    recorded = moved_on.storage.read_json("study.json")
    if gone:
        (folder / "own.csv").unlink()
        shutil.rmtree(folder / "base")
        (folder / "elsewhere").mkdir()
        monkeypatch.chdir(folder / "elsewhere")
    else:  # the study file is about what is there now
        changed = make_plan(moved_on.study, str(folder / "runs"))
        assert not {t.trial_id for t in changed.trials} & {t.trial_id for t in moved_on.trials}
    for _ in range(2):  # the second time with the study.json that the first one wrote
        assert rlsparse_(monkeypatch, "status", place) == 0
        assert capsys.readouterr().out.startswith("s: 2/2 done")
        assert rlsparse_(monkeypatch, "report", place) == 0
        assert "(planned)" not in capsys.readouterr().out
        rows = tables.read(Path(place) / "tables" / "trials.parquet", "trials").to_pylist()
        assert [(row["trial_id"], row["status"]) for row in rows] == [
            (trial.trial_id, "finished") for trial in moved_on.trials
        ]
        assert moved_on.storage.read_json("study.json") == recorded
    assert rlsparse_(monkeypatch, "mlflow", "sync", place) == 0


def test_diffs_that_need_a_base_that_is_gone_say_so(moved_on: Plan, folder: Path) -> None:
    """Its tokenizer is not needed, its weights are."""
    shutil.rmtree(folder / "runs" / "s" / "tables")
    plan = cli._plan_of(moved_on.storage.path(""), "")
    for item in diff.pending(plan):
        diff.measure(item)
    assert diff.pending(plan) == []
    shutil.rmtree(folder / "runs" / "s" / "tables")
    shutil.rmtree(folder / "base")
    _load_base.cache_clear()
    for item in diff.pending(plan):
        with pytest.raises(CheckpointError, match=r"model\.source '\./base': no such folder"):
            diff.measure(item)


def test_a_study_that_recorded_no_inputs_is_planned_with_those_that_are_here(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_copy.folder / "study.json"
    content = json.loads(file.read_text())
    del content["inputs"]
    file.write_text(json.dumps(content))
    assert rlsparse_(monkeypatch, "status", study_copy.folder) == 0
    assert capsys.readouterr().out.startswith("study: 12/12 done")
    file.write_text(json.dumps(content | {"inputs": {"bases": []}}))
    assert rlsparse_(monkeypatch, "status", study_copy.folder) == 1
    assert "study.json is damaged or of another release" in capsys.readouterr().err


def test_a_trial_whose_driver_is_gone_is_interrupted(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = study_copy.plan.trials[0]
    study_copy.plan.ledger.start(trial.trial_id, host="h", pid=1, versions={})
    assert rlsparse_(monkeypatch, "status", study_copy.folder) == 0
    assert f"interrupted {trial.trial_id}" in capsys.readouterr().out
    with study_copy.plan.storage.lock():
        assert rlsparse_(monkeypatch, "status", study_copy.folder) == 0
    assert f"running     {trial.trial_id}" in capsys.readouterr().out


def test_damaged_files_are_one_line_each(
    study_copy: StudyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = study_copy.folder / "ledger" / f"{study_copy.plan.trials[0].trial_id}.json"
    for file in (entry, study_copy.folder / "study.json"):
        file.write_text(file.read_text()[:20])
        assert rlsparse_(monkeypatch, "status", study_copy.folder) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{file.name} is damaged" in line
        assert "run the study again" in line
    assert rlsparse_(monkeypatch, "diff", TINY, TINY) == 1
    assert "both sides are the same checkpoint" in capsys.readouterr().err
