"""Study files are read strictly: each error names the file, the line and the nearest name."""

import pytest
from small_study import STUDY, load, with_factors

from rlsparse.algorithm_config import GrpoConfig, SftConfig
from rlsparse.errors import ConfigError
from rlsparse.study_file import load_study

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
        ("name: grpo", "name: dpo, kl_coef: 0.1", 3,
         "unknown key baseline.algorithm.kl_coef; known: beta, data, name, num_samples_per_prompt"),
        ("kind: exact", "kind: exact\n    valu: 1", 11,
         "unknown key claims.0.valu; did you mean value?"),
        ("kind: exact", "kind: exact\n    null: tensor", 11,
         "unknown key claims.0.null; known: at, id, kind, note, response, source, value, where"),
        ("null: tensor", "null: tensors", 13, "unknown claims.1.null tensors; did you mean tens"),
        ("kind: above_null", "kind: above_null\n    at: {stepp: 3}", 13,
         "unknown key claims.1.at.stepp; did you mean step?"),
        ("kind: exact", "kind: exakt", 10,
         "unknown claims.0.kind exakt; did you mean exact? known: above_null, associated"),
        ("name: grpo", "name: gpro", 3,
         "unknown baseline.algorithm.name gpro; did you mean grpo? known: dpo, grpo, kto, orpo"),
        ("{name: grpo}", "\n    beta: 1\n    name: gpro", 5,
         "unknown baseline.algorithm.name gpro; did you mean grpo?"),
        ("{name: grpo}", "{beta: 0.1}", 3,
         "baseline.algorithm: name is missing; known: dpo, grpo, kto, orpo, ppo, prime, rft"),
        ("{name: grpo}", "grpo", 3,
         "baseline.algorithm: must be a mapping, such as {name: grpo} (got 'grpo')"),
        ("{name: grpo}", "[grpo]", 3, "baseline.algorithm: must be a mapping (got ['grpo'])"),
        ("train:", "task: {name: chain_sums}\n  train:", 4,
         "unknown baseline.task.name chain_sums; did you mean chain_sum? known: basic_arithmetic"),
        ("train:", "task: {name: chain_sum, num_term: 2}\n  train:", 4,
         "unknown key baseline.task.num_term; did you mean num_terms?"),
        ("train:", "task: {name: dataset}\n  train:", 4, "baseline.task.source: Field required"),
        ("train:", "task: {name: dataset, source: a.csv, grader: maths}\n  train:", 4,
         "baseline.task.grader: must be exact, math or module:function (got 'maths')"),
        ("train:", "task: {name: dataset, source: a.csv, prompt_template: Q}\n  train:", 4,
         "baseline.task.prompt_template: must be a text with {prompt} (got 'Q')"),
        ("train:", "task: {name: basic_arithmetic, operators: '+^'}\n  train:", 4,
         "baseline.task.operators: must be one or more of + - * / (got '+^')"),
        ("name: grpo", "name: grpo, reward: tasks", 3,
         "baseline.algorithm.reward: must be task, shuffled, random or module:function (got"),
        ("train:", "train:\n    trainable_modules: [z]", 5,
         "unknown baseline.train.trainable_modules.0 z; known: q, k, v"),
        ("num_steps: 20", "max_grad_norm: 0", 5,
         "baseline.train.max_grad_norm: Input should be greater than 0 (got 0)"),
        ("num_steps: 20", "num_steps: many", 5,
         "baseline.train.num_steps: Input should be a valid integer"),
        ("num_steps: 20", "num_steps: 0", 5, "greater than or equal to 1 (got 0)"),
        ("seeds: [0, 1]", "seeds: []", 7, "seeds: must have at least 1 item (got [])"),
        ("seeds: [0, 1]", "seeds: [0, x]", 7, "seeds.1: Input should be a valid integer"),
        ("seeds: [0, 1]", "seeds: [0, 0]", 7, "seeds: 0 given more than once"),
        ("question: Why?\n", "", 1, "question: Field required"),
        ("id: second", "id: first", 8, "claims: first given more than once"),
        ("seeds:", "resources: {num_thread: 2}\nseeds:", 7,
         "unknown key resources.num_thread; did you mean num_threads?"),
        ("seeds:", "controls: [lr_one]\nseeds:", 7,
         "unknown controls.0 lr_one; did you mean lr_zero? known: lr_zero, same_seed"),
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
        (with_factors("  train.learning_rate: []"), "at least 1 item"),
    ],
)
def test_every_other_error_names_the_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load(tmp_path, text)
    assert str(tmp_path / "why.yaml") in str(raised.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (with_factors("  train.lr: [1]"), 8, "factors: unknown factor train.lr; "),
        (with_factors("  train.max_grad_norm: [1]\n  train.learning_rat: [1]"), 9,
         "factors: unknown factor train.learning_rat; did you mean train.learning_rate?"),
        (with_factors("  algorithm.beta: [0.1, 0.2]"), 8, "unknown factor algorithm.beta"),
        (with_factors("  seed: [0, 1]"), 8, "list the seeds under `seeds`"),
        (STUDY.replace("  train:", "  seed: 3\n  train:"), 4, "list the seeds under `seeds`"),
        (with_factors("  train.mask:\n    - null\n    - {from: cell, fraction: .nan}"),
         10, "factors.train.mask.1.fraction: must be a finite number (got nan)"),
        (with_factors("  train.learning_rate: [1.0, -.inf]"), 8,
         "factors.train.learning_rate.1: must be a finite number (got -inf)"),
        (with_factors("  train.learning_rate:\n    - 1.0\n    - fast"), 10,
         "factors: cell train.learning_rate fast is not a valid trial: "
         "train.learning_rate: Input should be a valid number, unable to parse string as a number "
         "(got 'fast')"),
        (with_factors("  train.momentum: [0.5, 1]\n  train.weight_decay: [0, 0.1]"), 8,
         "train.momentum: Input should be less than 1 (got 1)"),
        (with_factors("  train.batch_size: [64,\n     12]"), 9,
         "factors: cell train.batch_size 12 is not a valid trial: train.batch_size / "
         "gradient_accumulation_steps = 12 must be a multiple of algorithm.num_generations 8"),
        (with_factors("  algorithm.name: [grpo, gpro]"), 8,
         "cell algorithm.name gpro is not a valid trial: unknown algorithm.name gpro; "
         "did you mean grpo? known: dpo,"),
        (with_factors("  task.name: [chain_sum, dataset]"), 8,
         "cell task.name dataset is not a valid trial: task.source: Field required"),
        (with_factors("  algorithm: [grpo, sft]"), 8,
         "algorithm: must be a mapping, such as {name: grpo} (got 'grpo')"),
        (with_factors("  algorithm: [{name: sft, beta: 1}]"), 8,
         "is not a valid trial: unknown key algorithm.beta; did you mean data? known: data, name"),
        (with_factors("  algorithm.reward: [task, tasks]"), 8,
         "algorithm.reward: must be task, shuffled, random or module:function (got 'tasks')"),
        (with_factors("  train.trainable_modules: [null, [q, z]]"), 8,
         "cell train.trainable_modules [q, z] is not a valid trial: "
         "unknown train.trainable_modules.1 z; known: q, k"),
        (STUDY + "  - {id: c, kind: equivalent, factor: algorithm.kl_coef}\n", 14,
         "c names the factor algorithm.kl_coef, which this study does not vary; its factors: none"),
        (with_factors("  train.num_steps: [9]", "controls: [lr_zero, random_reward]")
         .replace("grpo", "sft"), 9,
         "controls: random_reward needs an algorithm with a reward, this study has sft; "
         "with a reward for what they sample: dpo, grpo, kto, orpo, ppo, prime, rft, rloo, simpo"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_factors_and_claims_names_the_line(tmp_path, text, line, message):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / 'why.yaml'}:{line}: "), said
    assert message in said
    assert len(said.splitlines()) == 1, said


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


def test_a_value_that_is_only_set_is_named_in_full(tmp_path):
    with pytest.raises(ConfigError, match=r"key baseline\.train\.num_generations; known"):
        load(tmp_path, STUDY, "train.num_generations=3")
    with pytest.raises(ConfigError, match=r"baseline\.task\.num_terms: .*\(got 0\)"):
        load(tmp_path, STUDY, "task.num_terms=0")


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("response: sparsity.bitwize", r"unknown response sparsity.bitwize; did you mean sparsity"),
        ("response: sparsity.bitwise@bf61", r"unknown view bf61; did you mean bf16"),
        ("where: {algorithmn: grpo}", r"unknown selector algorithmn; did you mean algorithm"),
        ("where: {algorithm: ppo}", r"no planned trial has algorithm ppo; there: grpo"),
        ("where: {task: products}", r"no planned trial has task products; there: chain_sum"),
        ("where: {algorithm.reward: random}", r"no planned trial has .* random; there: task"),
        ("where: {control: lr_zero}", r"no planned trial has control lr_zero; there: None"),
        ("where: {seed: 0, train.learning_rate: 1.0}", r"no planned trial has train.learning_rate"),
    ],
)
def test_a_claim_that_nothing_could_decide_is_found_before_training(tmp_path, claim, said):
    with pytest.raises(ConfigError, match=rf"why.yaml:14: claims: late: {said}"):
        load(tmp_path, STUDY + f"  - {{id: late, kind: exact, {claim}}}\n")


