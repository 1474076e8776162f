"""Group relative policy optimisation (GRPO; Shao et al., 2402.03300, equations 3 and 4).

For each prompt a group of G completions is sampled from the policy and rewarded; the advantage of
each is its reward, centred and scaled within the group. The loss is the clipped policy ratio
averaged over the tokens of a completion, then over completions (TRL's ``loss_type="grpo"``; TRL's
own default is DAPO's token average), plus ``kl_coef`` (paper: 0.04) times the unbiased k3 estimate
of KL(pi || pi_ref), not corrected by the importance ratio as TRL would. A group whose rewards are
all equal has zero advantage.

Deviations: G is 8, not 64; the reference stays the base; TRL adds 1e-4 to the standard deviation.
"""

from trl import GRPOConfig, GRPOTrainer

from rlsparse.algorithms.context import TrialContext

GRPO_ARGUMENTS = {
    "use_bias_correction_kl": False,
    "loss_type": "grpo",
    "delta": None,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}


def build(context: TrialContext) -> GRPOTrainer:
    """Trainer that samples from the policy and rewards with ``context.reward``."""
    trainer = GRPOTrainer(
        context.model,
        reward_funcs=context.trl_reward(),
        args=GRPOConfig(**context.rollout_arguments(), **GRPO_ARGUMENTS),
        train_dataset=context.prompts(),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
    context.set_reference(trainer)
    return trainer
