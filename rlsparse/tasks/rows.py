"""Rows of a user's own data: a JSONL, CSV or Parquet file or URL, or a data set of a hub.

pyarrow and datasets are imported when they are used.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from rlsparse.errors import CheckpointError, ConfigError, nearest
from rlsparse.files import locate, opened

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?")

_Parsed = tuple[Sequence[str], list[dict[str, Any]]]
"""Names of all columns, and rows that hold at least the wanted ones."""


def read_rows(
    source: str, columns: Sequence[str], *, subset: str | None = None, split: str = "train"
) -> list[dict[str, Any]]:
    """The rows of a data set, in its order; each has a value in all of ``columns``.

    Args:
        source: a file or fsspec URL that ends with .jsonl, .csv or .parquet (the cells of a CSV
            are text, whatever they look like), or a hub id ``org/name`` or ``org/name@revision``.
        columns: columns that must be there; others may be.
        subset: configuration of a hub data set; files have none.
        split: split of a hub data set; files have none.

    Raises:
        ConfigError: there is no such data set, it cannot be read, it has no rows, it lacks a
            column, or a cell of ``columns`` is empty (null, NaN or blank).
    """
    if is_file(source):
        known, rows = _parse_file(source, columns)
    else:
        known, rows = _load_hub(source, columns, subset, split)
    name = shown(source)
    for column in columns:
        if known and column not in known:
            raise ConfigError(f"{name} has no column {column!r}: {nearest(column, known)}")
    if not rows:
        raise ConfigError(f"{name} has no rows")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if _is_empty(row.get(column)):
                raise ConfigError(
                    f"row {number} of {name} has nothing in column {column!r}: fill it in or "
                    "remove the row"
                )
    return rows


def content_hash(source: str, subset: str | None = None) -> str:
    """Hash of the content of a file or URL; of a hub data set, the commit that is read.

    Args:
        source: see ``read_rows``.
        subset: see ``read_rows``.

    Raises:
        ConfigError: it cannot be read.
    """
    return _content_hash(source, subset, stamp(source))


def stamp(source: str) -> tuple[int, ...]:
    """Changes when a local file does; nothing is known of others without reading them."""
    path = _local(source)
    if not path.is_file():
        return ()
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def is_file(source: str) -> bool:
    """Whether a source is a file or URL, rather than the id of a data set on a hub."""
    if _URL.match(source) or _suffix(source) in _PARSERS or _local(source).exists():
        return True
    return not _HUB_ID.fullmatch(source)


def shown(source: str) -> str:
    """The source without passwords and queries."""
    if not _URL.match(source):
        return source
    return re.sub(r"^([^/]*//)[^/]*@", r"\1", source).partition("?")[0]


@lru_cache(maxsize=64)
def _content_hash(source: str, subset: str | None, _: tuple[int, ...]) -> str:
    if is_file(source):
        return hashlib.sha256(_content(source)).hexdigest()[:16]
    return str(_hub("load_dataset_builder", source, subset).hash)


def _parse_file(source: str, columns: Sequence[str]) -> _Parsed:
    parse = _PARSERS.get(_suffix(source))
    if parse is None:
        raise ConfigError(
            f"cannot tell the format of {shown(source)}: the name of a data file ends with "
            f"{', '.join(_PARSERS)}"
        )
    content = _content(source)
    try:
        return parse(content, columns)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read {shown(source)}: {reason}") from error


def _content(source: str) -> bytes:
    if not _URL.match(source) or source.startswith("file://"):
        path = _local(source)
        if not path.is_file():
            raise ConfigError(
                f"no data file {path}: give a {', '.join(_PARSERS)} file or URL, or a hub id "
                "org/name@revision"
            )
        source = str(path)
    try:
        file = locate(source)
        with opened(file) as stream:  # type: ignore[arg-type]  # a name with a suffix is no folder
            return stream.read()
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _parse_jsonl(content: bytes, _: Sequence[str]) -> _Parsed:
    rows: list[dict[str, Any]] = []
    # Not splitlines: strings of JSON may hold line separators of Unicode.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        rows.append(row)
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _parse_csv(content: bytes, _: Sequence[str]) -> _Parsed:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the header")
    return list(reader.fieldnames or ()), rows


def _parse_parquet(content: bytes, columns: Sequence[str]) -> _Parsed:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        known = file.schema_arrow.names
        rows = file.read(columns=[name for name in columns if name in known]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    return known, rows


_PARSERS: dict[str, Callable[[bytes, Sequence[str]], _Parsed]] = {
    ".jsonl": _parse_jsonl,
    ".csv": _parse_csv,
    ".parquet": _parse_parquet,
}


def _load_hub(source: str, columns: Sequence[str], subset: str | None, split: str) -> _Parsed:
    loaded = _hub("load_dataset", source, subset, split=split)
    known = loaded.column_names
    return known, loaded.select_columns([name for name in columns if name in known]).to_list()


def _hub(function: str, source: str, subset: str | None, **options: str) -> Any:
    """Result of a function of ``datasets`` for a hub id."""
    import datasets
    from datasets.exceptions import DatasetsError

    found = _HUB_ID.fullmatch(source)
    assert found
    load = getattr(datasets, function)
    try:
        return load(found["repo"], subset, revision=found["revision"], **options)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot load {source} from the hub, and no file here has that name: {reason}"
        ) from error


def _local(source: str) -> Path:
    return Path(source.removeprefix("file://").removeprefix("localhost"))


def _suffix(source: str) -> str:
    path = source.partition("?")[0] if _URL.match(source) else source
    return PurePosixPath(path).suffix


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value  # NaN, where Parquet or JSON has one