def test_claims_see_surrogates_only_if_they_ask(tmp_path):
    text = with_factors("  algorithm.reward: [task, random]", "controls: [shuffled_reward]")
    for asked in (
        "where: {role: surrogate}",
        "where: {control: shuffled_reward}",
        "where: {algorithm.reward: random}",
        "where: {algorithm.reward: shuffled}",
    ):
        load(tmp_path, text + f"  - {{id: late, kind: exact, {asked}}}\n")
    other = (
        with_factors("  algorithm: [{name: grpo}, {name: rloo, reward: random}]")
        + "  - {id: late, kind: exact, where: {algorithm: rloo}}\n"
    )
    with pytest.raises(ConfigError, match=r"late: no planned trial has \{'algorithm': 'rloo'\}"):
        load(tmp_path, other)


GRID = with_factors(
    "  algorithm.kl_coef: [0.0, 0.04]\n  train.max_grad_norm: [null, 1.0]",
    "controls: [lr_times_3]",
).partition("claims:")[0]
"""A study with two factors, up to its claims."""


def test_all_kinds_of_claims_are_read(tmp_path):
    listed = [
        "kind: reproduces, value: 0.8, margin: 0.05",
        "kind: below_null, null: [tensor, update_size, margins], module: q",
        "kind: recovers, response: score_after, a: {train.max_grad_norm: 1.0}, "
        "b: {algorithm.kl_coef: 0.0, train.max_grad_norm: null}, "
        "random: {algorithm.kl_coef: 0.04, train.max_grad_norm: null}",
        "kind: monotone, factor: algorithm.kl_coef, direction: increasing",
        "kind: interaction, factor: algorithm.kl_coef, by: train.max_grad_norm",
        "kind: associated, on: sparsity.bitwise@fp32, response: kl_final, sign: negative",
        "kind: greater, a: {seed: 0}, b: {seed: 1}, at: {kl: common}",
    ]
    claims = "".join(f"  - {{id: c{i}, {claim}}}\n" for i, claim in enumerate(listed))
    study = load(tmp_path, f"{GRID}claims:\n{claims}")
    kinds = [claim.kind for claim in study.claims]
    assert kinds[:3] == ["reproduces", "below_null", "recovers"]
    assert kinds[3:] == ["monotone", "interaction", "associated", "greater"]
    assert study.claims[1].nulls == ("tensor", "update_size", "margins")
    assert "fp32" in study.measured_views


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("kind: monotone, direction: increasing, factor: algorithm.kl_coeff",
         "claims: late names the factor algorithm.kl_coeff, which this study does not vary; "
         "did you mean algorithm.kl_coef?"),
        ("kind: monotone, direction: up, factor: algorithm.kl_coef",
         "unknown claims.0.direction up; known: increasing, decreasing"),
        ("kind: interaction, factor: algorithm.kl_coef, by: train.max_grad_nor",
         "late names the factor train.max_grad_nor, which this study does not vary; "
         "did you mean train.max_grad_norm?"),
        ("kind: interaction, factor: algorithm.kl_coef, by: algorithm.kl_coef",
         "late: algorithm.kl_coef cannot interact with itself; name two factors"),
        ("kind: associated, on: score_gian",
         "late: unknown response score_gian; did you mean score_gain? known: score_after"),
        ("kind: associated, on: overlap.bitwise", "late: unknown response overlap.bitwise"),
        ("kind: associated, on: sparsity.bitwise@bf61",
         "late: unknown view bf61; did you mean bf16"),
        ("kind: recovers, a: {seed: 0}, b: {seed: 1}, random: {train.max_grad_nrm: 1.0}",
         "late: unknown selector train.max_grad_nrm; did you mean train.max_grad_norm?"),
        ("kind: recovers, a: {seed: 0}, b: {seed: 1}, random: {train.max_grad_norm: 2.0}",
         "late: no planned trial has train.max_grad_norm 2.0; there: 1.0, None"),
        ("kind: greater, margin: 0, a: {seed: 0}, b: {seed: 1}",
         "late: margin 0 of sparsity.bitwise@stored is an odds ratio, must be above 0"),
        ("kind: greater, response: failed, a: {seed: 0}, b: {seed: 1}, at: {kl: common}",
         "late: at.kl interpolates density, which greater failed cannot use"),
        ("kind: greater, a: {seed: 0}, b: {algorithm.kl_coef: 0.04}",
         "late: a and b select 2 runs in common; say in both what tells them apart"),
        ("kind: associated, on: score_gain, where: {algorithm.kl_coef: 0.04}",
         "late: no seed has the 3 runs that a slope takes; select runs of one cell"),
        ("kind: above_null, module: qq", "late: unknown module qq; did you mean q?"),
        ("kind: above_null, module: q, tensor: a.b", "takes at most one of module, tensor"),
        ("kind: above_null, between: algorithm.kl_cof",
         "late: runs do not differ in algorithm.kl_cof; did you mean algorithm.kl_coef? known: "),
        ("kind: above_null, between: train.batch_size",
         "late: runs do not differ in train.batch_size"),
        ("kind: below_null, null: [tensor, surrogate]",
         "late: null surrogate needs runs whose reward carries no information; add one of the "
         "controls shuffled_reward, random_reward, or the factor algorithm.reward"),
        ("kind: greater, a: {seed: 0}, b: {seed: 1}, at: {kl: commn}", "claims.0.at.kl: "),
        ("kind: greater, a: {seed: 0}, b: {seed: 1}, at: {kl: 1, score: 1}",
         "`at` takes exactly one of step, score, kl"),
    ],
)  # fmt: skip
def test_new_kinds_are_checked_before_training(tmp_path, claim, said):
    text = f"{GRID}claims:\n  - {{id: late, {claim}}}\n"
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    line = text.splitlines().index(f"  - {{id: late, {claim}}}") + 1
    assert str(raised.value).startswith(f"{tmp_path / 'why.yaml'}:{line}: ")
    assert said in str(raised.value)


