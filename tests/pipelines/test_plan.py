"""A plan names the right trials and refuses what cannot run."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from command import StudyRun

from pipelines.plan import load_base, make_plan
from rlsparse import tables
from rlsparse.config import ModelConfig
from rlsparse.costs import patch_bytes
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.models import TINY
from rlsparse.study import Study


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
    same = load_base(ModelConfig(source=str(copy)), expect=tiny.identity)
    assert dataclasses.replace(same, path=tiny.path) == tiny

    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the study was planned with .* pin a revision"):
        load_base(ModelConfig(source=str(other)), expect=tiny.identity)
    with pytest.raises(CheckpointError, match=r"has weights with hash .* was planned with"):
        load_base(ModelConfig(source=str(other)), weights=tiny.fingerprint)


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("tokenizer.json", True),
        ("config.json", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True),
        ("README.md", False),
    ],
)
def test_what_training_reads_of_a_base_is_of_the_identity_of_a_trial(
    file: str, counts: bool, tmp_path: Path
) -> None:
    """The tensors stay, and so does the fingerprint, which patches name."""
    plans = []
    for folder in (tmp_path / "base", tmp_path / "edited"):
        shutil.copytree(TINY, folder)
        changed = folder / file
        changed.parent.mkdir(exist_ok=True)
        before = changed.read_text() if changed.exists() else "{{ messages }}"
        changed.write_text(before + (" " if folder.name == "edited" else ""))
        plans.append(
            make_plan(
                make_study(model={"source": str(folder)}, algorithm={"name": "sft"}), str(tmp_path)
            )
        )
    (one,), (other,) = (plan.trials for plan in plans)
    assert (one.trial_id != other.trial_id) == counts
    assert plans[0].base(one).fingerprint == plans[1].base(other).fingerprint


def test_bases_that_differ_in_the_tokenizer_are_two_cells(tmp_path: Path) -> None:
    copy, edited = tmp_path / "copy", tmp_path / "edited"
    for folder in (copy, edited):
        shutil.copytree(TINY, folder)
    (edited / "tokenizer.json").write_text((edited / "tokenizer.json").read_text() + " ")
    study = make_study(algorithm={"name": "sft"})
    for folder, num_trials in ((copy, 1), (edited, 2)):
        factors = {"model.source": ["tiny", str(folder)]}
        plan = make_plan(study.model_copy(update={"factors": factors}), str(tmp_path))
        assert len(plan.trials) == num_trials


def test_patches_are_no_larger_than_said(study_run: StudyRun) -> None:
    trials = tables.read(study_run.folder / "tables" / "trials.parquet", "trials").to_pylist()
    for trial, row in zip(study_run.plan.trials, trials, strict=True):
        most = patch_bytes(trial.config, study_run.plan.base(trial).num_weights)
        assert 0 < row["patch_bytes"] <= most


def make_study(**baseline: object) -> Study:
    return Study.model_validate({"name": "s", "question": "?", "baseline": baseline, "seeds": [0]})


def test_data_are_of_the_identity_of_a_trial(tmp_path: Path) -> None:
    data = tmp_path / "own.csv"

    def name_of(content: str) -> str:
        data.write_text("prompt,answer\n" + content)
        study = make_study(algorithm={"name": "sft"}, task={"name": "dataset", "source": str(data)})
        (trial,) = make_plan(study, str(tmp_path)).trials
        assert trial.data_version
        return trial.trial_id

    first, other = name_of("1 + 1,2\n"), name_of("1 + 1,3\n")
    assert first != other
    assert name_of("1 + 1,2\n") == first


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ({"algorithm": {"name": "sft"}, "task": {"name": "dataset", "source": "no/such.csv"}},
         r"no/such\.csv"),
        ({"algorithm": {"name": "dpo", "data": "no/pairs.jsonl"}}, r"no/pairs\.jsonl"),
        ({"algorithm": {"name": "grpo", "reward": "no_such_module:reward"}}, "no_such_module"),
    ],
)  # fmt: skip
def test_data_that_are_not_there_are_told_before_any_trial(
    baseline: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        make_plan(make_study(**baseline), str(tmp_path / "runs"))
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()
