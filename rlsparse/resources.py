"""What one trial occupies, and whether its batches split over its workers."""

from typing import Literal

from pydantic import AliasChoices, Field, model_validator

from rlsparse.algorithm_config import KtoConfig, OnlineConfig
from rlsparse.config import TrialConfig
from rlsparse.variants import Config

Strategy = Literal["ddp", "fsdp"]


class Resources(Config):
    """What one trial occupies; part of the trial's identity where it can change bits.

    It is trained by ``num_workers`` processes together, of ``num_threads`` CPU threads and
    ``gpus_per_worker`` GPUs each (``num_gpus`` in studies of earlier releases). ``strategy`` says
    how: ``ddp`` gives each the whole model, ``fsdp`` a part of every weight tensor.

    ``save_interval_s``: a trial that trains for longer is saved so often, and goes on from there
    after a kill; 0 saves after every step, null never.
    """

    num_threads: int = Field(1, ge=1)
    num_workers: int = Field(1, ge=1)
    gpus_per_worker: float = Field(
        0.0, ge=0, validation_alias=AliasChoices("gpus_per_worker", "num_gpus")
    )
    strategy: Strategy = "ddp"
    max_failures: int = Field(2, ge=0)
    save_interval_s: float | None = Field(600.0, ge=0)

    @model_validator(mode="after")
    def _workers_fit(self) -> "Resources":
        if self.num_workers == 1 and self.strategy == "fsdp":
            raise ValueError(
                "strategy fsdp splits the weights over workers and num_workers is 1; raise it, or "
                "leave strategy out"
            )
        shared = self.num_workers == 1 and self.gpus_per_worker < 1  # by several trials
        if not shared and self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}, but a worker trains on one GPU, and "
                "several workers have one each, or none; give 1 or 0, and num_workers for more GPUs"
            )
        return self

    def conflict(self, config: TrialConfig) -> str | None:
        """Why a trial cannot be trained by these workers, or None.

        Every worker takes an equal share of each forward pass (KTO: of two sequences at least, that
        it compares), and of a rollout whole groups of completions of a prompt.
        """
        if self.num_workers == 1:
            return None
        micro, algorithm = config.train.micro_batch_size, config.algorithm
        if self.strategy == "fsdp" and (reason := _whole_model(config)):
            return f"strategy fsdp {reason}"
        whole = self.num_workers * (2 if isinstance(algorithm, KtoConfig) else 1)
        if micro % self.num_workers or micro < whole:
            return (
                f"train.batch_size / gradient_accumulation_steps = {micro} must be a multiple of "
                f"num_workers {self.num_workers} and at least {whole} for {algorithm.name}; change "
                "one of them"
            )
        if isinstance(algorithm, OnlineConfig):
            share = config.train.batch_size * algorithm.steps_per_rollout / self.num_workers
            if share % algorithm.num_generations:
                return (
                    f"a worker's part of a rollout (train.batch_size * algorithm.steps_per_rollout "
                    f"/ num_workers = {share:g}) must be a multiple of algorithm.num_generations "
                    f"{algorithm.num_generations}; change one of them"
                )
        return None


def _whole_model(config: TrialConfig) -> str | None:
    """What of a trial needs a whole model on one worker, and what to do about it; or None."""
    algorithm = config.algorithm
    if algorithm.name in ("ppo", "prime"):
        return (
            f"does not train {algorithm.name}, whose second model every worker holds whole; leave "
            "strategy out (ddp), or take another algorithm"
        )
    if config.train.mask is not None:
        return (
            "trains no subnetwork, whose mask selects of whole tensors; leave strategy out (ddp), "
            "or train.mask"
        )
    if isinstance(algorithm, OnlineConfig) and algorithm.generation.engine == "vllm":
        return (
            "does not hand vLLM its weights, which each worker has a part of; set "
            "algorithm.generation.engine to transformers, or leave strategy out (ddp)"
        )
    if config.probe.step_patches:
        return (
            "writes no patches of steps, of which each worker has a part; leave "
            "probe.step_patches out, or strategy (ddp)"
        )
    if config.keep_checkpoints:
        return (
            "keeps no checkpoints, which one worker would have to hold whole; leave "
            "keep_checkpoints out: the patches are lossless"
        )
    return None
