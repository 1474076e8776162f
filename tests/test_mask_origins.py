"""A mask of another trial: which trial that is, what it makes of names, and what is refused."""

import re
from pathlib import Path

import pytest
import small_study

from rlsparse.errors import ConfigError
from rlsparse.study import Trial, expand

STUDY = """\
question: Does the subnetwork recover the full run?
baseline:
  algorithm: {{name: sft}}
  train: {{num_steps: 20, learning_rate: 1e-5}}
  probe: {{snapshots: [2]}}
factors:
  train.mask: [null, {mask}]
  {more}
seeds: {seeds}
"""


def trials(tmp_path, mask="{from: baseline}", more="", seeds="[5, 7, 9]", version="1", set_=()):
    text = STUDY.format(mask=mask, more=more, seeds=seeds)
    study = small_study.load(tmp_path, text, *set_)
    return expand(study, fingerprint=lambda _: "f", data_version=lambda _: version)


def by_label(found: list[Trial]) -> dict[str, Trial]:
    return {trial.label: trial for trial in found}


def test_masks_and_learning_rates_are_a_grid(tmp_path):
    found = by_label(trials(tmp_path, more="train.learning_rate: [1e-5, 3e-5]"))
    assert len(found) == 2 * 2 * 3
    for seed in (5, 7, 9):
        full = found[f"sft s{seed} mask=null learning_rate=1e-05"]
        assert (full.role, full.needs, full.origins) == ("baseline", (), ())
        for rate in ("1e-05", "3e-05"):  # always of the baseline's learning rate
            sub = found[f"sft s{seed} mask=final learning_rate={rate}"]
            assert sub.needs == (full.trial_id,)
            assert [(o.take, o.step) for o in sub.origins] == [("final", 20)]
            assert sub.cell["train.mask"] == "final"


def test_a_mask_of_the_cell_follows_its_levels(tmp_path):
    found = by_label(trials(tmp_path, "{from: cell}", "algorithm.name: [sft, dpo]"))
    for name in ("sft", "dpo"):
        (needed,) = found[f"{name} s7 mask=final(cell)"].needs
        assert needed == found[f"{name} s7 mask=null"].trial_id


@pytest.mark.parametrize(
    ("mask", "label", "needed"),
    [
        ("{from: baseline, seed: other}", "final(seed=other)", [7, 9, 5]),
        ("{from: baseline, seed: 9}", "final(seed=9)", [9, 9, 9]),
        ("{like: {from: baseline, seed: other}}", "random(final(seed=other))", [7, 9, 5]),
    ],
)
def test_the_other_seed_is_the_next(tmp_path, mask, label, needed):
    found = by_label(trials(tmp_path, mask))
    ids = {found[f"sft s{seed} mask=null"].trial_id: seed for seed in (5, 7, 9)}
    assert [ids[found[f"sft s{s} mask={label}"].needs[0]] for s in (5, 7, 9)] == needed


def test_a_mask_of_another_algorithm(tmp_path):
    mask = "{union: [{from: baseline}, {from: baseline, where: {algorithm.name: dpo}}]}"
    found = by_label(trials(tmp_path, mask, "algorithm.name: [sft, dpo]"))
    for name in ("sft", "dpo"):
        trial = found[f"{name} s5 mask=union(final, final(algorithm.name=dpo))"]
        expected = [found[f"{other} s5 mask=null"].trial_id for other in ("sft", "dpo")]
        assert list(trial.needs) == expected


def test_controls_of_masked_cells(tmp_path):
    found = trials(tmp_path, set_=["controls=[same_seed, lr_zero]", "train.mask={from: baseline}"])
    controls = [trial for trial in found if trial.control]
    assert [trial.cell["train.mask"] for trial in controls] == ["null", "null"]


# --- names -----------------------------------------------------------------------------------


def ids(tmp_path, mask, **more) -> set[str]:
    return {trial.trial_id for trial in trials(tmp_path, mask, **more) if trial.config.train.mask}


