"""A grid expands to each trial once, under a name that follows what determines its bits."""

from pathlib import Path

import pytest
from small_study import STUDY, load, with_factors

from rlsparse.config import DpoConfig, GrpoConfig, SftConfig
from rlsparse.study import (
    Study,
    Trial,
    collapsed_factors,
    expand,
    level_label,
    reference_level,
)
from rlsparse.study_file import load_study

ABLATIONS = Path(__file__).parents[1] / "ablations"
NUM_TRIALS = {"quickstart": 22, "smoke": 12}


def trials_of(study: Study) -> list[Trial]:
    return expand(study, fingerprint=lambda model: f"hash of {model.source}", task_version="1")


# --- expanding -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ablation_expands_to_its_number_of_trials(path):
    assert len(trials_of(load_study(path))) == NUM_TRIALS[path.stem]


def test_every_number_of_trials_is_of_an_ablation():
    assert {path.stem for path in ABLATIONS.glob("*.yaml")} == set(NUM_TRIALS)


def test_grid_times_seeds_in_a_stable_order(tmp_path):
    text = with_factors("  train.max_grad_norm: [1.0, null]\n  algorithm.kl_coef: [0.0, 0.04]")
    trials = trials_of(load(tmp_path, text))
    order = [(t.cell["algorithm.kl_coef"], t.cell["train.max_grad_norm"], t.config.seed)
             for t in trials]  # fmt: skip
    assert order == [
        (kl, norm, seed) for norm in ("1.0", "null") for kl in ("0.0", "0.04") for seed in (0, 1)
    ]
    assert trials == trials_of(load(tmp_path, text))
    assert [t.role for t in trials] == ["baseline"] * 2 + ["factor"] * 6
    for trial in trials:
        assert level_label(trial.config.algorithm.kl_coef) == trial.cell["algorithm.kl_coef"]
        assert level_label(trial.config.train.max_grad_norm) == trial.cell["train.max_grad_norm"]
        assert trial.config.train.num_steps == 20
    assert len({t.trial_id for t in trials}) == 8


def test_order_of_keys_in_the_file_does_not_change_the_trials(tmp_path):
    one = with_factors("  algorithm.kl_coef: [0.0, 0.04]\n  algorithm.name: [grpo, dpo]")
    other = with_factors("  algorithm.name: [grpo, dpo]\n  algorithm.kl_coef: [0.0, 0.04]")
    assert trials_of(load(tmp_path, one)) == trials_of(load(tmp_path, other))


def test_nested_factors_collapse_and_are_reported(tmp_path):
    study = load(
        tmp_path,
        with_factors(
            "  algorithm.kl_coef: [0.0, 0.04]\n  algorithm.name: [grpo, sft]\n"
            "  algorithm.beta: [0.1, 0.2]\n"
        ).replace("grpo, sft]", "grpo, sft, dpo]"),
    )
    cells = [(t.config.algorithm, t.cell) for t in trials_of(study) if t.config.seed == 0]
    assert cells == [
        (GrpoConfig(kl_coef=0.0), {"algorithm.name": "grpo", "algorithm.kl_coef": "0.0"}),
        (GrpoConfig(kl_coef=0.04), {"algorithm.name": "grpo", "algorithm.kl_coef": "0.04"}),
        (SftConfig(), {"algorithm.name": "sft"}),
        (DpoConfig(beta=0.1), {"algorithm.name": "dpo", "algorithm.beta": "0.1"}),
        (DpoConfig(beta=0.2), {"algorithm.name": "dpo", "algorithm.beta": "0.2"}),
    ]
    assert collapsed_factors(study) == {
        "algorithm.beta": ["grpo", "sft"],
        "algorithm.kl_coef": ["dpo", "sft"],
    }
    assert collapsed_factors(load(tmp_path)) == {}


def test_mapping_levels_change_only_what_they_list(tmp_path):
    text = with_factors(
        "  algorithm: [{name: grpo, kl_coef: 0.04}, {name: dpo, beta: 0.3}, {kl_coef: 0.1}]\n"
        "  train: [{num_steps: 5, precision: bf16}, {}]"
    ).replace("{name: grpo}", "{name: grpo, num_generations: 4}")
    trials = [t for t in trials_of(load(tmp_path, text)) if t.config.seed == 0]
    assert [t.config.algorithm for t in trials[::2]] == [
        GrpoConfig(kl_coef=0.04, num_generations=4),
        DpoConfig(beta=0.3),
        GrpoConfig(kl_coef=0.1, num_generations=4),
    ]
    assert {(t.config.train.num_steps, t.config.train.precision) for t in trials} == {
        (5, "bf16"), (20, "bf16-mixed"),
    }  # fmt: skip
    assert {t.config.train.learning_rate for t in trials} == {1e-5}
    assert trials[0].cell["algorithm"] == "grpo(kl_coef=0.04)"


