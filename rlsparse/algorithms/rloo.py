"""REINFORCE leave-one-out (RLOO; Ahmadian et al., 2402.14740, section 3.1 and equation 2).

For each prompt k completions are sampled from the policy. The reward of a completion is its score
less ``kl_coef`` times the log-ratio to the reference, summed over its tokens: the KL penalty is
part of the reward, not of the loss. Its advantage is that reward less the mean of the other k - 1;
it is neither scaled nor clipped. REINFORCE's gradient, A(y) grad log pi(y), moves the whole
completion as one action, so that longer completions are not weighted down.

TRL writes the loss as PPO does, -min(rho A, clip(rho, 1 -+ ``clip_range``) A), with rho = pi(y) /
pi_old(y) of the *whole completion* (GRPO's and PPO's ratio is a token's). Strictly on-policy rho is
1, clipping cannot act, and the gradient is REINFORCE's. With ``steps_per_rollout`` or
``num_iterations`` above 1 it is an extension of the paper, and a given ``clip_range`` is tighter
than a token's, because the log-ratios of the tokens add up.

Deviations: k is 8, not 2 or 4; TRL computes pi_old in other batches than pi, so that rho is 1 only
to rounding. The logged ``kl`` is the mean log-ratio per token of the rollout (k1), not GRPO's k3.
"""

from trl import RLOOConfig, RLOOTrainer

from rlsparse.algorithms.context import TrialContext

RLOO_ARGUMENTS = {
    "normalize_advantages": False,
    "reward_clip_range": None,
    "reward_weights": None,
}


def build(context: TrialContext) -> RLOOTrainer:
    """Trainer that samples from the policy and rewards with ``context.reward``."""
    trainer = RLOOTrainer(
        context.model,
        reward_funcs=context.trl_reward(),
        args=RLOOConfig(**context.rollout_arguments(), **RLOO_ARGUMENTS),
        train_dataset=context.prompts(),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
    context.set_reference(trainer)
    return trainer
