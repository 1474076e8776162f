"""Reads study files: strict YAML 1.2, with errors that name the line and what is allowed."""

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlsparse.claim_checks import check_claims, paths
from rlsparse.config import TrialConfig
from rlsparse.errors import ConfigError, nearest
from rlsparse.levels import canonical_path, level_label, touches
from rlsparse.mask_config import FileMask, leaves
from rlsparse.pair_runs import PairRun, described, pair_runs
from rlsparse.pair_table import TOLD, read_pairs
from rlsparse.study import PairStudy, Study, StudyError, Trial, expand
from rlsparse.variants import Location, distinct, explain, place_of


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study | PairStudy:
    """Read and check a study file; one with ``pairs`` is of runs made elsewhere.

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
    kind = PairStudy if "pairs" in raw else Study
    try:
        for place, value in _numbers(raw):
            if not math.isfinite(value):
                name = ".".join(map(str, place))
                raise StudyError(f"{name}: must be a finite number (got {value})").at(*place)
        study, trials = _read_pairs(raw, path) if "pairs" in raw else _read_grid(raw)
        check_claims(study, trials)
    except ValidationError as error:
        lines = [
            f"{path}:{_line(document, place_of(kind, raw, one))}: {explain(kind, raw, one)}"
            for one in distinct(error.errors())
        ]
        raise ConfigError("\n".join(lines)) from error
    except StudyError as error:
        raise ConfigError(f"{path}:{_line(document, error.location)}: {error}") from error
    return study


def _read_grid(raw: dict[str, Any]) -> tuple[Study, Sequence[Trial]]:
    study = Study.model_validate(raw)
    trials = expand(study, fingerprint=lambda base: base.source, data_version=_places)
    _check_factors(study, trials)
    return study, trials


def _places(config: TrialConfig) -> str:
    """Where data and masks lie, in place of what they contain: the files need not be there yet."""
    named = [getattr(config.algorithm, "data", ""), getattr(config.task, "source", "")]
    named += [leaf.file for leaf in leaves(config.train.mask) if isinstance(leaf, FileMask)]
    return " ".join(named)


def _read_pairs(raw: dict[str, Any], path: Path) -> tuple[PairStudy, Sequence[PairRun]]:
    """A study of pairs, with what its CSV file says; the path of that is absolute then."""
    for key in ("factors", "controls"):
        if key in raw:
            raise StudyError(
                f"{key} has no place beside pairs: columns of {raw['pairs']} tell it; leave it out"
            ).at(key)
    stated = PairStudy.model_validate(raw)
    pairs = read_pairs(path.absolute().parent / stated.pairs)
    for one, other in itertools.product(stated.settings, [*pairs.columns, *TOLD]):
        if touches(canonical_path(one), canonical_path(other)):
            raise StudyError(
                f"settings: {one} has no place here: {pairs.path} has a column that tells it"
            ).at("settings", one)
    study = described(stated, pairs)
    for one, level in study.reference.items():
        known = [level_label(value) for value in study.factors.get(one, [])]
        if level_label(level) not in known:
            raise StudyError(
                f"reference: {one} {level_label(level)} is no level of a factor; "
                + (f"its levels: {', '.join(known)}" if known else nearest(one, [*study.factors]))
            ).at("reference", one)
    return study, pair_runs(study, pairs)


def _check_factors(study: Study, trials: Sequence[Trial]) -> None:
    """Every factor must exist in at least one trial.

    Raises:
        StudyError: it does not.
    """
    lists = "list the seeds under `seeds`"
    if "seed" in study.baseline.model_fields_set:
        raise StudyError(f"baseline: seed has no place here; {lists}").at("baseline", "seed")
    if "seed" in study.factors:
        raise StudyError(f"factors: seed is not a factor; {lists}").at("factors", "seed")
    known = paths(trials)
    for path in study.factors:
        if not any(path in trial.cell for trial in trials):
            raise StudyError(f"factors: unknown factor {path}; {nearest(path, known)}").at(
                "factors", path
            )


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


def _numbers(node: Any, *place: str | int) -> Iterator[tuple[Location, float]]:
    """All floats of a study, with their places."""
    if isinstance(node, float):
        yield place, node
    items = node.items() if isinstance(node, dict) else ()
    for key, value in enumerate(node) if isinstance(node, list) else items:
        yield from _numbers(value, *place, key)


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
    if parts[0] in ("factors", "settings", "reference"):  # its keys are dotted paths themselves
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
