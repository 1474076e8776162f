"""Levels have short names, and change what they list and nothing else."""

import pytest

from rlsparse.algorithm_config import GrpoConfig
from rlsparse.config import TrialConfig
from rlsparse.levels import (
    at_level,
    canonical_path,
    has,
    level_label,
    order_of,
    paths_of,
    put,
    tags_of,
    touches,
)
from rlsparse.task_config import DatasetConfig, ProductsConfig

CONFIG = TrialConfig(algorithm=GrpoConfig(num_generations=4)).model_dump(mode="json")


def test_labels():
    labels = {None: "null", True: "true", 0.04: "0.04", 1e-05: "1e-05", "dpo": "dpo", 3: "3"}
    for level, label in labels.items():
        assert level_label(level) == label
    assert level_label({"name": "dpo", "beta": 0.1, "x": None}) == "dpo(beta=0.1, x=null)"
    assert level_label({"name": "dpo", "x": None, "beta": 0.1}) == "dpo(beta=0.1, x=null)"
    assert level_label({"name": "sft"}) == "sft"
    assert level_label(["q", "k"]) == "[q, k]"
    assert level_label({"trainable_layers": [0, 2], "x": [None, 0.1]}) == (
        "(trainable_layers=[0, 2], x=[null, 0.1])"
    )


def test_paths_of_a_configuration():
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1]}
    assert list(paths_of(nested)) == ["a", "a.b", "a.c", "a.c.d", "e"]
    assert put(nested, "a.c.d", 2) == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert nested["a"]["c"]["d"] is None
    assert [has(nested, path) for path in ("a.c", "a.c.d", "a.x", "e.0", "f.g")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_order_of_factors():
    paths = ["train.num_steps", "task.num_terms", "task.name", "algorithm.beta", "algorithm.name",
             "task", "algorithm"]  # fmt: skip
    assert sorted(paths, key=order_of) == [
        "task", "algorithm", "task.name", "algorithm.name",
        "train.num_steps", "task.num_terms", "algorithm.beta",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "tags"),
    [
        (["algorithm.beta"], ["algorithm.name"]),
        (["task.num_digits", "algorithm.beta"], ["algorithm.name", "task.name"]),
        (["algorithm.beta", "algorithm"], []),
        (["algorithm.name", "task.num_terms"], ["task.name"]),
        (["algorithm"], []),
        (["train.num_steps", "seed", "algorithmic.x"], []),
        ([], []),
    ],
)
def test_what_must_be_the_same_where_paths_are_compared(paths, tags):
    assert tags_of(*paths) == tags


def test_paths():
    assert [canonical_path(path) for path in ("algorithm", "task", "task.name", "train")] == [
        "algorithm.name", "task.name", "task.name", "train",
    ]  # fmt: skip
    assert touches("algorithm.name", "algorithm")
    assert touches("algorithm", "algorithm.name")
    assert touches("seed", "seed")
    assert not touches("train.num_steps", "train.num")
    assert not touches("train.batch_size", "train.num_steps")


def test_another_task_has_its_own_fields():
    assert at_level(CONFIG, "task.name", "products")["task"] == ProductsConfig().model_dump()
    level = at_level(CONFIG, "task", {"name": "dataset", "source": "a.jsonl"})["task"]
    assert level == DatasetConfig(source="a.jsonl").model_dump()
    assert "source" not in at_level(CONFIG, "task.name", "dataset")["task"]
    same = at_level(CONFIG, "algorithm", {"name": "grpo", "kl_coef": 0})["algorithm"]
    assert same == GrpoConfig(num_generations=4, kl_coef=0).model_dump()
    assert at_level(CONFIG, "algorithm.name", "grpo") == CONFIG
    assert at_level(CONFIG, "train.trainable_layers", [1])["train"]["trainable_layers"] == [1]
