"""Families of reasoning-gym: right answers by another evaluation, fixed and disjoint splits."""

import hashlib
import itertools
import operator
import re
from fractions import Fraction

import pytest

from rlsparse.errors import ConfigError
from rlsparse.models.tokenizer import CHARACTERS
from rlsparse.task_config import (
    BasicArithmeticConfig,
    ChainSumConfig,
    ProductsConfig,
    SimpleEquationsConfig,
)
from rlsparse.tasks import load_task

SPLITS = ("pretrain", "train", "validation", "test")
DIVIDING = BasicArithmeticConfig(operators="+-*/")
DIGESTS = [
    (ChainSumConfig(), "ad017f8b107b"),
    (ProductsConfig(), "4d36fb4cba41"),
    (BasicArithmeticConfig(), "cbe27f0ce332"),
    (SimpleEquationsConfig(), "63016f26cf42"),
]


@pytest.mark.parametrize(
    ("config", "digest"), DIGESTS, ids=lambda value: getattr(value, "name", "")
)
def test_problems_are_a_fixed_set(config, digest):
    """The version of a task must change with its problems."""
    task = load_task(config)
    assert task.problems("test", 7) == task.problems("test")[:7]
    text = "".join(f"{p.prompt}{p.completion};" for split in SPLITS for p in task.problems(split))
    assert (task.version, hashlib.sha256(text.encode()).hexdigest()[:12]) == ("1", digest)


