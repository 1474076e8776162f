"""PPO against its definitions: numbers by hand, and losses and gradients in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import rollout_oracle as oracle
import torch

from rlsparse.algorithms import ppo, rollouts
from rlsparse.models.loading import load_model

LENGTHS = [4, 1, 3]


@pytest.fixture
def drawn() -> dict[str, torch.Tensor]:
    """Rewards and values of three completions, with rubbish in the padding of the values."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[float(t < n) for t in range(4)] for n in LENGTHS])
    rewards = torch.randn(3, 4, generator=generator) * mask
    return {"rewards": rewards, "values": torch.randn(3, 4, generator=generator), "mask": mask}


def estimate(rewards, values, discount: float, gae_lambda: float) -> np.ndarray:
    """Advantages of one completion: equation 16 of 1506.02438 as the double sum that it is."""
    following = [*values[1:], 0.0]
    deltas = [r + discount * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return oracle.double_sum(np.array(deltas), discount * gae_lambda)


@pytest.mark.parametrize(
    ("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0)]
)
def test_generalized_advantages(drawn, discount, gae_lambda):
    advantages, returns = ppo.generalized_advantages(
        **drawn, discount=discount, gae_lambda=gae_lambda
    )
    for row, length in enumerate(LENGTHS):
        rewards = drawn["rewards"][row, :length].double().numpy()
        values = drawn["values"][row, :length].double().numpy()
        expected = estimate(rewards, values, discount, gae_lambda)
        np.testing.assert_allclose(advantages[row, :length], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns[row, :length], expected + values, rtol=1e-5, atol=1e-6)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_whiten(drawn):
    white = ppo.whiten(3 * drawn["values"] + 1, drawn["mask"])
    tokens = np.concatenate([white[row, :n].double() for row, n in enumerate(LENGTHS)])
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.std() == pytest.approx(1, rel=1e-5)
    kept = np.concatenate([drawn["values"][row, :n] for row, n in enumerate(LENGTHS)])
    assert np.argsort(tokens).tolist() == np.argsort(kept).tolist()
    assert not (white * (1 - drawn["mask"])).any()


def test_one_completion_by_hand():
    """Three tokens and a score of 1; kl_coef 0.5, discount 1, lambda 0.5."""
    mask = torch.ones(1, 3)
    rewards = rollouts.token_rewards(
        torch.tensor([1.0]), torch.tensor([[0.2, -0.4, 0.6]]), mask, kl_coef=0.5
    )
    assert rewards.tolist()[0] == pytest.approx([-0.1, 0.2, 0.7], rel=1e-6, abs=0)  # 1 - 0.3
    values = torch.tensor([[0.5, 0.25, 0.75]])
    # deltas: -0.1 + 0.25 - 0.5 = -0.35; 0.2 + 0.75 - 0.25 = 0.7; 0.7 - 0.75 = -0.05
    # advantages, from the last: -0.05; 0.7 - 0.025 = 0.675; -0.35 + 0.3375 = -0.0125
    advantages, returns = ppo.generalized_advantages(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist()[0] == pytest.approx([-0.0125, 0.675, -0.05], rel=1e-5, abs=0)
    assert returns.tolist()[0] == pytest.approx([0.4875, 0.925, 0.7], rel=1e-5, abs=0)


def test_losses_by_hand(context_of, tiny_trial, base):
    """Two completions of 3 tokens and 1, ratios 1.5, 0.5, 1.1 and 0.5; both ranges 0.2.

    Policy: advantage 2 at ratio 1.5 is clipped to 1.2: -2.4. Advantage 1 at 0.5: -0.5 (min).
    Advantage -1 at 1.1 lies inside: 1.1. Advantage -2 at 0.5 is clipped to 0.8: 1.6.
    Sum -0.2 over 4 tokens: -0.05.
    Critic: value 1.0, old 0.5, return 0: max(1, 0.7^2) = 1. Value 0.6, old 0.5, return 1: 0.16.
    Value 0, old 0.5, return -1: max(1, 1.3^2) = 1.69. Value 0.5, old 0.5, return 0.5: 0.
    Half of the sum 2.85, over 4 tokens: 0.35625.
    """
    trainer = ppo.build(context_of(tiny_trial("ppo"), base))
    ratios = torch.tensor([[1.5, 0.5, 1.1], [0.5, 9.0, 9.0]])
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        ratios.log().requires_grad_(), torch.zeros(2, 3), None,
    )  # fmt: skip
    trainer._values = lambda *_: torch.tensor([[1.0, 0.6, 0.0], [0.5, 9.0, 9.0]]).requires_grad_()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.ones(2, 3, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
        "completion_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "advantages": torch.tensor([[2.0, 1.0, -1.0], [-2.0, 0.0, 0.0]]),
        "old_per_token_logps": torch.zeros(2, 3),
        "num_items_in_batch": torch.tensor(4 * 8),  # of the rollout, of 8 steps
        "values": torch.full((2, 3), 0.5),
        "returns": torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.0]]),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(-0.05, rel=1e-5, abs=0)
    assert trainer._metrics["train"]["value_loss"] == [pytest.approx(0.35625, rel=1e-5, abs=0)]


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_losses(drawn, clip):
    values, old = drawn["values"], drawn["rewards"]
    returns = values.flip(0)
    losses = ppo.value_losses(values, old, returns, clip)
    for v, o, r, loss in zip(
        *(x.flatten().tolist() for x in (values, old, returns, losses)), strict=True
    ):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        assert loss == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2, rel=1e-5, abs=1e-9)


