"""Levels of factors: what they are called, and the configurations that they make.

Configurations are here plain nested dictionaries with all defaults filled in.
"""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlsparse.algorithm_config import AlgorithmConfig
from rlsparse.identity import canonical_json
from rlsparse.mask_config import label_parts
from rlsparse.task_config import ProblemSetConfig, TaskConfig
from rlsparse.variants import defaults_of

Scalar = bool | int | float | str | None
Level = Scalar | list[Any] | dict[str, Any]

TAGS = {"algorithm.name": "algorithm", "task.name": "task"}
"""Fields that say which algorithm or task it is, and so which other fields there are."""
MASK = "train.mask"
"""Field that says which weights are trained."""

_UNIONS: dict[str, Any] = {"algorithm": AlgorithmConfig, "task": TaskConfig}
_KEPT: dict[str, set[str]] = {
    "algorithm": set(),
    "task": set(ProblemSetConfig.model_fields) - {"max_completion_tokens"},
}
"""Fields that stay when a level changes the name: sizes and prompts mean the same for all tasks."""


def level_label(level: Any) -> str:
    """Text of a factor level: scalars as in YAML, ``[a, b]``, mappings as ``name(key=value)``.

    Equal levels have equal labels: keys are sorted. Masks are called by what they are: ``final``,
    ``random(final)``, ``snapshot(step=12)``.
    """
    if isinstance(level, Mapping):
        others = {k: v for k, v in level.items() if k != "name"}
        name, of, more = label_parts(level) or (str(level.get("name", "")), [], others)
        rest = sorted((str(k), level_label(v)) for k, v in more.items())
        inner = ", ".join([*map(level_label, of), *(f"{key}={value}" for key, value in rest)])
        return f"{name}({inner})" if inner else name
    if isinstance(level, list | tuple):
        return f"[{', '.join(level_label(item) for item in level)}]"
    return level if isinstance(level, str) else canonical_json(level)


def ordered_labels(levels: Sequence[Level]) -> list[str]:
    """Labels of a factor's levels: by number if all are numbers, else as listed."""
    numbers = [x for x in levels if isinstance(x, int | float) and not isinstance(x, bool)]
    ordered = sorted(numbers) if len(numbers) == len(levels) else levels
    return list(dict.fromkeys(map(level_label, ordered)))


def order_of(path: str) -> tuple[int, bool]:
    """Key by which factors apply: mappings first, then names, then the fields that these have."""
    return path.count("."), path not in TAGS


def canonical_path(path: str) -> str:
    """``algorithm`` as ``algorithm.name``, ``task`` as ``task.name``; other paths as they are."""
    return next((tag for tag, head in TAGS.items() if path == head), path)


def tags_of(*paths: str) -> list[str]:
    """What must be the same where these paths are compared: the algorithm, or the task.

    Fields of one name in two algorithms are different fields, unless these are what is compared.
    """
    varied = {canonical_path(path) for path in paths}
    return [
        tag
        for tag, head in TAGS.items()
        if tag not in varied and any(path.startswith(f"{head}.") for path in varied)
    ]


def touches(path: str, other: str) -> bool:
    """Whether one dotted path is, or lies inside, the other."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def has(config: Mapping[str, Any], path: str) -> bool:
    """Whether there is a field at ``path``."""
    return path in paths_of(config)


def paths_of(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys of nested mappings."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{key}.")


def put(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``config`` with ``value`` at ``path``."""
    head, _, rest = path.partition(".")
    return {**config, head: put(config[head], rest, value) if rest else value}


def under_mask(config: Mapping[str, Any]) -> bool:
    """Whether a configuration trains the weights of a mask alone.

    The mask forces which weights such runs share: they take no part in overlaps.
    """
    return config.get("train", {}).get("mask") is not None


def at_level(config: dict[str, Any], path: str, level: Level) -> dict[str, Any]:
    """``config`` with the field at ``path`` at ``level``.

    A mapping changes only the fields that it lists. Another algorithm or task has its own defaults,
    but a task keeps the numbers of problems, ``num_shots`` and ``prompt_format``. A mask is another
    mask as a whole.
    """
    if path in TAGS:
        path, level = TAGS[path], {"name": level}
    if isinstance(level, dict) and path != MASK:
        own = functools.reduce(operator.getitem, path.split("."), config)
        if path in _UNIONS and level.get("name", own["name"]) != own["name"]:
            kept = {key: own[key] for key in _KEPT[path]}
            own = defaults_of(_UNIONS[path], str(level["name"])) | kept
        level = {**own, **level} if isinstance(own, dict) else level
    return put(config, path, level)
