"""A study: one question, its grid and its claims, and the trials that answer it.

``expand`` turns baseline x factors x seeds, and the controls, into trials. ``study_file`` reads a
study from YAML.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from rlsparse.config import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    TrialConfig,
    canonical_json,
    models_of,
    tag_of,
    trial_id,
)
from rlsparse.errors import ConfigError, nearest

Scalar = bool | int | float | str | None
Level = Scalar | dict[str, Any]
Control = Literal["lr_zero", "same_seed", "lr_times_3"]
View = Literal["stored", "fp32", "bf16", "fp16", "fp8_e4m3"]

MIN_SEEDS = 4
"""Fewer seeds than this leave every verdict but ``exact`` undecided."""


class At(Config):
    """Where along training runs are compared; the last snapshot when absent.

    ``step``: the snapshot of that step. ``score``: density is interpolated between snapshots where
    the held-out score first reaches this value; ``common`` is the highest score that both runs of
    a matched pair reach.
    """

    step: int | None = Field(None, ge=1)
    score: Literal["common"] | float | None = None

    @model_validator(mode="after")
    def _one(self) -> "At":
        if (self.step is None) == (self.score is None):
            raise ValueError("`at` takes exactly one of step, score")
        return self


class ClaimBase(Config):
    """What all claims share.

    ``response`` is ``sparsity.<definition>[@<view>]``, ``score_after``, ``score_gain``,
    ``overlap.<definition>[@<view>]`` or ``identical_replicates``. ``where``, ``a`` and ``b`` select
    runs by dotted configuration path (``algorithm`` is short for ``algorithm.name``) or by
    ``role``, ``control``, ``seed``, ``replicate``; controls are left out unless asked for.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    source: str = ""
    response: str = "sparsity.bitwise"
    where: dict[str, Scalar] = Field(default_factory=dict)
    at: At | None = None
    note: str = ""


class ExactClaim(ClaimBase):
    """An identity: every selected run has exactly this value, under every definition."""

    kind: Literal["exact"]
    value: float = 1.0


class WithinClaim(ClaimBase):
    """The mean over runs lies inside [low, high]."""

    kind: Literal["within"]
    low: float
    high: float


class GreaterClaim(ClaimBase):
    """Matched by seed, the response of ``a`` exceeds that of ``b``.

    ``margin`` is an odds ratio for responses that are fractions, else a difference; the default
    asks for any excess.
    """

    kind: Literal["greater"]
    a: dict[str, Scalar]
    b: dict[str, Scalar]
    margin: float | None = None


class EquivalentClaim(ClaimBase):
    """No level of ``factor`` moves density by more than the ratio ``margin`` (2x one-sided test).

    Decided only if the factor acted and the positive control moved the response by more.
    """

    kind: Literal["equivalent"]
    factor: str
    margin: float = Field(1.25, gt=1)


class AboveNullClaim(ClaimBase):
    """Masks of runs that differ in ``between`` overlap more than ``null`` expects."""

    kind: Literal["above_null"]
    response: str = "overlap.bitwise"
    between: str = "seed"
    null: Literal["uniform", "tensor", "magnitude"] = "magnitude"
    margin: float = Field(1.1, ge=1)


Claim = Annotated[
    ExactClaim | WithinClaim | GreaterClaim | EquivalentClaim | AboveNullClaim,
    Field(discriminator="kind"),
]


class Resources(Config):
    """What one trial occupies; part of the trial's identity where it can change bits."""

    num_threads: int = Field(1, ge=1)
    num_gpus: float = Field(0.0, ge=0)
    num_workers: Literal[1] = 1
    max_failures: int = Field(2, ge=0)


