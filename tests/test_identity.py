"""A trial's name is the hash of all that determines its bits, and of nothing else.

The names in ``golden/trial_ids.json`` are recorded by ``python tests/record_golden.py trial_ids``.
"""

import hashlib
import json

import pytest
import record_golden

from rlsparse.algorithm_config import AlgorithmConfig, SftConfig
from rlsparse.config import ProbeConfig, TrainConfig, TrialConfig
from rlsparse.identity import canonical_json, trial_id
from rlsparse.task_config import ChainSumConfig, TaskConfig
from rlsparse.variants import models_of, tag_of

IDENTITY = {
    "replicate": 0,
    "num_threads": 1,
    "num_workers": 1,
    "base_fingerprint": "f",
    "data_version": "1",
}
BASE = {"algorithm": {"name": "grpo"}, "train": {"num_steps": 20, "batch_size": 16}}


def name_of(config: dict, **identity) -> str:
    return trial_id(TrialConfig.model_validate(config), **{**IDENTITY, **identity})


def changed(config: dict, path: str, value: object) -> dict:
    head, _, rest = path.partition(".")
    inner = changed(config.get(head, {}), rest, value) if rest else value
    return {**config, head: inner}


def test_trial_ids_are_golden():
    assert record_golden.trial_ids() == json.loads(record_golden.TRIAL_IDS.read_text())


def test_trial_id_is_the_hash_of_what_determines_the_bits():
    """Recomputed from the definition, independently of the order of keys."""
    resolved = {
        "algorithm": json.loads(SftConfig().model_dump_json()),
        "probe": {"score_snapshots": True, "snapshots": []},
        "seed": 7,
        "task": json.loads(ChainSumConfig().model_dump_json(exclude={"num_validation_problems"})),
        "train": json.loads(TrainConfig().model_dump_json(exclude={"mask"})),
    }
    identity = {
        "base": "f", "config": resolved, "num_threads": 1, "num_workers": 1, "replicate": 0,
        "data_version": "1",
    }  # fmt: skip
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert name_of({"algorithm": {"name": "sft"}, "seed": 7}) == expected


@pytest.mark.parametrize(
    "same",
    [
        {**BASE, "model": {"source": "/elsewhere/the/same/base"}},
        {**BASE, "keep_checkpoints": True},
        {**BASE, "seed": 0, "task": {}, "probe": {}},
        changed(BASE, "train.learning_rate", 0.00001),
    ],
)
def test_trial_id_ignores_what_does_not_change_the_bits(same):
    assert name_of(same) == name_of(BASE)


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "prime"])
def test_where_an_engine_runs_is_not_of_the_name_of_a_trial(name):
    def of(**generation):
        return name_of({"algorithm": {"name": name, "generation": generation}})

    assert of() == name_of({"algorithm": {"name": name}}) == of(gpu_memory_utilization=0.5)
    server = {"mode": "server", "server_url": "http://a:8000"}
    assert of(engine="vllm") == of(engine="vllm", **server) != of()
    assert of(engine="vllm", importance_sampling=None) != of(engine="vllm")


