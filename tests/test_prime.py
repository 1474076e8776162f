"""PRIME against its equations: numbers by hand, and losses and gradients in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import rollout_oracle as oracle
import torch

from rlsparse.algorithms import prime
from rlsparse.errors import TrialError
from rlsparse.models.loading import load_model

LENGTHS = [3, 1, 2, 3, 2, 2]


def equation_5(process: list, outcomes: list[float], size: int, discount: float) -> list[list]:
    """Advantages of completions whose process rewards are lists, by loops."""
    advantages = []
    for i, rewards in enumerate(process):
        first = i - i % size
        others = [j for j in range(first, first + size) if j != i]
        baseline = sum(np.mean(process[j]) for j in others) / (size - 1)
        outcome = outcomes[i] - sum(outcomes[j] for j in others) / (size - 1)
        returns = oracle.double_sum(np.array(rewards) - baseline, discount)
        advantages.append([float(r) + outcome for r in returns])
    return advantages


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_advantages(discount):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[float(t < n) for t in range(3)] for n in LENGTHS])
    process = torch.randn(6, 3, generator=generator)  # with rubbish in the padding
    outcomes = [1.0, 0.0, 0.5, 0.0, 0.0, 1.0]
    advantages = prime.prime_advantages(process, torch.tensor(outcomes), mask, 3, discount)
    rewards = [process[i, :n].double().tolist() for i, n in enumerate(LENGTHS)]
    for row, expected in enumerate(equation_5(rewards, outcomes, 3, discount)):
        length = LENGTHS[row]
        np.testing.assert_allclose(advantages[row, :length], expected, rtol=1e-5, atol=1e-6)
        assert not advantages[row, length:].any()


def test_leave_one_out():
    values = torch.tensor([1.0, 0.0, 0.5, 4.0, 2.0, 6.0])
    assert prime.leave_one_out(values, 3).tolist() == [0.25, 0.75, 0.5, 4.0, 5.0, 3.0]


def test_one_prompt_by_hand():
    """Two completions, of 2 tokens and 1; outcomes 1 and 0; discount 0.5.

    Token averages: (0.3 + 0.1) / 2 = 0.2 and -0.4, each the other's baseline.
    First: 0.3 + 0.4 = 0.7 and 0.1 + 0.4 = 0.5; returns 0.7 + 0.25 = 0.95 and 0.5; plus 1 - 0.
    Second: -0.4 - 0.2 = -0.6; plus 0 - 1.
    """
    process = torch.tensor([[0.3, 0.1], [-0.4, 7.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    advantages = prime.prime_advantages(process, torch.tensor([1.0, 0.0]), mask, 2, 0.5)
    assert advantages.tolist() == [
        pytest.approx([1.95, 1.5], rel=1e-6, abs=0),
        pytest.approx([-1.6, 0.0], rel=1e-6, abs=1e-12),
    ]


def test_cross_entropy_by_hand(context_of, tiny_trial, base):
    """Sums of the implicit rewards 0 and log 3, so that sigma is 1/2 and 3/4; labels 1 and 0.25.

    -(log 1/2) = 0.6931; -(0.25 log 3/4 + 0.75 log 1/4) = 0.0719 + 1.0397; mean 0.9024.
    """
    config = tiny_trial("prime", batch_size=4, algorithm={"num_generations": 2})
    trainer = prime.build(context_of(config, base))
    process = torch.tensor([[0.5, -0.5], [math.log(3), 0.0], [9.0, 9.0], [9.0, 9.0]])
    trainer._process_rewards = lambda rollout, rows: process[rows].requires_grad_()
    rollout = type("Labels", (), {"rewards": torch.tensor([1.0, 0.25, 1.0, 1.0])})
    trainer._update_reward_model(rollout, torch.arange(4), torch.tensor([True, True, False, False]))
    (loss,) = trainer._metrics["train"]["reward_model_loss"]
    assert loss == pytest.approx(0.90235, rel=1e-4, abs=0)


SETTINGS = {
    "kl_coef": 0.1, "discount": 0.9, "num_iterations": 2, "reward_beta": 0.5, "num_generations": 4,
    "reward_learning_rate": 3e-3, "temperature": 0.8, "min_accuracy": 0.25, "max_accuracy": 0.75,
}  # fmt: skip
VALUES = [0.0, 1.0, 0.5, 0.25, 1.0, 1.0, 0.75, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
KEPT = [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4  # means 7/16, 13/16, 1/4 and 1/8


def oracle_losses(batch, policy, policy_old, reference, reward_model, reward_model_old):
    """Loss of the policy and of the reward model, in float64, by loops over the definitions."""
    with torch.no_grad():
        old, base = (oracle.log_probs(m, batch, 0.8) for m in (policy_old, reference))
        implicit = 0.5 * (oracle.log_probs(reward_model_old, batch, 0.8) - base)
        rewards = implicit - 0.1 * (old - base)
    counts = oracle.lengths(batch)
    process = [rewards[row, :length].tolist() for row, length in enumerate(counts)]
    advantages = equation_5(process, VALUES, 4, 0.9)
    new, phi = oracle.log_probs(policy, batch, 0.8), oracle.log_probs(reward_model, batch, 0.8)
    policy_loss, reward_loss, num_far = torch.zeros(()), torch.zeros(()), 0
    for row, length in enumerate(counts):
        if not KEPT[row]:
            continue
        for t in range(length):
            ratio = torch.exp(new[row, t] - old[row, t])
            policy_loss = policy_loss + oracle.clipped_loss(ratio, advantages[row][t], 0.2)
            num_far += abs(ratio.item() - 1) > 0.2
        total = sum(0.5 * (phi[row, t] - base[row, t]) for t in range(length))
        right = 1 / (1 + torch.exp(-total))
        reward_loss = (
            reward_loss - VALUES[row] * right.log() - (1 - VALUES[row]) * (1 - right).log()
        )
    num_tokens = sum(n for n, kept in zip(counts, KEPT, strict=True) if kept)
    return policy_loss / num_tokens, reward_loss / sum(KEPT), num_far


def test_gradients_of_a_second_pass(context_of, tiny_trial, base):
    """All three models differ at sampling, the policy has moved since, and prompts are dropped."""
    config = tiny_trial(
        "prime", precision="fp32", batch_size=16, learning_rate=3e-3, max_grad_norm=None,
        algorithm=SETTINGS,
    )  # fmt: skip
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(VALUES))
    trainer = prime.build(context)
    oracle.perturb(trainer.model, seed=1)
    oracle.perturb(trainer.reward_model.model, seed=2)
    record, side = oracle.recorded(trainer), oracle.recorded_companion(trainer.reward_model)
    trainer.train()
    (batch,) = record.rollouts
    plain = load_model(base.path, "fp32")
    for step in range(2):
        policy = oracle.float64(plain, record.weights[step])
        reward_model = oracle.float64(plain, side.weights[0])
        policy_loss, reward_loss, num_far = oracle_losses(
            batch,
            policy,
            oracle.float64(plain, record.weights[0]),
            oracle.float64(plain),
            reward_model,
            oracle.float64(plain, side.weights[0]),
        )
        assert num_far > 9 if step else num_far == 0  # clipping acts
        (policy_loss + reward_loss).backward()
        assert oracle.largest_error(record.gradients[step], policy) < 1e-3
        logged = trainer.state.log_history[step]
        assert logged["loss"] == pytest.approx(policy_loss.item(), rel=1e-3, abs=1e-5)
    (gradients,) = side.gradients  # one step per rollout, before the policy's two
    assert oracle.largest_error(gradients, reward_model) < 1e-3
    logged = trainer.state.log_history[0]
    assert logged["reward_model_loss"] == pytest.approx(reward_loss.item(), rel=1e-4, abs=0)
    assert logged["kept_fraction"] == 0.5


def test_rewards_are_given_before_the_update(context_of, tiny_trial, base):
    """At the first rollout the reward model is the reference: advantages are the outcomes' own."""
    config = tiny_trial(
        "prime", batch_size=8, num_steps=2,
        algorithm={"num_generations": 4, "reward_learning_rate": 1e-3, "max_accuracy": 0.9},
    )  # fmt: skip
    values = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(values))
    trainer = prime.build(context)
    record = oracle.recorded(trainer)
    trainer.train()
    first, second = record.rollouts
    third = [1 - 0, -1 / 3, -1 / 3, -1 / 3, 1 - 2 / 3, 1 - 2 / 3, 1 - 2 / 3, -1]
    expected = torch.tensor(third)[:, None] * first["completion_mask"]
    torch.testing.assert_close(first["advantages"], expected, rtol=1e-6, atol=0)
    expected = torch.tensor(third)[:, None] * second["completion_mask"]
    assert (second["advantages"] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_a_step_without_prompts_moves_nothing(context_of, tiny_trial, base, precision):
    """Not even by the momentum of the step before it, in either model."""
    config = tiny_trial(
        "prime", precision=precision, learning_rate=1e-3, num_steps=3, weight_decay=0.1,
        algorithm={"reward_learning_rate": 1e-3},
    )  # fmt: skip
    rewards = iter([[1.0] * 4 + [0.0] * 4, [1.0] * 8, [0.0] * 8])
    context = replace(context_of(config, base), reward=lambda **_: next(rewards))
    trainer = prime.build(context)
    record, side = oracle.recorded(trainer), oracle.recorded_companion(trainer.reward_model)
    trainer.train()
    start, second, third = record.weights
    assert any(not torch.equal(start[key], second[key]) for key in start)
    last = oracle.weights_of(trainer.model)
    assert all(torch.equal(second[key], third[key]) for key in start)
    assert all(torch.equal(second[key], last[key]) for key in start)
    assert len(side.weights) == 1
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in rows[1:]] == [0, 0]
    assert [row["grad_norm"] for row in rows[1:]] == [0, 0]
    assert [row["kept_fraction"] for row in rows] == [1, 0, 0]


