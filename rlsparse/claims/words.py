"""Verdicts in words: numbers as people write them, and where a verdict holds."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rlsparse.claim_config import At
from rlsparse.effects.selection import value_at
from rlsparse.identity import canonical_json
from rlsparse.levels import canonical_path
from rlsparse.study import Study, StudyBase

TINY_CAVEAT = "checks the pipeline, is no evidence about LLMs"
NUM_NAMED = 3

_HELD = {
    "model.source": "base {}",
    "task.name": "task {}",
    "train.learning_rate": "learning rate {}",
    "train.num_steps": "{} steps",
    "train.precision": "{}",
}


def number(value: float) -> str:
    """Three digits that count."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.2e}" if not -4 < exponent < 5 else f"{value:.{max(0, 2 - exponent)}f}"


def place(at: At | None) -> str:
    """Where along training runs are compared, in words: "", or "at ..."."""
    if at is None:
        return ""
    name, value = next((n, v) for n, v in at.model_dump().items() if v is not None)
    label = {"score": "score", "kl": "KL", "step": "step"}[name]
    return f"at equal {label}" if value == "common" else f"at {label} {value:g}"


def interpolated(at: At | None) -> str:
    """How density is read where runs are compared at a score or KL, in words, or ""."""
    if at is None or at.step is not None:
        return ""
    return f", {place(at)}, log density interpolated linearly"


def interval(estimate: float, low: float, high: float) -> str:
    """An estimate with its interval; without the latter where that is not known."""
    if math.isnan(low) or math.isnan(high):
        return number(estimate)
    return f"{number(estimate)} [{number(low)}, {number(high)}]"


def scope(study: StudyBase, selected: pd.DataFrame, view: str, at: At | None) -> str:
    """Where a verdict holds: the settings of its runs, or of the study without any.

    Args:
        study: the study.
        selected: the runs that the claim is about.
        view: in which weights were compared.
        at: where along training they are compared.
    """
    configs: Sequence[Any] = list(selected["config"]) or [_settings(study)]
    found = {path: [value_at({"config": c}, path) for c in configs] for path in _HELD}
    parts = [pattern.format(_listed(found[path], path)) for path, pattern in _HELD.items()]
    caveat = f"; {TINY_CAVEAT}" if ("tiny",) in found["model.source"] else ""
    return ", ".join([*parts, *filter(None, [place(at)]), f"view {view}"]) + caveat


def _listed(values: Sequence[tuple[Any, ...]], path: str) -> str:
    """Values that occur; ``unknown`` where a run does not have one."""
    label = f"{path.rpartition('.')[2]} unknown" if path == "train.precision" else "unknown"
    distinct = {canonical_json(value): value for value in values}
    names = [str(distinct[key][0]) if distinct[key] else label for key in sorted(distinct)]
    more = [f"{len(names) - NUM_NAMED} more"] if len(names) > NUM_NAMED else []
    return " and ".join([*names[:NUM_NAMED], *more])


def _settings(study: StudyBase) -> Any:
    """What a study says of all its runs, as a nested configuration."""
    if isinstance(study, Study):
        return study.baseline.model_dump(mode="json")
    nested: dict[str, Any] = {}
    for path, value in getattr(study, "settings", {}).items():
        *parents, last = canonical_path(path).split(".")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return nested