MASKED_GRID = with_factors("  train.mask: [null, {from: baseline}]").partition("claims:")[0]


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("kind: above_null",
         "late: trials under train.mask are left out of overlaps: the mask forces which weights "
         "they share; select the runs that train all weights with where: {train.mask: null}"),
        ("kind: above_null, where: {train.mask: final}", "late: trials under train.mask are left"),
        ("kind: above_null, between: train.mask",
         "late: runs do not differ in train.mask; known: seed"),
    ],
)  # fmt: skip
def test_overlaps_of_trials_under_a_mask_are_refused(tmp_path, claim, said):
    text = f"{MASKED_GRID}claims:\n  - {{id: late, {claim}}}\n"
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    line = text.splitlines().index(f"  - {{id: late, {claim}}}") + 1
    assert str(raised.value).startswith(f"{tmp_path / 'why.yaml'}:{line}: ")
    assert said in str(raised.value)


def test_overlaps_of_full_trials_are_fine_beside_masked_ones(tmp_path):
    claim = "{id: fine, kind: above_null, where: {train.mask: null}}"
    assert load(tmp_path, f"{MASKED_GRID}claims:\n  - {claim}\n").claims[0].id == "fine"


TUNED_GRID = (
    with_factors(
        "  algorithm.kl_coef: [0.0, 0.04]\n  train.max_grad_norm: [null, 1.0]",
        "controls: [lr_times_3]",
    )
    .partition("claims:")[0]
    .replace("baseline:\n", "baseline:\n  task: {num_validation_problems: 8}\n")
)
SIDES = "kind: greater, a: {train.max_grad_norm: 1.0}, b: {train.max_grad_norm: null}"
TUNE = "tune: algorithm.kl_coef, tuning_seeds: [0]"


