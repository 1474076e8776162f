"""What decides how an algorithm learns: one class for each, in one union."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlsparse.variants import Config, function_or

Reward = Annotated[str, function_or("task", "shuffled", "random")]
"""Where rewards come from: the task's grader, or ``module:function`` of the user's own code,
called with lists ``prompts``, ``completions``, ``answers`` and giving one float each. Two
surrogates carry no information: ``shuffled`` permutes the grades among the completions of a prompt,
``random`` tosses a coin for each."""


class EngineConfig(Config):
    """What samples completions from the policy while it is trained.

    ``transformers`` samples with the code that trains. ``vllm`` is faster, needs GPUs and vLLM, and
    computes probabilities with other kernels, so that samples are slightly off-policy: ``grpo``,
    ``ppo`` and ``prime`` weigh them by TRL's ``importance_sampling`` (null: not at all), whose
    ratios are bounded by ``importance_cap``; ``rloo`` has no such correction. ``colocate`` runs
    vLLM on the trial's own GPU, in ``gpu_memory_utilization`` of its memory; ``server`` asks a
    `trl vllm-serve` at ``server_url``, which serves one trial at a time.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    mode: Literal["colocate", "server"] = "colocate"
    server_url: str | None = None
    gpu_memory_utilization: float = Field(0.3, gt=0, lt=1)
    tensor_parallel_size: int = Field(1, ge=1)
    importance_sampling: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = "sequence_mask"
    importance_cap: float = Field(3.0, gt=1)

    @model_validator(mode="after")
    def _server_is_named(self) -> "EngineConfig":
        if (self.mode == "server") != (self.server_url is not None):
            raise ValueError(
                f"mode is {self.mode} and server_url {self.server_url}: mode server needs the URL "
                "of a running server, mode colocate none"
            )
        return self

    @property
    def is_colocated(self) -> bool:
        """Whether the engine takes memory of the GPU that trains."""
        return self.engine == "vllm" and self.mode == "colocate"


class OnlineConfig(Config):
    """What the algorithms share that sample from the policy while they train it.

    One rollout samples ``steps_per_rollout`` batches and each serves ``num_iterations`` passes:
    1 and 1 is strictly on-policy (the ratio is 1 and ``clip_range`` never acts); else the last of
    its steps sees samples that are ``steps_per_rollout * num_iterations - 1`` steps old.
    ``clip_range: null`` turns ratio clipping off. ``sampling_seed: null`` follows the trial's seed.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 10.0  # samples, reference, forward and backward

    reward: Reward = "task"
    kl_coef: float = Field(0.0, ge=0)
    num_generations: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    clip_range: float | None = Field(0.2, gt=0)
    num_iterations: int = Field(1, ge=1)
    steps_per_rollout: int = Field(1, ge=1)
    sampling_seed: int | None = Field(None, ge=0, lt=2**31)
    generation: EngineConfig = EngineConfig()

    def check_rollout(self, micro_batch_size: int, batch_size: int, num_problems: int) -> None:
        """Refuse batches that hold no whole groups, and rollouts of more prompts than there are."""
        count = self.num_generations
        if micro_batch_size % count:
            raise ValueError(
                f"train.batch_size / gradient_accumulation_steps = {micro_batch_size} must be a "
                f"multiple of algorithm.num_generations {count}"
            )
        if (needed := batch_size * self.steps_per_rollout // count) > num_problems:
            raise ValueError(
                f"a rollout takes {needed} prompts (train.batch_size * algorithm.steps_per_rollout "
                f"/ num_generations), task.num_train_problems is {num_problems}; raise it"
            )


class GrpoConfig(OnlineConfig):
    """Group relative policy optimisation (2402.03300)."""

    name: Literal["grpo"] = "grpo"
    kl_coef: float = Field(0.04, ge=0)
    scale_rewards: Literal["group", "batch", "none"] = "group"


class RlooConfig(OnlineConfig):
    """REINFORCE leave-one-out (2402.14740)."""

    name: Literal["rloo"] = "rloo"
    kl_coef: float = Field(0.03, ge=0)


class PpoConfig(OnlineConfig):
    """Proximal policy optimisation (1707.06347) with a critic, as in InstructGPT (2203.02155, C.4).

    The critic starts from the base with a scalar head seeded by ``init_seed`` (null: the trial's
    seed), and has its own learning rate. In the first rollout the policy still is the reference, so
    that ``kl_coef`` acts from the second on: after ``steps_per_rollout * num_iterations`` steps.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 18.0

    name: Literal["ppo"] = "ppo"
    kl_coef: float = Field(0.02, ge=0)
    steps_per_rollout: int = Field(8, ge=1)
    discount: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    value_clip_range: float | None = Field(0.2, gt=0)
    value_learning_rate: float = Field(1e-5, ge=0, lt=1e30)
    init_seed: int | None = Field(None, ge=0, lt=2**31)


