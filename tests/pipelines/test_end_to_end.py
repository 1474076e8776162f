"""One study through the real command: what it leaves is complete, true and final."""

import json
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from command import Command, StudyRun

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.models import TINY
from rlsparse.train import train_trial

PATCH = "weights.patch.safetensors"
CHANGED = [f"num_changed_{definition}" for definition in DEFINITIONS]


def bits_of(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a bf16 safetensors file as raw bits, read without the product."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    body = content[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], "<u2")
        for name, entry in header.items()
    }


def test_the_command_says_what_it_did(study_run: StudyRun) -> None:
    result = study_run.result
    assert "12 trials: 0 done, 12 to run" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    assert "lr-zero-changes-nothing" in result.stdout
    places = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines()[-3:]}
    assert study_run.command.cwd / places["report"] == study_run.folder / "report" / "index.html"
    assert study_run.command.cwd / places["tables"] == study_run.folder / "tables"
    assert places["MLflow"].startswith("sqlite:///")
    assert places["MLflow"].endswith("mlflow.db")
    assert study_run.command.ray_has_run
    assert study_run.command.processes() == []


def test_a_trial_alone_gives_the_bits_of_the_sweep(study_run: StudyRun, tmp_path: Path) -> None:
    """In this process, without Ray, in another order than in the sweep's reused workers."""
    trials = {t.config.algorithm.name: t for t in study_run.plan.trials if t.role != "control"}
    assert set(trials) == {"grpo", "dpo", "sft"}
    for name, trial in sorted(trials.items()):
        base = study_run.plan.base(trial)
        train_trial(
            trial.config,
            trial_id=trial.trial_id,
            base_dir=base.path,
            base_fingerprint=base.fingerprint,
            out_dir=tmp_path / name,
        )
        kept = study_run.folder / "trials" / trial.trial_id
        for file in (f"snapshots/step-000002/{PATCH}", "steps.parquet", tables.EVER_CHANGED):
            assert (tmp_path / name / file).read_bytes() == (kept / file).read_bytes()


def test_no_temporary_file_is_left(study_run: StudyRun) -> None:
    assert [p for p in study_run.folder.rglob(".*") if p.is_file()] == []
    assert not (study_run.folder / "driver.lock").exists()


OTHERS = {"agreement", "syncs", "spectra", "stripes"}
"""Tables of masks, of patches of steps, of request, of pairs of checkpoints."""


@pytest.mark.parametrize("name", sorted(tables.SCHEMAS.keys() - OTHERS))
def test_every_table_fits_its_schema(study_run: StudyRun, name: str) -> None:
    files = [study_run.folder / "tables" / f"{name}.parquet"]
    if name == "eval":  # stays with its trial
        files = sorted(study_run.folder.glob("trials/*/eval.parquet"))
        assert len(files) == len(study_run.plan.trials)
    for file in files:
        assert tables.read(file, name).num_rows > 0


def test_a_study_without_masks_compares_no_weights(study_run: StudyRun) -> None:
    assert not (study_run.folder / "tables" / "agreement.parquet").exists()
    assert "comparing the weights" not in study_run.result.stderr
    assert 'id="subnetworks"' not in (study_run.folder / "report" / "index.html").read_text()


def test_every_planned_trial_is_a_row(study_run: StudyRun) -> None:
    trials = tables.read(study_run.folder / "tables" / "trials.parquet", "trials").to_pylist()
    assert [t["trial_id"] for t in trials] == [t.trial_id for t in study_run.plan.trials]
    assert len(trials) == 12
    assert {t["status"] for t in trials} == {"finished"}
    assert {t["attempts"] for t in trials} == {1}
    assert {t["factor.algorithm.name"] for t in trials} == {"grpo", "dpo", "sft"}
    assert (
        sorted(t["control"] for t in trials if t["control"]) == ["lr_zero"] * 3 + ["same_seed"] * 3
    )


def test_steps_are_whole(study_run: StudyRun) -> None:
    steps = tables.read(study_run.folder / "tables" / "steps.parquet", "steps").to_pylist()
    for trial in study_run.plan.trials:
        rows = [row for row in steps if row["trial_id"] == trial.trial_id]
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert all(0 <= row["score"] <= 1 for row in rows)
        assert all(row["loss"] is not None for row in rows[1:])


