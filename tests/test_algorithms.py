"""What every algorithm owes the project, and that each is the one its page describes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlsparse import tables
from rlsparse.algorithms import ALGORITHMS
from rlsparse.config import STORED_DTYPE, TrialConfig
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.patch import Patch
from rlsparse.tasks import load_task


def steps_of(trial) -> list[dict]:
    return tables.read(trial.folder / "steps.parquet", "steps").to_pylist()[1:]


@pytest.mark.parametrize("name", list(ALGORITHMS))
class TestContract:
    """A new algorithm passes this by being in ``ALGORITHMS``."""

    @pytest.mark.parametrize("precision", list(STORED_DTYPE))
    def test_trains_in_every_precision(self, trained, tiny_trial, base, name, precision):
        config = tiny_trial(name, precision=precision, keep_checkpoints=True)
        trial = trained(config, base)
        steps = steps_of(trial)
        assert [row["step"] for row in steps] == [1, 2]
        assert all(math.isfinite(row["loss"]) for row in steps)
        norms = [row["grad_norm"] for row in steps]
        assert min(norms) >= 0  # a group whose rewards are equal teaches nothing
        assert 0 < max(norms) < math.inf
        assert Patch.open(trial.patch()).num_changed > 0

    def test_configuration_survives_json(self, tiny_trial, name):
        config = tiny_trial(name)
        assert TrialConfig.model_validate_json(config.model_dump_json()) == config
        assert TrialConfig.model_validate(json.loads(config.model_dump_json())) == config

    def test_learning_rate_zero_changes_nothing(self, trained, tiny_trial, base, name):
        trial = trained(tiny_trial(name, learning_rate=0.0, precision="bf16-mixed"), base)
        assert Patch.open(trial.patch()).num_changed == 0
        assert [row["learning_rate"] for row in steps_of(trial)] == [0, 0]

    def test_settings_of_training_arrive(self, context_of, tiny_trial, base, name):
        config = tiny_trial(
            name, max_grad_norm=None, learning_rate=3e-6, weight_decay=0.25, num_steps=5,
            warmup_steps=2, lr_schedule="cosine", gradient_accumulation_steps=2, batch_size=16,
            precision="bf16-mixed", seed=7, adam_beta2=0.9,
        )  # fmt: skip
        trainer = ALGORITHMS[name](context_of(config, base))
        args = trainer.args
        assert args.max_grad_norm == 0
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 2)
        assert (args.max_steps, args.warmup_steps, args.lr_scheduler_type) == (5, 2, "cosine")
        assert (args.seed, args.data_seed, args.bf16, args.fp16) == (7, 7, True, False)
        (group,) = trainer.optimizer.param_groups
        assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-6, 0.25, (0.9, 0.9))
        assert len(group["params"]) == len(list(trainer.model.parameters()))

    @pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
    def test_building_leaves_the_model_alone(self, context_of, tiny_trial, base, name, precision):
        context = context_of(tiny_trial(name, precision=precision), base)
        before = {key: w.detach().clone() for key, w in context.model.named_parameters()}
        trainer = ALGORITHMS[name](context)
        assert trainer.model is context.model
        for key, weight in trainer.model.named_parameters():
            assert weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
            assert torch.equal(weight, before[key])
        assert not [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        assert not trainer.model.is_activation_checkpointing


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5]),
        ("cosine", [0, 0.5, 1, 0.5]),
    ],
)
def test_warmup_and_schedule(trained, tiny_trial, base, schedule, expected):
    """transformers' own constant schedule ignores the warmup."""
    config = tiny_trial(num_steps=4, warmup_steps=2, lr_schedule=schedule)
    rates = [row["learning_rate"] / 1e-4 for row in steps_of(trained(config, base))]
    assert rates == pytest.approx(expected)


