"""Studies: errors name file, line and remedy; a grid expands to each trial once."""

from pathlib import Path

import pytest

from rlsparse.config import DpoConfig, GrpoConfig, SftConfig
from rlsparse.errors import ConfigError
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

STUDY = """\
question: Why?
baseline:
  algorithm: {name: grpo}
  train:
    num_steps: 20
    learning_rate: 1e-5
seeds: [0, 1]
claims:
  - id: first
    kind: exact
  - id: second
    kind: above_null
    null: tensor
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "why.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = STUDY, *overrides: str) -> Study:
    return load_study(write(folder, text), overrides)


def trials_of(study: Study) -> list[Trial]:
    return expand(study, fingerprint=lambda model: f"hash of {model.source}", task_version="1")


def with_factors(factors: str, controls: str = "") -> str:
    return STUDY.replace("seeds:", f"factors:\n{factors}\n{controls}\nseeds:")


# --- reading ---------------------------------------------------------------------------------


def test_a_small_study(tmp_path):
    study = load(tmp_path)
    assert (study.name, study.seeds) == ("why", (0, 1))
    assert study.baseline.algorithm == GrpoConfig()
    assert study.claims[1].null == "tensor"  # the key `null`, which YAML reads as a value
    assert study.default_view == "stored"


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", "0.00001", "1.0e-05"])
def test_floats_of_yaml_1_2(tmp_path, text):
    study = load(tmp_path, STUDY.replace("1e-5", text))
    rate = study.baseline.train.learning_rate
    assert (type(rate), rate) == (float, 1e-5)
    factor = load(tmp_path, with_factors(f"  train.learning_rate: [{text}, 1]"))
    assert [type(level) for level in factor.factors["train.learning_rate"]] == [float, int]


def test_words_of_yaml_1_1_are_text(tmp_path):
    study = load(tmp_path, with_factors("  algorithm.scale_rewards: [none, group]"))
    assert study.factors["algorithm.scale_rewards"] == ["none", "group"]
    assert load(tmp_path, STUDY.replace("Why?", "no")).question == "no"


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seeds: [0, 1]", "seeds: [0]\nseed: [1]", 8, "unknown key seed; did you mean seeds?"),
        ("num_steps", "num_step", 5, "unknown key baseline.train.num_step; did you mean num_steps"),
        ("train:", "trian:", 4, "unknown key baseline.trian; did you mean train?"),
        ("name: grpo", "name: grpo, kl_coeff: 0.1", 3,
         "unknown key baseline.algorithm.kl_coeff; did you mean kl_coef? known: clip_range"),
        ("name: grpo", "name: dpo, kl_coef: 0.1", 3, "known: beta, name, num_samples_per_prompt"),
        ("kind: exact", "kind: exact\n    valu: 1", 11,
         "unknown key claims.0.valu; did you mean value?"),
        ("kind: exact", "kind: exact\n    null: tensor", 11,
         "unknown key claims.0.null; known: at, id, kind, note, response, source, value, where"),
        ("null: tensor", "null: tensors", 13, "claims.1.null: Input should be 'uniform'"),
        ("kind: above_null", "kind: above_null\n    at: {stepp: 3}", 13,
         "unknown key claims.1.at.stepp; did you mean step?"),
        ("kind: exact", "kind: exakt", 9, "'exact'"),
        ("name: grpo", "name: ppo", 3, "'sft', 'dpo', 'grpo'"),
        ("num_steps: 20", "num_steps: many", 5,
         "baseline.train.num_steps: Input should be a valid integer"),
        ("num_steps: 20", "num_steps: 0", 5, "greater than or equal to 1 (got 0)"),
        ("seeds: [0, 1]", "seeds: []", 7, "seeds: Tuple should have at least 1 item"),
        ("seeds: [0, 1]", "seeds: [0, x]", 7, "seeds.1: Input should be a valid integer"),
        ("seeds: [0, 1]", "seeds: [0, 0]", 1, "seeds ['0'] given more than once"),
        ("question: Why?\n", "", 1, "question: Field required"),
        ("id: second", "id: first", 1, "claim ids ['first'] given more than once"),
        ("seeds:", "resources: {num_thread: 2}\nseeds:", 7,
         "unknown key resources.num_thread; did you mean num_threads?"),
        ("seeds:", "controls: [lr_one]\nseeds:", 7, "'lr_zero', 'same_seed' or 'lr_times_3'"),
    ],
)  # fmt: skip
def test_errors_name_the_line_and_the_nearest_key(tmp_path, old, new, line, message):
    assert STUDY.count(old) == 1
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, STUDY.replace(old, new))
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / 'why.yaml'}:{line}: "), text
    assert message in text
    assert len(text.splitlines()) == 1, text


def test_all_errors_are_told_at_once(tmp_path):
    text = STUDY.replace("num_steps", "num_step").replace("kind: exact", "kind: exact\n    valu: 1")
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        ("just text\n", "must be a mapping"),
        (STUDY + "question: Again?\n", "is not valid YAML: .*duplicate key.* line 14"),
        (STUDY.replace("[0, 1]", "[0, 1"), "is not valid YAML"),
        (STUDY.replace("Why", "Why\x07"), "is not valid YAML"),
        (with_factors("  train.lr: [1]"), "unknown factor train.lr; .*train.learning_rate"),
        (with_factors("  train.learning_rat: [1]"), "did you mean train.learning_rate?"),
        (with_factors("  algorithm.beta: [0.1, 0.2]"), "unknown factor algorithm.beta"),
        (with_factors("  seed: [0, 1]"), "list the seeds under `seeds`"),
        (STUDY.replace("  train:", "  seed: 3\n  train:"), "list the seeds under `seeds`"),
        (with_factors("  train.learning_rate: []"), "at least 1 item"),
        (with_factors("  train.learning_rate: [fast]"),
         r"factors: cell .*fast.* is not a valid trial: train.learning_rate: .*valid number"),
        (with_factors("  train.batch_size: [64, 12]"),
         r"cell \{'train.batch_size': '12'\} .* multiple of algorithm.num_generations 8"),
        (with_factors("  algorithm.name: [grpo, ppo]"), "cell .*ppo.* 'sft', 'dpo', 'grpo'"),
        (with_factors("  algorithm: [grpo, sft]"), "is not a valid trial: algorithm"),
        (with_factors("  algorithm: [{name: sft, beta: 1}]"), "algorithm.sft.beta: Extra inputs"),
        (STUDY + "  - {id: c, kind: equivalent, factor: algorithm.kl_coef}\n",
         "c names the factor algorithm.kl_coef, which this study does not vary; .*none"),
    ],
)  # fmt: skip
def test_every_other_error_names_the_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load(tmp_path, text)
    assert str(tmp_path / "why.yaml") in str(raised.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read study file .*absent\.yaml: No such file"):
        load_study(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read study file"):
        load_study(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"question: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not valid YAML"):
        load_study(tmp_path / "latin.yaml")


# --- overrides -------------------------------------------------------------------------------


def test_overrides_set_values_before_checking(tmp_path):
    study = load(
        tmp_path,
        with_factors("  train.learning_rate: [1e-5]"),
        "baseline.train.num_steps=7",
        "train.learning_rate=1e-4",
        "task.num_eval_problems=32",
        "algorithm={name: sft}",
        "train.max_grad_norm=null",
        "seeds=[4, 5, 6]",
        "factors.train.learning_rate=[1e-6, 2e-6]",
        "resources.num_threads=2",
        "question=a=b",
    )
    assert study.baseline.train.num_steps == 7
    assert study.baseline.train.learning_rate == 1e-4
    assert study.baseline.train.max_grad_norm is None
    assert study.baseline.task.num_eval_problems == 32
    assert study.baseline.algorithm == SftConfig()
    assert study.seeds == (4, 5, 6)
    assert study.factors == {"train.learning_rate": [1e-6, 2e-6]}
    assert (study.resources.num_threads, study.question) == (2, "a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps", "must look like dotted.path=value"),
        ("=3", "must look like dotted.path=value"),
        ("seeds=[1", "the value is not YAML"),
        ("question.text=3", "question holds a value, not a mapping"),
        ("train.num_step=3", "unknown key baseline.train.num_step; did you mean num_steps"),
        ("algorithm.beta=0.1", "unknown key .*algorithm.beta"),
        ("factors.train.lr=[1]", "unknown factor train.lr"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, STUDY, override)


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
