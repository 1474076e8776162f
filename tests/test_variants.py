"""The members of unions, and what is said of values that are none of them."""

import pytest
from pydantic import ValidationError

from rlsparse.algorithm_config import AlgorithmConfig, KtoConfig, SimpoConfig
from rlsparse.config import TrainConfig, TrialConfig
from rlsparse.study import Study
from rlsparse.task_config import ChainSumConfig, DatasetConfig, TaskConfig
from rlsparse.variants import defaults_of, distinct, explain, models_at, models_of, place_of, tag_of

ALGORITHMS = ["sft", "rft", "dpo", "simpo", "orpo", "kto", "grpo", "rloo", "ppo", "prime"]


def test_members_have_names():
    assert [tag_of(model) for model in models_of(AlgorithmConfig)] == ALGORITHMS
    assert [tag_of(model) for model in models_of(TaskConfig)] == [
        "chain_sum", "products", "basic_arithmetic", "simple_equations", "dataset",
    ]  # fmt: skip
    assert tag_of(TrainConfig) is None


def test_defaults_by_name():
    assert defaults_of(AlgorithmConfig, "simpo") == SimpoConfig().model_dump()
    assert defaults_of(AlgorithmConfig, "kto") == KtoConfig().model_dump()
    own = defaults_of(TaskConfig, "dataset")
    assert "source" not in own
    assert DatasetConfig(source="a.csv", **own) == DatasetConfig(source="a.csv")
    assert defaults_of(TaskConfig, "gsm8k") == {}


def test_models_at_a_location():
    assert models_at(TrialConfig, ["task", "chain_sum"]) == [ChainSumConfig]
    assert len(models_at(TrialConfig, ["algorithm"])) == len(ALGORITHMS)
    assert models_at(TrialConfig, ["task", "chain_sum", "num_terms"]) == []
    assert models_at(Study, ["baseline", "train"]) == [TrainConfig]
    assert [tag_of(model) for model in models_at(Study, ["claims", 3, "within"])] == ["within"]


@pytest.mark.parametrize(
    ("config", "place", "said"),
    [
        ({}, ["algorithm"], "algorithm: Field required"),
        ({"algorithm": {"name": "sft", "reward": "x"}}, ["algorithm", "reward"],
         "unknown key algorithm.reward; known: data, name"),
        ({"algorithm": {"name": "sft"}, "train": 5}, ["train"], "train: must be a mapping (got 5)"),
        ({"algorithm": {"name": 7}}, ["algorithm", "name"], "unknown algorithm.name 7; known: dpo"),
        ({"algorithm": {"name": "sft"}, "train": {"num_steps": 3}, "probe": {"snapshots": [4]}}, [],
         "probe.snapshots [4] lie beyond train.num_steps 3"),
        ({"algorithm": {"name": "sft"}, "train": {"trainable_layers": [0, -1]}},
         ["train", "trainable_layers", 1],
         "train.trainable_layers.1: Input should be greater than or equal to 0 (got -1)"),
        ({"algorithm": {"name": "sft"}, "train": {"trainable_layers": [-1]}},
         ["train", "trainable_layers", 0], "train.trainable_layers.0: Input should be"),
        ({"algorithm": {"name": "sft"}, "train": {"trainable_layers": []}},
         ["train", "trainable_layers"], "must have at least 1 item (got"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(config, place, said):
    with pytest.raises(ValidationError) as raised:
        TrialConfig.model_validate(config)
    (error,) = distinct(raised.value.errors())
    assert place_of(TrialConfig, config, error) == place
    line = explain(TrialConfig, config, error)
    assert said in line
    assert "\n" not in line