class Study(Config):
    """One question, its grid of trials and its claims. Field by field what the YAML file holds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str
    baseline: TrialConfig
    factors: dict[str, Annotated[list[Level], Field(min_length=1)]] = Field(default_factory=dict)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)]
    controls: tuple[Control, ...] = ()
    views: tuple[View, ...] = ()
    claims: tuple[Claim, ...] = ()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        given: list[tuple[str, list[str]]] = [
            ("seeds", [str(seed) for seed in self.seeds]),
            ("controls", list(self.controls)),
            ("views", list(self.views)),
            ("claim ids", [claim.id for claim in self.claims]),
        ]
        for what, values in given:
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} {twice} given more than once")
        return self

    @property
    def default_view(self) -> View:
        """bf16 when precision varies, else the stored format of the baseline."""
        return "bf16" if "train.precision" in self.factors else "stored"

    @property
    def measured_views(self) -> tuple[str, ...]:
        """Views that the diff stage measures, the default one first, then those of claims."""
        named = [c.response.split("@")[1] for c in self.claims if "@" in c.response]
        return tuple(dict.fromkeys([self.default_view, *self.views, *named]))


@dataclass(frozen=True)
class Trial:
    """One cell x one seed x one replicate, ready to run.

    Attributes:
        cell: factor path -> level label; a factor that the trial does not have is absent.
        role: baseline, factor or control.
        control: name of the control, or None.
    """

    trial_id: str
    config: TrialConfig
    replicate: int
    cell: dict[str, str]
    role: str
    control: Control | None

    @property
    def label(self) -> str:
        """Short text for people: algorithm, seed and what is special about the trial."""
        special = [
            f"{k.split('.', 1)[-1]}={v}" for k, v in self.cell.items() if k != "algorithm.name"
        ]
        if self.control:
            special.append(self.control)
        return " ".join([self.config.algorithm.name, f"s{self.config.seed}", *special])


# --- expanding -------------------------------------------------------------------------------


def expand(
    study: Study, *, fingerprint: Callable[[ModelConfig], str], task_version: str
) -> list[Trial]:
    """All trials of a study, each once, in a fixed order (seeds innermost, controls last).

    Factors that a cell's algorithm does not have are dropped from it, and cells that become equal
    are one (nested factors). ``lr_zero`` and ``same_seed`` add one trial per algorithm at the
    first seed, ``lr_times_3`` the first cell of the baseline's algorithm at every seed.

    Args:
        study: a checked study.
        fingerprint: content hash of a base model.
        task_version: version of the task's data and grader.
    """
    cells = _cells(study)
    baseline = study.baseline.model_dump(mode="json", exclude={"seed"})
    trials: dict[str, Trial] = {}

    def add(
        config: dict[str, Any],
        cell: dict[str, str],
        seed: int,
        replicate: int,
        control: Control | None,
    ) -> None:
        resolved = TrialConfig.model_validate({**config, "seed": seed})
        name = trial_id(
            resolved,
            replicate=replicate,
            num_threads=study.resources.num_threads,
            num_workers=study.resources.num_workers,
            base_fingerprint=fingerprint(resolved.model),
            task_version=task_version,
        )
        role = "control" if control else "baseline" if config == baseline else "factor"
        trials.setdefault(name, Trial(name, resolved, replicate, cell, role, control))

    for config, cell in cells:
        for seed in study.seeds:
            add(config, cell, seed, 0, None)
    by_algorithm: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for config, cell in cells:
        by_algorithm.setdefault(config["algorithm"]["name"], (config, cell))
    first_seed = study.seeds[0]
    for control in study.controls:
        if control == "lr_times_3":
            name = study.baseline.algorithm.name
            config, cell = by_algorithm.get(name, cells[0])
            rate = float(
                f"{3 * config['train']['learning_rate']:.12g}"
            )  # 3e-5, not 3.0000000000000004e-05
            for seed in study.seeds:
                add(_with(config, "train.learning_rate", rate), cell, seed, 0, control)
            continue
        for config, cell in by_algorithm.values():
            if control == "lr_zero":
                add(_with(config, "train.learning_rate", 0.0), cell, first_seed, 0, control)
            else:
                add(config, cell, first_seed, 1, control)
    return list(trials.values())


def collapsed_factors(study: Study) -> dict[str, list[str]]:
    """Nested factors: path -> algorithms that do not have it."""
    missing: dict[str, set[str]] = {}
    for config, cell in _cells(study):
        for path in study.factors:
            if path not in cell:
                missing.setdefault(path, set()).add(config["algorithm"]["name"])
    return {path: sorted(names) for path, names in missing.items()}


def level_label(level: Any) -> str:
    """Text of a factor level: scalars as in YAML, mappings as ``name(key=value, ...)``."""
    if isinstance(level, Mapping):
        inner = ", ".join(f"{k}={level_label(v)}" for k, v in level.items() if k != "name")
        name = str(level.get("name", ""))
        return f"{name}({inner})" if inner else name
    return level if isinstance(level, str) else canonical_json(level)


def reference_level(study: Study, path: str) -> str:
    """Label of the level that effects of ``path`` are measured against.

    The baseline's own value when it is a level, else the first level.
    """
    levels = study.factors[path]
    own = study.baseline.model_dump(mode="json", exclude={"seed"})
    is_own = (level for level in levels if _has(own, path) and _at_level(own, path, level) == own)
    return level_label(next(is_own, levels[0]))


def _cells(study: Study) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Distinct cells as (configuration without seed, labels)."""
    paths = sorted(study.factors, key=lambda p: (p.count("."), p != "algorithm.name"))
    cells: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for levels in itertools.product(*(study.factors[path] for path in paths)):
        config = study.baseline.model_dump(mode="json", exclude={"seed"})
        cell: dict[str, str] = {}
        for path, level in zip(paths, levels, strict=True):
            if _has(config, path):
                config = _at_level(config, path, level)
                cell[path] = level_label(level)
        resolved = _resolve(config, cell)
        cells.setdefault(canonical_json(resolved), (resolved, cell))
    return list(cells.values())