def test_sides_may_be_tuned(tmp_path):
    recovers = ("kind: recovers, a: {train.max_grad_norm: 1.0}, b: {train.max_grad_norm: null, "
                "seed: 0}, random: {train.max_grad_norm: null, seed: 1}, "
                "tune: algorithm.kl_coef, tuning_seeds: []")  # fmt: skip
    claims = f"claims:\n  - {{id: c, {SIDES}, {TUNE}}}\n"
    claims += "  - {id: d, kind: within, response: score_validation, low: 0.1, high: 0.2}\n"
    study = load(tmp_path, TUNED_GRID + claims)
    first = study.claims[0]
    assert (first.tune, first.tuning_seeds) == ("algorithm.kl_coef", (0,))
    assert first.compared == ("train.max_grad_norm", "train.max_grad_norm", "algorithm.kl_coef")
    assert study.baseline.task.num_validation_problems == 8
    with pytest.raises(ConfigError, match="tune and tuning_seeds go together"):
        load(tmp_path, f"{TUNED_GRID}claims:\n  - {{id: c, {recovers}}}\n")


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (f"{SIDES}, tune: algorithm.kl_coef",
         "tune and tuning_seeds go together: the factor whose level is chosen, and the seeds"),
        (f"{SIDES}, tuning_seeds: [0]", "tune and tuning_seeds go together"),
        (f"{SIDES}, tuning_seeds: [0], tune: algorithm.kl_coeff",
         "late: tune names the factor algorithm.kl_coeff, which this study does not vary; did you "
         "mean algorithm.kl_coef?"),
        (f"{SIDES}, tuning_seeds: [0], tune: train.learning_rate",
         "late: tune names the factor train.learning_rate, which this study does not vary"),
        (f"{SIDES}, tune: algorithm.kl_coef, tuning_seeds: [0, 7, 9]",
         "late: tuning_seeds 7, 9: no such seeds; those of a: 0, 1"),
        (f"{SIDES}, tune: algorithm.kl_coef, tuning_seeds: [1, 0]",
         "late: tuning_seeds are all seeds there are, which leaves none to compare; leave"),
        ("kind: greater, a: {seed: 0}, b: {seed: 1}, " + TUNE,
         "late: tuning_seeds 0: no such seeds; those of b: 1"),
        (f"{SIDES}, {TUNE}, where: {{algorithm.kl_coef: 0.0}}",
         "late: where fixes algorithm.kl_coef, which the claim tunes; leave algorithm.kl_coef out"),
        ("kind: greater, a: {algorithm.kl_coef: 0.0}, b: {algorithm.kl_coef: 0.04}, " + TUNE,
         "late: a fixes algorithm.kl_coef, which the claim tunes; leave algorithm.kl_coef out"),
        (f"kind: monotone, factor: algorithm.kl_coef, direction: increasing, {TUNE}",
         "unknown key claims.0.tune"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused(tmp_path, claim, said):
    text = f"{TUNED_GRID}claims:\n  - {{id: late, {claim}}}\n"
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    line = text.splitlines().index(f"  - {{id: late, {claim}}}") + 1
    assert str(raised.value).startswith(f"{tmp_path / 'why.yaml'}:{line}: ")
    assert said in str(raised.value)


def test_each_error_of_tuning_names_its_own_line(tmp_path):
    keys = ["id: late", *SIDES.split(", "), "tune: algorithm.kl_coef", "tuning_seeds: [3]"]
    text = f"{TUNED_GRID}claims:\n  - " + "\n    ".join(keys) + "\n"
    for old, line in (("tuning_seeds: [3]", "tuning_seeds: [3]"),
                      ("tune: algorithm.kl_coef", "tune: train.seed")):  # fmt: skip
        text = text.replace(old, line)
        with pytest.raises(ConfigError) as raised:
            load(tmp_path, text)
        place = text.splitlines().index(f"    {line}") + 1
        assert str(raised.value).startswith(f"{tmp_path / 'why.yaml'}:{place}: ")


@pytest.mark.parametrize(
    ("claim", "field"),
    [
        (f"{SIDES}, {TUNE}", "tune"),
        (f"{SIDES}, response: score_validation", "response"),
        ("kind: associated, on: score_validation", "on"),
    ],
)
def test_validation_scores_need_validation_problems(tmp_path, claim, field):
    text = f"{GRID}claims:\n  - {{id: late, {claim}}}\n"
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    said = f"late: {field} asks for validation scores, which the runs of "
    assert said in str(raised.value)
    assert "set task.num_validation_problems" in str(raised.value)
    load(tmp_path, TUNED_GRID + text.removeprefix(GRID))


def test_surrogates_may_be_a_control_or_a_factor(tmp_path):
    claim = "claims:\n  - {id: late, kind: above_null, null: surrogate}\n"
    load(tmp_path, GRID.replace("lr_times_3", "random_reward") + claim)
    load(
        tmp_path,
        GRID.replace("algorithm.kl_coef: [0.0, 0.04]", "algorithm.reward: [task, random]") + claim,
    )


def test_interactions_name_two_factors(tmp_path):
    pair = "[algorithm.kl_coef, train.max_grad_norm]"
    study = load(tmp_path, f"{GRID}interactions: [{pair}]\n")
    assert study.interactions == (("algorithm.kl_coef", "train.max_grad_norm"),)
    for wrong, said in (
        ("[algorithm.kl_coef, train.max_grad]", "interactions names the factor train.max_grad, "),
        ("[algorithm.kl_coef, algorithm.kl_coef]", "interactions: algorithm.kl_coef with itself"),
    ):
        with pytest.raises(ConfigError, match=r"why\.yaml:14: ") as raised:
            load(tmp_path, f"{GRID}interactions:\n  - {pair}\n  - {wrong}\n".replace("\n\n", "\n"))
        assert said in str(raised.value)


WRONG = [
    ("kind: within, low: 0.4, high: 0.4", "low 0.4 must be below high 0.4"),
    ("kind: within, low: 90, high: 95", "low 90 of sparsity.bitwise is a fraction"),
    ("kind: reproduces, value: 93.1, margin: 1", "value 93.1 of sparsity.bitwise is a fraction"),
    ("kind: reproduces, response: score_after, value: -0.1, margin: 1", "value -0.1 of score"),
    ("kind: exact, value: 100", "value 100 of sparsity.bitwise is a fraction"),
    ("kind: exact, at: {step: 7}", "no selected trial has a snapshot at step 7; there: 20; furth"),
    ("kind: associated, on: sparsity.bitwise@stored", "sparsity.bitwise@stored is the response it"),
    ("kind: equivalent, factor: algorithm.kl_coef, where: {algorithm.kl_coef: 0.0}",
     "where fixes algorithm.kl_coef, in which the claim compares runs; leave algorithm.kl_coef"),
    ("kind: monotone, direction: increasing, factor: algorithm.kl_coef, "
     "where: {algorithm.kl_coef: 0.0}", "where fixes algorithm.kl_coef"),
    ("kind: interaction, factor: algorithm.kl_coef, by: train.max_grad_norm, "
     "where: {train.max_grad_norm: 1.0}", "where fixes train.max_grad_norm"),
    ("kind: above_null, where: {seed: 0}", "where fixes seed, in which the claim compares runs"),
    ("kind: below_null, between: algorithm.kl_coef, where: {algorithm.kl_coef: 0.0}",
     "where fixes algorithm.kl_coef"),
    ("kind: above_null, null: []", "null: must have at least 1 item (got [])"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "said"), WRONG)
def test_claims_that_no_runs_could_decide_are_refused(tmp_path, claim, said):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, f"{GRID}claims:\n  - {{id: late, {claim}}}\n")
    text = str(raised.value)
    line = len(GRID.splitlines()) + 2
    assert text.startswith(f"{tmp_path / 'why.yaml'}:{line}: "), text
    assert said in text
    assert len(text.splitlines()) == 1, text


