"""Costs are estimated from the configuration: real trials peak near them, and parts are exact."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Base

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrainConfig, TrialConfig
from rlsparse.costs import (
    PROCESS_BYTES,
    Memory,
    ModelSize,
    cpu_seconds,
    estimates,
    probe_bytes,
    remedies,
    smaller_passes,
    step_mask_bytes,
    trial_memory,
)
from rlsparse.models import TINY

TRIAL = """
import sys
from pathlib import Path
from rlsparse.config import TrialConfig
from rlsparse.train import train_trial
config, base, fingerprint, out = sys.argv[1:]
train_trial(TrialConfig.model_validate_json(config), trial_id="0123456789ab", base_dir=Path(base),
            base_fingerprint=fingerprint, out_dir=Path(out))
"""


@pytest.fixture(scope="module")
def larger_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A random Llama of 23 million weights with the tokenizer of the tiny base."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("larger")
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=6, intermediate_size=1408, vocab_size=8192,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, eos_token_id=1,
        pad_token_id=0, bos_token_id=None, initializer_range=0.04,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return Base(folder, fingerprint(Checkpoint.open(folder)))


def config_of(name: str, **train: object) -> TrialConfig:
    return TrialConfig.model_validate(
        {
            "algorithm": {"name": name},
            "task": {"num_train_problems": 512, "num_eval_problems": 32},
            "train": {"num_steps": 2, "batch_size": 16, "precision": "fp32", **train},
        }
    )


@pytest.mark.parametrize(
    "name",
    ["sft", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "dpo"))],
)
def test_real_trials_peak_near_the_estimate(name: str, larger_base: Base, tmp_path: Path) -> None:
    """In a process of its own; what lies above an idle process counts by itself, too."""
    config = config_of(name)
    if name == "dpo":  # a random base samples nothing that is right
        gold = config.algorithm.model_copy(update={"data": "gold"})
        config = config.model_copy(update={"algorithm": gold})
    subprocess.run(
        [sys.executable, "-c", TRIAL, config.model_dump_json(), str(larger_base.path),
         larger_base.fingerprint, str(tmp_path)],
        check=True, capture_output=True,
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    measured, estimated = summary["peak_bytes"], summary["estimated_peak_bytes"]
    assert estimated / 1.5 < measured < 1.5 * estimated
    above = (measured - 0.65e9) / (estimated - PROCESS_BYTES)  # as measured after the imports
    assert 1 / 1.6 < above < 1.6
    size = ModelSize.of(Checkpoint.open(larger_base.path))
    assert estimated == trial_memory(config, size).peak_bytes
    assert summary["estimated_cpu_s"] == cpu_seconds(config, size.num_weights)


# 2 layers of 24 weights, trained q, and an embedding of 100 x 4.
SIZE = ModelSize(
    tensors=((None, "embed", 400), (0, "q", 16), (0, "norm", 8), (1, "q", 16), (1, "norm", 8)),
    hidden=4, layers=2, intermediate=16, kv=4, vocabulary=100,
)  # fmt: skip


def parts(name: str = "sft", algorithm: dict | None = None, **train: object) -> dict[str, int]:
    config = config_of(name, **train)
    if algorithm:
        config = TrialConfig.model_validate(
            {**config.model_dump(), "algorithm": {"name": name, **algorithm}}
        )
    return trial_memory(config, SIZE).parts


@pytest.mark.parametrize(
    ("precision", "weights", "moments"),
    [("bf16", 2, 2), ("bf16-weights", 2, 4), ("bf16-mixed", 4, 4), ("fp32", 4, 4)],
)
@pytest.mark.parametrize(("optimizer", "count"), [("adamw", 2), ("sgd-momentum", 1), ("sgd", 0)])
def test_weights_and_optimizer_by_precision(
    precision: str, weights: int, moments: int, optimizer: str, count: int
) -> None:
    found = parts(precision=precision, optimizer=optimizer)
    assert found["weights"] == 448 * weights
    assert found["optimizer"] == 448 * count * moments
    own = parts(precision=precision, optimizer=optimizer, trainable_modules=["q"])
    assert own["optimizer"] == 32 * count * moments
    assert own["weights"] == found["weights"]


def test_only_trained_weights_have_moments() -> None:
    train = TrainConfig(trainable_modules=("q", "norm"), trainable_layers=(1,))
    assert SIZE.num_trained(train) == 24
    assert SIZE.num_trained(TrainConfig()) == SIZE.num_weights == 448


@pytest.mark.parametrize(
    ("name", "algorithm", "held"),
    [
        ("sft", {}, {}),
        ("dpo", {}, {"reference": 4}),
        ("kto", {}, {"reference": 4}),
        ("simpo", {}, {}),
        ("grpo", {}, {"reference": 4}),
        ("grpo", {"kl_coef": 0.0}, {}),
        ("ppo", {}, {"reference": 4, "critic": 12}),
        ("ppo", {"kl_coef": 0.0}, {"critic": 12}),
        ("prime", {}, {"reference": 4, "reward model": 12}),
    ],
)
def test_other_models_that_an_algorithm_holds(
    name: str, algorithm: dict, held: dict[str, int]
) -> None:
    """Bytes per weight: a frozen copy 4, one that is trained 4 and two moments of 4."""
    found = parts(name, algorithm)
    for part in ("reference", "critic", "reward model"):
        assert found.get(part) == (448 * held[part] if part in held else None)


def test_what_lowers_memory_lowers_the_estimate() -> None:
    size = ModelSize.of(Checkpoint.open(TINY))

    def peak(name: str = "dpo", device: str = "cpu", **train: object) -> int:
        return trial_memory(config_of(name, batch_size=512, **train), size, device).peak_bytes

    assert peak(gradient_accumulation_steps=8) < peak(gradient_accumulation_steps=2) < peak()
    assert peak(trainable_modules=["q"]) < peak()
    assert peak(precision="bf16") < peak(precision="bf16-weights") < peak()
    assert peak("sft") < peak("grpo") < peak("ppo")
    assert peak("sft") < peak("dpo")
    assert peak() - peak(device="gpu") == pytest.approx(1.05 * PROCESS_BYTES, rel=1e-6)


def test_remedies_are_of_the_largest_parts_at_that_moment() -> None:
    memory = Memory("step", {"activations": 80, "optimizer": 30, "probe": 4, "autocast": 20})
    first, second = remedies(memory, config_of("sft", batch_size=8))
    assert first == "raise train.gradient_accumulation_steps 1 (a pass takes 8 sequences)"
    assert "sgd" in second
    (only,) = remedies(Memory("distance", {"logits": 80, "activations": 90}), config_of("sft"))
    assert "task.num_eval_problems" in only
    assert str(Memory("step", {"weights": 10**9, "probe": 2 * 10**9})) == (
        "probe 2.00 GB, weights 1.00 GB"
    )


@pytest.mark.parametrize(
    ("name", "train", "algorithm", "said"),
    [
        ("grpo", {"batch_size": 32}, {}, "raise train.gradient_accumulation_steps 1"),
        ("grpo", {"batch_size": 8}, {}, "lower algorithm.num_generations 8"),
        (
            "grpo",
            {"batch_size": 32, "gradient_accumulation_steps": 4},
            {},
            "lower algorithm.num_generations 8",
        ),
        ("kto", {"batch_size": 2}, {}, "lower task.max_completion_tokens 6"),
        ("kto", {"batch_size": 3}, {}, "raise train.gradient_accumulation_steps 1"),
        ("sft", {"batch_size": 2}, {}, "raise train.gradient_accumulation_steps 1"),
        ("sft", {"batch_size": 1}, {}, "lower task.max_completion_tokens 6"),
    ],
)
def test_what_makes_passes_smaller_can_be_done(name, train, algorithm, said) -> None:
    config = TrialConfig.model_validate({"algorithm": {"name": name, **algorithm}, "train": train})
    assert said in smaller_passes(config)


def test_dimensions_of_a_base() -> None:
    size = ModelSize.of(Checkpoint.open(TINY))
    assert size.num_weights == 856_192
    assert (size.hidden, size.layers, size.intermediate, size.kv, size.vocabulary) == (
        128, 4, 384, 128, 24,
    )  # fmt: skip


def test_time_is_not_estimated_for_a_gpu() -> None:
    checkpoint = Checkpoint.open(TINY)
    assert set(estimates(config_of("sft"), checkpoint, "gpu")) == {"estimated_peak_bytes"}
    found = estimates(config_of("sft"), checkpoint, "cpu")
    assert set(found) == {"estimated_peak_bytes", "estimated_cpu_s"}


def test_memory_and_bytes_of_the_probe() -> None:
    """A copy of the weights of 2 or 4 bytes each, one more per window, and bits."""
    own = {"algorithm": {"name": "sft"}, "train": {"num_steps": 10}}
    plain = TrialConfig.model_validate(own)
    assert (probe_bytes(plain, 801), step_mask_bytes(plain, 801)) == (1602 + 101, 0)
    asked = {"k_steps": [2, 8], "step_masks": True}
    wide = TrialConfig.model_validate(
        {**own, "train": {"num_steps": 10, "precision": "fp32"}, "probe": asked}
    )
    assert (probe_bytes(wide, 801), step_mask_bytes(wide, 801)) == (3 * 3204 + 101, 1010)


def seconds(name: str, task: dict[str, object] | None = None, **algorithm: object) -> float:
    config = {"algorithm": {"name": name, **algorithm}, "task": task or {}}
    return cpu_seconds(TrialConfig.model_validate(config), 1_000_000)


def test_cost_is_estimated_for_every_algorithm_and_task() -> None:
    names = ("rft", "rloo", "grpo", "ppo", "prime", "orpo", "simpo", "kto", "dpo")
    assert all(seconds(name) > seconds("sft") > 0 for name in names)
    sampled = 2.0 * 768 * 8 * (12 + 6) * 1e6 / 2e10
    assert seconds("kto") - seconds("kto", data="gold") == pytest.approx(sampled, rel=1e-9)
    assert seconds("rft") - seconds("sft") == pytest.approx(sampled, rel=1e-9)
    longer = {"name": "simple_equations", "num_shots": 1}
    assert seconds("sft", longer) == pytest.approx(seconds("sft") * (48 + 16) / 18, rel=1e-9)
    data = {"name": "dataset", "source": "a.csv", "max_completion_tokens": 128}
    assert seconds("grpo", data) == pytest.approx(seconds("grpo") * 256 / 18, rel=1e-9)


def test_validation_counts_once_in_time_and_as_the_test_score_in_memory() -> None:
    few, many = (parts_of_score(num_validation_problems=n) for n in (16, 200))
    assert few == parts_of_score()
    assert many == parts_of_score(num_eval_problems=200)
    assert parts_of_score(num_validation_problems=2000) == parts_of_score(num_eval_problems=256)
    once = 2.0 * 64 * (12 + 6) * 1e6 / 2e10
    found = seconds("sft", {"num_validation_problems": 64}) - seconds("sft")
    assert found == pytest.approx(once, rel=1e-6)


def parts_of_score(**task: object) -> dict[str, int]:
    """Memory of a trial that peaks while it scores, over a vocabulary that outweighs all else."""
    config = TrialConfig.model_validate(
        {
            "algorithm": {"name": "sft"},
            "task": {"num_eval_problems": 32, "max_completion_tokens": 1, **task},
            "train": {"num_steps": 1, "batch_size": 1, "precision": "fp32"},
        }
    )
    memory = trial_memory(config, replace(SIZE, vocabulary=0, kv=10_000, tensors=SIZE.tensors))
    assert memory.moment == "score"
    return memory.parts


def test_several_workers_share_batches_and_under_fsdp_weights():
    config, size = config_of("dpo", batch_size=64), SIZE
    one = trial_memory(config, size).parts
    ddp = trial_memory(config, size, num_workers=4).parts
    fsdp = trial_memory(config, size, num_workers=4, num_shards=4).parts
    shared = {"activations", "logits", "exchange", "allocator"}
    assert {name for name in one if one[name] != ddp[name]} == shared
    assert ddp["activations"] == fsdp["activations"] == one["activations"] // 4
    assert ddp["exchange"] == one["gradients"]
    for part in ("weights", "gradients", "optimizer", "reference", "probe"):
        assert fsdp[part] == pytest.approx(one[part] / 4, rel=1e-3)
    assert fsdp["exchange"] == 2 * 400 * 4  # the embedding, in fp32