def _resolve(config: dict[str, Any], cell: dict[str, str]) -> dict[str, Any]:
    try:
        return TrialConfig.model_validate(config).model_dump(mode="json", exclude={"seed"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "cell"
        raise ConfigError(
            f"factors: cell {cell} is not a valid trial: {where}: "
            f"{first['msg'].removeprefix('Value error, ')}"
        ) from error


def _has(config: dict[str, Any], path: str) -> bool:
    """Whether ``config``, which has its defaults filled, has a field at ``path``."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _at_level(config: dict[str, Any], path: str, level: Level) -> dict[str, Any]:
    """``config`` with the field at ``path`` at ``level``.

    A mapping changes only the fields that it lists, but another algorithm has its own defaults.
    """
    if path == "algorithm.name":
        path, level = "algorithm", {"name": level}
    if isinstance(level, dict):
        own = functools.reduce(operator.getitem, path.split("."), config)
        if path == "algorithm" and level.get("name", own["name"]) != own["name"]:
            own = _algorithm_defaults(level["name"])
        level = {**own, **level} if isinstance(own, dict) else level
    return _with(config, path, level)


def _algorithm_defaults(name: Any) -> dict[str, Any]:
    models = (model for model in models_of(AlgorithmConfig) if tag_of(model) == name)
    return {key: field.default for model in models for key, field in model.model_fields.items()}


def _with(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {**config, head: _with(config[head], rest, value) if rest else value}


def check_factors(study: Study) -> None:
    """Every factor must exist in at least one cell; every claim's factor must be varied."""
    for path in study.factors:
        if path == "seed":
            raise ConfigError("factors: seed is not a factor; list the seeds under `seeds`")
    if "seed" in study.baseline.model_fields_set:
        raise ConfigError("baseline: seed has no place here; list the seeds under `seeds`")
    cells = _cells(study)
    known = sorted({path for config, _ in cells for path in paths_of(config)})
    for path in study.factors:
        if not any(path in cell for _, cell in cells):
            raise ConfigError(f"factors: unknown factor {path}; {nearest(path, known)}")
    for claim in study.claims:
        if isinstance(claim, EquivalentClaim) and claim.factor not in study.factors:
            raise ConfigError(
                f"claims: {claim.id} names the factor {claim.factor}, which this study does not "
                f"vary; its factors: {', '.join(study.factors) or 'none'}"
            )


def paths_of(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys of nested mappings."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{key}.")
