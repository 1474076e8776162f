"""Reads a CSV file of checkpoint pairs: runs made elsewhere.

The columns are in ``COLUMNS``; every other one is a factor, named by its dotted path, and its
values are YAML scalars (an empty one: the run does not have the factor). Rows that agree in all
factors and the seed are snapshots of one run. Without a column ``seed`` nothing says which runs of
two cells belong together: each run then gets a seed of its own, so that none are matched.
"""

import csv
import datetime
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlsparse.errors import ConfigError, nearest
from rlsparse.identity import canonical_json
from rlsparse.levels import TAGS, Scalar, canonical_path, level_label, touches
from rlsparse.study import Control

NEEDED = ("before", "after", "step")
COLUMNS = (
    *NEEDED, "seed", "score", "score_before", "kl", "run", "num_eval_problems", "control",
)  # fmt: skip
"""Columns that are no factors. ``before`` and ``after`` are checkpoints: folders or files, relative
to the CSV file, hub ids ``org/name@revision`` or URLs. ``score`` and ``score_before`` are fractions
of ``num_eval_problems``; ``kl`` is that of the run to its base, per token. ``run`` names the run
that a row is a snapshot of; ``control`` says that it is one, see ``study.Control``."""

TOLD = {
    "model.source": "before", "seed": "seed", "train.num_steps": "step", "probe.snapshots": "step",
}  # fmt: skip
"""Paths of the configuration that no column may have -> the column that tells them."""


class PairRow(NamedTuple):
    """One checkpoint of a run; ``values`` are the factors that it has, ``line`` is for errors."""

    line: int
    before: str
    after: str
    step: int
    seed: int | None
    score: float | None
    score_before: float | None
    kl: float | None
    run: str | None
    num_eval_problems: int | None
    control: Control | None
    values: dict[str, Scalar]


@dataclass(frozen=True)
class PairFile:
    """A CSV file of checkpoint pairs, checked as far as it says itself.

    Attributes:
        columns: that are no ``COLUMNS``.
        runs: the rows of each run, in order of the steps.
        factors: column -> the values that occur, in order of appearance; controls have no say.
        constants: column -> the value that all runs have.
        has_seeds: whether there is a column ``seed``.
    """

    path: Path
    columns: tuple[str, ...]
    runs: tuple[tuple[PairRow, ...], ...]
    factors: dict[str, list[Scalar]]
    constants: dict[str, Scalar]
    has_seeds: bool


# --- reading ---------------------------------------------------------------------------------


