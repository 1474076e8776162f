"""Configuration is frozen and strict; a trial's name follows all that determines its bits.

The names in ``golden/trial_ids.json`` are recorded by ``python tests/record_golden.py``.
"""

import json
import subprocess
import sys

import pytest
import record_golden
from pydantic import ValidationError

from rlsparse.config import (
    STORED_DTYPE,
    ChainSumConfig,
    DpoConfig,
    GrpoConfig,
    ProbeConfig,
    SftConfig,
    TrainConfig,
    TrialConfig,
    canonical_json,
    trial_id,
)

IDENTITY = {
    "replicate": 0,
    "num_threads": 1,
    "num_workers": 1,
    "base_fingerprint": "f",
    "task_version": "1",
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
    import hashlib

    resolved = {
        "algorithm": {"name": "sft"},
        "probe": {"score_snapshots": True, "snapshots": []},
        "seed": 7,
        "task": json.loads(ChainSumConfig().model_dump_json()),
        "train": json.loads(TrainConfig().model_dump_json()),
    }
    identity = {
        "base": "f", "config": resolved, "num_threads": 1, "num_workers": 1, "replicate": 0,
        "task_version": "1",
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


OTHER = {
    "train.num_steps": 21,
    "train.batch_size": 32,
    "train.learning_rate": 2e-5,
    "train.precision": "fp32",
    "train.max_grad_norm": None,
    "train.optimizer": "sgd",
    "train.adam_beta1": 0.8,
    "train.adam_beta2": 0.99,
    "train.adam_epsilon": 1e-6,
    "train.weight_decay": 0.1,
    "train.lr_schedule": "cosine",
    "train.warmup_steps": 3,
    "train.gradient_accumulation_steps": 2,
    "task.num_terms": 4,
    "task.num_digits": 2,
    "task.num_shots": 1,
    "task.num_train_problems": 700,
    "task.num_eval_problems": 300,
    "task.max_completion_tokens": 7,
    "algorithm.kl_coef": 0.04,
    "algorithm.num_generations": 4,
    "algorithm.temperature": 0.9,
    "algorithm.clip_range": 0.1,
    "algorithm.num_iterations": 2,
    "algorithm.scale_rewards": "none",
    "probe.snapshots": [3],
    "probe.score_snapshots": False,
    "seed": 1,
}


@pytest.mark.parametrize(("path", "value"), OTHER.items())
def test_trial_id_changes_with_every_field(path, value):
    assert name_of(changed(BASE, path, value)) != name_of(BASE)


def test_every_field_is_in_the_test_above():
    parts = {
        "train": TrainConfig,
        "task": ChainSumConfig,
        "algorithm": GrpoConfig,
        "probe": ProbeConfig,
    }
    fields = {f"{part}.{field}" for part, model in parts.items() for field in model.model_fields}
    assert fields - {"task.name", "algorithm.name"} | {"seed"} == set(OTHER)
    assert set(TrialConfig.model_fields) == {*parts, "seed", "model", "keep_checkpoints"}


@pytest.mark.parametrize(
    "other",
    [
        {"replicate": 1},
        {"num_threads": 2},
        {"num_workers": 2},
        {"base_fingerprint": "g"},
        {"task_version": "2"},
    ],
)
def test_trial_id_changes_with_what_is_outside_the_configuration(other):
    assert name_of(BASE, **other) != name_of(BASE)


def test_algorithms_have_other_names():
    ids = {name_of({"algorithm": {"name": name}}) for name in ("sft", "dpo", "grpo")}
    assert len(ids) == 3


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
        ({"algorithm": {"name": "ppo"}}, "'sft', 'dpo', 'grpo'"),
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


def test_canonical_json():
    assert canonical_json({"b": 1e-5, "a": [None, True, "é"]}) == '{"a":[null,true,"é"],"b":1e-05}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("inf"))


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
        TrialConfig.model_validate({**BASE, "model": {"source": ""}})