SETTINGS = {
    "kl_coef": 0.1, "discount": 0.9, "gae_lambda": 0.8, "num_iterations": 2, "steps_per_rollout": 1,
    "value_learning_rate": 3e-3, "temperature": 0.8,
}  # fmt: skip
VALUES = [0.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.75, 0.125, 1.0, 1.0, 0.0, 0.0, 0.3, 0.6, 0.9, 0.2]


def oracle_losses(batch, policy, policy_old, reference, critic, critic_old):
    """Policy and critic loss of a rollout, in float64, by loops over the definitions."""
    with torch.no_grad():
        old = oracle.log_probs(policy_old, batch, 0.8)
        penalty = 0.1 * (old - oracle.log_probs(reference, batch, 0.8))
        old_values = critic_values(critic_old, batch)
    advantages = []
    for row, length in enumerate(oracle.lengths(batch)):
        rewards = [-float(penalty[row, t]) for t in range(length)]
        rewards[-1] += VALUES[row]
        advantages.append(estimate(rewards, old_values[row, :length].tolist(), 0.9, 0.8))
    tokens = np.concatenate(advantages)
    new, values = oracle.log_probs(policy, batch, 0.8), critic_values(critic, batch)
    policy_loss, value_loss, num_far = torch.zeros(()), torch.zeros(()), np.zeros(2)
    for row, terms in enumerate(advantages):
        for t, advantage in enumerate(terms):
            white = (advantage - tokens.mean()) / math.sqrt(tokens.var() + 1e-8)
            ratio = torch.exp(new[row, t] - old[row, t])
            policy_loss = policy_loss + oracle.clipped_loss(ratio, white, 0.2)
            value, before = values[row, t], float(old_values[row, t])
            near = torch.clamp(value, before - 0.2, before + 0.2)
            target = advantage + before
            worse = torch.maximum((value - target) ** 2, (near - target) ** 2)
            value_loss = value_loss + worse / 2
            num_far += [abs(ratio.item() - 1) > 0.2, abs(value.item() - before) > 0.2]
    return policy_loss / len(tokens), value_loss / len(tokens), num_far


