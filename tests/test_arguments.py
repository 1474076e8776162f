"""The one table of names: what each algorithm has, and what TRL calls it."""

import math
from dataclasses import fields

import pytest
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

from rlsparse.algorithm_config import AlgorithmConfig
from rlsparse.algorithms import ALGORITHMS
from rlsparse.algorithms.arguments import (
    TRL_ARGUMENT,
    algorithm_arguments,
    engine_arguments,
    training_arguments,
)
from rlsparse.algorithms.experimental import experimental_classes
from rlsparse.config import TrainConfig, TrialConfig
from rlsparse.variants import models_of, tag_of

CLASSES = {tag_of(model): model for model in models_of(AlgorithmConfig)}
DATA = {"name", "reward", "sampling_seed"}
SAMPLED = DATA | {"num_samples_per_prompt", "temperature"}
ROLLOUT = DATA | {"steps_per_rollout", "generation"}
OURS = {
    "sft": {"name", "data"},
    "rft": SAMPLED,
    **dict.fromkeys(("dpo", "simpo", "orpo", "kto"), SAMPLED | {"data"}),
    "grpo": ROLLOUT,
    "rloo": ROLLOUT,
    "ppo": ROLLOUT
    | {
        "kl_coef", "discount", "gae_lambda", "value_clip_range", "value_learning_rate", "init_seed",
    },
    "prime": ROLLOUT
    | {
        "kl_coef", "discount", "reward_beta", "reward_learning_rate", "min_accuracy",
        "max_accuracy",
    },
}  # fmt: skip
"""Fields that never reach TRL's configuration under a name of the table."""


def trl_config(name: str) -> type:
    stable = {
        "sft": SFTConfig, "rft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig,
        "grpo": GRPOConfig, "rloo": RLOOConfig, "ppo": GRPOConfig, "prime": GRPOConfig,
    }  # fmt: skip
    if name in stable:
        return stable[name]
    module, cls = {"simpo": ("cpo", "CPOConfig"), "orpo": ("orpo", "ORPOConfig")}[name]
    return experimental_classes(module, cls)[0]


def arguments_of(name: str, **given) -> dict:
    return algorithm_arguments(TrialConfig(algorithm={"name": name, **given}).algorithm)


def test_all_algorithms_are_in_the_table():
    assert set(TRL_ARGUMENT) == set(ALGORITHMS) == set(CLASSES)


@pytest.mark.parametrize("name", list(CLASSES))
def test_every_field_is_mapped_or_ours(name):
    assert set(TRL_ARGUMENT[name]) == set(CLASSES[name].model_fields) - OURS[name]
    assert set(TRL_ARGUMENT[name].values()) <= {field.name for field in fields(trl_config(name))}


def test_a_kl_coefficient_is_no_temperature():
    has = {
        key: {n for n, c in CLASSES.items() if key in c.model_fields} for key in ("kl_coef", "beta")
    }
    assert has == {
        "kl_coef": {"ppo", "grpo", "rloo", "prime"},
        "beta": {"dpo", "kto", "orpo", "simpo"},
    }
    meaning = {
        name: key
        for name, table in TRL_ARGUMENT.items()
        for key, trl in table.items()
        if trl == "beta"
    }
    assert meaning == {
        "grpo": "kl_coef", "rloo": "kl_coef",
        "dpo": "beta", "kto": "beta", "orpo": "beta", "simpo": "beta",
    }  # fmt: skip


def test_values_arrive_under_their_names():
    given = {"kl_coef": 0.3, "clip_range": 0.1, "num_generations": 4, "temperature": 0.5}
    expected = {"beta": 0.3, "epsilon": 0.1, "num_generations": 4, "temperature": 0.5}
    assert arguments_of("rloo", **given, num_iterations=3) == {**expected, "num_iterations": 3}
    assert arguments_of("simpo", beta=3.0, gamma=0.9) == {"beta": 3.0, "simpo_gamma": 0.9}
    assert "beta" not in arguments_of("ppo", kl_coef=0.3)


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "prime"])
def test_no_clip_range_is_an_infinite_one(name):
    assert arguments_of(name, clip_range=None)["epsilon"] == math.inf


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "prime"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"mode": "colocate", "server_base_url": None, "importance_sampling_correction": True,
              "importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 3.0}),
        ({"mode": "server", "server_url": "http://host:8000", "importance_sampling": None},
         {"mode": "server", "server_base_url": "http://host:8000",
          "importance_sampling_correction": False}),
        ({"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2, "importance_cap": 2.0,
          "importance_sampling": "token_truncate"},
         {"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2,
          "importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": 2.0}),
    ],
)  # fmt: skip
def test_vllm_by_configuration(name, given, expected, tmp_path):
    """TRL takes the arguments; vLLM itself is not run here."""
    generation = {"engine": "vllm", **given}
    config = TrialConfig(algorithm={"name": name, "generation": generation})
    found = engine_arguments(config.algorithm)
    accepted = trl_config(name)(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, **found
    )
    assert accepted.use_vllm
    corrects = {key for key in expected if key.startswith("importance")}
    for key in expected.keys() - (corrects if name == "rloo" else set()):
        assert getattr(accepted, f"vllm_{key}") == expected[key]
    # Whatever TRL has for vLLM is said explicitly, but for addresses that a URL stands for.
    known = {f.name for f in fields(trl_config(name)) if "vllm" in f.name}
    addresses = {"host", "port", "timeout"}
    unsaid = {f"vllm_server_{one}" for one in addresses} | {"vllm_group_port"}
    assert known - set(found) <= unsaid | {"vllm_importance_sampling_cap"}


def test_without_vllm_nothing_of_it_is_said():
    for name in ("grpo", "rloo", "ppo", "prime"):
        config = TrialConfig(algorithm={"name": name})
        assert engine_arguments(config.algorithm) == {"use_vllm": False}


@pytest.mark.parametrize("given", [{"mode": "server"}, {"server_url": "http://host:8000"}])
def test_a_server_has_a_url(given):
    with pytest.raises(ValueError, match="mode server needs the URL of a running server"):
        TrialConfig(algorithm={"name": "grpo", "generation": {"engine": "vllm", **given}})


def test_arguments_of_training():
    train = TrainConfig(
        num_steps=7, batch_size=24, gradient_accumulation_steps=3, learning_rate=3e-6,
        max_grad_norm=None, weight_decay=0.1, warmup_steps=2,
    )  # fmt: skip
    assert training_arguments(train, data_seed=11) == {
        "max_steps": 7, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3,
        "learning_rate": 3e-6, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2,
        "max_grad_norm": 0.0, "weight_decay": 0.1, "bf16": True, "seed": 11, "data_seed": 11,
    }  # fmt: skip
    clipped = TrainConfig(max_grad_norm=0.3, precision="bf16")
    found = training_arguments(clipped, data_seed=0)
    assert (found["max_grad_norm"], found["bf16"]) == (0.3, False)
