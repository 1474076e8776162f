"""Reads study files: strict YAML 1.2, with errors that name the line and what is allowed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlsparse.config import TrialConfig, models_of, tag_of
from rlsparse.errors import ConfigError, nearest
from rlsparse.study import Study, check_factors


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
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, document, path) for e in error.errors())) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


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
