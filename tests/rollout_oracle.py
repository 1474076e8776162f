"""Log-probabilities in float64 and what a trainer did, for the tests of online algorithms."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

Tensors = dict[str, torch.Tensor]


@dataclass
class Record:
    """What a trainer did: one entry per rollout, and one per optimizer step."""

    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """In the order of sampling, before minibatches are drawn."""
    weights: list[Tensors] = field(default_factory=list)
    """Before each step."""
    gradients: list[dict[str, torch.Tensor | None]] = field(default_factory=list)


def weights_of(model: torch.nn.Module) -> Tensors:
    """A copy of all weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """A copy of all gradients."""
    return {
        name: None if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }


def recorded(trainer: Any) -> Record:
    """Let a trainer be recorded while it trains."""
    record, generate = Record(), trainer._generate_and_score_completions

    def generate_and_record(inputs: Any) -> Any:
        batch = generate(inputs)
        record.rollouts.append(dict(batch))
        return batch

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            record.weights.append(weights_of(model))
            record.gradients.append(gradients_of(model))

    trainer._generate_and_score_completions = generate_and_record
    trainer.add_callback(Watch())
    return record


def recorded_companion(companion: Any) -> Record:
    """Let the model that is trained beside the policy be recorded."""
    record, step = Record(), companion.step

    def step_and_record() -> None:
        record.weights.append(weights_of(companion.model))
        record.gradients.append(gradients_of(companion.model))
        step()

    companion.step = step_and_record
    return record


def perturb(model: torch.nn.Module, seed: int, scale: float = 0.02) -> None:
    """Move every weight by a random fraction of itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + scale * torch.randn(weight.shape, generator=generator))


def float64(model: torch.nn.Module, weights: Tensors | None = None) -> Any:
    """A float64 copy of a model, with other weights if given."""
    twin = copy.deepcopy(model).double().requires_grad_(True)
    for name, weight in twin.named_parameters():
        weight.grad = None
        if weights is not None:
            weight.data = weights[name].double()
    return twin


def log_probs(model: Any, batch: Tensors, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each completion token, (B, T), from plain logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention).logits / temperature
    start = batch["prompt_ids"].shape[1]
    columns = [
        logits[:, t - 1].log_softmax(-1).gather(1, ids[:, t : t + 1])
        for t in range(start, ids.shape[1])
    ]
    return torch.cat(columns, dim=1)


def lengths(batch: Tensors) -> list[int]:
    """Number of tokens of each completion."""
    return batch["completion_mask"].sum(dim=1).tolist()


def largest_error(gradients: Tensors, model: torch.nn.Module) -> float:
    """Largest deviation from the gradients that ``model`` has, relative to the largest of each."""
    errors = []
    for name, weight in model.named_parameters():
        scale = weight.grad.abs().max()
        errors.append(float((gradients[name] - weight.grad).abs().max() / scale))
    return max(errors)


def clipped_loss(ratio: torch.Tensor, advantage: float, clip: float) -> torch.Tensor:
    """PPO's loss of one action."""
    inside = torch.clamp(ratio, 1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, inside * advantage)


def fixed_rewards(values: list[float]) -> Callable[..., list[float]]:
    """A reward that gives ``values`` to the completions of every rollout."""

    def reward(*, prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        assert len(completions) == len(values)
        return list(values)

    return reward


def double_sum(deltas: np.ndarray, factor: float) -> np.ndarray:
    """sum_{l >= 0} factor^l delta_{t + l} for each t, by definition."""
    count = len(deltas)
    return np.array(
        [sum(factor**k * deltas[t + k] for k in range(count - t)) for t in range(count)]
    )
