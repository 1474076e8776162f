"""The exact grader is strict, that of mathematics is not; neither raises nor hangs."""

import random
import threading
import time

import pytest

from rlsparse.tasks.graders import exact_grade, math_grade


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        ("5", 1), (" 5", 1), ("5 ", 1), ("\n5", 1), ("5\n6", 1), (" 5 \n= 7", 1),
        ("6", 0), ("?5", 0), (" ?5", 0), ("5?", 0), ("", 0), (" ", 0), ("\n", 0), ("05", 0),
        ("-5", 0), ("+5", 0), ("5.0", 0), ("5 5", 0), ("55", 0), ("5 = 5", 0), ("6\n5", 0),
    ],
)  # fmt: skip
def test_exact(completion, grade):
    assert exact_grade(completion, "5") == grade


def test_exact_with_signs_and_words():
    assert exact_grade(" -5", "-5") == 1
    assert exact_grade(" 5", "-5") == 0
    assert exact_grade("Paris \nis", " Paris") == 1
    assert exact_grade("paris", "Paris") == 0


@pytest.mark.parametrize(
    ("completion", "answer", "grade"),
    [
        ("2", "2", 1), (" 2", "2", 1), ("m = 2", "2", 1), ("$2$", "2", 1), ("2.0", "2", 1),
        ("The answer is 2.", "2", 1), ("3m = 6\nm = 6/3\nm = 2", "2", 1), ("$x = 2$", "2", 1),
        (r"\boxed{2}", "2", 1), (r"so \boxed{2} as 3 - 1 is it, not 7", "2", 1), ("4/2", "2", 1),
        (r"$\frac{1}{2}$", "0.5", 1), ("1/2", r"\frac{1}{2}", 1), ("-7", "-7", 1),
        (r"$1 + x^2$", "x^2 + 1", 1), ("12 km", "12 km", 1), ("no number", "no number", 1),
        ("3", "2", 0), ("m = 3", "2", 0), ("-2", "2", 0), ("$3$", "2", 0), ("22", "2", 0),
        ("The answer is 3.", "2", 0), ("2\n3", "2", 0), (r"\boxed{3}", "2", 0), ("7", "-7", 0),
        (r"\boxed{2}" + " so 3" * 200, "2", 1), (r"\boxed{2}, no, \boxed{3}", "2", 0),
        ("two", "2", 0), ("x = 2\nx = 3", "2", 0),
        ("", "2", 0), (" \n", "2", 0), ("???", "2", 0), ("{{{{", "2", 0), ("$" * 400, "2", 0),
        (r"\boxed{", "2", 0), (r"$\frac{$", "2", 0), ("\x00\ud800", "2", 0), ("1" * 9000, "2", 0),
        ("2" + " nothing" * 100, "2", 0), ("words " * 100 + "2", "2", 1), ("word", "no number", 0),
    ],
)  # fmt: skip
def test_mathematics(completion, answer, grade):
    assert math_grade(completion, answer) == grade


@pytest.mark.parametrize(
    "bomb",
    [
        "9^9^9", "9**9**9", "$9^{9^9}$", "$9^{9^{9^{9}}}$", "$9^(9^9)$", "$2^{1000000000}$",
        "$100000000!$", "$5!!!!$", "$10^{10}!$", r"$\binom{1000000000}{1000000}$",
        r"$\sum_{n=1}^{100000} \sin(n)$", r"$\int_0^1 e^{-x^2}\sin(x^3) dx$", "$(x+1)^{1000}$",
        r"$\sin^{1000}(x)$", r"$\left(\frac{1}{3}\right)^{10000000}$", r"\boxed{9^{9^9}}",
        r"$\Gamma(100000000)$", r"$\prod_{n=1}^{100000} \sin(n)$",
    ],
)  # fmt: skip
def test_explosive_mathematics_is_not_evaluated(bomb):
    started = time.monotonic()
    assert math_grade(bomb, "2") == 0
    assert math_grade("2", bomb) == 0
    assert math_grade(bomb, bomb) == 1
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("text", ["2^{10}", "x^{12}", "3 x^2 - y^{-1}", "10!", "2^{1000}"])
def test_harmless_powers_are_evaluated(text):
    assert math_grade(f"So it is ${text}$", text) == 1


def test_mathematics_in_a_thread():
    """math-verify's own time limit is a signal, which only the main thread can have."""
    grades = []

    def grade():
        grades.extend([math_grade("the answer is 11", "11"), math_grade("$12$", "11")])

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert grades == [1, 0]


def test_nothing_that_a_model_writes_raises():
    draw = random.Random(0)
    words = [r"\frac", r"\sqrt", r"\boxed", r"\text", r"\left(", r"\pi", "the final answer is "]
    pieces = [*"0123456789+-*/=().,$ \n{}^_!|<>&%#~'\\xé", *words]
    for _ in range(250):
        text = "".join(draw.choices(pieces, k=draw.randrange(30)))
        assert math_grade(text, "12345678") in (0, 1)
        assert exact_grade(text, "12345678") in (0, 1)