@pytest.mark.parametrize(
    "config", [config for config, _ in DIGESTS], ids=lambda config: config.name
)
def test_splits(config):
    """Disjoint, without repeats, and large enough by default."""
    prompts = {s: [p.prompt for p in load_task(config).problems(s)] for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {*prompts[one]} & {*prompts[other]}
    sizes = {split: len({*prompts[split]}) for split in SPLITS}
    assert sizes == {split: len(prompts[split]) for split in SPLITS}
    assert sizes["test"] >= 512
    assert sizes["train"] >= config.num_train_problems
    for split, share in zip(SPLITS, (0.50, 0.25, 0.08, 0.17), strict=True):
        assert sizes[split] / sum(sizes.values()) == pytest.approx(share, rel=0, abs=0.03)


@pytest.mark.parametrize(
    "config",
    [ChainSumConfig(), ProductsConfig(), BasicArithmeticConfig(), DIVIDING],
    ids=["chain_sum", "products", "basic_arithmetic", "division"],
)
def test_bare_expressions_fit_the_tiny_base(config):
    task = load_task(config)
    for problem in task.problems("train"):
        assert {*problem.prompt, *problem.completion} <= {*CHARACTERS}
        assert re.fullmatch(r"-?\d+", problem.answer)
        assert problem.completion == f" {problem.answer}"
        assert len(problem.completion) < config.max_completion_tokens  # and the end of text
        assert task.grade(problem.completion, problem.answer) == 1
        assert task.grade(f"{problem.completion}1", problem.answer) == 0


def test_difficulty_of_products():
    for num_terms, num_digits in [(2, 2), (3, 1), (2, 4)]:
        config = ProductsConfig(num_terms=num_terms, num_digits=num_digits)
        for problem in load_task(config).problems("train", 50):
            numbers = problem.prompt.removesuffix(" =").split(" * ")
            assert len(numbers) == num_terms
            assert all(re.fullmatch(rf"\d{{{num_digits}}}", number) for number in numbers)
            product = 1
            for number in numbers:
                product *= int(number)
            assert problem.answer == str(product)


def value(text: str) -> Fraction:
    """Value of an expression by recursive descent over its tokens, in exact arithmetic."""
    tokens = re.findall(r"\d+|[-+*/()]", text)

    def atom() -> Fraction:
        token = tokens.pop(0)
        if token == "-":
            return -atom()
        if token == "(":
            inner = chain(0)
            assert tokens.pop(0) == ")"
            return inner
        return Fraction(token)

    def chain(level: int) -> Fraction:
        signs = [{"+": operator.add, "-": operator.sub}, {"*": operator.mul, "/": operator.truediv}]
        total = chain(1) if level == 0 else atom()
        while tokens and tokens[0] in signs[level]:
            apply = signs[level][tokens.pop(0)]
            total = apply(total, chain(1) if level == 0 else atom())
        return total

    result = chain(0)
    assert not tokens
    return result


@pytest.mark.parametrize(
    "config",
    [
        BasicArithmeticConfig(),
        DIVIDING,
        BasicArithmeticConfig(operators="*/", num_terms=4),
        BasicArithmeticConfig(operators="+/", num_terms=6),
        BasicArithmeticConfig(operators="+-", num_terms=2, num_digits=3),
    ],
    ids=["default", "division", "products", "deep", "sums"],
)
def test_difficulty_and_answers_of_basic_arithmetic(config):
    assert value("2 - 3 * (4 - -6 / 2) - 1") == -20
    seen = set()
    for problem in load_task(config).problems("train")[:2000]:
        text = problem.prompt.removesuffix(" =")
        assert value(text) == int(problem.answer)
        numbers = re.findall(r"\d+", text)
        assert max(map(len, numbers)) <= config.num_digits
        assert len(numbers) == config.num_terms
        seen |= {*re.sub(r"-(?=\d)", "", text)} & {*"+-*/("}
    assert seen == {*config.operators, "("}


@pytest.mark.parametrize(
    "options", [{"operators": "/"}, {"operators": "+/", "num_terms": 3, "num_digits": 3}]
)
def test_divisions_that_cannot_be_drawn(options):
    with pytest.raises(ConfigError, match=r"cannot divide with operators.*at most 8"):
        load_task(BasicArithmeticConfig(**options))


def test_equations_have_the_answer_as_their_solution():
    for config in (SimpleEquationsConfig(), SimpleEquationsConfig(num_terms=4, max_value=9)):
        task = load_task(config)
        for problem in task.problems("test", 300):
            left, right = re.fullmatch(
                r"Solve for x: (.+) = (-?\d+)\nAnswer:", problem.prompt
            ).groups()
            at = [value(left.replace("x", str(x))) for x in (0, 1, int(problem.answer))]
            assert at[2] == int(right)
            assert at[0] != at[1]  # it depends on x, so that there is one solution
            assert problem.completion == f" {problem.answer}"
            assert 1 <= int(problem.answer) <= config.max_value
            assert task.grade(problem.completion, problem.answer) == 1
            assert task.grade(f" x = {int(problem.answer) + 1}", problem.answer) == 0


def test_equations_that_the_model_poses_itself_are_not_read():
    task = load_task(SimpleEquationsConfig())
    assert task.grade(" x = 2\nSolve for x: x + 1 = 4\nAnswer: 3", "2") == 1
    assert task.grade(" x = 2\nSolve for x: x + 1 = 4\nAnswer: 3", "3") == 0
    assert task.grade(" the value is $2$.\n", "2") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ProductsConfig(num_digits=1), "products with num_terms 2 and num_digits 1 has 23 .* test"),
        (BasicArithmeticConfig(operators="+"), "and num_digits 1 and operators [+] has .* raise"),
        (SimpleEquationsConfig(), "num_terms 2 and max_value 20 .* raise num_terms or max_value"),
    ],
)
def test_too_few_problems(config, message):
    with pytest.raises(ConfigError, match=f"{message}.*ask for fewer"):
        load_task(config).problems("test", 9000)


@pytest.mark.parametrize("config", [ProductsConfig(), SimpleEquationsConfig()])
def test_shots(config):
    plain = load_task(config)
    shown = load_task(config.model_copy(update={"num_shots": 2}))
    shots = "".join(f"{p.prompt}{p.completion}\n" for p in plain.problems("pretrain", 2))
    assert shown.problems("test", 1)[0].prompt == shots + plain.problems("test", 1)[0].prompt
