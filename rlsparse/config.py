"""What one trial is: everything that determines its bits, as frozen data.

Defaults are the vetted setting; a study lists only what differs. Importing this module needs no
torch. Adding an algorithm or a task starts in ``algorithm_config`` or ``task_config``, with one
class and one entry in its union.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsparse.algorithm_config import AlgorithmConfig, KtoConfig, OnlineConfig
from rlsparse.definitions import Module, StepWindow
from rlsparse.mask_config import MaskConfig
from rlsparse.task_config import ChainSumConfig, TaskConfig
from rlsparse.variants import Config

Precision = Literal["bf16", "bf16-weights", "bf16-mixed", "fp32"]

STORED_DTYPE: dict[Precision, str] = {
    "bf16": "bf16", "bf16-weights": "bf16", "bf16-mixed": "bf16", "fp32": "fp32",
}  # fmt: skip
"""The number format in which a trial of each precision regime leaves its weights."""


class ModelConfig(Config):
    """The base model: one that has a name, a folder, or a hub ``id@revision``.

    Names are ``tiny`` (ships with the project), and ``smollm2-135m`` and ``gemma3-270m`` (from
    packages that are installed on their own).
    """

    source: str = Field("tiny", min_length=1)


class TrainConfig(Config):
    """How weights are moved. ``batch_size`` counts the sequences of one optimizer step.

    A preference pair counts as one sequence. ``max_grad_norm: null`` turns clipping off. The four
    precision regimes are: ``bf16`` (weights, gradients and moments in bf16), ``bf16-weights``
    (bf16 weights, fp32 moments), ``bf16-mixed`` (fp32 master weights, bf16 autocast; what RL
    stacks use) and ``fp32``. ``learning_rate: 0`` is allowed: it is a control. ``momentum`` is that
    of ``sgd-momentum``. Only weights of ``trainable_modules`` in ``trainable_layers`` are trained;
    null means all. With a ``mask``, of these only the weights in it: ``max_grad_norm`` is then of
    their gradients, and nothing is kept for others (PPO's critic and PRIME's reward model are
    trained whole). ``data_seed`` orders the data; null follows the trial's seed.
    """

    num_steps: int = Field(150, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-5, ge=0, lt=1e30)
    precision: Precision = "bf16-mixed"
    max_grad_norm: float | None = Field(1.0, gt=0)
    optimizer: Literal["adamw", "sgd", "sgd-momentum"] = "adamw"
    momentum: float = Field(0.9, gt=0, lt=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    gradient_accumulation_steps: int = Field(1, ge=1)
    trainable_modules: Annotated[tuple[Module, ...], Field(min_length=1)] | None = None
    trainable_layers: (
        Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None
    ) = None
    mask: MaskConfig | None = None
    data_seed: int | None = Field(None, ge=0, lt=2**31)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass."""
        return self.batch_size // self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _batch_splits(self) -> "TrainConfig":
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        return self


NUM_DISTANCE_PROBLEMS = 256
"""Test problems, at most, on which the KL divergence to the base is measured."""


class ProbeConfig(Config):
    """What is measured while training.

    ``snapshots`` are the optimizer steps after which a patch is written; the last step is always
    one. ``score_snapshots``: at each, the held-out score and the KL divergence to the base too.
    After every step it is measured which weights differ from the step before; ``k_steps`` are
    further windows, in steps, over which that is measured, of which each costs the memory of one
    more copy of the weights. ``step_masks``: the mask of what each step changed is kept;
    ``step_patches``: the patch of each step is, so that what syncing the weights would take can be
    told. ``casts``: at each snapshot, what differs from the base after a cast to each of the views.
    ``update_interval``: after every so many steps, gradients and updates against half a bf16 ULP.
    """

    snapshots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    score_snapshots: bool = True
    k_steps: tuple[StepWindow, ...] = ()
    step_masks: bool = False
    step_patches: bool = False
    casts: bool = False
    update_interval: int | None = Field(None, ge=1)


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
        for name in ("snapshots", "k_steps"):
            beyond = [s for s in getattr(self.probe, name) if s > self.train.num_steps]
            if beyond:
                raise ValueError(
                    f"probe.{name} {beyond} lie beyond train.num_steps {self.train.num_steps}; "
                    "leave them out, or raise it"
                )
        if (self.probe.update_interval or 0) > self.train.num_steps:
            raise ValueError(
                f"probe.update_interval {self.probe.update_interval} lies beyond train.num_steps "
                f"{self.train.num_steps}, so that no step would be looked at; lower it"
            )
        algorithm, micro = self.algorithm, self.train.micro_batch_size
        if isinstance(algorithm, KtoConfig) and micro < 2:
            raise ValueError(
                "kto compares the sequences of a forward pass with each other; train.batch_size / "
                f"gradient_accumulation_steps is {micro} and must be at least 2"
            )
        if isinstance(algorithm, OnlineConfig):
            algorithm.check_rollout(micro, self.train.batch_size, self.task.num_train_problems)
        return self

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps after which a snapshot is taken: those asked for and the last, ascending."""
        return tuple(sorted({*self.probe.snapshots, self.train.num_steps}))

    @property
    def data_seed(self) -> int:
        """Seed of the order of the data."""
        return self.seed if self.train.data_seed is None else self.train.data_seed

    @property
    def sampling_seed(self) -> int:
        """Seed of the sampling of completions."""
        own: int | None = getattr(self.algorithm, "sampling_seed", None)
        return self.seed if own is None else own

    @property
    def init_seed(self) -> int:
        """Seed of weights that training adds to the base (the head of PPO's critic)."""
        own: int | None = getattr(self.algorithm, "init_seed", None)
        return self.seed if own is None else own

    @property
    def stored_dtype(self) -> str:
        """Number format of the weights that this trial leaves: ``bf16`` or ``fp32``."""
        return STORED_DTYPE[self.train.precision]

    @property
    def trained_dtype(self) -> str:
        """Number format of the weights while they are trained; that of the masters, if any."""
        return "fp32" if self.train.precision == "bf16-mixed" else self.stored_dtype
