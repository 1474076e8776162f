"""Problems are disjoint and rightly answered; the grader is strict; decoding is what it says."""

import hashlib
import itertools
import re

import pytest
import torch

from rlsparse.config import ChainSumConfig
from rlsparse.errors import ConfigError
from rlsparse.models import TINY
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.tasks import chain_sum, load_task, task_version
from rlsparse.tasks.generate import complete, evaluate

SPLITS = ("pretrain", "train", "validation", "test")
DIFFICULTIES = [(3, 1), (2, 1), (4, 1), (2, 2)]


def task_of(num_terms: int = 3, num_digits: int = 1, **other):
    return load_task(ChainSumConfig(num_terms=num_terms, num_digits=num_digits, **other))


@pytest.fixture(scope="module")
def task():
    return task_of()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return load_model(TINY, "fp32")


def test_splits_are_disjoint_by_text_across_difficulties():
    of_split = {
        split: {p.prompt for n, d in DIFFICULTIES for p in task_of(n, d).problems(split)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not of_split[one] & of_split[other]
        assert of_split[one]
        assert of_split[other]


def test_sizes_of_splits(task):
    sizes = {split: len(task.problems(split)) for split in SPLITS}
    for split in SPLITS:
        assert len({p.prompt for p in task.problems(split)}) == sizes[split]
    assert sizes["test"] >= 512
    assert sizes["train"] >= ChainSumConfig().num_train_problems
    assert sizes["pretrain"] / sum(sizes.values()) == pytest.approx(0.5, abs=0.03)


def test_problems_are_deterministic_and_prefixes(task):
    first = list(task.problems("test"))
    chain_sum._splits.cache_clear()
    assert list(task_of().problems("test")) == first
    assert list(task.problems("test", 7)) == first[:7]
    # A fixed set: the version of the task must change with it.
    text = "".join(f"{p.prompt}{p.completion};" for split in SPLITS for p in task.problems(split))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert (task_version(ChainSumConfig()), digest) == ("1", "ad017f8b107b")


@pytest.mark.parametrize(("num_terms", "num_digits"), DIFFICULTIES)
def test_answers_are_right_by_another_evaluation(num_terms, num_digits):
    for split in SPLITS:
        for problem in task_of(num_terms, num_digits).problems(split, 50 if num_terms > 2 else 5):
            tokens = problem.prompt.removesuffix(" =").split(" ")
            assert len(tokens) == 2 * num_terms - 1
            numbers, signs = tokens[::2], ["+", *tokens[1::2]]
            assert all(re.fullmatch(rf"\d{{{num_digits}}}", number) for number in numbers)
            total = 0
            for sign, number in zip(signs, numbers, strict=True):
                total = total + int(number) if sign == "+" else total - int(number)
            assert problem.answer == str(total)
            assert problem.completion == f" {total}"
            assert task_of().grade(problem.completion, problem.answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        ("5", 1), (" 5", 1), ("5 ", 1), ("\n5", 1), ("5\n6", 1), (" 5 \n= 7", 1),
        ("6", 0), ("?5", 0), (" ?5", 0), ("5?", 0), ("", 0), (" ", 0), ("\n", 0), ("05", 0),
        ("-5", 0), ("+5", 0), ("5.0", 0), ("5 5", 0), ("55", 0), ("5 = 5", 0), ("6\n5", 0),
    ],
)  # fmt: skip
def test_grader(task, completion, grade):
    assert task.grade(completion, "5") == grade


def test_grader_of_negative_answers(task):
    assert task.grade(" -5", "-5") == 1
    assert task.grade(" 5", "-5") == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_too_many_problems(split):
    with pytest.raises(ConfigError, match=rf"num_terms 2 and .* {split} problems, 5000 were asked"):
        task_of(2).problems(split, 5000)


def test_shots_come_from_the_pretrain_split(task):
    shown = task_of(num_shots=2)
    shots = "".join(f"{p.prompt}{p.completion}\n" for p in task.problems("pretrain", 2))
    for with_shots, plain in zip(shown.problems("test", 5), task.problems("test", 5), strict=True):
        assert with_shots.prompt == shots + plain.prompt
        assert with_shots.answer == plain.answer


# --- decoding --------------------------------------------------------------------------------


def naive_greedy(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """One prompt, no padding, no cache, one argmax a token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
    return tokenizer.decode(new)


def test_greedy_completion_is_the_argmax(task, model, tokenizer):
    prompts = [p.prompt for p in task.problems("test", 9)] + ["1 =", "2 + 3 - 4 + 5 + 6 ="]
    expected = [naive_greedy(model, tokenizer, prompt, 6) for prompt in prompts]
    for batch_size in (4, 256):
        got = complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size)
        assert got == expected
    assert complete(model, tokenizer, prompts, max_new_tokens=2) == [t[:2] for t in expected]
    assert len(set(expected)) > 3


def test_sampling_follows_the_seed_of_torch(task, model, tokenizer):
    prompts = [p.prompt for p in task.problems("test", 32)]

    def sample(seed: int, temperature: float = 1.0) -> list[str]:
        torch.manual_seed(seed)
        return complete(model, tokenizer, prompts, max_new_tokens=4, temperature=temperature)

    greedy = complete(model, tokenizer, prompts, max_new_tokens=4)
    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert sample(0) != greedy
    assert sample(0, temperature=1e-4) == greedy


def test_sampling_is_not_truncated(model, tokenizer):
    """At a high temperature all tokens come up: no top-k, no top-p."""
    torch.manual_seed(0)
    texts = complete(model, tokenizer, ["1 + 1 ="] * 400, max_new_tokens=1, temperature=1e3)
    assert len(set(texts)) >= 20


def test_evaluate_grades_greedy_completions(task, model, tokenizer):
    problems = task.problems("test", 40)
    right = [
        naive_greedy(model, tokenizer, p.prompt, task.max_completion_tokens).strip() == p.answer
        for p in problems
    ]
    score = evaluate(model, tokenizer, task, problems)
    assert (score.num_correct, score.num_problems) == (sum(right), 40)
    assert score.fraction == sum(right) / 40
    assert 0 < score.fraction < 1


@pytest.mark.parametrize("mode", [True, False])
def test_mode_and_generator_are_left_as_they_were(task, model, tokenizer, mode):
    model.train(mode)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    evaluate(model, tokenizer, task, task.problems("test", 4))
    assert model.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
