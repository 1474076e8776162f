"""Reads study files: strict YAML 1.2, with errors that name the line and what is allowed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlsparse.config import TrialConfig, models_of, tag_of
from rlsparse.definitions import DEFINITIONS, VIEWS
from rlsparse.errors import ConfigError, nearest
from rlsparse.study import (
    GreaterClaim,
    Scalar,
    Study,
    Trial,
    check_factors,
    expand,
    paths_of,
)


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
        check_factors(study)
        _check_claims(study)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, document, path) for e in error.errors())) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


_RESPONSES = ("score_after", "score_gain", "identical_replicates")


def _check_claims(study: Study) -> None:
    """Find now what would leave a claim undecided after all training.

    Raises:
        ConfigError: a response that does not exist, or a selector that matches no planned trial.
    """
    trials = expand(study, fingerprint=lambda model: model.source, task_version="")
    known = [
        *_RESPONSES,
        *(f"sparsity.{name}" for name in DEFINITIONS),
        "overlap.bitwise",
    ]
    for claim in study.claims:
        name, at, view = claim.response.partition("@")
        if name not in known:
            raise ConfigError(
                f"claims: {claim.id}: unknown response {name}; {nearest(name, known)}"
            )
        if at and view not in VIEWS:
            raise ConfigError(f"claims: {claim.id}: unknown view {view}; {nearest(view, VIEWS)}")
        sides = [claim.a, claim.b] if isinstance(claim, GreaterClaim) else [{}]
        for selector in ({**claim.where, **side} for side in sides):
            for path, value in selector.items():
                _check_selector(claim.id, path, value, trials)
            if not any(all(_value(t, k) == v for k, v in selector.items()) for t in trials):
                raise ConfigError(f"claims: {claim.id}: no planned trial has {selector}")


def _check_selector(claim_id: str, path: str, value: Scalar, trials: Sequence[Trial]) -> None:
    values = [found for trial in trials if (found := _value(trial, path)) is not _NOWHERE]
    if not values:
        paths = {p for t in trials for p in paths_of(t.config.model_dump(mode="json"))}
        known = sorted({*paths, *_COLUMNS, "algorithm"})
        raise ConfigError(f"claims: {claim_id}: unknown selector {path}; {nearest(path, known)}")
    if value not in values:
        there = ", ".join(sorted({str(found) for found in values}))
        raise ConfigError(
            f"claims: {claim_id}: no planned trial has {path} {value}; there: {there}"
        )


_COLUMNS = ("role", "control", "replicate")
_NOWHERE = object()


def _value(trial: Trial, path: str) -> Any:
    """What a trial has at a selector's path; ``_NOWHERE`` if it has no such path."""
    if path in _COLUMNS:
        return getattr(trial, path)
    node: Any = trial.config.model_dump(mode="json")
    for part in ("algorithm.name" if path == "algorithm" else path).split("."):
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


def _explain(error: Any, document: Any, path: Path) -> str:
    """One pydantic error as one line: file, line, path, what, what is allowed."""
    node, line, shown = document, 1, list[str]()
    candidates: list[type[BaseModel]] = [Study]
    for part in error["loc"]:
        # YAML reads the key `null` as the value null.
        key = None if part == "null" and isinstance(node, dict) and None in node else part
        inside = isinstance(node, (dict, list)) and (
            key in node if isinstance(node, dict) else isinstance(key, int) and key < len(node)
        )
        if inside:
            line = (node.lc.item(key) if isinstance(key, int) else node.lc.key(key))[0] + 1
            node = node[key]
            shown.append(str(part))
        elif isinstance(part, str) and any(tag_of(c) == part for c in candidates):
            candidates = [c for c in candidates if tag_of(c) == part]
            continue
        elif error["type"] == "extra_forbidden" or any(part in c.model_fields for c in candidates):
            shown.append(str(part))  # set by --set, or missing: not in the file
        if error["type"] == "extra_forbidden" and part == error["loc"][-1]:
            break
        if isinstance(part, str):
            candidates = [
                model
                for c in candidates
                if part in c.model_fields
                for model in models_of(c.model_fields[part].annotation)
            ]
    name = ".".join(shown) or "study"
    if error["type"] == "extra_forbidden":
        known = sorted({field for c in candidates for field in c.model_fields})
        return f"{path}:{line}: unknown key {name}; {nearest(str(error['loc'][-1]), known)}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
    return f"{path}:{line}: {name}: {message}{given}"
