"""Reads study files: strict YAML 1.2, with errors that name the line and what is allowed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlsparse.claim_config import EquivalentClaim, GreaterClaim
from rlsparse.config import TrialConfig
from rlsparse.definitions import DEFINITIONS, VIEWS
from rlsparse.errors import ConfigError, nearest
from rlsparse.levels import Scalar, canonical_path, paths_of
from rlsparse.study import Study, StudyError, Trial, expand, left_out
from rlsparse.variants import Location, distinct, explain, place_of


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file.

    Args:
        path: the YAML file; its stem is the study's name.
        overrides: ``dotted.path=value`` texts, each value in YAML, set before checking. A path
            that begins with a factor or a field of the baseline may omit ``baseline.``.

    Raises:
        ConfigError: not readable, not YAML, or not a study; with file, line and the nearest name.
    """
    path = Path(path)
    yaml = YAML(typ="rt", pure=True)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read study file {path}: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must be a mapping with question, baseline, factors, seeds ...")
    raw = _plain(document)
    for override in overrides:
        _set(raw, override)
    raw.setdefault("name", path.stem)
    try:
        study = Study.model_validate(raw)
        trials = expand(study, fingerprint=lambda base: base.source, data_version=lambda config: "")
        _check_factors(study, trials)
        _check_claims(study, trials)
    except ValidationError as error:
        lines = [
            f"{path}:{_line(document, place_of(Study, raw, one))}: {explain(Study, raw, one)}"
            for one in distinct(error.errors())
        ]
        raise ConfigError("\n".join(lines)) from error
    except StudyError as error:
        raise ConfigError(f"{path}:{_line(document, error.location)}: {error}") from error
    return study


def _check_factors(study: Study, trials: Sequence[Trial]) -> None:
    """Every factor must exist in at least one trial; every claim's factor must be varied.

    Raises:
        StudyError: it does not, or is not.
    """
    lists = "list the seeds under `seeds`"
    if "seed" in study.baseline.model_fields_set:
        raise StudyError(f"baseline: seed has no place here; {lists}").at("baseline", "seed")
    if "seed" in study.factors:
        raise StudyError(f"factors: seed is not a factor; {lists}").at("factors", "seed")
    known = _paths(trials)
    for path in study.factors:
        if not any(path in trial.cell for trial in trials):
            raise StudyError(f"factors: unknown factor {path}; {nearest(path, known)}").at(
                "factors", path
            )
    for index, claim in enumerate(study.claims):
        if isinstance(claim, EquivalentClaim) and claim.factor not in study.factors:
            raise StudyError(
                f"claims: {claim.id} names the factor {claim.factor}, which this study does not "
                f"vary; its factors: {', '.join(study.factors) or 'none'}"
            ).at("claims", index, "factor")


def _paths(trials: Sequence[Trial]) -> list[str]:
    return sorted({p for t in trials for p in paths_of(t.config.model_dump(mode="json"))})


_RESPONSES = ("score_after", "score_gain", "identical_replicates")


def _check_claims(study: Study, trials: Sequence[Trial]) -> None:
    """Find now what would leave a claim undecided after all training.

    Raises:
        StudyError: a response that does not exist, or a selector that matches no planned trial.
    """
    known = [
        *_RESPONSES,
        *(f"sparsity.{name}" for name in DEFINITIONS),
        "overlap.bitwise",
    ]
    for index, claim in enumerate(study.claims):
        name, at, view = claim.response.partition("@")
        here = ("claims", index, "response")
        if name not in known:
            raise StudyError(
                f"claims: {claim.id}: unknown response {name}; {nearest(name, known)}"
            ).at(*here)
        if at and view not in VIEWS:
            raise StudyError(f"claims: {claim.id}: unknown view {view}; {nearest(view, VIEWS)}").at(
                *here
            )
        sides = {"a": claim.a, "b": claim.b} if isinstance(claim, GreaterClaim) else {"where": {}}
        for key, side in sides.items():
            selector = {**claim.where, **side}
            for path, value in selector.items():
                place = ("claims", index, key if path in side else "where", path)
                _check_selector(claim.id, path, value, trials, place)
            hidden = left_out(selector, claim.varied)
            if not any(
                t.role not in hidden and all(_value(t, k) == v for k, v in selector.items())
                for t in trials
            ):
                raise StudyError(f"claims: {claim.id}: no planned trial has {selector}").at(
                    "claims", index, key
                )


def _check_selector(
    claim_id: str, path: str, value: Scalar, trials: Sequence[Trial], place: Location
) -> None:
    values = [found for trial in trials if (found := _value(trial, path)) is not _NOWHERE]
    if not values:
        known = sorted([*_paths(trials), *_COLUMNS])
        raise StudyError(f"claims: {claim_id}: unknown selector {path}; {nearest(path, known)}").at(
            *place
        )
    if value not in values:
        there = ", ".join(sorted({str(found) for found in values}))
        raise StudyError(
            f"claims: {claim_id}: no planned trial has {path} {value}; there: {there}"
        ).at(*place)


_COLUMNS = ("role", "control", "replicate")
_NOWHERE = object()


def _value(trial: Trial, path: str) -> Any:
    """What a trial has at a selector's path; ``_NOWHERE`` if it has no such path."""
    if path in _COLUMNS:
        return getattr(trial, path)
    node: Any = trial.config.model_dump(mode="json")
    for part in canonical_path(path).split("."):
        if not isinstance(node, dict) or part not in node:
            return _NOWHERE
        node = node[part]
    return node


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        # YAML reads the key `null` (the field of a claim) as the value null.
        return {"null" if k is None else str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} must look like dotted.path=value")
    try:
        value = _plain(YAML(typ="rt", pure=True).load(io.StringIO(text)))
    except YAMLError as error:
        raise ConfigError(
            f"--set {override!r}: the value is not YAML: {_one_line(error)}"
        ) from error
    parts = key.split(".")
    if parts[0] == "factors":  # its keys are dotted paths themselves
        parts = key.split(".", 1)
    if parts[0] in TrialConfig.model_fields:
        parts.insert(0, "baseline")
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {part} holds a value, not a mapping")
    node[parts[-1]] = value


def _line(document: Any, place: Location) -> int:
    """Line of the file that holds a place, or of the last key before it that is in the file."""
    node, line = document, 1
    for part in place:
        # YAML reads the key `null` as the value null.
        key = None if part == "null" and isinstance(node, dict) and None in node else part
        is_item = isinstance(node, list) and isinstance(key, int) and key < len(node)
        if not is_item and not (isinstance(node, dict) and key in node):
            break
        line = (node.lc.item(key) if is_item else node.lc.key(key))[0] + 1
        node = node[key]
    return line
