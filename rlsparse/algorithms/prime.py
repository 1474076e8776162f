"""Process reinforcement through implicit rewards (PRIME; Cui et al., 2502.01456, algorithm 1).

A reward model pi_phi, a language model that starts as the base, gives token t the implicit process
reward r_phi(y_t) = ``reward_beta`` log(pi_phi(y_t) / pi_ref(y_t)) (equation 3). Its advantage
(equation 5) adds up, over the rest of the completion, that reward less the leave-one-out mean
(over the other K - 1 completions of the prompt) of the token-averaged process reward, and adds the
outcome r_o less its leave-one-out mean. The policy loss is PPO's clipped one (equation 6). Prompts
whose mean outcome lies outside [``min_accuracy``, ``max_accuracy``] take part in neither loss.

pi_phi is trained online by cross-entropy between sigma(sum_t r_phi(y_t)) and the outcome, after it
has given its rewards for the rollout (algorithm 1, lines 7 and 8), with an optimizer, learning rate
and gradient clipping of its own: one step per part of the rollout that is as large as the policy's
batch (the paper: batches of 256 of the 1024 completions of a rollout, for both models). A nonzero
``kl_coef`` (the paper: 0) takes kl_coef log(pi / pi_ref) off the process rewards.

Deviations: K is 8, not 4, and dropped prompts are not replaced, so that a step learns from fewer
completions, or from none, and then moves nothing. The authors' code also whitens advantages, leaves
the last token without process reward and has another baseline; here it is the paper's equation.
Log-probabilities are those of sampling at ``temperature``, for all three models.
"""

from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from rlsparse import distributed
from rlsparse.algorithm_config import PrimeConfig
from rlsparse.algorithms import rollouts
from rlsparse.algorithms.context import TrialContext
from rlsparse.errors import TrialError


def leave_one_out(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Mean of the others in the same group, for values (B,) whose groups are adjacent: (B,)."""
    groups = values.view(-1, group_size)
    return ((groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)).view(-1)


def prime_advantages(
    process_rewards: torch.Tensor,
    outcomes: torch.Tensor,
    mask: torch.Tensor,
    group_size: int,
    discount: float,
) -> torch.Tensor:
    """Equation 5: (B, T), 0 on padding.

    Args:
        process_rewards: reward of each token, (B, T).
        outcomes: reward of each completion, (B,).
        mask: 1 on the tokens of completions, (B, T).
        group_size: completions of a prompt, adjacent.
        discount: of process rewards, per token.
    """
    means = (process_rewards * mask).sum(dim=1) / mask.sum(dim=1)
    baselines = leave_one_out(means, group_size)
    returns = rollouts.discounted_sums((process_rewards - baselines[:, None]) * mask, discount)
    return (returns + (outcomes - leave_one_out(outcomes, group_size))[:, None]) * mask


class PrimeTrainer(rollouts.TokenAdvantageTrainer):
    """Trains the policy and, beside it, the reward model."""

    def __init__(self, context: TrialContext) -> None:
        config = context.config
        assert isinstance(config.algorithm, PrimeConfig)
        self.settings = config.algorithm
        temperature = config.algorithm.temperature
        model = rollouts.copy_of(context.model, temperature=temperature)
        self.reward_model = rollouts.Companion(model, config, "reward_learning_rate")
        super().__init__(context, rollouts.copy_of(context.model, temperature=temperature))

    def score(self, rollout: rollouts.Rollout) -> dict[str, torch.Tensor]:
        """Advantages, 0 for dropped prompts, and the number of tokens that are not dropped.

        Raises:
            TrialError: an outcome lies outside [0, 1].
        """
        outcomes, size = rollout.rewards, self.settings.num_generations
        if ((outcomes < 0) | (outcomes > 1)).any():
            raise TrialError(
                f"prime learns rewards as probabilities, but one was {outcomes.min():g} and one "
                f"{outcomes.max():g}; algorithm.reward must give values in [0, 1]"
            )
        accuracy = (outcomes.view(-1, size).sum(dim=1) / size).repeat_interleave(size)
        low, high = self.settings.min_accuracy, self.settings.max_accuracy
        kept = (accuracy >= low) & (accuracy <= high)
        every = torch.arange(len(outcomes), device=outcomes.device)
        with torch.no_grad():
            penalty = self.settings.kl_coef * rollout.log_ratio
            rewards = self._process_rewards(rollout, every) - penalty
        self._update_reward_model(rollout, every, kept)
        self._metrics["train"]["kept_fraction"].append(kept.float().mean().item())
        advantages = prime_advantages(rewards, outcomes, rollout.mask, size, self.settings.discount)
        num_tokens = self.accelerator.reduce((rollout.mask.sum(dim=1) * kept).sum())
        return {"advantages": advantages * kept[:, None], "num_items_in_batch": num_tokens}

    def _process_rewards(self, rollout: rollouts.Rollout, rows: torch.Tensor) -> torch.Tensor:
        """Implicit reward of each token of some completions: (rows, T)."""
        assert rollout.reference_log_probs is not None
        log_probs = self.log_probs(
            self.reward_model.model,
            rollout.input_ids[rows],
            rollout.attention_mask[rows],
            rollout.mask.shape[1],
        )
        log_ratio = log_probs - rollout.reference_log_probs[rows]
        return self.settings.reward_beta * log_ratio * rollout.mask[rows]

    def _update_reward_model(
        self, rollout: rollouts.Rollout, every: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """One step on each part of the rollout in which a prompt was kept, by any worker."""
        micro_size = self.args.per_device_train_batch_size
        for part in torch.split(every, micro_size * self.args.gradient_accumulation_steps):
            rows = part[kept[part]]
            (count,) = distributed.total_counts([len(rows)])
            if not count:
                continue
            share = count / distributed.num_workers()
            total = 0.0
            for micro in torch.split(rows, micro_size) if len(rows) else ():
                logits = self._process_rewards(rollout, micro).sum(dim=1)
                loss = (
                    binary_cross_entropy_with_logits(
                        logits, rollout.rewards[micro], reduction="sum"
                    )
                    / share
                )
                self.accelerator.backward(loss)
                total += loss.item()
            self.reward_model.step()
            self._metrics["train"]["reward_model_loss"].append(total)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; without a gradient, Adam's momentum shall not move weights either."""
        loss: torch.Tensor = super().training_step(model, *args, **kwargs)
        weights = [w for w in model.parameters() if w.grad is not None]
        if self.accelerator.sync_gradients and not any(w.grad.any() for w in weights):
            model.zero_grad()
        return loss


def build(context: TrialContext) -> PrimeTrainer:
    """Trainer that samples from the policy and rewards with ``context.reward``."""
    return PrimeTrainer(context)
