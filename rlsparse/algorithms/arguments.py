"""Our names for what defines an algorithm -> the arguments of its TRL configuration, in one table.

TRL calls many things ``beta``: in GRPO and RLOO it is the KL coefficient, in DPO, KTO, ORPO and
SimPO a temperature or a weight. We never share a name between the two.
"""

import math
from typing import Any

from rlsparse.config import AlgorithmConfig, TrainConfig

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
