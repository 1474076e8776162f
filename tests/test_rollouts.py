"""What PPO and PRIME share: rollouts, the reference, companions, and sums over tokens."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import rollout_oracle as oracle
import torch

from rlsparse.algorithm_config import PpoConfig, PrimeConfig
from rlsparse.algorithms import ALGORITHMS, rollouts
from rlsparse.config import TrainConfig, TrialConfig
from rlsparse.errors import TrialError
from rlsparse.models.loading import load_model

ONLINE = ["ppo", "prime"]
LENGTHS = [5, 1, 3]


@pytest.fixture
def mask() -> torch.Tensor:
    """Of three completions of different lengths."""
    return torch.tensor([[float(t < n) for t in range(5)] for n in LENGTHS])


def test_discounted_sums(mask):
    terms = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * mask
    sums = rollouts.discounted_sums(terms, 0.7).numpy()
    for row, length in enumerate(LENGTHS):
        expected = oracle.double_sum(terms[row, :length].double().numpy(), 0.7)
        np.testing.assert_allclose(sums[row, :length], expected, rtol=1e-6, atol=1e-7)
        assert not sums[row, length:].any()


def test_token_rewards(mask):
    log_ratio = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * mask
    scores = [1.0, 0.0, 0.25]
    rewards = rollouts.token_rewards(torch.tensor(scores), log_ratio, mask, 0.3)
    for row, length in enumerate(LENGTHS):
        expected = -0.3 * log_ratio[row].double().numpy()
        expected[length - 1] += scores[row]
        np.testing.assert_allclose(rewards[row].numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ONLINE)
def test_arguments_of_the_policy_loss(context_of, tiny_trial, base, name):
    settings = {"temperature": 0.7, "clip_range": 0.3, "num_iterations": 2, "steps_per_rollout": 2}
    config = tiny_trial(name, algorithm={"kl_coef": 0.1, **settings})
    trainer = ALGORITHMS[name](context_of(config, base))
    assert (trainer.loss_type, trainer.importance_sampling_level) == ("dapo", "token")
    assert (trainer.beta, trainer.ref_model, trainer.args.delta) == (0.0, None, None)
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.temperature) == (0.3, 0.3, 0.7)
    assert (trainer.num_iterations, trainer.args.steps_per_generation) == (2, 2)
    assert (trainer.top_entropy_quantile, trainer.args.entropy_coef) == (1.0, 0.0)
    assert trainer.off_policy_mask_threshold is None
    unclipped = ALGORITHMS[name](context_of(tiny_trial(name, algorithm={"clip_range": None}), base))
    assert unclipped.epsilon_low == unclipped.epsilon_high == float("inf")


@pytest.mark.parametrize(("name", "temperature"), [("ppo", 1.0), ("ppo", 0.5), ("prime", 0.5)])
def test_a_rollout_is_what_was_sampled(context_of, tiny_trial, base, name, temperature):
    """Log-ratios against float64, the policy being moved off the reference first."""
    values = [0.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.75, 0.125] * 2
    settings = {"kl_coef": 0.1, "temperature": temperature, "steps_per_rollout": 1}
    config = tiny_trial(name, precision="fp32", batch_size=16, num_steps=1, algorithm=settings)
    context = replace(context_of(config, base), reward=oracle.fixed_rewards(values))
    trainer = ALGORITHMS[name](context)
    oracle.perturb(trainer.model, seed=1, scale=0.1)
    policy = oracle.float64(load_model(base.path, "fp32"), oracle.weights_of(trainer.model))
    reference = oracle.float64(load_model(base.path, "fp32"))
    seen, score = [], trainer.score
    trainer.score = lambda rollout: (seen.append(rollout), score(rollout))[1]
    record = oracle.recorded(trainer)
    trainer.train()
    (rollout,), (batch,) = seen, record.rollouts
    assert rollout.rewards.tolist() == values
    assert rollout.mask.tolist() == batch["completion_mask"].tolist()
    assert rollout.input_ids.shape[1] == batch["prompt_ids"].shape[1] + rollout.mask.shape[1]
    with torch.no_grad():
        first = oracle.log_probs(policy, batch, temperature)
        second = oracle.log_probs(reference, batch, temperature)
    ratio = (first - second) * rollout.mask
    assert ratio.abs().max() > 0.05
    torch.testing.assert_close(rollout.log_ratio.double(), ratio, rtol=1e-3, atol=1e-5)
    (logged,) = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    terms = [
        float(torch.exp(-r) - 1 + r)
        for row, length in zip(ratio, oracle.lengths(batch), strict=True)
        for r in row[:length]
    ]
    assert logged == pytest.approx(np.mean(terms), rel=1e-3, abs=0)


@pytest.mark.parametrize(
    ("name", "precision"), [("ppo", "bf16"), ("ppo", "bf16-mixed"), ("prime", "fp32")]
)
def test_equal_weights_give_equal_bits(context_of, tiny_trial, wide_base, name, precision):
    """At the first rollout the policy is the reference: the KL is 0, and the reference stays."""
    config = tiny_trial(
        name, precision=precision, num_steps=1, algorithm={"kl_coef": 0.1, "steps_per_rollout": 1}
    )
    trainer = ALGORITHMS[name](context_of(config, wide_base))
    seen, score = [], trainer.score
    trainer.score = lambda rollout: (seen.append(rollout), score(rollout))[1]
    trainer.train()
    assert not seen[0].log_ratio.any()
    start = oracle.weights_of(load_model(wide_base.path, precision))
    after = oracle.weights_of(trainer.reference)
    assert start.keys() == after.keys()
    assert all(torch.equal(start[key], after[key]) for key in start)
    assert all(weight.dtype == start[key].dtype for key, weight in after.items())
    assert not any(weight.requires_grad for weight in trainer.reference.parameters())


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(
    ("settings", "num_rollouts", "aligned"),
    [({"num_iterations": 1}, 3, True), ({"num_iterations": 3}, 1, False)],
)
def test_steps_of_a_rollout(context_of, tiny_trial, base, name, settings, num_rollouts, aligned):
    config = tiny_trial(
        name, num_steps=3, algorithm={"kl_coef": 0.1, "steps_per_rollout": 1, **settings}
    )
    trainer = ALGORITHMS[name](context_of(config, base))
    record = oracle.recorded(trainer)
    trainer.train()
    assert len(record.rollouts) == num_rollouts
    assert [("old_per_token_logps" in batch) for batch in record.rollouts] == [
        not aligned
    ] * num_rollouts
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all("kl" in row for row in rows)


@pytest.mark.parametrize("name", ONLINE)
def test_gradient_accumulation_sums_to_the_same_batch(context_of, tiny_trial, base, name):
    """Both models make the same steps, on two minibatches of a rollout twice."""
    settings = {
        "steps_per_rollout": 2, "num_iterations": 2, "kl_coef": 0.1, "num_generations": 4,
    }  # fmt: skip
    if name == "prime":
        settings |= {"min_accuracy": 0.25, "max_accuracy": 0.75, "reward_learning_rate": 1e-4}
    records = []
    for parts in (1, 4):
        config = tiny_trial(
            name, precision="fp32", batch_size=16, num_steps=4, algorithm=settings,
            gradient_accumulation_steps=parts, optimizer="sgd", learning_rate=1e-2,
            max_grad_norm=None,
        )  # fmt: skip
        trainer = ALGORITHMS[name](context_of(config, base))
        side = trainer.critic if name == "ppo" else trainer.reward_model
        records.append((oracle.recorded(trainer), oracle.recorded_companion(side)))
        trainer.train()
    for whole, split in zip(*records, strict=True):
        assert len(whole.gradients) == len(split.gradients) > 1
        for one, other in zip(whole.gradients, split.gradients, strict=True):
            for key in one:
                scale = one[key].abs().max()
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=float(2e-4 * scale))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_companion_has_an_optimizer_of_its_own(limit):
    """Against torch's AdamW by hand: own learning rate, the trial's optimizer and clipping."""
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    other = copy.deepcopy(model).requires_grad_(True)
    train = TrainConfig(max_grad_norm=limit, weight_decay=0.1, trainable_modules=("q",))
    config = TrialConfig(algorithm=PpoConfig(value_learning_rate=0.01), train=train)
    companion = rollouts.Companion(model, config, "value_learning_rate")
    optimizer = torch.optim.AdamW(
        other.parameters(), lr=0.01, weight_decay=0.1, foreach=False, fused=False
    )
    data = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        companion.model(data).square().sum().backward()
        companion.step()
        other(data).square().sum().backward()
        if limit is not None:
            norm = torch.cat([w.grad.flatten() for w in other.parameters()]).norm()
            for weight in other.parameters():
                weight.grad *= limit / norm
        optimizer.step()
        optimizer.zero_grad()
    assert all(weight.grad is None for weight in companion.model.parameters())
    for one, two in zip(companion.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_companion_that_diverges_names_its_learning_rate(limit):
    model = torch.nn.Linear(3, 2)
    algorithm = PrimeConfig(reward_learning_rate=7.0)
    config = TrialConfig(algorithm=algorithm, train=TrainConfig(max_grad_norm=limit))
    companion = rollouts.Companion(model, config, "reward_learning_rate")
    (model(torch.ones(1, 3)).sum() * math.inf).backward()
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(TrialError, match=r"algorithm.reward_learning_rate 7 trains is not finite"):
        companion.step()
    assert all(map(torch.equal, before, model.parameters()))
