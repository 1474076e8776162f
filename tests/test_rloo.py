"""RLOO: its settings, and its gradient against REINFORCE in float64."""

from dataclasses import replace

import numpy as np
import pytest
import rollout_oracle as oracle
import torch

from rlsparse.algorithms import rloo
from rlsparse.models.loading import load_model

VALUES = [0.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.75, 0.125, 1.0, 1.0, 0.0, 0.0, 0.3, 0.6, 0.9, 0.2]


def test_it_is_the_papers(context_of, tiny_trial, base):
    settings = {
        "kl_coef": 0.1, "num_generations": 4, "temperature": 0.7, "clip_range": 0.3,
        "num_iterations": 2, "steps_per_rollout": 2,
    }  # fmt: skip
    trainer = rloo.build(context_of(tiny_trial("rloo", algorithm=settings), base))
    assert (trainer.beta, trainer.epsilon_low, trainer.epsilon_high) == (0.1, 0.3, 0.3)
    assert (trainer.num_generations, trainer.num_iterations) == (4, 2)
    assert (trainer.temperature, trainer.args.steps_per_generation) == (0.7, 2)
    assert (trainer.normalize_advantages, trainer.reward_clip_range) == (False, None)
    assert (trainer.top_p, trainer.top_k, trainer.min_p) == (1.0, 0, None)
    default = rloo.build(context_of(tiny_trial("rloo"), base))
    assert (default.beta, default.args.steps_per_generation) == (0.03, 1)
    without = rloo.build(context_of(tiny_trial("rloo", algorithm={"kl_coef": 0.0}), base))
    assert without.ref_model is None


def test_gradients(context_of, tiny_trial, base):
    """First REINFORCE with leave-one-out baselines, then, off-policy, clipped completions."""
    config = tiny_trial(
        "rloo", precision="fp32", batch_size=16, learning_rate=1e-3, max_grad_norm=None,
        algorithm={"kl_coef": 0.1, "num_iterations": 2, "num_generations": 4},
    )  # fmt: skip
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(VALUES))
    trainer = rloo.build(context)
    oracle.perturb(trainer.model, seed=1)
    record = oracle.recorded(trainer)
    trainer.train()
    (batch,) = record.rollouts
    plain, counts = load_model(base.path, "fp32"), oracle.lengths(batch)
    with torch.no_grad():
        old = oracle.log_probs(oracle.float64(plain, record.weights[0]), batch)
        ratios = old - oracle.log_probs(oracle.float64(plain), batch)
    rewards = [
        value - 0.1 * sum(ratios[i, t].item() for t in range(counts[i]))
        for i, value in enumerate(VALUES)
    ]
    groups = [range(i - i % 4, i - i % 4 + 4) for i in range(16)]
    advantages = [
        rewards[i] - np.mean([rewards[j] for j in groups[i] if j != i]) for i in range(16)
    ]
    reinforce = oracle.float64(plain, record.weights[0])
    terms = oracle.log_probs(reinforce, batch)
    sequences = [sum(terms[i, t] for t in range(counts[i])) for i in range(16)]
    (-sum(a * s for a, s in zip(advantages, sequences, strict=True)) / 16).backward()
    assert oracle.largest_error(record.gradients[0], reinforce) < 1e-3

    policy = oracle.float64(plain, record.weights[1])
    terms = oracle.log_probs(policy, batch)
    ratios = [torch.exp(sum(terms[i, t] - old[i, t] for t in range(counts[i]))) for i in range(16)]
    assert sum(abs(ratio.item() - 1) > 0.2 for ratio in ratios) > 3
    losses = [oracle.clipped_loss(r, a, 0.2) for r, a in zip(ratios, advantages, strict=True)]
    (sum(losses) / 16).backward()
    assert oracle.largest_error(record.gradients[1], policy) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_the_reference_is_the_base_as_trained(context_of, tiny_trial, wide_base, precision):
    """TRL reads the folder again, where weights may lie between those of the trained format."""
    trainer = rloo.build(context_of(tiny_trial("rloo", precision=precision), wide_base))
    reference = oracle.weights_of(trainer.ref_model)
    for key, weight in trainer.model.named_parameters():
        assert reference[key].dtype == weight.dtype
        assert torch.equal(reference[key], weight)


@pytest.mark.slow
def test_it_learns(run_trial, tiny_trial, base):
    config = tiny_trial(
        "rloo", precision="bf16-mixed", learning_rate=1e-5, num_steps=40, batch_size=48,
        task={"num_train_problems": 768, "num_eval_problems": 512},
    )  # fmt: skip
    summary = run_trial(config, base).summary
    assert summary["score_before"] == pytest.approx(0.428, abs=0.01)
    assert summary["score_after"] > 0.7
