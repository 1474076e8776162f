"""Graders of completions: exact, and as mathematics.

Every grader is deterministic, raises nothing whatever a model wrote, and takes bounded time.
"""

import re
from functools import lru_cache
from typing import Any

_LONGEST = 300
"""Characters of a completion that are read as mathematics."""

_POWER = r"(?:\^|\*\*)"
_UNBOUNDED = re.compile(
    rf"""
      {_POWER}\s*[{{(]?\s*[-+]?\s*\d{{5,}}             # 2^{{100000}}
    | [^\d\s]\s*{_POWER}\s*[{{(]?\s*[-+]?\s*\d{{3,}}   # (x + 1)^{{1000}}
    | {_POWER}\s*[{{(][^)}}]*(?:{_POWER}|!)            # 9^{{9^9}}
    | {_POWER}\s*[\w.]+\s*(?:{_POWER}|!)               # 9^9^9
    | \d{{4,}}\s*! | [)}}!]\s*!                        # 1000000!, (10^9)!, 5!!!
    | \\(?:sum|prod|i*int|oint|lim|[dt]?binom|Gamma|operatorname)
    """,
    re.VERBOSE,
)
"""Mathematics that sympy may evaluate for hours.

math-verify would stop it by a signal, which only the main thread of a process can, and not all
trials run in one; a time limit would also make rewards depend on the speed of the machine.
"""


def exact_grade(completion: str, answer: str) -> float:
    """1 if the first line of the completion is the answer and nothing else, else 0."""
    lines = completion.strip().splitlines()
    return float(bool(lines) and lines[0].strip() == answer.strip())


def math_grade(completion: str, answer: str) -> float:
    r"""1 if the completion is the answer, or ends in what equals it as mathematics, else 0.

    Free text is allowed; math-verify finds the expression in it: the last ``\boxed`` one, else what
    "the final answer is", else the last. It reads 300 characters, from the last ``\boxed`` on or at
    the end. What could take unbounded time to evaluate (sums, integrals, towers of powers) is 0.
    """
    if completion.strip() == answer.strip():
        return 1.0
    text, gold = _ending(completion), _parsed_answer(answer)
    if not gold or _UNBOUNDED.search(text):
        return 0.0
    from math_verify import verify

    return float(verify(list(gold), _parse(text), timeout_seconds=None))


def _ending(completion: str) -> str:
    boxed = completion.rfind("\\boxed")
    return completion[boxed:][:_LONGEST] if boxed >= 0 else completion[-_LONGEST:]


@lru_cache(maxsize=65536)
def _parsed_answer(answer: str) -> tuple[Any, ...]:
    """What an answer means, as LaTeX or else as text; nothing where it is not mathematics."""
    if _UNBOUNDED.search(answer) or len(answer) > _LONGEST:
        return ()
    return tuple(_parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$"))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed
