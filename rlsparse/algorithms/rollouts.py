"""What PPO and PRIME share: TRL's GRPO loop with advantages of their own, one per token.

TRL samples, rewards, splits the rollout into minibatches and computes the clipped policy loss, with
``loss_type="dapo"``: a sum over tokens, divided by the mean number of completion tokens per
optimizer step of the rollout. Every token of a rollout so weighs the same, and gradient
accumulation changes nothing. The KL penalty is not in the loss but in the rewards, per token.
"""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlsparse import distributed
from rlsparse.algorithm_config import OnlineConfig
from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.grpo import GRPO_ARGUMENTS
from rlsparse.config import TrialConfig
from rlsparse.errors import TrialError
from rlsparse.optim import build_optimizer

TOKEN_ARGUMENTS = {**GRPO_ARGUMENTS, "loss_type": "dapo", "beta": 0.0, "scale_rewards": "none"}


@dataclass(frozen=True)
class Rollout:
    """B completions of at most T tokens, those of a prompt adjacent, padded after their end."""

    input_ids: torch.Tensor
    """(B, P + T): prompts padded on the left, completions on the right."""
    attention_mask: torch.Tensor
    """(B, P + T)."""
    mask: torch.Tensor
    """(B, T), fp32: 1 on the tokens of completions, end of text included."""
    rewards: torch.Tensor
    """(B,): score of each completion."""
    reference_log_probs: torch.Tensor | None
    """(B, T): log-probability of each token under the reference, if there is one."""
    log_ratio: torch.Tensor
    """(B, T): log(pi / pi_ref) at sampling; 0 on padding, and where ``kl_coef`` is 0."""


class Companion:
    """A model that is trained beside the policy, with an optimizer and a clipping of its own.

    Every worker holds it whole; a step averages their gradients, as that of the policy does.

    The optimizer is the trial's, but for the learning rate, which is the algorithm's ``rate_field``
    and stays constant; all weights are trained, also where the policy's are those of a mask.
    """

    def __init__(self, model: torch.nn.Module, config: TrialConfig, rate_field: str) -> None:
        train, rate = config.train, getattr(config.algorithm, rate_field)
        self.model = model.requires_grad_(True)
        own = {"learning_rate": rate, "trainable_modules": None, "trainable_layers": None}
        self.optimizer = build_optimizer(self.model, train.model_copy(update=own))
        self._max_grad_norm = math.inf if train.max_grad_norm is None else train.max_grad_norm
        self._rate = f"algorithm.{rate_field} {rate:g}"

    def step(self) -> None:
        """Average over workers, clip, update and forget the gradients.

        Raises:
            TrialError: a gradient is not finite.
        """
        distributed.average_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        if not torch.isfinite(norm):
            raise TrialError(
                f"the gradient of the model that {self._rate} trains is not finite; lower it"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer, between steps."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def copy_of(model: Any, *, temperature: float) -> Any:
    """Copy of a language model, without dropout, for ``TokenAdvantageTrainer.log_probs``.

    It gets the head that TRL gives to the policy, so that equal weights give equal bits; the
    log-probabilities are those of sampling at ``temperature``.
    """
    twin = copy.deepcopy(model).eval()
    add_fused_lm_head(twin, temperature=temperature)
    return twin


class TokenAdvantageTrainer(GRPOTrainer, ABC):  # type: ignore[misc]
    """TRL's GRPO trainer, with the advantages of ``score`` in place of GRPO's.

    Args:
        context: the trial.
        reference: the frozen base, from ``copy_of``; needed where ``kl_coef`` is not 0.
    """

    def __init__(self, context: TrialContext, reference: Any | None) -> None:
        algorithm = context.config.algorithm
        assert isinstance(algorithm, OnlineConfig)
        super().__init__(
            context.model,
            reward_funcs=context.trl_reward(),
            args=GRPOConfig(**context.rollout_arguments(), **TOKEN_ARGUMENTS),
            train_dataset=context.prompts(),
            processing_class=context.tokenizer,
            optimizers=context.optimizers(),
        )
        self.reference = None if reference is None else reference.requires_grad_(False)
        self._kl_coef = algorithm.kl_coef

    @abstractmethod
    def score(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Tensors that the loss needs: ``advantages`` (B, T) and any others of B rows.

        A scalar ``num_items_in_batch``, if given, replaces the number of tokens of the rollout.
        """

    def log_probs(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """Log-probability of each of the last ``num_tokens`` tokens: (B, num_tokens), fp32.

        ``model`` is the policy or comes from ``copy_of``. It runs in micro-batches of the trainer.
        """
        result: torch.Tensor = self._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            num_tokens,
            batch_size=self.args.per_device_train_batch_size,
        )[0]
        return result

    def token_mean(self, terms: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of ``terms`` (B, T) of a micro-batch over what the policy loss divides by."""
        num_parts = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        num_tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        mean: torch.Tensor = (terms * inputs["completion_mask"]).sum() * num_parts / num_tokens
        return mean

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rollout = self._rollout(batch)
        batch.update(self.score(rollout))
        if self._kl_coef:
            batch["kl"] = torch.expm1(-rollout.log_ratio) + rollout.log_ratio
        return batch

    @torch.no_grad()
    def _rollout(self, batch: dict[str, Any]) -> Rollout:
        """What TRL sampled and this trainer's part of the rewards."""
        ids, attention_mask = joined(batch)
        mask = batch["completion_mask"].float()
        count, length = mask.shape
        start = self.accelerator.process_index * count
        reference, log_ratio = None, torch.zeros_like(mask)
        if self.reference is not None:
            reference = self.log_probs(self.reference, ids, attention_mask, length)
        if reference is not None and self._kl_coef:
            # TRL has left these out if the weights that sampled are those that the loss will see.
            policy = batch.get("old_per_token_logps")
            if policy is None:
                policy = self.log_probs(self.model, ids, attention_mask, length)
            log_ratio = (policy - reference) * mask
        rewards = self._rewards[start : start + count, 0]
        return Rollout(ids, attention_mask, mask, rewards, reference, log_ratio)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "kl" in inputs:
            sums = torch.stack([inputs["kl"].sum(), inputs["completion_mask"].sum().float()])
            kl, num_tokens = distributed.total(sums)
            self._metrics["train"]["kl"].append((kl / num_tokens).item())
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss


def joined(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompt and completion: (B, P + T) each."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def discounted_sums(terms: torch.Tensor, discount: float) -> torch.Tensor:
    """sum_{s >= t} discount^(s - t) terms_s, for ``terms`` (B, T) that are 0 on padding."""
    sums = torch.zeros_like(terms)
    running = torch.zeros_like(terms[:, 0])
    for t in reversed(range(terms.shape[1])):
        running = terms[:, t] + discount * running
        sums[:, t] = running
    return sums


def token_rewards(
    scores: torch.Tensor, log_ratio: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """-kl_coef log(pi / pi_ref) of each token, and the score on the last: (B, T) (2203.02155).

    Args:
        scores: of completions, (B,).
        log_ratio: log(pi / pi_ref), (B, T), 0 on padding.
        mask: 1 on the tokens of completions, (B, T).
        kl_coef: coefficient of the penalty.
    """
    last = mask.sum(dim=1, keepdim=True).long() - 1
    return (-kl_coef * log_ratio).scatter_add(1, last, scores[:, None])
