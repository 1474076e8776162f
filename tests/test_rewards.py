"""Surrogates carry no information and touch no global generator; users' functions are checked."""

import random
import sys
from collections import Counter
from itertools import permutations
from types import ModuleType

import numpy as np
import pytest
import torch

from rlsparse.errors import ConfigError, TrialError
from rlsparse.task_config import ChainSumConfig
from rlsparse.tasks import load_reward, load_task

PROMPTS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
COMPLETIONS = [*"1000", *"1100", *"1111"]
GRADES = [float(completion) for completion in COMPLETIONS]


@pytest.fixture(scope="module")
def task():
    return load_task(ChainSumConfig())


def call(reward, prompts=PROMPTS, completions=COMPLETIONS):
    return reward(prompts=prompts, completions=completions, answers=["1"] * len(prompts))


def test_task(task):
    reward = load_reward("task", task, seed=0)
    assert call(reward) == GRADES
    assert reward(prompts=["x", "x"], completions=[" 5", "5 5"], answers=["5", "5"]) == [1, 0]


def test_shuffled_permutes_within_a_prompt(task):
    reward = load_reward("shuffled", task, seed=0)
    mixed = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    for _ in range(20):
        for order in (range(12), mixed):
            rewards = call(reward, [PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order])
            by_prompt = {p: [] for p in "abc"}
            for i, value in zip(order, rewards, strict=True):
                by_prompt[PROMPTS[i]].append(value)
            assert {p: sum(values) for p, values in by_prompt.items()} == {"a": 1, "b": 2, "c": 4}


def test_shuffled_carries_no_information(task):
    """All orders of the grades of a prompt come up equally often, over calls."""
    reward = load_reward("shuffled", task, seed=3)
    counts = Counter(tuple(call(reward)[4:8]) for _ in range(3000))
    assert {*counts} == {*permutations([1.0, 1.0, 0.0, 0.0])}
    # Binomial(3000, 1/6): mean 500, standard deviation 20.4
    assert all(abs(count - 500) < 5 * 20.4 for count in counts.values())


def test_random_is_a_fair_coin(task):
    reward = load_reward("random", task, seed=0)
    tosses = np.array([call(reward) for _ in range(1000)])
    assert {*tosses.flat} == {0.0, 1.0}
    # Binomial(12000, 1/2): standard deviation 54.8
    assert abs(tosses.sum() - 6000) < 5 * 54.8
    correlation = np.corrcoef(tosses, rowvar=False) - np.eye(12)
    assert abs(correlation).max() < 5 / np.sqrt(1000)
    assert abs(np.corrcoef(tosses[:-1].ravel(), tosses[1:].ravel())[0, 1]) < 5 / np.sqrt(12000)


@pytest.mark.parametrize("name", ["shuffled", "random"])
def test_surrogates_follow_seed_and_call_only(task, name):
    def run(seed, sizes=(12, 12, 12)):
        reward = load_reward(name, task, seed=seed)
        return [call(reward, PROMPTS[:size], COMPLETIONS[:size]) for size in sizes]

    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    first = run(0)
    assert (str(np.random.get_state()), random.getstate()) == (states[2], states[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    torch.manual_seed(7)
    assert run(0) == first != run(1)
    assert first[0] != first[1] != first[2]
    assert run(0, (12, 4, 12))[2] == first[2]  # whatever the size of the calls before


# --- the user's own ----------------------------------------------------------------------------


@pytest.fixture
def user_reward(monkeypatch, task):
    """The reward that a function of the user makes."""

    def make(function):
        module = ModuleType("my_rewards")
        module.score = function
        monkeypatch.setitem(sys.modules, "my_rewards", module)
        return load_reward("my_rewards:score", task, seed=0)

    return make


def test_own_function_is_called_with_lists(user_reward):
    given = {}

    def score(**lists):
        given.update(lists)
        return [len(p) + len(c) / 2 - int(a) for p, c, a in zip(*lists.values(), strict=True)]

    reward = user_reward(score)
    rewards = reward(prompts=["p", "qq"], completions=["", "c"], answers=["0", "5"])
    assert rewards == [1.0, -2.5]
    assert given == {"prompts": ["p", "qq"], "completions": ["", "c"], "answers": ["0", "5"]}


@pytest.mark.parametrize(
    "result",
    [[1, 0.5], (True, np.float32(0.5)), np.array([1, 0.5]), torch.tensor([1, 0.5])],
    ids=["list", "tuple", "numpy", "torch"],
)
def test_numbers_of_any_kind(user_reward, result):
    rewards = call(user_reward(lambda **_: result), PROMPTS[:2], COMPLETIONS[:2])
    assert rewards == [1.0, 0.5]
    assert all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 rewards"),
        ([1.0] * 3, "returned 3 rewards"),
        ([], "returned 0 rewards"),
        (np.ones(1), "returned 1 rewards"),
        (None, "returned NoneType None"),
        (1.0, "returned float 1.0"),
        ("10", "returned str '10'"),
        ([1.0, None], "returned NoneType None for completion 1"),
        ([1.0, "1"], "returned str '1' for completion 1"),
        ([float("nan"), 1.0], "returned float nan for completion 0"),
        ([1.0, float("inf")], "returned float inf for completion 1"),
        (np.ones((2, 2)), r"returned list \[1.0, 1.0\] for completion 0"),
    ],
)
def test_results_that_are_no_rewards(user_reward, result, message):
    match = rf"^reward function my_rewards:score {message}; allowed is a list of 2 finite numbers"
    with pytest.raises(TrialError, match=match):
        call(user_reward(lambda **_: result), PROMPTS[:2], COMPLETIONS[:2])


def test_function_that_raises(user_reward):
    def score(**_):
        raise KeyError("no\nsuch key")

    message = r"^reward function my_rewards:score raised KeyError: 'no\\nsuch key'$"
    with pytest.raises(TrialError, match=message) as caught:
        call(user_reward(score))
    assert isinstance(caught.value.__cause__, KeyError)


def test_function_that_is_not_there(user_reward, task):
    user_reward(lambda **_: [])
    with pytest.raises(ConfigError, match=r"scor does not exist .* did you mean score"):
        load_reward("my_rewards:scor", task, seed=0)
