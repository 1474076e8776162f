"""A study: one question, its grid and its claims, and the trials that answer it.

``expand`` turns baseline x factors x seeds, and the controls, into trials. ``study_file`` reads a
study from YAML.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from rlsparse.algorithm_config import AlgorithmConfig
from rlsparse.claim_config import Claim
from rlsparse.config import ModelConfig, TrialConfig
from rlsparse.errors import ConfigError
from rlsparse.identity import canonical_json, trial_id
from rlsparse.levels import (
    MASK,
    TAGS,
    Level,
    Scalar,
    at_level,
    canonical_path,
    has,
    level_label,
    order_of,
    put,
    touches,
)
from rlsparse.mask_config import Origin, TrialMask, leaves
from rlsparse.mask_origins import absence, origin_config
from rlsparse.resources import Resources
from rlsparse.variants import Config, Location, explain, models_of, place_of, tag_of

Control = Literal["lr_zero", "same_seed", "lr_times_3", "shuffled_reward", "random_reward"]
Role = Literal["baseline", "factor", "control", "surrogate"]
View = Literal["stored", "fp32", "bf16", "fp16", "fp8_e4m3"]

SURROGATES = {"shuffled_reward": "shuffled", "random_reward": "random"}  # control -> its reward

MIN_SEEDS = 4  # fewer leave every verdict but ``exact`` undecided


class StudyError(ConfigError):
    """A study is wrong; ``location`` holds the keys that lead there in its file."""

    location: Location = ()

    def at(self, *location: str | int) -> "StudyError":
        """This error with its place."""
        self.location = location
        return self


class StudyBase(Config):
    """What the analysis needs of a study: its question, factors and claims.

    ``interactions`` are pairs of factors, for the factorial model.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str
    factors: dict[str, Annotated[list[Level], Field(min_length=1)]] = Field(default_factory=dict)
    interactions: tuple[tuple[str, str], ...] = ()
    controls: tuple[Control, ...] = ()
    views: tuple[View, ...] = ()
    spectrum: Literal["off", "auto", "exact"] = "off"
    claims: tuple[Claim, ...] = ()

    @field_validator("controls", "views", "claims")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        _refuse_twice([getattr(value, "id", value) for value in values])
        return values

    @property
    def default_view(self) -> View:
        """bf16 when precision varies, else the stored format."""
        return "bf16" if "train.precision" in self.factors else "stored"

    @property
    def measured_views(self) -> tuple[str, ...]:
        """Views that the diff stage measures, the default one first, then those of claims."""
        given = [text for c in self.claims for text in (c.response, getattr(c, "on", ""))]
        named = [text.split("@")[1] for text in given if "@" in text]
        return tuple(dict.fromkeys([self.default_view, *self.views, *named]))

    def reference_level(self, path: str) -> str:
        """Label of the level that effects of ``path`` are measured against: the first."""
        return level_label(self.factors[path][0])


class Study(StudyBase):
    """One question, its grid of trials and its claims. Field by field what the YAML file holds."""

    baseline: TrialConfig
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)]
    resources: Resources = Resources()

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        _refuse_twice(seeds)
        return seeds

    def reference_level(self, path: str) -> str:
        """The baseline's own value when it is a level, else the first level."""
        own = self.baseline.model_dump(mode="json", exclude={"seed"})
        levels = self.factors[path]
        is_own = (one for one in levels if has(own, path) and at_level(own, path, one) == own)
        return level_label(next(is_own, levels[0]))


class PairStudy(StudyBase):
    """A study of runs made elsewhere: checkpoint pairs, listed in a CSV file.

    ``pairs`` has a row per checkpoint: before, after, step, seed, score, and a column per factor,
    named by its path. ``factors`` are these columns with the values that occur; ``reference`` says
    against which one effects are measured, else the first that occurs. What is known of every run
    but varies nowhere (learning rate, precision) stands in ``settings``, by path.
    """

    pairs: str
    reference: dict[str, Scalar] = Field(default_factory=dict)
    settings: dict[str, Scalar] = Field(default_factory=dict)

    @property
    def default_view(self) -> View:
        """The first of ``views``; without any, as in other studies."""
        return self.views[0] if self.views else super().default_view

    def reference_level(self, path: str) -> str:
        """See the class."""
        return level_label(self.reference.get(path, self.factors[path][0]))


def _refuse_twice(values: Sequence[Any]) -> None:
    """Raise ValueError if a value is there more than once."""
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given more than once")