def test_the_name_of_a_trial_is_that_of_what_its_mask_is_of(tmp_path):
    same = ids(tmp_path, "{from: baseline}")
    assert same == ids(tmp_path, "{from: cell}")  # the same trial
    assert same == ids(tmp_path, "{from: baseline, take: final, seed: same}")
    others = [
        "{from: baseline, take: ever_changed}",
        "{from: baseline, take: snapshot, step: 2}",
        "{from: baseline, seed: other}",
        "{like: {from: baseline}}",
        "{like: {from: baseline}, mask_seed: 0}",
        "{union: [{from: baseline}, {from: baseline, seed: other}]}",
        "{intersection: [{from: baseline}, {from: baseline, seed: other}]}",
        "{file: a.mask.safetensors}",
    ]
    found = [same, *(ids(tmp_path, mask) for mask in others)]
    assert all(len(some) == 3 for some in found)
    assert len(set().union(*found)) == 3 * len(found)
    assert ids(tmp_path, "{from: baseline, take: snapshot, fraction: 0.1}") == found[2]


def test_a_file_is_known_by_its_content(tmp_path):
    one, other = "{file: a.mask.safetensors}", "{file: /b.mask.safetensors}"
    assert ids(tmp_path, one) == ids(tmp_path, other)
    assert ids(tmp_path, one, version="2").isdisjoint(ids(tmp_path, one))


def test_two_files_are_two_cells_before_they_are_read(tmp_path):
    """A claim on one of them must find its trials when the study is checked."""
    claim = "{id: a, kind: greater, a: {train.mask: a}, b: {train.mask: b}, response: score_after}"
    text = STUDY.format(mask="{file: a}, {file: b}", more="", seeds="[0, 1]")
    small_study.load(tmp_path, text, f"claims=[{claim}]")
    with pytest.raises(ConfigError, match=r"train\.mask.*c"):
        small_study.load(tmp_path, text, f"claims=[{claim.replace('mask: b', 'mask: c')}]")


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "set_", "said"),
    [
        ("{from: baseline}", ["factors={train.mask: [{from: baseline}]}"],
         r"mask of trial sft s5 mask=final is of a trial outside of this study: every trial has a "
         r"mask; add null to the levels of train\.mask"),
        ("{from: baseline, where: {algorithm.name: dpo}}", [],
         r"no trial without a mask has algorithm\.name dpo; add that as a level"),
        ("{from: baseline, where: {train.learning_rate: 1}}", [], r"train\.learning_rate 1\.0;"),
        ("{from: baseline, seed: 6}", [], r"it has seed 6, the study has 5, 7, 9; add it"),
        ("{from: baseline, seed: other}", ["seeds=[5]"], r"the study has one; give more seeds"),
        ("{from: baseline, take: snapshot, step: 3}", [],
         r"is of step 3, after which .* \(it does after 2, 20\); add 3 to probe\.snapshots"),
        ("{from: baseline, where: {algorithm.beta: 1}}", [], r"has no field algorithm\.beta; "),
        ("{from: baseline, where: {train.batch_size: 0}}", [], r"of no valid trial: train\.batch"),
        ("{from: baseline}", ["resources={num_workers: 2, strategy: fsdp}"],
         r"strategy fsdp trains no subnetwork.*ddp"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_is_told_with_its_line(tmp_path, mask, set_, said):
    with pytest.raises(ConfigError, match=r"why\.yaml:\d+: .*" + said) as caught:
        trials(tmp_path, mask, set_=set_)
    if not set_:
        line = STUDY.splitlines().index("  train.mask: [null, {mask}]") + 1
        assert f"why.yaml:{line}:" in str(caught.value)


def test_the_study_in_the_readme_has_two_phases(tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = re.search(r"a study of two phases:\n\n```yaml\n(.*?)```", text, re.DOTALL)[1]
    study = small_study.load(tmp_path, f"question: Does the subnetwork recover?\n{block}")
    found = expand(study, fingerprint=lambda _: "f", data_version=lambda _: "1")
    assert len(found) == 5 * 2 * 4
    assert sum(bool(trial.needs) for trial in found) == 4 * 2 * 4
    assert {trial.cell["train.mask"] for trial in found} == {
        "null", "final", "random(final)", "final(seed=other)", "snapshot(step=6)",
    }  # fmt: skip
