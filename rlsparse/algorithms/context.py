"""What an algorithm gets to build its trainer from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rlsparse import distributed
from rlsparse.algorithm_config import OnlineConfig
from rlsparse.algorithms.arguments import (
    algorithm_arguments,
    engine_arguments,
    training_arguments,
)
from rlsparse.config import TrialConfig
from rlsparse.errors import TrialError
from rlsparse.models.loading import in_parts, load_model
from rlsparse.optim import build_optimizer
from rlsparse.sharded import split
from rlsparse.subnetwork import SubnetworkMask
from rlsparse.tasks import Problem, Reward, Task


@dataclass(frozen=True)
class TrialContext:
    """One trial's model, data and settings, before its trainer exists."""

    config: TrialConfig
    model: Any
    tokenizer: Any
    task: Task
    problems: list[Problem]
    """Problems of the train split."""
    reward: Reward
    """What training rewards completions with; evaluation always uses the task's grader."""
    scratch_dir: Path
    num_shards: int = 1
    """Workers of which each holds a part of the model."""
    mask: SubnetworkMask | None = None
    """The weights that are trained, if not all."""

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that all of TRL's configurations share and those of the algorithm's fields.

        Each is set explicitly, because TRL's defaults would change what is measured: bf16 autocast
        where nothing is said, recomputed activations, another optimizer, logging every ten steps.
        """
        return {
            **training_arguments(
                self.config.train,
                data_seed=self.config.data_seed,
                num_workers=distributed.num_workers(),
            ),
            **algorithm_arguments(self.config.algorithm),
            **({} if self.mask is None else {"max_grad_norm": 0.0}),  # the optimizer clips
            "output_dir": str(self.scratch_dir),
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
            "dataloader_drop_last": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
        }

    def rollout_arguments(self) -> dict[str, Any]:
        """Arguments that TRL's GRPO and RLOO configurations share: plain sampling, no shaping."""
        algorithm = self.config.algorithm
        assert isinstance(algorithm, OnlineConfig)
        accumulation = self.config.train.gradient_accumulation_steps
        return {
            **self.trainer_arguments(),
            "steps_per_generation": algorithm.steps_per_rollout * accumulation,
            "max_completion_length": self.task.max_completion_tokens,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": None,
            "repetition_penalty": 1.0,
            "epsilon_high": None,
            "mask_truncated_completions": False,
            "sync_ref_model": False,
            "disable_dropout": True,
            "shuffle_dataset": True,
            "model_init_kwargs": in_parts(self.num_shards) or None,  # of the reference alone
            **engine_arguments(algorithm),
        }

    def dataset(self, rows: list[dict[str, Any]]) -> Dataset:
        """Rows as a data set, those of the first worker; every step takes a whole batch of them.

        Raises:
            TrialError: there are fewer than one batch.
        """
        rows, wanted = distributed.from_first(rows), self.config.train.batch_size
        if len(rows) < wanted:
            raise TrialError(
                f"{self.config.algorithm.name} has {len(rows)} examples, fewer than "
                f"train.batch_size {wanted}; lower it, or give more problems "
                "(task.num_train_problems), samples of each, or rows of your own data"
            )
        return Dataset.from_list(rows)

    def prompts(self) -> Dataset:
        """Data set of the train problems for an algorithm that samples from the policy."""
        return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in self.problems])

    def trl_reward(self) -> Callable[..., list[float]]:
        """The reward in the signature that TRL calls."""

        def reward(
            prompts: list[str], completions: list[str], answer: list[str], **_: Any
        ) -> list[float]:
            return self.reward(prompts=prompts, completions=completions, answers=answer)

        return reward

    def optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        """Our optimizer; the trainer adds the learning-rate schedule."""
        split(self.model)
        return build_optimizer(self.model, self.config.train, self.mask), None

    def reference(self) -> Any | None:
        """The base once more, in parts; None where the trainer may load it itself, whole."""
        if self.num_shards == 1:
            return None
        path = Path(self.model.config._name_or_path)
        return load_model(path, self.config.train.precision, num_shards=self.num_shards)

    def set_reference(self, trainer: Any) -> None:
        """Make the reference policy of ``trainer``, if it has one, the base as it is trained.

        TRL reads it from the folder of the base again, which may be stored in a wider format than
        the one that the weights start from.
        """
        if trainer.ref_model is not None:
            trainer.ref_model.load_state_dict(self.model.state_dict())
