"""Plain TRL scripts, each written out with TRL's own classes and literal arguments.

What a trial does beyond them is to measure: ``test_faithful.py`` compares the weights, and
``benchmarks/bench_trial.py`` the CPU time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.import_utils import suppress_experimental_warning

from rlsparse.models import TINY

with suppress_experimental_warning():
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

SEED, DATA_SEED = 5, 7
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.5,
    "weight_decay": 0.01,
    "seed": DATA_SEED,
    "data_seed": DATA_SEED,
    "activation_checkpointing": False,
    "use_cpu": not torch.cuda.is_available(),
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "dataloader_drop_last": True,
}
SETTINGS = {
    "sft": {},
    "rft": {},
    "dpo": {"beta": 0.3},
    "simpo": {"beta": 2.5, "gamma": 0.7},
    "orpo": {"beta": 0.4},
    "kto": {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75},
    "grpo": {"num_generations": 4, "temperature": 0.9, "kl_coef": 0.1},
    "rloo": {"num_generations": 4, "temperature": 0.9, "kl_coef": 0.1},
}


def right(completions: list[str], answer: list[str], **_) -> list[float]:
    """1 if the first line of a completion is the answer."""
    lines = [completion.strip().split("\n")[0].strip() for completion in completions]
    return [float(line == wanted) for line, wanted in zip(lines, answer, strict=True)]


def sft(model, tokenizer, rows, optimizer, common):
    return SFTTrainer(
        model,
        args=SFTConfig(**common),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def dpo(model, tokenizer, rows, optimizer, common):
    return DPOTrainer(
        model,
        args=DPOConfig(**common, beta=0.3),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def simpo(model, tokenizer, rows, optimizer, common):
    given = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.7}
    return CPOTrainer(
        model,
        args=CPOConfig(**common, **given, remove_unused_columns=False),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def orpo(model, tokenizer, rows, optimizer, common):
    return ORPOTrainer(
        model,
        args=ORPOConfig(**common, beta=0.4, remove_unused_columns=False),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def kto(model, tokenizer, rows, optimizer, common):
    given = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75}
    return KTOTrainer(
        model,
        args=KTOConfig(**common, **given),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def grpo(model, tokenizer, rows, optimizer, common):
    given = {
        "num_generations": 4, "max_completion_length": 6, "temperature": 0.9, "beta": 0.1,
        "steps_per_generation": 1, "loss_type": "grpo", "use_bias_correction_kl": False,
    }  # fmt: skip
    return GRPOTrainer(
        model,
        reward_funcs=right,
        args=GRPOConfig(**common, **given),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def rloo(model, tokenizer, rows, optimizer, common):
    given = {
        "num_generations": 4, "max_completion_length": 6, "temperature": 0.9, "beta": 0.1,
        "steps_per_generation": 1, "normalize_advantages": False,
    }  # fmt: skip
    return RLOOTrainer(
        model,
        reward_funcs=right,
        args=RLOOConfig(**common, **given),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


SCRIPTS: dict[str, Callable] = {
    "sft": sft,
    "rft": sft,
    "dpo": dpo,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
    "grpo": grpo,
    "rloo": rloo,
}


def run_script(
    name: str, rows: list[dict], folder: Path, *, bf16: bool, **changes: Any
) -> dict[str, torch.Tensor]:
    """Train on ``rows``; ``changes`` are to the training arguments. The weights that came out."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    if torch.cuda.is_available():
        model = model.to("cuda")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.01, foreach=False, fused=False
    )
    common = {**COMMON, "output_dir": str(folder), "bf16": bf16, **changes}
    trainer = SCRIPTS[name](model, tokenizer, Dataset.from_list(rows), optimizer, common)
    transformers.set_seed(SEED)
    trainer.train()
    return {key: value.cpu() for key, value in model.state_dict().items()}