@dataclass(frozen=True)
class Trial:
    """One cell x one seed x one replicate, ready to run.

    Attributes:
        cell: factor path -> level label; a factor that the trial does not have is absent.
        role: a trial is a surrogate if its reward, unlike the baseline's, carries no information.
        control: name of the control, or None.
        data_version: of its task, reward, data and mask files.
        origins: what the masks of other trials in ``train.mask`` refer to, in their order.
    """

    trial_id: str
    config: TrialConfig
    replicate: int
    cell: dict[str, str]
    role: Role
    control: Control | None
    data_version: str = ""
    origins: tuple[Origin, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the trials that must be done before this one can begin."""
        return tuple(dict.fromkeys(origin.trial_id for origin in self.origins))

    @property
    def label(self) -> str:
        """See ``run_label``."""
        return run_label(self.config.algorithm.name, self.config.seed, self.cell, self.control)


def run_label(algorithm: str, seed: int, cell: Mapping[str, str], control: str | None) -> str:
    """Short text for people: algorithm, seed and what is special about the run."""
    special = [
        f"{path.removesuffix('.name').split('.', 1)[-1]}={label}"
        for path, label in cell.items()
        if canonical_path(path) != "algorithm.name"
    ]
    name = algorithm + cell.get("algorithm", algorithm).removeprefix(algorithm)
    return " ".join([name, f"s{seed}", *special, *filter(None, [control])])


def left_out(asked: Collection[str], varied: str = "") -> set[Role]:
    """Roles of the runs that a claim is not about.

    Controls and surrogates enter only by role, control or replicate, surrogates by reward, too.

    Args:
        asked: paths of the claim's selector.
        varied: the factor that is compared, if any.
    """
    if {"role", "control", "replicate"} & set(asked):
        return set()
    by_reward = "algorithm.reward" in asked or varied in ("algorithm", "algorithm.reward")
    return {"control"} if by_reward else {"control", "surrogate"}


# --- expanding -------------------------------------------------------------------------------

_Cell = tuple[dict[str, Any], dict[str, str]]
"""Configuration without seed, and level labels by factor."""


def expand(
    study: Study,
    *,
    fingerprint: Callable[[ModelConfig], str],
    data_version: Callable[[TrialConfig], str],
) -> list[Trial]:
    """All trials of a study, each once, in a fixed order (seeds innermost, controls last).

    Factors that a cell's algorithm or task does not have are dropped from it, and cells that become
    equal are one (nested factors). ``lr_zero`` and ``same_seed`` add one trial per algorithm at the
    first seed. The others are run at every seed: ``lr_times_3`` in the first cell of the baseline's
    algorithm, the rewards too, or in that of the first algorithm that rewards what it samples.

    Args:
        study: a checked study.
        fingerprint: content hash of a base model.
        data_version: version of a trial's task, reward, data and mask files.

    Raises:
        StudyError: a cell is no valid trial or does not split over the workers, no algorithm has
            the reward that a control changes, or a mask is of a trial that is not in the study.
    """
    cells = _cells(study)
    baseline = study.baseline.model_dump(mode="json", exclude={"seed"})
    own_reward = baseline["algorithm"].get("reward")
    names = _Names(study, baseline, fingerprint, data_version)
    trials: dict[str, Trial] = {}

    def add(cell: _Cell, seed: int, control: Control | None = None) -> None:
        config, labels = cell
        resolved = TrialConfig.model_validate({**config, "seed": seed})
        if reason := study.resources.conflict(resolved):
            raise StudyError(f"resources: {reason}").at("resources")
        origins = names.origins(resolved, labels)
        replicate, version = int(control == "same_seed"), data_version(resolved)
        name = names.name(resolved, replicate, version, origins)
        reward = config["algorithm"].get("reward")
        is_surrogate = reward in SURROGATES.values() and reward != own_reward
        role: Role = "baseline" if config == baseline else "factor"
        if control in SURROGATES or (control is None and is_surrogate):
            role = "surrogate"
        elif control:
            role = "control"
        trial = Trial(name, resolved, replicate, labels, role, control, version, origins)
        trials.setdefault(name, trial)

    for cell in cells:
        for seed in study.seeds:
            add(cell, seed)
    for index, control in enumerate(study.controls):
        for cell in _control_cells(study, control, index, cells):
            once = control in ("lr_zero", "same_seed")
            for seed in study.seeds[:1] if once else study.seeds:
                add(cell, seed, control)
    names.check(trials)
    return list(trials.values())


@dataclass(frozen=True)
class _Names:
    """Names of the trials of a study, and what their masks are of; see ``expand``."""

    study: Study
    baseline: dict[str, Any]
    fingerprint: Callable[[ModelConfig], str]
    data_version: Callable[[TrialConfig], str]
    sources: dict[str, TrialConfig] = field(default_factory=dict)
    """Trials that masks are of, by name; whether they are in the study or not."""

    def name(
        self, config: TrialConfig, replicate: int, version: str, origins: Sequence[Origin] = ()
    ) -> str:
        resources = self.study.resources
        return trial_id(
            config,
            replicate=replicate,
            num_threads=resources.num_threads,
            num_workers=resources.num_workers,
            strategy=resources.strategy,
            base_fingerprint=self.fingerprint(config.model),
            data_version=version,
            origins=origins,
        )

    def origins(self, config: TrialConfig, cell: Mapping[str, str]) -> tuple[Origin, ...]:
        masks = [leaf for leaf in leaves(config.train.mask) if isinstance(leaf, TrialMask)]
        try:
            return tuple(self._origin(mask, config) for mask in masks)
        except ConfigError as error:
            raise self._error(cell, str(error)) from error

    def _origin(self, mask: TrialMask, config: TrialConfig) -> Origin:
        source = origin_config(mask, config, self.baseline, self.study.seeds)
        name = self.name(source, 0, self.data_version(source))
        self.sources[name] = source
        return Origin(name, mask.take, mask.step_of(source.train.num_steps))

    def check(self, trials: Mapping[str, Trial]) -> None:
        """Refuse masks of trials that are not there."""
        for trial in trials.values():
            for name in trial.needs:
                if name not in trials:
                    reason = absence(self.sources[name], [one.config for one in trials.values()])
                    text = f"the mask of trial {trial.label} is of a trial outside of this study: "
                    raise self._error(trial.cell, text + reason)

    def _error(self, cell: Mapping[str, str], reason: str) -> StudyError:
        if MASK not in cell:
            return StudyError(f"baseline: {reason}").at("baseline", "train", "mask")
        labels = [level_label(level) for level in self.study.factors[MASK]]
        return StudyError(f"factors: {reason}").at("factors", MASK, labels.index(cell[MASK]))


def _control_cells(study: Study, control: Control, index: int, cells: list[_Cell]) -> list[_Cell]:
    """The cells of a control, the ``index``-th of the study."""
    first: dict[str, _Cell] = {}
    for cell in cells:
        first.setdefault(cell[0]["algorithm"]["name"], cell)
    own = study.baseline.algorithm.name
    if control == "same_seed":
        return list(first.values())
    if control == "lr_zero":
        return [
            (put(config, "train.learning_rate", 0.0), labels) for config, labels in first.values()
        ]
    if control == "lr_times_3":
        config, labels = first.get(own, cells[0])
        rate = float(f"{3 * config['train']['learning_rate']:.12g}")  # 3e-5, not 3.0000000000000004
        return [(put(config, "train.learning_rate", rate), labels)]
    samples = {name: {"data": "sampled", **first[name][0]["algorithm"]} for name in first}
    rewarded = [n for n, a in samples.items() if "reward" in a and a["data"] == "sampled"]
    if not rewarded:
        members = [m for m in models_of(AlgorithmConfig) if "reward" in m.model_fields]
        known = sorted(str(tag_of(member)) for member in members)
        raise StudyError(
            f"controls: {control} needs an algorithm with a reward, this study has "
            f"{', '.join(first)}; with a reward for what they sample: {', '.join(known)}"
        ).at("controls", index)
    config, labels = first[own if own in rewarded else rewarded[0]]
    if "algorithm.reward" in labels:
        labels = {**labels, "algorithm.reward": SURROGATES[control]}
    return [(put(config, "algorithm.reward", SURROGATES[control]), labels)]


def collapsed_factors(study: Study) -> dict[str, list[str]]:
    """Nested factors: path -> algorithms (for ``task`` factors, tasks) that do not have it."""
    missing: dict[str, set[str]] = {}
    for config, cell in _cells(study):
        for path in study.factors:
            if path not in cell:
                head = TAGS.get(f"{path.partition('.')[0]}.name", "algorithm")
                missing.setdefault(path, set()).add(config[head]["name"])
    return {path: sorted(names) for path, names in missing.items()}


def _cells(study: Study) -> list[_Cell]:
    """Distinct cells."""
    paths = sorted(study.factors, key=order_of)
    cells: dict[str, _Cell] = {}
    for levels in itertools.product(*(study.factors[path] for path in paths)):
        config = study.baseline.model_dump(mode="json", exclude={"seed"})
        cell: dict[str, str] = {}
        for path, level in zip(paths, levels, strict=True):
            if has(config, path):
                config = at_level(config, path, level)
                cell[path] = level_label(level)
        resolved = _resolve(study, config, cell)
        cells.setdefault(canonical_json(resolved), (resolved, cell))
    return list(cells.values())


def _resolve(study: Study, config: dict[str, Any], cell: dict[str, str]) -> dict[str, Any]:
    try:
        return TrialConfig.model_validate(config).model_dump(mode="json", exclude={"seed"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, place_of(TrialConfig, config, first)))
        location: list[str | int] = ["factors"]
        for path in reversed(cell):  # the last that applied has the last word
            if not where or touches(TAGS.get(path, path), where):
                labels = [level_label(level) for level in study.factors[path]]
                location += [path, labels.index(cell[path])]
                break
        named = ", ".join(f"{path} {label}" for path, label in cell.items())
        raise StudyError(
            f"factors: cell {named} is not a valid trial: {explain(TrialConfig, config, first)}"
        ).at(*location) from error