def test_limits_of_accuracy_are_kept(context_of, tiny_trial, base):
    """2 and 8 of 10 are neither below 0.2 nor above 0.8."""
    config = tiny_trial(
        "prime", batch_size=40, num_steps=1, algorithm={"num_generations": 10}
    )  # fmt: skip
    values = [float(i < right) for right in (1, 2, 8, 9) for i in range(10)]
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(values))
    trainer = prime.build(context)
    record = oracle.recorded(trainer)
    trainer.train()
    (batch,) = record.rollouts
    moved = batch["advantages"].abs().sum(dim=1).view(4, 10).sum(dim=1) > 0
    assert moved.tolist() == [False, True, True, False]
    assert batch["num_items_in_batch"] == batch["completion_mask"][10:30].sum()


def test_the_reward_model_steps_once_per_part_of_a_rollout(context_of, tiny_trial, base):
    settings = {"steps_per_rollout": 3, "num_iterations": 2, "reward_learning_rate": 1e-3}
    config = tiny_trial("prime", num_steps=6, algorithm=settings)
    values = [1.0, 0.0] * 4 + [0.0] * 8 + [0.0, 1.0] * 4  # the second prompt is dropped
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(values))
    trainer = prime.build(context)
    start = oracle.weights_of(trainer.reward_model.model)
    side = oracle.recorded_companion(trainer.reward_model)
    trainer.train()
    first, second = side.weights
    assert all(torch.equal(start[key], first[key]) for key in start)
    last = oracle.weights_of(trainer.reward_model.model)
    moved = [key for key in start if "norm" not in key]
    assert not any(torch.equal(first[key], second[key]) for key in moved)
    assert not any(torch.equal(second[key], last[key]) for key in moved)


