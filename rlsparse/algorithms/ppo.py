"""Proximal policy optimisation with a critic (PPO; 1707.06347; for LLMs: InstructGPT, 2203.02155).

The reward of token t is -``kl_coef`` log(pi / pi_ref), to which the last token adds the score of
the completion (InstructGPT, equation 2, without its pretraining term). A critic V, the base with a
scalar head, gives advantages by generalised advantage estimation (1506.02438, equation 16)

    A_t = sum_l (discount gae_lambda)^l delta_{t+l},   delta_t = r_t + discount V_{t+1} - V_t,

with V = 0 after the last token, and the returns A_t + V_t that it learns. Advantages are whitened
over all tokens of the rollout. Losses, as means over tokens:

    policy  max(-rho A, -clip(rho, 1 -+ clip_range) A),  rho = pi / pi_old of a token (equation 7)
    critic  1/2 max((V - R)^2, (V_old + clip(V - V_old, -+ value_clip_range) - R)^2)

They share no weights, so the critic has an optimizer, learning rate and gradient clipping of its
own and needs no loss coefficient; the logged loss is the policy's. A rollout is split at random
into ``steps_per_rollout`` minibatches, each of which is one optimizer step of both, and is gone
through ``num_iterations`` times.

Deviations: a prompt is sampled ``num_generations`` times in a rollout, as for the other algorithms
here; minibatches are the same in every pass; the critic starts from the base, not from a reward
model; a truncated completion counts as ended; no entropy bonus, no adaptive KL coefficient.
"""

import copy
from typing import Any

import torch

from rlsparse import distributed
from rlsparse.algorithm_config import PpoConfig
from rlsparse.algorithms import rollouts
from rlsparse.algorithms.context import TrialContext


def generalized_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    discount: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (both (B, T), 0 on padding) of rewards and values (B, T)."""
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + discount * following - values) * mask
    advantages = rollouts.discounted_sums(deltas, discount * gae_lambda)
    return advantages, advantages + values


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and (biased) variance 1 over the mask; 0 on padding.

    Mean and variance are those of the rollouts of all workers.
    """
    num_tokens = distributed.total(mask.sum())
    centred = (values - distributed.total((values * mask).sum()) / num_tokens) * mask
    return centred * torch.rsqrt(distributed.total(centred.square().sum()) / num_tokens + 1e-8)


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """The critic's loss of each token; ``clip`` of None clips nothing."""
    losses = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.maximum(losses, (near - returns).square())
    return 0.5 * losses


class Critic(torch.nn.Module):
    """The base without its language-model head, with a scalar head in the same number format.

    The head is drawn from N(0, 1 / (hidden + 1)), as in 2009.01325, by a generator of its own.
    """

    def __init__(self, base: Any, seed: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(base.base_model).eval()
        size = base.get_output_embeddings().weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        head = torch.empty(size).normal_(std=(size + 1) ** -0.5, generator=generator)
        self.head = torch.nn.Parameter(head.to(base.device, base.dtype))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """Value before each of the last ``num_tokens`` tokens: (B, num_tokens), fp32."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states = output.last_hidden_state[:, -num_tokens - 1 : -1]
        values: torch.Tensor = (states.float() * self.head.float()).sum(-1)
        return values


class PpoTrainer(rollouts.TokenAdvantageTrainer):
    """Trains the policy and, beside it, the critic."""

    def __init__(self, context: TrialContext) -> None:
        config = context.config
        assert isinstance(config.algorithm, PpoConfig)
        self.settings = config.algorithm
        critic = Critic(context.model, config.init_seed)
        self.critic = rollouts.Companion(critic, config, "value_learning_rate")
        reference = None
        if self.settings.kl_coef > 0:
            reference = rollouts.copy_of(context.model, temperature=self.settings.temperature)
        super().__init__(context, reference)

    @torch.no_grad()
    def score(self, rollout: rollouts.Rollout) -> dict[str, torch.Tensor]:
        """Whitened advantages, and the values and returns that the critic's loss needs."""
        rewards = rollouts.token_rewards(
            rollout.rewards, rollout.log_ratio, rollout.mask, self.settings.kl_coef
        )
        values = self._values(rollout.input_ids, rollout.attention_mask, rewards.shape[1])
        advantages, returns = generalized_advantages(
            rewards, values, rollout.mask, self.settings.discount, self.settings.gae_lambda
        )
        advantages = whiten(advantages, rollout.mask)
        return {"advantages": advantages, "values": values, "returns": returns}

    def _values(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """The critic's values, in micro-batches."""
        size = self.args.per_device_train_batch_size
        parts = [slice(i, i + size) for i in range(0, len(input_ids), size)]
        critic = self.critic.model
        with self.accelerator.autocast():
            return torch.cat([critic(input_ids[p], attention_mask[p], num_tokens) for p in parts])

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add to the critic's gradient, then the policy's loss: one graph in memory at a time."""
        values = self._values(*rollouts.joined(inputs), inputs["values"].shape[1])
        clip = self.settings.value_clip_range
        losses = value_losses(values, inputs["values"], inputs["returns"], clip)
        loss = self.token_mean(losses, inputs)
        self.accelerator.backward(loss)
        self._metrics["train"]["value_loss"].append(loss.item())
        return super()._compute_loss(model, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; the critic is updated when the policy will be."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.critic.step()
        return loss


def build(context: TrialContext) -> PpoTrainer:
    """Trainer that samples from the policy and rewards with ``context.reward``."""
    return PpoTrainer(context)
