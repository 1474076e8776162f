"""The stage that sends the steps of trials again, on a small study that has run."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines import cli, syncs
from pipelines.plan import Plan, make_plan
from pipelines.sweep import _spec, run_trial
from pipelines.table_files import read_table
from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import PatchError
from rlsparse.models import TINY
from rlsparse.study_file import load_study
from rlsparse.sync_costs import sync_rows
from rlsparse.tables import STEP_PATCHES
from rlsparse.weight_sync.versions import VersionFolder

TEXT = """
question: How many bytes?
baseline:
  task: {num_train_problems: 16, num_eval_problems: 16}
  algorithm: {name: sft}
  train: {num_steps: 3, batch_size: 8, learning_rate: 1.0e-5}
  probe: {score_snapshots: false}
factors:
  probe.step_patches: [false, true]
seeds: [0]
"""
TIMES = ("encode_s", "apply_s")


def plan_in(folder: Path) -> Plan:
    file = folder / "study.yaml"
    file.write_text(TEXT)
    return make_plan(load_study(file), str(folder / "runs"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study with its trials done, and nothing else."""
    folder = tmp_path_factory.mktemp("syncs")
    plan = plan_in(folder)
    for trial in plan.trials:
        run_trial(_spec(plan, trial))
    return folder


@pytest.fixture
def plan(ran: Path, tmp_path: Path, tasks_here: None) -> Plan:
    """The same in a place of its own; tasks run here, without Ray."""
    shutil.copytree(ran / "runs", tmp_path / "runs")
    return plan_in(tmp_path)


def test_the_table_is_that_of_the_serial_reference(plan: Plan, tmp_path: Path) -> None:
    (item,) = syncs.pending(plan)  # the other trial kept no steps
    trial = item["part"]
    syncs.run(plan, [item])
    folder = Path(plan.storage.path(f"trials/{trial}/{STEP_PATCHES}"))
    expected = sync_rows(Checkpoint.open(TINY), folder, num_steps=3, dtype="bf16", scratch=tmp_path)
    found = read_table(plan.storage, "syncs", trial).drop([*TIMES, "host"]).to_pylist()
    assert found == [
        {"trial_id": trial} | {key: row[key] for key in row if key not in TIMES} for row in expected
    ]
    assert syncs.pending(plan) == []


def test_a_damaged_step_names_its_trial(plan: Plan) -> None:
    (item,) = syncs.pending(plan)
    place = Path(plan.storage.path(f"trials/{item['part']}/{STEP_PATCHES}"))
    file = VersionFolder(place).patch_file(2)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(PatchError, match=rf"trial {item['part']}: .*damaged.*run again"):
        syncs.run(plan, [item])
    assert syncs.pending(plan) == [item]


@pytest.mark.parametrize("link", ["0", "inf", "nan"])
def test_links_of_the_report_must_be_positive_and_finite(tmp_path: Path, link: str) -> None:
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path), "--link", link])
    assert result.exit_code == 2