def test_gradient_accumulation_sums_to_the_same_batch(trained, tiny_trial, base):
    whole = trained(tiny_trial(precision="fp32", keep_checkpoints=True), base)
    split = trained(tiny_trial(precision="fp32", gradient_accumulation_steps=4), base)
    for one, other in zip(steps_of(whole), steps_of(split), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


# --- GRPO ------------------------------------------------------------------------------------


def test_grpo_is_the_papers(context_of, tiny_trial, base):
    settings = {
        "kl_coef": 0.04, "num_generations": 4, "temperature": 0.7, "clip_range": 0.3,
        "num_iterations": 2, "scale_rewards": "none",
    }  # fmt: skip
    config = tiny_trial("grpo", algorithm=settings)
    trainer = ALGORITHMS["grpo"](context_of(config, base))
    assert (trainer.beta, trainer.epsilon_low, trainer.epsilon_high) == (0.04, 0.3, 0.3)
    assert (trainer.num_generations, trainer.num_iterations) == (4, 2)
    assert (trainer.loss_type, trainer.scale_rewards, trainer.temperature) == ("grpo", "none", 0.7)
    assert (trainer.importance_sampling_level, trainer.use_vllm) == ("token", False)
    assert trainer.max_completion_length == config.task.max_completion_tokens
    assert (trainer.args.use_bias_correction_kl, trainer.args.steps_per_generation) == (False, 1)
    assert (trainer.top_p, trainer.top_k, trainer.min_p) == (1.0, 0, None)


def test_grpo_without_kl_has_no_reference(context_of, tiny_trial, base):
    build = ALGORITHMS["grpo"]
    without = build(context_of(tiny_trial("grpo", algorithm={"kl_coef": 0.0}), base))
    assert (without.beta, without.ref_model) == (0.0, None)
    by_default = build(context_of(tiny_trial("grpo"), base))
    assert by_default.beta == 0.04
    assert by_default.ref_model is not None


def test_grpo_logs_the_kl_that_it_is_penalised_for(trained, tiny_trial, base):
    config = tiny_trial(
        "grpo", algorithm={"kl_coef": 0.04}, num_steps=3, learning_rate=1e-3, precision="fp32"
    )
    trial = trained(config, base)
    kls = [row["kl"] for row in steps_of(trial)]
    assert kls[0] == pytest.approx(0, abs=1e-6)  # the policy is the reference still
    assert kls[2] > 1e-4
    without = trained(tiny_trial("grpo", algorithm={"kl_coef": 0.0}), base)
    assert [row["kl"] for row in steps_of(without)] == [None, None]
    assert all(row["entropy"] > 0 for row in steps_of(trial))


def test_grpo_learns_from_the_reward_of_the_context(context_of, tiny_trial, base):
    config = tiny_trial("grpo", num_steps=1, batch_size=32)
    context = context_of(config, base)
    seen: list[tuple[str, str, str, float]] = []

    def reward(*, prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        rewards = [1.0 + len(text) for text in completions]
        seen.extend(zip(prompts, completions, answers, rewards, strict=True))
        return rewards

    trainer = ALGORITHMS["grpo"](replace(context, reward=reward))
    trainer.train()
    assert len(seen) == 32
    known = {(problem.prompt, problem.answer) for problem in context.problems}
    assert {(prompt, answer) for prompt, _, answer, _ in seen} <= known
    logged = next(row["reward"] for row in trainer.state.log_history if "reward" in row)
    assert logged == pytest.approx(np.mean([given for *_, given in seen]), rel=1e-6)
    groups = np.reshape([prompt for prompt, *_ in seen], (4, 8))
    assert (groups == groups[:, :1]).all()  # eight completions of each prompt


# --- references -------------------------------------------------------------------------------


def test_dpo_starts_at_log_2(trained, tiny_trial, base):
    trial = trained(tiny_trial("dpo", precision="fp32", keep_checkpoints=True), base)
    assert steps_of(trial)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp32"])
@pytest.mark.parametrize(
    ("name", "settings"), [("dpo", {}), ("kto", {}), ("grpo", {"kl_coef": 0.04})]
)
def test_the_reference_is_the_base_as_trained(
    context_of, tiny_trial, wide_base, name, settings, precision
):
    """TRL reads the folder again, where weights may lie between those of the trained format."""
    config = tiny_trial(name, precision=precision, algorithm=settings)
    trainer = ALGORITHMS[name](context_of(config, wide_base))
    reference = dict(trainer.ref_model.named_parameters())
    for key, weight in trainer.model.named_parameters():
        assert reference[key] is not weight
        assert reference[key].dtype == weight.dtype
        assert torch.equal(reference[key], weight)


# --- SFT -------------------------------------------------------------------------------------


def test_sft_loss_is_the_nll_of_completion_and_end(trained, tiny_trial, base):
    """Against log-softmax by hand, over the problems of the first step: all of them."""
    config = tiny_trial(
        precision="fp32", num_steps=1, task={"num_train_problems": 8}, learning_rate=0.0
    )
    row = steps_of(trained(config, base))[0]
    model, tokenizer = load_model(base.path, "fp32"), load_tokenizer(base.path)
    terms: list[float] = []
    for problem in load_task(config.task).problems("train", 8):
        prompt = tokenizer(problem.prompt)["input_ids"]
        target = [*tokenizer(problem.completion)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0].double()
        for offset, token in enumerate(target):
            position = logits[len(prompt) + offset - 1].numpy()
            terms.append(np.log(np.exp(position).sum()) - position[token])
    assert row["loss"] == pytest.approx(np.mean(terms), rel=1e-5)
    assert row["data_nll"] == row["loss"]