def test_cells_may_be_invalid_on_the_way(tmp_path):
    """Only whole cells are checked: 12 sequences are no multiple of the default 8."""
    text = with_factors("  train.batch_size: [12]\n  algorithm.num_generations: [4, 6]")
    sizes = [t.config.algorithm.num_generations for t in trials_of(load(tmp_path, text))]
    assert sizes == [4, 4, 6, 6]


def test_equal_cells_are_one(tmp_path):
    trials = trials_of(load(tmp_path, with_factors("  train.learning_rate: [1e-5, 0.00001, 2e-5]")))
    assert len(trials) == 4 == len({t.trial_id for t in trials})


def test_controls(tmp_path):
    text = with_factors(
        "  algorithm.name: [grpo, sft]\n  train.max_grad_norm: [1.0, null]",
        "controls: [lr_zero, same_seed, lr_times_3]",
    ).replace("seeds: [0, 1]", "seeds: [5, 6]")
    trials = trials_of(load(tmp_path, text))
    grid, controls = trials[:8], trials[8:]
    assert {t.control for t in grid} == {None}
    assert {t.role for t in controls} == {"control"}
    by_control = {
        name: [t for t in controls if t.control == name]
        for name in ("lr_zero", "same_seed", "lr_times_3")
    }
    assert {name: len(found) for name, found in by_control.items()} == {
        "lr_zero": 2, "same_seed": 2, "lr_times_3": 2,
    }  # fmt: skip
    original = {t.config.algorithm.name: t for t in reversed(grid) if t.config.seed == 5}
    for zero in by_control["lr_zero"]:
        twin = original[zero.config.algorithm.name]
        still = twin.config.train.model_copy(update={"learning_rate": 0.0})
        assert zero.config == twin.config.model_copy(update={"train": still})
        assert zero.replicate == 0
    for again in by_control["same_seed"]:
        twin = original[again.config.algorithm.name]
        assert (again.config, again.replicate, twin.replicate) == (twin.config, 1, 0)
        assert again.trial_id != twin.trial_id
    assert [t.config.seed for t in by_control["lr_times_3"]] == [5, 6]
    for fast in by_control["lr_times_3"]:
        assert fast.config.algorithm.name == "grpo"
        assert fast.config.train.learning_rate == pytest.approx(3e-5)
    assert len({t.trial_id for t in trials}) == len(trials) == 14


def test_identity_follows_the_base_and_the_study(tmp_path):
    def ids(text: str, fingerprint: str = "f", version: str = "1") -> list[str]:
        study = load(tmp_path, text)
        trials = expand(study, fingerprint=lambda _: fingerprint, task_version=version)
        return [t.trial_id for t in trials]

    first = ids(STUDY)
    assert first == ids(STUDY.replace("Why?", "Why not?"))
    assert first == ids(STUDY.replace("baseline:", "baseline:\n  model: {source: /some/where}"))
    assert not set(first) & set(ids(STUDY, "g"))
    assert not set(first) & set(ids(STUDY, version="2"))
    assert not set(first) & set(ids(STUDY + "resources: {num_threads: 2}\n"))
    assert first[:1] == ids(STUDY.replace("[0, 1]", "[0]"))  # adding seeds keeps what is done


def test_labels():
    labels = {None: "null", True: "true", 0.04: "0.04", 1e-05: "1e-05", "dpo": "dpo", 3: "3"}
    for level, label in labels.items():
        assert level_label(level) == label
    assert level_label({"name": "dpo", "beta": 0.1, "x": None}) == "dpo(beta=0.1, x=null)"
    assert level_label({"name": "sft"}) == "sft"


@pytest.mark.parametrize(
    ("factor", "reference"),
    [
        ("algorithm.kl_coef: [0.04, 0]", "0"),  # the baseline's 0.0, as the level is written
        ("algorithm.name: [sft, grpo]", "grpo"),
        ("algorithm.name: [sft, dpo]", "sft"),
        ("algorithm: [{name: dpo}, {name: grpo}]", "grpo"),
        ("train.max_grad_norm: [null, 1]", "1"),
        ("train.learning_rate: [3e-5, 2e-5]", "3e-05"),
    ],
)
def test_reference_level_is_the_baselines_own(tmp_path, factor, reference):
    study = load(tmp_path, with_factors(f"  {factor}"))
    path = factor.partition(":")[0]
    assert reference_level(study, path) == reference
    assert reference in {trial.cell[path] for trial in trials_of(study)}


def test_views(tmp_path):
    text = with_factors("  train.precision: [bf16, fp32]") + "views: [fp16]\n"
    text = text.replace("kind: exact", "kind: exact\n    response: sparsity.bitwise@fp8_e4m3")
    assert load(tmp_path, text).measured_views == ("bf16", "fp16", "fp8_e4m3")
    assert load(tmp_path).measured_views == ("stored",)
    assert trials_of(load(tmp_path))[0].label == "grpo s0"