def read_pairs(path: Path) -> PairFile:
    """Read a CSV file of checkpoint pairs; whether the checkpoints are there is not looked at.

    Raises:
        ConfigError: not readable, or rows that are wrong or contradict each other; with line,
            column, value and remedy.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
            _check_columns(path, [name.strip() for name in reader.fieldnames or ()])
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = [_row(path, reader.line_num, cells) for cells in reader]
    except OSError as error:
        raise ConfigError(f"cannot read the pairs {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not CSV in UTF-8: {error}; save it as comma-separated values"
        ) from error
    if not rows:
        raise ConfigError(f"{path} has no rows; give one per checkpoint")
    has_seeds = "seed" in reader.fieldnames
    runs = _grouped(path, _of_one_type(rows if has_seeds else _numbered(rows)))
    columns = tuple(name for name in reader.fieldnames if name not in COLUMNS)
    return PairFile(path, columns, runs, *_levels(runs), has_seeds)


def _check_columns(path: Path, names: Sequence[str]) -> None:
    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{path}:1: {what}")

    if missing := [name for name in NEEDED if name not in names]:
        raise refuse(
            f"column {missing[0]} is missing; needed: {', '.join(NEEDED)}; "
            f"there: {', '.join(names) or 'nothing'}"
        )
    factors = [name for name in names if name not in COLUMNS]
    for name in factors:
        canonical = canonical_path(name)
        if "." not in canonical or not all(canonical.split(".")):
            raise refuse(
                f"unknown column {name!r}; {nearest(name, [*COLUMNS, *TAGS.values()])}; a factor "
                "is named by its dotted path, such as train.learning_rate"
            )
        if canonical in TOLD:
            raise refuse(f"column {name} has no place here: column {TOLD[canonical]} tells it")
    for index, name in enumerate(names):
        for other in names[:index]:
            if name == other or (
                {name, other} <= set(factors)
                and touches(canonical_path(name), canonical_path(other))
            ):
                raise refuse(f"columns {other} and {name} say the same thing; keep one")


def _row(path: Path, line: int, cells: Mapping[str | None, Any]) -> PairRow:
    if None in cells or None in cells.values():
        raise ConfigError(
            f"{path}:{line}: not as many cells as columns; quote values that hold commas"
        )
    texts = {str(name): text.strip() for name, text in cells.items()}
    problem = functools.partial(_problem, path, line)
    for name in ("before", "after"):
        if not texts[name]:
            raise problem(name, "", "a folder, file, hub id org/name@revision or URL")
    control = texts.get("control") or None
    if control not in (None, *get_args(Control)):
        raise problem("control", control, f"empty or one of {', '.join(get_args(Control))}")

    def number(name: str, kind: Callable[[str], Any], low: float, high: float, what: str) -> Any:
        text = texts.get(name, "")
        if not text and name not in ("step", "seed"):
            return None
        if not text and name not in texts:
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise problem(name, text, what)
        return value

    return PairRow(
        line,
        texts["before"],
        texts["after"],
        number("step", int, 1, 2**62, "the whole number of optimizer steps, 1 or more"),
        number("seed", int, 0, 2**31 - 1, "a whole number, or drop the column: then runs are not "
               "matched"),
        number("score", float, 0, 1, "a fraction in [0, 1], or empty"),
        number("score_before", float, 0, 1, "a fraction in [0, 1], or empty"),
        number("kl", float, -math.inf, math.inf, "a number, or empty"),
        texts.get("run") or None,
        number("num_eval_problems", int, 1, 2**62, "a whole number, 1 or more, or empty"),
        control,
        {
            name: _scalar(text, functools.partial(problem, name, text))
            for name, text in texts.items()
            if name not in COLUMNS and text
        },
    )  # fmt: skip


def _problem(path: Path, line: int, column: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{path}:{line}: column {column}: {value!r} is not allowed; give {allowed}")


def _scalar(text: str, problem: Callable[[str], ConfigError]) -> Scalar:
    try:
        value = _parsed(text)
    except YAMLError as error:
        raise problem("a number, true, false, null or text; put other text in quotes") from error
    if isinstance(value, list | dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise problem("a finite number, true, false, null or text; put other text in quotes")
    return text if isinstance(value, datetime.date) else value


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


# --- rows to runs ----------------------------------------------------------------------------


def _numbered(rows: Sequence[PairRow]) -> list[PairRow]:
    """Rows with a seed for each run, none twice: they are told apart by ``run``, else by row."""
    names = [row.run or f"line {row.line}" for row in rows]
    number = {name: seed for seed, name in enumerate(dict.fromkeys(names))}
    return [row._replace(seed=number[name]) for row, name in zip(rows, names, strict=True)]


def _of_one_type(rows: Sequence[PairRow]) -> list[PairRow]:
    """Rows with whole numbers as floats in columns that hold floats: 0 and 0.0 are one level."""
    floats = {name for row in rows for name, value in row.values.items() if type(value) is float}
    return [
        row._replace(values={
            name: float(value) if name in floats and type(value) is int else value
            for name, value in row.values.items()
        })
        for row in rows
    ]  # fmt: skip


def _grouped(path: Path, rows: Sequence[PairRow]) -> tuple[tuple[PairRow, ...], ...]:
    """Runs, in order of their first rows.

    Raises:
        ConfigError: rows contradict each other.
    """
    agree = functools.partial(_check_agreement, path)
    agree(
        rows, lambda row: canonical_json(row.values), "before",
        "a cell has one base; a column must tell runs of two bases apart",
    )  # fmt: skip
    for name in ("run", "score_before", "num_eval_problems"):
        agree(rows, _run_key, name, "rows with the same factors and seed are one run")
    after: dict[str, PairRow] = {}
    by_name: dict[str, PairRow] = {}
    runs: dict[str, dict[int, PairRow]] = {}
    for row in rows:
        if (twice := after.setdefault(row.after, row)) is not row:
            raise ConfigError(
                f"{path}:{row.line}: column after: {row.after!r} is in line {twice.line} too; give "
                "each row a checkpoint of its own"
            )
        key = _run_key(row)
        first = by_name.setdefault(row.run or key, row)
        if _run_key(first) != key:
            raise ConfigError(
                f"{path}:{row.line}: column run: {row.run!r} has other factors or another seed in "
                f"line {first.line}; give each run a name of its own"
            )
        run = runs.setdefault(key, {})
        if row.step in run:
            raise ConfigError(
                f"{path}:{row.line}: column step: {row.step} is there already for this run, in "
                f"line {run[row.step].line}; give another run another seed, or add the column in "
                "which it differs"
            )
        run[row.step] = row
    return tuple(tuple(run[step] for step in sorted(run)) for run in runs.values())


def _run_key(row: PairRow) -> str:
    return canonical_json([row.values, row.seed, row.control])


def _check_agreement(
    path: Path, rows: Sequence[PairRow], key: Callable[[PairRow], str], name: str, rule: str
) -> None:
    """Refuse rows of one key that differ in the field ``name``."""
    found: dict[str, PairRow] = {}
    for row in rows:
        first = found.setdefault(key(row), row)
        if getattr(first, name) != getattr(row, name):
            raise ConfigError(
                f"{path}:{row.line}: column {name}: {getattr(row, name)!r}, in line {first.line} "
                f"{getattr(first, name)!r}; {rule}"
            )


def _levels(
    runs: Sequence[Sequence[PairRow]],
) -> tuple[dict[str, list[Scalar]], dict[str, Scalar]]:
    """Factors and constants. A single value that some runs do not have is neither."""
    grid = [run[0].values for run in runs if run[0].control is None] or [r[0].values for r in runs]
    factors: dict[str, list[Scalar]] = {}
    constants: dict[str, Scalar] = {}
    for name in dict.fromkeys(name for values in grid for name in values):
        found = [values[name] for values in grid if name in values]
        levels = {level_label(value): value for value in found}
        if len(levels) > 1:
            factors[name] = list(levels.values())
        elif len(found) == len(grid):
            constants[name] = found[0]
    return factors, constants