def critic_values(critic, batch) -> torch.Tensor:
    """Value before each completion token: the state there times the head."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    states = critic.backbone(input_ids=ids, attention_mask=attention).last_hidden_state
    start = batch["prompt_ids"].shape[1]
    columns = [(states[:, t - 1] * critic.head).sum(-1) for t in range(start, ids.shape[1])]
    return torch.stack(columns, dim=1)


def test_gradients_of_a_second_pass(context_of, tiny_trial, base):
    """The policy has left the reference before sampling, and both have moved since."""
    config = tiny_trial(
        "ppo", precision="fp32", batch_size=16, learning_rate=3e-3, max_grad_norm=None,
        algorithm=SETTINGS,
    )  # fmt: skip
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(VALUES))
    trainer = ppo.build(context)
    oracle.perturb(trainer.model, seed=1)
    record, side = oracle.recorded(trainer), oracle.recorded_companion(trainer.critic)
    trainer.train()
    (batch,) = record.rollouts
    plain, critic = load_model(base.path, "fp32"), trainer.critic.model
    for step in range(2):
        policy = oracle.float64(plain, record.weights[step])
        values = oracle.float64(critic, side.weights[step])
        policy_loss, value_loss, num_far = oracle_losses(
            batch,
            policy,
            oracle.float64(plain, record.weights[0]),
            oracle.float64(plain),
            values,
            oracle.float64(critic, side.weights[0]),
        )
        assert (num_far > 9).all() if step else not num_far.any()  # clipping acts on both
        (policy_loss + value_loss).backward()
        assert oracle.largest_error(record.gradients[step], policy) < 1e-3
        assert oracle.largest_error(side.gradients[step], values) < 1e-3
        logged = trainer.state.log_history[step]
        assert logged["loss"] == pytest.approx(policy_loss.item(), rel=1e-3, abs=1e-5)
        assert logged["value_loss"] == pytest.approx(value_loss.item(), rel=1e-3, abs=0)


def final_weights(context_of, config, base) -> tuple[oracle.Tensors, oracle.Tensors]:
    torch.manual_seed(config.sampling_seed)
    trainer = ppo.build(context_of(config, base))
    torch.manual_seed(config.sampling_seed)
    trainer.train()
    return oracle.weights_of(trainer.model), oracle.weights_of(trainer.critic.model)


def test_same_seed_same_bits_and_what_enters_them(context_of, tiny_trial, base):
    """The critic's learning rate reaches the policy through the second rollout only."""

    def run(**given):
        seed = given.pop("seed", 0)
        num_steps = given.pop("num_steps", 2)
        settings = {"steps_per_rollout": 2, **given}
        config = tiny_trial(
            "ppo", precision="bf16-mixed", seed=seed, num_steps=num_steps, algorithm=settings
        )
        return final_weights(context_of, config, base)

    policy, critic = run()
    again, critic_again = run()
    assert all(torch.equal(policy[key], again[key]) for key in policy)
    assert all(torch.equal(critic[key], critic_again[key]) for key in critic)
    faster, critic_faster = run(value_learning_rate=1e-3)
    assert all(torch.equal(policy[key], faster[key]) for key in policy)
    assert not torch.equal(critic["head"], critic_faster["head"])
    longer, longer_faster = run(num_steps=3)[0], run(num_steps=3, value_learning_rate=1e-3)[0]
    assert not any(torch.equal(longer[key], longer_faster[key]) for key in policy)
    other = run(init_seed=1)[0]
    assert not all(torch.equal(policy[key], other[key]) for key in policy)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_the_critic_starts_from_the_base_and_moves(context_of, tiny_trial, base, precision):
    config = tiny_trial(
        "ppo",
        precision=precision,
        num_steps=1,
        algorithm={"init_seed": 5, "value_learning_rate": 1e-3},
    )
    context = context_of(config, base)
    before = torch.get_rng_state()
    again = ppo.Critic(context.model, 5)
    assert torch.equal(torch.get_rng_state(), before)
    trainer = ppo.build(context)
    start = oracle.weights_of(trainer.critic.model)
    plain = oracle.weights_of(load_model(base.path, precision).base_model)
    assert start.keys() == {"head", *(f"backbone.{key}" for key in plain)}
    for key, weight in plain.items():
        assert torch.equal(start[f"backbone.{key}"], weight)
        assert start[f"backbone.{key}"].dtype == weight.dtype == start["head"].dtype
    assert torch.equal(start["head"], again.head)
    assert not torch.equal(start["head"], ppo.Critic(context.model, 6).head)
    assert start["head"].float().std().item() == pytest.approx(129**-0.5, rel=0.2, abs=0)
    trainer.train()
    after = oracle.weights_of(trainer.critic.model)
    assert not any(torch.equal(start[key], after[key]) for key in start if "norm" not in key)


def test_without_kl_there_is_no_reference(context_of, tiny_trial, base):
    config = tiny_trial("ppo", num_steps=1, algorithm={"kl_coef": 0.0})
    trainer = ppo.build(context_of(config, base))
    trainer.train()
    assert trainer.reference is None
    assert not [row for row in trainer.state.log_history if "kl" in row]


@pytest.mark.slow
def test_it_learns(run_trial, tiny_trial, base):
    config = tiny_trial(
        "ppo", precision="bf16-mixed", learning_rate=1e-5, num_steps=48, batch_size=48,
        task={"num_train_problems": 768, "num_eval_problems": 512},
        algorithm={"value_learning_rate": 1e-4},
    )  # fmt: skip
    summary = run_trial(config, base).summary
    assert summary["score_before"] == pytest.approx(0.428, abs=0.01)
    assert summary["score_after"] > 0.7