def test_learning_rate_zero_changes_nothing(study_run: StudyRun) -> None:
    deltas = tables.read(study_run.folder / "tables" / "tensor_deltas.parquet", "tensor_deltas")
    zero = {t.trial_id for t in study_run.plan.trials if t.control == "lr_zero"}
    for trial in study_run.plan.trials:
        rows = deltas.filter(pc.equal(deltas["trial_id"], trial.trial_id))
        changed = {name: pc.sum(rows[name]).as_py() for name in CHANGED}
        if trial.trial_id in zero:
            assert set(changed.values()) == {0}
        else:
            assert changed["num_changed_bitwise"] > 0
    masks = tables.read(study_run.folder / "tables" / "masks.parquet", "masks").to_pylist()
    assert all(not any(row["mask"]) for row in masks if row["trial_id"] in zero)
    assert {row["kind"] for row in masks} == {"snapshot", "ever_changed"}


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "sft"])
def test_the_same_seed_gives_the_same_bits(study_run: StudyRun, algorithm: str) -> None:
    first = study_run.trial_folder(f"{algorithm} s0")
    again = study_run.trial_folder(f"{algorithm} s0 same_seed")
    other = study_run.trial_folder(f"{algorithm} s1")
    for step in ("step-000001", "step-000002"):
        patch = first / "snapshots" / step / PATCH
        assert patch.read_bytes() == (again / "snapshots" / step / PATCH).read_bytes()
        assert patch.read_bytes() != (other / "snapshots" / step / PATCH).read_bytes()
    weights = "checkpoint/model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()


def test_counts_equal_a_script_over_the_checkpoints(study_run: StudyRun) -> None:
    base = bits_of(TINY / "model.safetensors")
    deltas = tables.read(study_run.folder / "tables" / "tensor_deltas.parquet", "tensor_deltas")
    deltas = deltas.filter(pc.equal(deltas["step_after"], 2))
    ours: dict[tuple[str, str], int] = {}
    for row in deltas.to_pylist():
        key = (row["trial_id"], row["tensor"])
        ours[key] = ours.get(key, 0) + row["num_changed_bitwise"]
    for trial in study_run.plan.trials:
        folder = study_run.folder / "trials" / trial.trial_id
        after = bits_of(folder / "checkpoint" / "model.safetensors")
        assert after.keys() == base.keys()
        for tensor in base:
            assert ours[trial.trial_id, tensor] == np.sum(base[tensor] != after[tensor]), tensor


def test_overlaps_equal_a_script_over_the_checkpoints(study_run: StudyRun) -> None:
    base = bits_of(TINY / "model.safetensors")
    overlaps = tables.read(study_run.folder / "tables" / "overlaps.parquet", "overlaps")
    whole = [row for row in overlaps.to_pylist() if row["module"] is None]
    rows = {(r["trial_a"], r["trial_b"]): r for r in whole if r["trial_a"] != r["trial_b"]}
    assert len(rows) == 12 * 11 / 2
    within = [row for row in whole if row["trial_a"] == row["trial_b"]]
    assert [(row["step_a"], row["step_b"]) for row in within] == [(1, 2)] * 12
    masks = {}
    for trial in study_run.plan.trials:
        file = study_run.folder / "trials" / trial.trial_id / "checkpoint" / "model.safetensors"
        masks[trial.trial_id] = np.concatenate(
            [bits != base[name] for name, bits in sorted(bits_of(file).items())]
        )
    for (one, other), row in rows.items():
        assert row["num_both"] == np.sum(masks[one] & masks[other])
        assert row["num_a"] == masks[one].sum()
        assert row["num_b"] == masks[other].sum()
        assert row["num_elements"] == len(masks[one])


def test_the_claims_that_two_seeds_can_decide_hold(study_run: StudyRun) -> None:
    claims = tables.read(study_run.folder / "tables" / "claims.parquet", "claims").to_pylist()
    assert [claim["verdict"] for claim in claims] == ["supported", "supported"]
    assert [claim["registered"] for claim in claims] == ["registered", "registered"]


def test_the_report_is_there(study_run: StudyRun) -> None:
    text = (study_run.folder / "report" / "index.html").read_text()
    HTMLParser().feed(text)
    assert study_run.plan.study.question in text
    assert "lr-zero-changes-nothing" in text
    assert json.loads((study_run.folder / "report" / "report.json").read_text())


def test_again_nothing_runs(study_run: StudyRun) -> None:
    def state() -> dict[str, tuple[float, bytes]]:
        kept = [*study_run.folder.glob("ledger/*"), *study_run.folder.glob("tables/*/*")]
        kept += study_run.folder.glob("trials/*/*")
        files = [path for path in kept if path.is_file()]
        return {str(path): (path.stat().st_mtime, path.read_bytes()) for path in files}

    before = state()

    again = Command(study_run.command.cwd)
    try:
        result = again.run("run", study_run.yaml, "--storage", study_run.storage)
        assert result.returncode == 0, result.stderr
        assert "all 12 trials are done" in result.stderr
        assert result.stdout == study_run.result.stdout
        assert not again.ray_has_run
    finally:
        again.close()
    assert state() == before