def test_numbers_that_are_no_fractions_may_exceed_one(tmp_path):
    listed = [
        "kind: within, response: kl_final, low: 2, high: 3",
        "kind: reproduces, response: score_gain, value: -0.1, margin: 0.2",
        "kind: above_null, where: {seed: 0}, between: algorithm.kl_coef",
        "kind: exact, at: {step: 20}",
    ]
    claims = "".join(f"  - {{id: c{i}, {claim}}}\n" for i, claim in enumerate(listed))
    assert len(load(tmp_path, f"{GRID}claims:\n{claims}").claims) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("claims:\n  - {id: Not Good, kind: exact}\n",
         "claims.0.id: must be lower-case letters, digits and hyphens (got 'Not Good')"),
        ("interactions: [[a]]\n", "interactions.0: must have 2 or more items"),
        ("interactions: [[a, b, c]]\n", "interactions.0: must have at most 2 items"),
    ],
)  # fmt: skip
def test_messages_are_in_our_words(tmp_path, text, said):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, GRID + text)
    assert said in str(raised.value)


def test_where_may_name_an_algorithm_whose_fields_are_compared(tmp_path):
    levels = "  algorithm: [{name: grpo, kl_coef: 0.0}, {name: grpo, kl_coef: 0.04}]"
    grid = with_factors(levels, "controls: [lr_times_3]").partition("claims:")[0]
    claim = "{id: c, kind: equivalent, factor: algorithm, where: {algorithm: grpo}}"
    text = f"{grid}claims:\n  - {claim}\n"
    assert len(load(tmp_path, text).claims) == 1
    with pytest.raises(ConfigError, match=r"claims: c: .*; add the control lr_times_3"):
        load(tmp_path, text.replace("controls: [lr_times_3]", ""))