class PrimeConfig(OnlineConfig):
    """Process reinforcement through implicit rewards (2502.01456).

    ``reward_beta`` scales the log-ratio that is the implicit reward; prompts whose share of right
    completions lies outside [``min_accuracy``, ``max_accuracy``] are left out of a step.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 18.0

    name: Literal["prime"] = "prime"
    discount: float = Field(1.0, gt=0, le=1)
    reward_beta: float = Field(0.05, gt=0)
    reward_learning_rate: float = Field(1e-6, ge=0, lt=1e30)
    min_accuracy: float = Field(0.2, ge=0, le=1)
    max_accuracy: float = Field(0.8, ge=0, le=1)


class SftConfig(Config):
    """Supervised fine-tuning, the control that every RL claim needs.

    ``data`` is ``gold`` (the task's own solutions), or a file, URL or hub id with columns prompt
    and completion. ``FLOP_PER_WEIGHT_TOKEN`` of each class is for the estimate of ``--dry-run``.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 6.0

    name: Literal["sft"] = "sft"
    data: str = Field("gold", min_length=1)


class SampledDataConfig(Config):
    """What the algorithms share that learn from completions sampled once, from the base.

    ``num_samples_per_prompt`` completions of each prompt are sampled at ``temperature``, and
    rewarded.
    """

    reward: Reward = "task"
    num_samples_per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    sampling_seed: int | None = Field(None, ge=0, lt=2**31)


class RftConfig(SampledDataConfig):
    """Rejection-sampling fine-tuning (2308.01825): SFT on the base's own right completions."""

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 6.0

    name: Literal["rft"] = "rft"


class PreferenceConfig(SampledDataConfig):
    """What the algorithms share that learn from preferences.

    ``data`` is ``sampled`` (of the base's completions of a prompt the best is chosen, the worst
    rejected: in-distribution), ``gold`` (the task's solution chosen, that of another problem
    rejected: off-distribution), or a file, URL or hub id with columns prompt, chosen, rejected
    (KTO: prompt, completion, label). ``beta`` is each algorithm's own temperature, not a KL
    coefficient, and never pooled with one.
    """

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 12.0  # two sequences

    data: str = Field("sampled", min_length=1)
    beta: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _reward_acts(self) -> "PreferenceConfig":
        if self.data != "sampled" and self.reward != "task":
            raise ValueError(
                f"reward {self.reward} would do nothing with data {self.data}: only sampled "
                "completions are rewarded; set data to sampled, or reward to task"
            )
        return self


class DpoConfig(PreferenceConfig):
    """Direct preference optimisation (2305.18290)."""

    FLOP_PER_WEIGHT_TOKEN: ClassVar[float] = 16.0  # each of both with a reference pass

    name: Literal["dpo"] = "dpo"


class SimpoConfig(PreferenceConfig):
    """Simple preference optimisation (2405.14734), without a reference."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    gamma: float = Field(1.0, ge=0)


class OrpoConfig(PreferenceConfig):
    """Odds ratio preference optimisation (2403.07691); ``beta`` is the paper's lambda."""

    name: Literal["orpo"] = "orpo"


class KtoConfig(PreferenceConfig):
    """Kahneman-Tversky optimisation (2402.01306) on single completions that are right or wrong."""

    name: Literal["kto"] = "kto"
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)


AlgorithmConfig = Annotated[
    SftConfig
    | RftConfig
    | DpoConfig
    | SimpoConfig
    | OrpoConfig
    | KtoConfig
    | GrpoConfig
    | RlooConfig
    | PpoConfig
    | PrimeConfig,
    Field(discriminator="name"),
]
