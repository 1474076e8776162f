"""Data of the algorithms that do not sample while they train: all made before the first step.

Texts carry no special tokens: each trainer adds exactly one end of text to a completion. A sample
that was cut off at ``max_completion_tokens`` gets one too, although the base had not ended there.
Sampling draws from torch's global generator, all else from generators of its own.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlsparse.algorithm_config import PreferenceConfig, SampledDataConfig, SftConfig
from rlsparse.algorithms.context import TrialContext
from rlsparse.errors import TrialError
from rlsparse.tasks import Problem, render_prompts
from rlsparse.tasks.generate import complete
from rlsparse.tasks.rows import read_rows


@dataclass(frozen=True)
class GradedSamples:
    """Completions of one prompt, in the order in which they were sampled, and their rewards."""

    prompt: str
    completions: list[str]
    rewards: list[float]


def graded_samples(context: TrialContext) -> list[GradedSamples]:
    """``num_samples_per_prompt`` completions of each train problem from the base, rewarded."""
    algorithm = context.config.algorithm
    assert isinstance(algorithm, SampledDataConfig)
    count = algorithm.num_samples_per_prompt
    repeated = [problem for problem in context.problems for _ in range(count)]
    prompts = [problem.prompt for problem in repeated]
    completions = complete(
        context.model,
        context.tokenizer,
        prompts,
        max_new_tokens=context.task.max_completion_tokens,
        temperature=algorithm.temperature,
    )
    rewards = context.reward(
        prompts=prompts, completions=completions, answers=[problem.answer for problem in repeated]
    )
    return [
        GradedSamples(prompts[i], completions[i : i + count], rewards[i : i + count])
        for i in range(0, len(prompts), count)
    ]


def preference_pairs(context: TrialContext) -> list[dict[str, str]]:
    """Rows ``prompt``, ``chosen``, ``rejected`` from where ``algorithm.data`` says.

    ``sampled``: of each prompt the first of its best and the first of its worst completions; a
    prompt whose completions are all rewarded alike gives no pair. ``gold``: the solution of the
    problem, and that of another, drawn from those whose answer is another text. Else a user's file.

    Raises:
        TrialError: there is no pair, or a cell of the file is no text.
        ConfigError: the file cannot be read, or lacks rows, a column or a cell.
    """
    algorithm = context.config.algorithm
    assert isinstance(algorithm, PreferenceConfig)
    if algorithm.data == "sampled":
        return _best_against_worst(context)
    if algorithm.data == "gold":
        return _own_against_other(context.problems, random.Random(context.config.sampling_seed))
    pairs = _user_texts(context, algorithm.data, ["prompt", "chosen", "rejected"])
    for number, pair in enumerate(pairs, start=1):
        if pair["chosen"] == pair["rejected"]:
            raise TrialError(
                f"row {number} of algorithm.data {algorithm.data}: chosen and rejected are both "
                f"{pair['chosen']!r}, which prefers nothing; leave the row out"
            )
    return pairs


def labelled_completions(context: TrialContext) -> list[dict[str, Any]]:
    """Rows ``prompt``, ``completion``, ``label`` (True: right), for KTO.

    Each preference pair gives a right row and a wrong one after it, so both are equally many. A
    user's file has these columns itself; its label is a bool, 0 or 1.

    Raises:
        TrialError: there is no pair, or a cell of the file is no text or no label.
        ConfigError: the file cannot be read, or lacks rows, a column or a cell.
    """
    algorithm = context.config.algorithm
    assert isinstance(algorithm, PreferenceConfig)
    if algorithm.data in ("sampled", "gold"):
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in preference_pairs(context)
            for side in ("chosen", "rejected")
        ]
    rows = read_rows(algorithm.data, ["prompt", "completion", "label"])
    labels = [_label(row["label"], place) for place, row in _numbered(algorithm.data, rows)]
    if len(set(labels)) == 1:
        raise TrialError(
            f"algorithm.data {algorithm.data}: all {len(labels)} labels are {labels[0]}; kto "
            "learns from right and from wrong completions, add some of the other kind"
        )
    texts = _user_texts(context, algorithm.data, ["prompt", "completion"])
    return [{**text, "label": label} for text, label in zip(texts, labels, strict=True)]


def demonstrations(context: TrialContext) -> list[dict[str, str]]:
    """Rows ``prompt``, ``completion`` for SFT: the task's own solutions, or a user's file.

    Raises:
        TrialError: a cell of the file is no text.
        ConfigError: the file cannot be read, or lacks rows, a column or a cell.
    """
    algorithm = context.config.algorithm
    assert isinstance(algorithm, SftConfig)
    if algorithm.data == "gold":
        return [{"prompt": p.prompt, "completion": p.completion} for p in context.problems]
    return _user_texts(context, algorithm.data, ["prompt", "completion"])


def accepted_samples(context: TrialContext) -> list[dict[str, str]]:
    """Rows ``prompt``, ``completion`` for RFT: the base's own right completions, each text once.

    A completion is accepted if its reward is positive and no other of its prompt has a higher one.
    For a grader of 0 and 1 these are the right ones (2308.01825, section 3.3); of graded rewards
    only the best count.

    Raises:
        TrialError: no reward is positive.
    """
    samples = graded_samples(context)
    rows = [
        {"prompt": sample.prompt, "completion": text}
        for sample in samples
        for text in dict.fromkeys(
            text
            for text, reward in zip(sample.completions, sample.rewards, strict=True)
            if reward == max(sample.rewards) > 0
        )
    ]
    if not rows:
        raise TrialError(
            f"rft found no completion with a positive reward in {_looked_at(samples)}; {_REMEDY}"
        )
    return rows


_REMEDY = "raise algorithm.num_samples_per_prompt or change the difficulty of the task"


def _looked_at(samples: list[GradedSamples]) -> str:
    return f"{len(samples[0].completions)} samples for each of {len(samples)} prompts"


def _best_against_worst(context: TrialContext) -> list[dict[str, str]]:
    samples = graded_samples(context)
    pairs = [
        {
            "prompt": sample.prompt,
            "chosen": sample.completions[sample.rewards.index(max(sample.rewards))],
            "rejected": sample.completions[sample.rewards.index(min(sample.rewards))],
        }
        for sample in samples
        if max(sample.rewards) > min(sample.rewards)
    ]
    if not pairs:
        raise TrialError(
            f"{context.config.algorithm.name} found no pair of a better and a worse completion in "
            f"{_looked_at(samples)}; {_REMEDY}"
        )
    return pairs


def _own_against_other(
    problems: Sequence[Problem], generator: random.Random
) -> list[dict[str, str]]:
    if len({problem.answer for problem in problems}) < 2:
        raise TrialError(
            "algorithm.data gold needs train problems with at least two different answers, and "
            f"all {len(problems)} have the same; raise task.num_train_problems"
        )

    def other(problem: Problem) -> Problem:
        while (drawn := generator.choice(problems)).answer == problem.answer:
            pass
        return drawn

    return [
        {"prompt": p.prompt, "chosen": p.completion, "rejected": other(p).completion}
        for p in problems
    ]


def _numbered(source: str, rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a user's data after what errors call it."""
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of algorithm.data {source}", row


def _user_texts(context: TrialContext, source: str, columns: list[str]) -> list[dict[str, str]]:
    """A user's rows; prompts in the format that the trial asks for, all else as it is."""
    rows = read_rows(source, columns)
    texts = [_texts(row, columns, place) for place, row in _numbered(source, rows)]
    asked = [Problem(text["prompt"], "", "") for text in texts]
    prompts = render_prompts(asked, context.tokenizer, context.config.task.prompt_format)
    return [{**text, "prompt": own.prompt} for text, own in zip(texts, prompts, strict=True)]


def _texts(row: dict[str, Any], columns: list[str], place: str) -> dict[str, str]:
    """The cells of a user's row that must be texts, as they are."""
    for column in columns:
        if not isinstance(row[column], str):
            raise TrialError(f"{place}: {column} is {row[column]!r}, not a text; put it in quotes")
    return {column: row[column] for column in columns}


_LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Cells of a CSV file are texts."""


def _label(value: Any, place: str) -> bool:
    label = _LABELS.get(str(value).lower()) if isinstance(value, str | bool | int) else None
    if label is None:
        raise TrialError(f"{place}: label is {value!r}; it must be true or false, or 1 or 0")
    return label
