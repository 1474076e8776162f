"""What one trial is: everything that determines its bits, as frozen data.

Defaults are the vetted setting; a study lists only what differs. Importing this module needs no
torch. Adding an algorithm or a task starts here, with one class and one entry in its union.
"""

import hashlib
import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["bf16", "bf16-weights", "bf16-mixed", "fp32"]

STORED_DTYPE: dict[Precision, str] = {
    "bf16": "bf16",
    "bf16-weights": "bf16",
    "bf16-mixed": "bf16",
    "fp32": "fp32",
}
"""The number format in which a trial of each precision regime leaves its weights."""


class Config(BaseModel):
    """Base of all configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Config):
    """The base model: ``tiny`` (ships with the project), a folder, or a hub ``id@revision``."""

    source: str = Field("tiny", min_length=1)


class ChainSumConfig(Config):
    """Sums such as ``4 - 1 + 7``, from reasoning-gym's ``chain_sum``.

    ``num_terms`` and ``num_digits`` set the difficulty; ``num_shots`` puts that many solved
    problems (of the pretrain split) before each prompt, for models that were not trained on the
    task.
    """

    name: Literal["chain_sum"] = "chain_sum"
    num_terms: int = Field(3, ge=2, le=6)
    num_digits: int = Field(1, ge=1, le=4)
    num_shots: int = Field(0, ge=0, le=8)
    num_train_problems: int = Field(768, ge=1)
    num_eval_problems: int = Field(512, ge=1)
    max_completion_tokens: int = Field(6, ge=1)


TaskConfig = ChainSumConfig
"""One task so far; a second one makes this a union discriminated by ``name``."""


class SftConfig(Config):
    """Supervised fine-tuning on gold completions, the control that every RL claim needs.

    ``FLOP_PER_WEIGHT_TOKEN`` of each algorithm class is for the estimate of ``--dry-run``.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 6.0

    name: Literal["sft"] = "sft"


class DpoConfig(Config):
    """Direct preference optimisation (2305.18290) on pairs sampled from the base and graded.

    ``beta`` is DPO's own temperature; it is not a KL coefficient and is never pooled with one.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 16.0  # two sequences, each with a reference pass

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    num_samples_per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)


class GrpoConfig(Config):
    """Group relative policy optimisation (2402.03300), strictly on-policy by default."""

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 8.0  # samples first

    name: Literal["grpo"] = "grpo"
    kl_coef: float = Field(0.0, ge=0)
    num_generations: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    clip_range: float = Field(0.2, gt=0)
    num_iterations: int = Field(1, ge=1)
    scale_rewards: Literal["group", "batch", "none"] = "group"


AlgorithmConfig = Annotated[SftConfig | DpoConfig | GrpoConfig, Field(discriminator="name")]


class TrainConfig(Config):
    """How weights are moved. ``batch_size`` counts the sequences of one optimizer step.

    A DPO pair counts as one sequence. ``max_grad_norm: null`` turns clipping off. The four
    precision regimes are: ``bf16`` (weights, gradients and moments in bf16), ``bf16-weights``
    (bf16 weights, fp32 moments), ``bf16-mixed`` (fp32 master weights, bf16 autocast; what RL
    stacks use) and ``fp32``. ``learning_rate: 0`` is allowed: it is a control.
    """

    num_steps: int = Field(150, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-5, ge=0)
    precision: Precision = "bf16-mixed"
    max_grad_norm: float | None = Field(1.0, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    gradient_accumulation_steps: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _batch_splits(self) -> "TrainConfig":
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        return self


class ProbeConfig(Config):
    """What is measured while training.

    ``snapshots`` are the optimizer steps after which a patch is written and the model is scored;
    the last step is always one.
    """

    snapshots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    score_snapshots: bool = True


class TrialConfig(Config):
    """One training run: the resolved form of one cell and one seed of a study."""

    model: ModelConfig = ModelConfig()
    task: TaskConfig = ChainSumConfig()
    algorithm: AlgorithmConfig
    train: TrainConfig = TrainConfig()
    probe: ProbeConfig = ProbeConfig()
    seed: int = Field(0, ge=0, lt=2**31)
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrialConfig":
        beyond = [s for s in self.probe.snapshots if s > self.train.num_steps]
        if beyond:
            raise ValueError(
                f"probe.snapshots {beyond} lie beyond train.num_steps {self.train.num_steps}"
            )
        algorithm = self.algorithm
        micro = self.train.batch_size // self.train.gradient_accumulation_steps
        if isinstance(algorithm, GrpoConfig) and micro % algorithm.num_generations:
            raise ValueError(
                f"train.batch_size / gradient_accumulation_steps = {micro} must be a multiple of "
                f"algorithm.num_generations {algorithm.num_generations}"
            )
        return self

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps after which a snapshot is taken: those asked for and the last, ascending."""
        return tuple(sorted({*self.probe.snapshots, self.train.num_steps}))

    @property
    def stored_dtype(self) -> str:
        """Number format of the weights that this trial leaves: ``bf16`` or ``fp32``."""
        return STORED_DTYPE[self.train.precision]


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """All configuration classes that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, tuple, list):
        for argument in typing.get_args(annotation):
            yield from models_of(argument)


def tag_of(model: type[BaseModel]) -> str | None:
    """What ``name`` or ``kind`` says in a member of a union; None for other classes."""
    for field in ("name", "kind"):
        if field in model.model_fields:
            values = typing.get_args(model.model_fields[field].annotation)
            if len(values) == 1:
                return str(values[0])
    return None


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces, floats by ``repr``, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def trial_id(
    config: TrialConfig,
    *,
    replicate: int,
    num_threads: int,
    num_workers: int,
    base_fingerprint: str,
    task_version: str,
) -> str:
    """Name of a trial: the first 12 hex digits of the sha256 of all that determines its bits.

    Args:
        config: the resolved configuration; where the base lies (``model.source``) is replaced by
            what it contains.
        replicate: 0, or k for the k-th rerun of the same trial under the same seed.
        num_threads: CPU threads of the trial, fixed for a study.
        num_workers: processes that train the trial together.
        base_fingerprint: content hash of the base model.
        task_version: version of the task's data and grader.
    """
    resolved = config.model_dump(mode="json", exclude={"keep_checkpoints": True, "model": True})
    identity = {
        "config": resolved,
        "replicate": replicate,
        "num_threads": num_threads,
        "num_workers": num_workers,
        "base": base_fingerprint,
        "task_version": task_version,
    }
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
