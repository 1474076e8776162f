"""A grid expands to each trial once, under a name that follows what determines its bits."""

from pathlib import Path

import pytest
from small_study import STUDY, load, with_factors

from rlsparse.algorithm_config import DpoConfig, GrpoConfig, RlooConfig, SftConfig
from rlsparse.errors import ConfigError
from rlsparse.levels import level_label
from rlsparse.study import Study, Trial, collapsed_factors, expand
from rlsparse.study_file import load_study
from rlsparse.task_config import ChainSumConfig, ProductsConfig, SimpleEquationsConfig

ABLATIONS = Path(__file__).parents[1] / "ablations"
NUM_TRIALS = {
    "algorithm": 68, "quickstart": 22, "smoke": 40, "smollm2_quickstart": 4, "subnetwork": 401,
    "weight_sync": 4,
}  # fmt: skip


def trials_of(study: Study) -> list[Trial]:
    return expand(
        study,
        fingerprint=lambda model: f"hash of {model.source}",
        data_version=lambda config: f"{config.task.name} 1",
    )


# --- expanding -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ablation_expands_to_its_number_of_trials(path):
    assert len(trials_of(load_study(path))) == NUM_TRIALS[path.stem]


def test_every_number_of_trials_is_of_an_ablation():
    assert {path.stem for path in ABLATIONS.glob("*.yaml")} == set(NUM_TRIALS)


