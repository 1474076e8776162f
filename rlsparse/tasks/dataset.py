"""A user's own problems: a JSONL, CSV or Parquet file or URL, or a data set of a hub."""

import hashlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any

from rlsparse.errors import ConfigError, RlsparseWarning, TrialError
from rlsparse.task_config import DatasetConfig
from rlsparse.tasks.graders import exact_grade, math_grade
from rlsparse.tasks.problem import Problem, Split, split_of, with_shots
from rlsparse.tasks.rows import content_hash, is_file, read_rows, shown, stamp
from rlsparse.tasks.user_code import code_hash, explain, load_function

_SHARES: dict[Split, float] = {"train": 0.75, "validation": 0.08, "test": 0.17}

Grader = Callable[[str, str], float]


class DatasetTask:
    """Rows of a data set as problems; fields of the configuration name source and columns.

    Of rows with one prompt (but for blanks around it) the first is kept. With ``test_source`` or
    ``test_split``, train and test are as given, but a prompt that is in both is left out of train,
    with a warning; no problem is of the validation split. Else a row belongs to a split by the
    sha256 of its prompt (train .75, validation .08, test .17). The order is that of the hashes. The
    last ``num_shots`` rows of train are not in it: they are the pretrain split, and the shots.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.max_completion_tokens = config.max_completion_tokens
        if config.test_split and not config.test_source and is_file(config.source):
            raise ConfigError(
                f"task.test_split {config.test_split!r} is for a data set of a hub, and "
                f"{shown(config.source)} is a file; give the test problems as task.test_source"
            )
        self.grade: Grader = _grader(config.grader)

    @property
    def version(self) -> str:
        """Hashes of the data and of a user's grader; for a hub, the commits that are read."""
        config = self.config
        parts = ["1", f"data {content_hash(config.source, config.subset)}"]
        if config.test_source:
            parts.append(f"test {content_hash(config.test_source, config.subset)}")
        if ":" in config.grader:
            parts.append(f"grader {code_hash(config.grader)}")
        return ", ".join(parts)

    def problems(self, split: Split, count: int | None = None) -> list[Problem]:
        """The problems of a split, in a fixed order that is unrelated to their content.

        Raises:
            ConfigError: the data cannot be used (see ``read_rows``), a cell has no text or no
                answer, or the split has fewer than ``count`` distinct problems.
        """
        config = self.config
        splits = _splits(config, stamp(config.source), stamp(config.test_source or config.source))
        if count is not None and count > len(splits[split]):
            remedy = (
                "add rows, or set task.num_train_problems, task.num_validation_problems or "
                "task.num_eval_problems lower"
            )
            if split == "validation" and (config.test_source or config.test_split):
                remedy = (
                    "none are set apart where task.test_source or task.test_split holds the test "
                    "problems: leave these out, or set task.num_validation_problems to 0"
                )
            raise ConfigError(
                f"{shown(config.source)} has {len(splits[split])} distinct {split} problems, "
                f"{count} were asked for; {remedy}"
            )
        return with_shots(splits[split][:count], splits["pretrain"])


@lru_cache(maxsize=4)
def _splits(config: DatasetConfig, *_: tuple[int, ...]) -> dict[Split, list[Problem]]:
    rows = _read(config, config.source, config.split)
    splits: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
    if config.test_source or config.test_split:
        source, split = config.test_source or config.source, config.test_split or config.split
        test = _read(config, source, split)
        splits["train"] = [problem for digest, problem in rows.items() if digest not in test]
        splits["test"] = list(test.values())
        _tell_leaks(config, len(rows) - len(splits["train"]), len(rows))
    else:
        for digest, problem in rows.items():
            splits[split_of(digest, _SHARES)].append(problem)
    last = max(0, len(splits["train"]) - config.num_shots)
    return {**splits, "train": splits["train"][:last], "pretrain": splits["train"][last:]}


def _tell_leaks(config: DatasetConfig, num_shared: int, num_rows: int) -> None:
    what = f"{num_shared} of {num_rows} prompts of {shown(config.source)} are also test problems"
    if num_shared == num_rows:
        raise ConfigError(f"{what}, so that none is left to train on; give another task.source")
    if num_shared:
        warnings.warn(f"{what} and were left out of train", RlsparseWarning, stacklevel=2)


def _read(config: DatasetConfig, source: str, split: str) -> dict[str, Problem]:
    """Problems by the hash of their prompt, in the order of the hashes."""
    columns = [config.prompt_column, config.answer_column]
    if config.completion_column:
        columns.append(config.completion_column)
    problems: dict[str, Problem] = {}
    rows = read_rows(source, columns, subset=config.subset, split=split)
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {shown(source)}"
        prompt = _text(row, config.prompt_column, where)
        answer = _answer(config, row, where)
        completion = f" {answer}"
        if config.completion_column:
            completion = _text(row, config.completion_column, where)
        digest = hashlib.sha256(prompt.strip().encode()).hexdigest()
        asked = config.prompt_template.replace("{prompt}", prompt)
        problems.setdefault(digest, Problem(asked, completion, answer))
    return dict(sorted(problems.items()))


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ConfigError(
            f"{where} has a {type(value).__name__} in column {column!r}; text is needed"
        )
    return value


def _answer(config: DatasetConfig, row: dict[str, Any], where: str) -> str:
    value, mark = row[config.answer_column], config.answer_after
    if isinstance(value, int | float):
        value = str(value)
    text = _text({config.answer_column: value}, config.answer_column, where)
    if mark is not None:
        if mark not in text:
            raise ConfigError(
                f"{where} has no {mark!r} (task.answer_after) in column {config.answer_column!r}"
            )
        text = text.rpartition(mark)[2]
    answer = text.strip()
    if not answer:
        raise ConfigError(f"{where} has no answer after {mark!r} (task.answer_after)")
    if config.grader == "exact" and len(answer.splitlines()) > 1:
        raise ConfigError(
            f"{where} has an answer of several lines, and task.grader exact compares one; set "
            "task.answer_after, or use another grader"
        )
    return answer


def _grader(name: str) -> Grader:
    if ":" in name:
        return _UserGrader(name)
    return {"exact": exact_grade, "math": math_grade}[name]


class _UserGrader:
    """A user's function of completion and answer, its result checked."""

    def __init__(self, name: str) -> None:
        self._name = f"grader {name}"
        self._function = load_function(name)

    def __call__(self, completion: str, answer: str) -> float:
        try:
            grade = self._function(completion, answer)
        except Exception as error:  # a user's function may raise anything
            raise TrialError(explain(self._name, error)) from error
        if not isinstance(grade, Real) or not 0 <= float(grade) <= 1:
            raise TrialError(
                f"{self._name} returned {type(grade).__name__} {grade!r:.60}; allowed is a number "
                "in [0, 1]"
            )
        return float(grade)
