"""Configuration is frozen and strict, and its parts must fit."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from rlsparse.algorithm_config import DpoConfig, Reward, SftConfig
from rlsparse.config import STORED_DTYPE, ProbeConfig, TrainConfig, TrialConfig
from rlsparse.task_config import BasicArithmeticConfig, DatasetConfig


def test_configuration_is_frozen_and_strict():
    config = TrialConfig(algorithm=SftConfig())
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    for wrong in (
        {"learning_rate": float("nan")},
        {"learning_rate": -1e-5},
        {"max_grad_norm": 0.0},
        {"num_steps": 0},
        {"precision": "fp8"},
        {"lr": 1e-5},
    ):
        with pytest.raises(ValidationError):
            TrainConfig.model_validate(wrong)
    with pytest.raises(ValidationError):
        DpoConfig(beta=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": {"name": "grpo"}, "train": {"batch_size": 12}}, "multiple of"),
        (
            {
                "algorithm": {"name": "grpo"},
                "train": {"batch_size": 16, "gradient_accumulation_steps": 4},
            },
            "= 4 must be a multiple of algorithm.num_generations 8",
        ),
        ({"algorithm": {"name": "sft"}, "train": {"batch_size": 9,
          "gradient_accumulation_steps": 2}}, "9 is not a multiple"),
        ({"algorithm": {"name": "sft"}, "train": {"num_steps": 3}, "probe": {"snapshots": [2, 4]}},
         r"\[4\] lie beyond train.num_steps 3"),
        ({"algorithm": {"name": "sft"}, "train": {"num_steps": 3}, "probe": {"update_interval": 4}},
         "update_interval 4 lies beyond train.num_steps 3"),
        ({"algorithm": {"name": "trpo"}}, "'grpo', 'rloo', 'ppo', 'prime'"),
        ({"algorithm": {"name": "ppo"}, "train": {"batch_size": 12}}, "= 12 must be a multiple of"),
        ({"algorithm": {"name": "ppo"}, "task": {"num_train_problems": 63}},
         r"rollout takes 64 prompts .*num_train_problems is 63; raise it"),
        ({"algorithm": {"name": "dpo", "data": "gold", "reward": "random"}},
         "reward random would do nothing with data gold"),
        ({"algorithm": {"name": "kto"}, "train": {"batch_size": 3,
          "gradient_accumulation_steps": 3}}, "is 1 and must be at least 2"),
    ],
)  # fmt: skip
def test_parts_must_fit(config, message):
    with pytest.raises(ValidationError, match=message):
        TrialConfig.model_validate(config)


def test_snapshot_steps_end_with_the_last():
    train = TrainConfig(num_steps=10)
    config = TrialConfig(algorithm=SftConfig(), train=train, probe=ProbeConfig(snapshots=(7, 2, 7)))
    assert config.snapshot_steps == (2, 7, 10)
    assert TrialConfig(algorithm=SftConfig(), train=train).snapshot_steps == (10,)


def test_stored_dtype():
    for precision, dtype in STORED_DTYPE.items():
        config = TrialConfig(algorithm=SftConfig(), train=TrainConfig(precision=precision))
        assert config.stored_dtype == dtype
    assert STORED_DTYPE == {
        "bf16": "bf16", "bf16-weights": "bf16", "bf16-mixed": "bf16", "fp32": "fp32",
    }  # fmt: skip


def test_configuration_and_models_need_no_torch():
    code = (
        "import sys, rlsparse.config, rlsparse.study, rlsparse.tables;"
        "from rlsparse.models import resolve; from rlsparse.config import ModelConfig;"
        "assert resolve(ModelConfig()).is_dir();"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'trl', 'ray', 'mlflow', 'pandas', 'numba'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_empty_source_is_no_model():
    with pytest.raises(ValidationError, match="at least 1 character"):
        TrialConfig.model_validate({"algorithm": {"name": "sft"}, "model": {"source": ""}})


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("task", True), ("shuffled", True), ("random", True), ("mine:reward", True),
     ("a.b_2:_c", True), ("tasks", False), ("", False), ("mine", False), ("mine:", False),
     (":reward", False), ("a b:c", False), ("mine:reward\n", False), ("a:b:c", False)],
)  # fmt: skip
def test_a_reward_is_a_word_or_a_function(text, is_one):
    try:
        TypeAdapter(Reward).validate_python(text)
    except ValidationError:
        assert not is_one
    else:
        assert is_one


def test_texts_of_tasks():
    for wrong in ({"operators": ""}, {"operators": "+x"}, {"operators": "**%"}):
        with pytest.raises(ValidationError):
            BasicArithmeticConfig(**wrong)
    assert BasicArithmeticConfig(operators="-/").operators == "-/"
    for wrong in ({"grader": "exactly"}, {"prompt_template": "Q: {question}"}, {"source": ""}):
        with pytest.raises(ValidationError):
            DatasetConfig.model_validate({"source": "a.csv", **wrong})
    template = "Question:\n{prompt}\nAnswer:"
    assert DatasetConfig(source="a.csv", prompt_template=template).prompt_template == template


def test_seeds_follow_the_trial_unless_they_are_set():
    trial = TrialConfig.model_validate({"algorithm": {"name": "ppo"}, "seed": 3})
    assert (trial.data_seed, trial.sampling_seed, trial.init_seed) == (3, 3, 3)
    apart = {"name": "ppo", "sampling_seed": 0, "init_seed": 1}
    trial = TrialConfig.model_validate(
        {"algorithm": apart, "train": {"data_seed": 0}, "seed": 3, "task": {"num_terms": 4}}
    )
    assert (trial.data_seed, trial.sampling_seed, trial.init_seed) == (0, 0, 1)
    assert trial.task.name == "chain_sum"
    sft = TrialConfig(algorithm=SftConfig(), seed=5)
    assert (sft.data_seed, sft.sampling_seed, sft.init_seed) == (5, 5, 5)
