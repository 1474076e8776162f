"""A plan names the right trials and refuses what cannot run."""

import shutil
from pathlib import Path

import pytest
from command import StudyRun

from pipelines.plan import load_base, make_plan, patch_bytes
from rlsparse import tables
from rlsparse.config import ModelConfig
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.models import TINY


def test_a_plan_lies_in_the_folder_of_its_name(study_run: StudyRun) -> None:
    assert Path(study_run.plan.storage.path("study.json")) == study_run.folder / "study.json"
    assert {t.trial_id for t in study_run.plan.finished()} == {
        t.trial_id for t in study_run.plan.trials
    }


def test_only_takes_a_prefix_of_a_trial(study_run: StudyRun) -> None:
    study, name = study_run.plan.study, study_run.plan.trials[3].trial_id
    assert make_plan(study, str(study_run.storage), name[:6]).trials == study_run.plan.trials
    with pytest.raises(ConfigError, match=r"--only zzz: no such trial .*--dry-run"):
        make_plan(study, str(study_run.storage), "zzz")


def test_a_base_of_other_content_is_refused(tmp_path: Path) -> None:
    tiny = load_base(ModelConfig())
    copy = tmp_path / "base"
    shutil.copytree(TINY, copy)
    same = load_base(ModelConfig(source=str(copy)), expect=tiny.fingerprint)
    assert (same.fingerprint, same.num_weights) == (tiny.fingerprint, tiny.num_weights)

    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the study was planned with .* pin a revision"):
        load_base(ModelConfig(source=str(other)), expect=tiny.fingerprint)


def test_patches_are_no_larger_than_said(study_run: StudyRun) -> None:
    trials = tables.read(study_run.folder / "tables" / "trials.parquet", "trials").to_pylist()
    for trial, row in zip(study_run.plan.trials, trials, strict=True):
        most = patch_bytes(trial.config, study_run.plan.base(trial).num_weights)
        assert 0 < row["patch_bytes"] <= most
