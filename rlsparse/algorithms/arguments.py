"""Our names for what defines an algorithm -> the arguments of its TRL configuration, in one table.

TRL calls many things ``beta``: in GRPO and RLOO it is the KL coefficient, in DPO, KTO, ORPO and
SimPO a temperature or a weight. We never share a name between the two.
"""

import math
from typing import Any

from rlsparse.algorithm_config import AlgorithmConfig, OnlineConfig, RlooConfig
from rlsparse.config import TrainConfig

_ONLINE = {
    "num_generations": "num_generations",
    "temperature": "temperature",
    "clip_range": "epsilon",
    "num_iterations": "num_iterations",
}
TRL_ARGUMENT: dict[str, dict[str, str]] = {
    "sft": {},
    "rft": {},
    "dpo": {"beta": "beta"},
    "simpo": {"beta": "beta", "gamma": "simpo_gamma"},
    "orpo": {"beta": "beta"},
    "kto": {
        "beta": "beta",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
    },
    "grpo": {**_ONLINE, "kl_coef": "beta", "scale_rewards": "scale_rewards"},
    "rloo": {**_ONLINE, "kl_coef": "beta"},
    "ppo": _ONLINE,
    "prime": _ONLINE,
}
"""Algorithm -> our name -> TRL's. Names that are absent here are the project's own: where data and
rewards come from, seeds, and all of PPO and PRIME beyond sampling and clipping."""

_SCHEDULE = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""transformers' own ``constant`` ignores the warmup."""


def algorithm_arguments(config: AlgorithmConfig) -> dict[str, Any]:
    """Arguments of TRL's configuration that an algorithm's own fields set.

    ``clip_range: null`` becomes an infinite range, which clips nothing.
    """
    values = config.model_dump()
    arguments = {trl: values[ours] for ours, trl in TRL_ARGUMENT[config.name].items()}
    if "epsilon" in arguments:
        arguments["epsilon"] = math.inf if values["clip_range"] is None else values["clip_range"]
    return arguments


def engine_arguments(algorithm: OnlineConfig) -> dict[str, Any]:
    """Arguments of TRL's configuration that say what samples; RLOO's knows no correction."""
    engine = algorithm.generation
    if engine.engine == "transformers":
        return {"use_vllm": False}
    arguments = {
        "use_vllm": True,
        "vllm_mode": engine.mode,
        "vllm_model_impl": "vllm",
        "vllm_enable_sleep_mode": False,
        "vllm_server_base_url": engine.server_url,
        "vllm_gpu_memory_utilization": engine.gpu_memory_utilization,
        "vllm_tensor_parallel_size": engine.tensor_parallel_size,
        "vllm_max_model_length": None,
        "vllm_structured_outputs_regex": None,
    }
    if isinstance(algorithm, RlooConfig):
        return arguments
    return {
        **arguments,
        "vllm_importance_sampling_correction": engine.importance_sampling is not None,
        "vllm_importance_sampling_mode": engine.importance_sampling or "sequence_mask",
        "vllm_importance_sampling_clip_max": engine.importance_cap,
        "vllm_importance_sampling_clip_min": None,
    }


def training_arguments(
    train: TrainConfig, *, data_seed: int, num_workers: int = 1
) -> dict[str, Any]:
    """Arguments of transformers' ``TrainingArguments`` that the fields of ``train`` set.

    ``max_grad_norm: null`` becomes 0, with which transformers does not clip. ``batch_size`` is that
    of all workers together, transformers' is that of one.
    """
    return {
        "max_steps": train.num_steps,
        "per_device_train_batch_size": train.micro_batch_size // num_workers,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": _SCHEDULE[train.lr_schedule],
        "warmup_steps": train.warmup_steps,
        "max_grad_norm": train.max_grad_norm or 0.0,
        "weight_decay": train.weight_decay,
        "bf16": train.precision == "bf16-mixed",
        "seed": data_seed,
        "data_seed": data_seed,
    }