def test_grid_times_seeds_in_a_stable_order(tmp_path):
    text = with_factors("  train.max_grad_norm: [1.0, null]\n  algorithm.kl_coef: [0.04, 0.0]")
    trials = trials_of(load(tmp_path, text))
    order = [(t.cell["algorithm.kl_coef"], t.cell["train.max_grad_norm"], t.config.seed)
             for t in trials]  # fmt: skip
    assert order == [
        (kl, norm, seed) for norm in ("1.0", "null") for kl in ("0.04", "0.0") for seed in (0, 1)
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
    assert [t.label.split(" train")[0] for t in trials[::2]] == [
        "grpo(kl_coef=0.04) s0", "dpo(beta=0.3) s0", "grpo(kl_coef=0.1) s0",
    ]  # fmt: skip


def test_another_algorithm_has_its_own_defaults(tmp_path):
    text = with_factors("  algorithm.name: [grpo, rloo, dpo]").replace(
        "{name: grpo}", "{name: grpo, kl_coef: 0.1, num_generations: 4}"
    )
    trials = [t for t in trials_of(load(tmp_path, text)) if t.config.seed == 0]
    assert [t.config.algorithm for t in trials] == [
        GrpoConfig(kl_coef=0.1, num_generations=4), RlooConfig(), DpoConfig(),
    ]  # fmt: skip


SIZES = "{name: chain_sum, num_terms: 4, num_eval_problems: 9, num_shots: 2, prompt_format: chat}"


def test_another_task_keeps_sizes_and_prompts_only(tmp_path):
    text = with_factors(
        "  task: [{name: products, num_digits: 1}, {num_terms: 5}, {name: simple_equations,"
        " num_eval_problems: 7}]"
    ).replace("train:", f"task: {SIZES}\n  train:")
    study = load(tmp_path, text)
    kept = {"num_eval_problems": 9, "num_shots": 2, "prompt_format": "chat"}
    trials = trials_of(study)
    assert [t.config.task for t in trials if t.config.seed == 0] == [
        ProductsConfig(num_digits=1, **kept),
        ChainSumConfig(num_terms=5, **kept),
        SimpleEquationsConfig(**{**kept, "num_eval_problems": 7}),
    ]
    assert [t.data_version for t in trials[::2]] == ["products 1", "chain_sum 1",
                                                     "simple_equations 1"]  # fmt: skip
    assert [t.label for t in trials[::2]] == [
        "grpo s0 task=products(num_digits=1)",
        "grpo s0 task=(num_terms=5)",
        "grpo s0 task=simple_equations(num_eval_problems=7)",
    ]


def test_names_apply_before_the_fields_that_they_have(tmp_path):
    """Although ``task.max_value`` and ``algorithm.beta`` come first in the file."""
    factors = (
        "  task.max_value: [10, 20]\n  algorithm.beta: [0.5]\n"
        "  task.name: [chain_sum, simple_equations]\n  algorithm: [{name: grpo}, {name: dpo}]"
    )
    study = load(tmp_path, with_factors(factors))
    cells = [t.cell for t in trials_of(study) if t.config.seed == 0]
    assert [list(cell.values()) for cell in cells] == [
        ["grpo", "chain_sum"],
        ["grpo", "simple_equations", "10"],
        ["grpo", "simple_equations", "20"],
        ["dpo", "chain_sum", "0.5"],
        ["dpo", "simple_equations", "10", "0.5"],
        ["dpo", "simple_equations", "20", "0.5"],
    ]
    assert collapsed_factors(study) == {
        "task.max_value": ["chain_sum"], "algorithm.beta": ["grpo"],
    }  # fmt: skip


def test_list_levels(tmp_path):
    text = with_factors(
        "  train.trainable_modules: [[q, k, v, o], [gate, up, down], null]\n"
        "  train: [{trainable_layers: [0, 2]}, {num_steps: 3}]"
    )
    trials = [t for t in trials_of(load(tmp_path, text)) if t.config.seed == 0]
    assert [
        (t.config.train.trainable_modules, t.config.train.trainable_layers) for t in trials
    ] == [
        (modules, layers)
        for layers in ((0, 2), None)
        for modules in (("q", "k", "v", "o"), ("gate", "up", "down"), None)
    ]
    assert (
        trials[0].label == "grpo s0 train=(trainable_layers=[0, 2]) trainable_modules=[q, k, v, o]"
    )
    assert len({t.trial_id for t in trials}) == 6


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


SURROGATES = "controls: [shuffled_reward, random_reward]"


def surrogates_of(study: Study) -> list[tuple]:
    return [
        (t.control, t.config.algorithm.name, t.config.algorithm.reward, t.config.seed)
        for t in trials_of(study)
        if t.role == "surrogate"
    ]


def test_surrogates_are_the_first_cell_with_another_reward(tmp_path):
    study = load(tmp_path, with_factors("  algorithm.kl_coef: [0.1, 0.2]", SURROGATES))
    trials = trials_of(study)
    assert [(t.role, t.control) for t in trials] == [("factor", None)] * 4 + [
        ("surrogate", name) for name in ("shuffled_reward", "random_reward") for _ in range(2)
    ]
    for real, surrogate in zip(trials[:2] * 2, trials[4:], strict=True):
        reward = {"shuffled_reward": "shuffled", "random_reward": "random"}[surrogate.control]
        other = real.config.algorithm.model_copy(update={"reward": reward})
        assert surrogate.config == real.config.model_copy(update={"algorithm": other})
        assert surrogate.cell == real.cell
    assert trials[4].label == "grpo s0 kl_coef=0.1 shuffled_reward"


@pytest.mark.parametrize(
    ("baseline", "names", "expected"),
    [
        ("grpo", "[sft, dpo, grpo]", "grpo"),
        ("sft", "[sft, dpo, grpo]", "dpo"),
        ("grpo", "[sft, rft, dpo]", "rft"),
    ],
)
def test_surrogates_take_an_algorithm_that_has_a_reward(tmp_path, baseline, names, expected):
    text = with_factors(f"  algorithm.name: {names}", SURROGATES)
    study = load(tmp_path, text.replace("{name: grpo}", f"{{name: {baseline}}}"))
    assert surrogates_of(study) == [
        (f"{reward}_reward", expected, reward, seed)
        for reward in ("shuffled", "random")
        for seed in (0, 1)
    ]


def test_surrogates_take_an_algorithm_that_rewards_what_it_samples(tmp_path):
    factor = "  algorithm: [{name: dpo, data: gold}, {name: kto, data: a.csv}, {name: rloo}]"
    text = with_factors(factor, "controls: [random_reward]").replace("{name: grpo}", "{name: dpo}")
    assert {name for _, name, _, _ in surrogates_of(load(tmp_path, text))} == {"rloo"}
    with pytest.raises(ConfigError, match=r"this study has dpo, kto; .* sample: dpo, grpo"):
        load(tmp_path, text.replace(", {name: rloo}", ""))


def test_no_reward_no_surrogate(tmp_path):
    baseline = load(tmp_path).baseline.model_copy(update={"algorithm": SftConfig()})
    study = Study(name="s", question="?", baseline=baseline, seeds=[0], controls=["random_reward"])
    with pytest.raises(ConfigError, match=r"needs an algorithm with a reward, this study has sft;"):
        trials_of(study)


def test_a_reward_that_a_factor_changes_makes_a_surrogate(tmp_path):
    text = with_factors(
        "  algorithm.reward: [task, shuffled, 'mine:reward']",
        "controls: [random_reward, shuffled_reward, lr_zero, lr_times_3]",
    )
    study = load(tmp_path, text)
    trials = [t for t in trials_of(study) if t.config.seed == 0]
    assert [(t.role, t.control, t.cell["algorithm.reward"]) for t in trials] == [
        ("baseline", None, "task"),
        ("surrogate", None, "shuffled"),  # which the control would only repeat
        ("factor", None, "mine:reward"),
        ("surrogate", "random_reward", "random"),
        ("control", "lr_zero", "task"),
        ("control", "lr_times_3", "task"),
    ]
    all_shuffled = load(tmp_path, STUDY.replace("{name: grpo}", "{name: grpo, reward: shuffled}"))
    assert {t.role for t in trials_of(all_shuffled)} == {"baseline"}


def test_identity_follows_the_base_and_the_study(tmp_path):
    def ids(text: str, fingerprint: str = "f", version: str = "1") -> list[str]:
        study = load(tmp_path, text)
        trials = expand(study, fingerprint=lambda _: fingerprint, data_version=lambda _: version)
        return [t.trial_id for t in trials]

    first = ids(STUDY)
    assert first == ids(STUDY.replace("Why?", "Why not?"))
    assert first == ids(STUDY.replace("baseline:", "baseline:\n  model: {source: /some/where}"))
    assert not set(first) & set(ids(STUDY, "g"))
    assert not set(first) & set(ids(STUDY, version="2"))
    assert not set(first) & set(ids(STUDY + "resources: {num_threads: 2}\n"))
    assert first[:1] == ids(STUDY.replace("[0, 1]", "[0]"))  # adding seeds keeps what is done


@pytest.mark.parametrize(
    ("factor", "reference"),
    [
        ("algorithm.kl_coef: [0, 0.040]", "0.04"),
        ("algorithm.kl_coef: [0, 0.02]", "0"),
        ("train.weight_decay: [0.1, 0]", "0"),  # the baseline's 0.0, as the level is written
        ("train.trainable_modules: [[q, k], null]", "null"),
        ("task: [{name: products}, {name: chain_sum}]", "chain_sum"),
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
    assert study.reference_level(path) == reference
    assert reference in {trial.cell[path] for trial in trials_of(study)}


def test_views(tmp_path):
    text = with_factors("  train.precision: [bf16, fp32]") + "views: [fp16]\n"
    text = text.replace("kind: exact", "kind: exact\n    response: sparsity.bitwise@fp8_e4m3")
    assert load(tmp_path, text).measured_views == ("bf16", "fp16", "fp8_e4m3")
    assert load(tmp_path).measured_views == ("stored",)
    assert trials_of(load(tmp_path))[0].label == "grpo s0"
