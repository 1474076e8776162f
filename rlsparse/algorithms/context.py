"""What an algorithm gets to build its trainer from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlsparse.config import TrialConfig
from rlsparse.optim import build_optimizer
from rlsparse.tasks import Problem, Task

# transformers' own "constant" ignores the warmup.
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class TrialContext:
    """One trial's model, data and settings, before its trainer exists."""

    config: TrialConfig
    model: Any
    tokenizer: Any
    task: Task
    problems: list[Problem]
    """Problems of the train split."""
    scratch_dir: Path

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that all of TRL's configurations share, each set explicitly."""
        train, micro = self.config.train, self.config.train.batch_size
        return {
            "output_dir": str(self.scratch_dir),
            "max_steps": train.num_steps,
            "per_device_train_batch_size": micro // train.gradient_accumulation_steps,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "learning_rate": train.learning_rate,
            "lr_scheduler_type": _SCHEDULES[train.lr_schedule],
            "warmup_steps": train.warmup_steps,
            "max_grad_norm": train.max_grad_norm or 0.0,
            "weight_decay": train.weight_decay,
            "seed": self.config.seed,
            "data_seed": self.config.seed,
            "bf16": train.precision == "bf16-mixed",
            "fp16": False,
            "tf32": None,
            "use_cpu": not torch.cuda.is_available(),
            "activation_checkpointing": False,
            "torch_compile": False,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
        }

    def optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        """Our optimizer; the trainer adds the learning-rate schedule."""
        return build_optimizer(self.model, self.config.train), None

    def set_reference(self, trainer: Any) -> None:
        """Make the reference policy of ``trainer``, if it has one, the base as it is trained.

        TRL reads it from the folder of the base again, which may be stored in a wider format than
        the one that the weights start from.
        """
        if trainer.ref_model is not None:
            trainer.ref_model.load_state_dict(self.model.state_dict())