OTHER: dict[str, object] = {
    # train
    "num_steps": 21, "batch_size": 32, "learning_rate": 2e-5, "precision": "fp32",
    "max_grad_norm": None, "optimizer": "sgd", "momentum": 0.8, "adam_beta1": 0.8,
    "adam_beta2": 0.99, "adam_epsilon": 1e-6, "weight_decay": 0.1, "lr_schedule": "cosine",
    "warmup_steps": 3, "gradient_accumulation_steps": 2, "trainable_modules": ["q"],
    "trainable_layers": [1], "data_seed": 0, "mask": {"file": "a.mask.safetensors"},
    # probe
    "snapshots": [3], "score_snapshots": False, "k_steps": [2], "step_masks": True,
    "step_patches": True, "casts": True, "update_interval": 2,
    # tasks
    "num_shots": 1, "num_train_problems": 700, "num_eval_problems": 300,
    "num_validation_problems": 32,
    "max_completion_tokens": 7, "prompt_format": "chat", "num_terms": 4, "num_digits": 3,
    "operators": "+", "max_value": 30, "subset": "main",
    "split": "test", "test_split": "test", "prompt_column": "q", "answer_column": "a",
    "completion_column": "c", "prompt_template": "Q {prompt}", "answer_after": "####",
    "grader": "math",
    # algorithms
    "reward": "shuffled", "kl_coef": 0.5, "num_generations": 4, "temperature": 0.9,
    "clip_range": 0.1, "num_iterations": 2, "steps_per_rollout": 2, "sampling_seed": 0,
    "scale_rewards": "none", "discount": 0.9, "gae_lambda": 0.9, "value_clip_range": None,
    "value_learning_rate": 2e-4, "init_seed": 0, "reward_beta": 0.1, "reward_learning_rate": 1e-4,
    "generation": {"engine": "vllm"},
    "min_accuracy": 0.1, "max_accuracy": 0.9, "data": "mine.jsonl", "num_samples_per_prompt": 4,
    "beta": 0.3, "gamma": 0.5, "desirable_weight": 2.0, "undesirable_weight": 2.0,
}  # fmt: skip
"""Field -> a valid value that is the default of no class."""

NEEDED = {"dataset": {"source": "a.csv"}}
FIELDS = [
    (part, tag_of(model), field)
    for part, union in {
        "train": TrainConfig, "probe": ProbeConfig, "task": TaskConfig, "algorithm": AlgorithmConfig
    }.items()
    for model in models_of(union)
    for field in model.model_fields
    if field not in ("name", "source", "test_source")
]  # fmt: skip


@pytest.mark.parametrize(("part", "tag", "field"), FIELDS)
def test_trial_id_changes_with_every_field(part, tag, field):
    own = {} if tag is None else {"name": tag, **NEEDED.get(tag, {})}
    before = {**BASE, part: {**BASE.get(part, {}), **own}} if tag is None else {**BASE, part: own}
    after = {**before, part: {**before[part], field: OTHER[field]}}
    assert name_of(after) != name_of(before)


def test_where_the_data_lie_does_not_matter():
    """What they contain is in ``data_version``."""
    one, other = (
        {
            "algorithm": {"name": "dpo", "data": f"{folder}/pairs.csv"},
            "task": {"name": "dataset", "source": f"{folder}/a.csv", "test_source": test},
        }
        for folder, test in (("here", "here/t.csv"), ("/there", None))
    )
    assert name_of(one) == name_of(other)
    assert name_of(one, data_version="2") != name_of(one)


def test_every_part_is_in_the_test_above():
    assert {field for _, _, field in FIELDS} == set(OTHER)
    tested = {part for part, _, _ in FIELDS}
    assert set(TrialConfig.model_fields) == {*tested, "seed", "model", "keep_checkpoints"}
    assert name_of({**BASE, "seed": 1}) != name_of(BASE)


def test_algorithms_and_tasks_have_other_names():
    algorithms = [{"algorithm": {"name": tag_of(model)}} for model in models_of(AlgorithmConfig)]
    tasks = [
        {**BASE, "task": {"name": tag_of(model), **NEEDED.get(str(tag_of(model)), {})}}
        for model in models_of(TaskConfig)
    ]
    assert len({name_of(config) for config in [*algorithms, *tasks]}) == 10 + 5


@pytest.mark.parametrize(
    "other",
    [
        {"replicate": 1},
        {"num_threads": 2},
        {"num_workers": 2},
        {"base_fingerprint": "g"},
        {"data_version": "2"},
    ],
)
def test_trial_id_changes_with_what_is_outside_the_configuration(other):
    assert name_of(BASE, **other) != name_of(BASE)


def test_canonical_json():
    assert canonical_json({"b": 1e-5, "a": [None, True, "é"]}) == '{"a":[null,true,"é"],"b":1e-05}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("inf"))