@pytest.mark.parametrize("wrong", [-0.5, 1.5])
def test_rewards_that_are_no_probabilities(context_of, tiny_trial, base, wrong):
    context = context_of(tiny_trial("prime"), base)
    trainer = prime.build(replace(context, reward=oracle.fixed_rewards([0.5] * 7 + [wrong])))
    with pytest.raises(TrialError, match=rf"one was .*{wrong}.*values in \[0, 1\]"):
        trainer.train()


def test_same_seed_same_bits(context_of, tiny_trial, base):
    config = tiny_trial("prime", precision="bf16-mixed", algorithm={"max_accuracy": 1.0})
    runs = []
    for _ in range(2):
        trainer = prime.build(context_of(config, base))
        torch.manual_seed(3)
        trainer.train()
        runs.append(
            {**oracle.weights_of(trainer.model), **oracle.weights_of(trainer.reward_model.model)}
        )
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.slow
def test_it_learns(run_trial, tiny_trial, base):
    config = tiny_trial(
        "prime", precision="bf16-mixed", learning_rate=1e-5, num_steps=40, batch_size=48,
        task={"num_train_problems": 768, "num_eval_problems": 512},
        algorithm={"reward_learning_rate": 1e-4},
    )  # fmt: skip
    summary = run_trial(config, base).summary
    assert summary["score_before"] == pytest.approx(0.428, abs=0.01)
    assert summary["score_after"] > 0.7
