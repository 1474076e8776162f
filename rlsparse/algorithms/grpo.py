"""Group relative policy optimisation (GRPO; Shao et al., 2402.03300, equations 3 and 4).

For each prompt a group of G completions is sampled from the policy and rewarded by the task's
grader; the advantage of each is its reward, centred and scaled within the group. The loss is the
clipped policy ratio averaged over the tokens of a completion, then over completions (TRL's
``loss_type="grpo"``; TRL's own default is DAPO's token average), plus ``kl_coef`` times the
unbiased k3 estimate of KL(pi || pi_ref). TRL's default coefficient is 0 and it corrects the KL by
the importance ratio; the paper has 0.04 and no correction. A group whose rewards are all equal has
zero advantage and moves nothing.
"""

from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rlsparse.algorithms.context import TrialContext
from rlsparse.config import GrpoConfig


def build(context: TrialContext) -> GRPOTrainer:
    """Trainer that samples from the policy and rewards with the task's grader."""
    algorithm = context.config.algorithm
    assert isinstance(algorithm, GrpoConfig)
    arguments = GRPOConfig(
        **context.trainer_arguments(),
        num_generations=algorithm.num_generations,
        steps_per_generation=context.config.train.gradient_accumulation_steps,
        num_iterations=algorithm.num_iterations,
        max_completion_length=context.task.max_completion_tokens,
        temperature=algorithm.temperature,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        beta=algorithm.kl_coef,
        use_bias_correction_kl=False,
        loss_type="grpo",
        epsilon=algorithm.clip_range,
        epsilon_high=None,
        delta=None,
        scale_rewards=algorithm.scale_rewards,
        importance_sampling_level="token",
        mask_truncated_completions=False,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        sync_ref_model=False,
        disable_dropout=True,
        shuffle_dataset=True,
        use_vllm=False,
    )

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [context.task.grade(c, a) for c, a in zip(completions, answer, strict=True)]

    trainer = GRPOTrainer(
        context.model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(
            [{"prompt": p.prompt, "answer": p.answer} for p in context.problems]
        ),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
    context.set_reference(trainer)
    return trainer
