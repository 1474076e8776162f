"""Reads, writes and checks the tables; what is in them is in ``schemas``.

A table is a Parquet file or a folder of Parquet files.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlsparse.errors import TableError
from rlsparse.schemas import OLDER_VERSIONS, SCHEMA_VERSION, SCHEMAS

EVER_CHANGED = "ever_changed.mask.safetensors"
"""File of a trial: every weight that differed from the base after any step."""
SUBNETWORK = "subnetwork.mask.safetensors"
"""File of a trial that trains under a mask: the weights that it trained."""
SUMMARY = "summary.json"
"""File of a trial: what it ended with, one number per key."""


def step_mask_file(step: int) -> str:
    """File of a trial, in the columns of table ``masks``: what one step changed."""
    return f"step_masks/step-{step:06d}.parquet"


STEP_PATCHES = "step_patches"
"""Folder of a trial: what a ``weight_sync.PatchReceiver`` that begins at the base can follow."""


def snapshot_folder(step: int) -> str:
    """Folder of a trial that holds the patch of one snapshot."""
    return f"snapshots/step-{step:06d}"


def check(table: pa.Table, name: str) -> pa.Table:
    """Return ``table`` with the columns of schema ``name`` first, in order, cast and stamped.

    Further columns are kept behind them.

    Raises:
        TableError: a column is missing or cannot be cast.
    """
    return _fitted(table, name, SCHEMAS[name].names)


def _fitted(table: pa.Table, name: str, columns: Sequence[str]) -> pa.Table:
    """``check`` for some columns of the schema."""
    schema = SCHEMAS[name]
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise TableError(f"table {name} lacks the columns {missing}")
    extra = [field for field in table.schema if field.name not in schema.names]
    full = pa.schema([*map(schema.field, columns), *extra], metadata=schema.metadata)
    try:
        return table.select(full.names).cast(full)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise TableError(f"table {name} does not fit its schema: {error}") from error


def from_rows(rows: list[dict[str, object]], name: str) -> pa.Table:
    """Make table ``name`` of ``rows``; keys beyond the schema become further columns."""
    if not rows:
        return SCHEMAS[name].empty_table()
    extra = {key: None for row in rows for key in row if key not in SCHEMAS[name].names}
    columns = {
        field.name: pa.array([row.get(field.name) for row in rows], type=field.type)
        for field in SCHEMAS[name]
    }
    columns |= {key: pa.array([row.get(key) for row in rows]) for key in extra}
    return check(pa.table(columns), name)


def write(table: pa.Table, name: str, path: Path) -> None:
    """Write table ``name`` to the Parquet file ``path`` (not atomic: callers rename)."""
    pq.write_table(check(table, name), path, compression="zstd")


def read(
    path: Path,
    name: str,
    columns: Sequence[str] | None = None,
    rows: pc.Expression | None = None,
) -> pa.Table:
    """Read table ``name`` from a Parquet file, or from a folder of them (in file-name order).

    Columns of the schema that an older version lacks are null.

    Args:
        path: the file or folder.
        name: of the table.
        columns: of the schema, the only ones to read; all and further ones by default.
        rows: the rows to keep, by what is in the columns read; all by default.

    Raises:
        TableError: nothing is there, or it was written under another schema version.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not path.exists():
        raise TableError(f"no table {name} at {path}; `rlsparse run` makes it again")
    kept = SCHEMAS[name].names if columns is None else list(columns)
    empty = SCHEMAS[name].empty_table().select(kept)
    try:
        parts = [_read_file(file, columns, rows) for file in files]
    except (pa.ArrowException, OSError) as error:
        raise TableError(
            f"table {name} at {path} is damaged ({error}); delete it and run the study again"
        ) from error
    parts = [part.replace_schema_metadata(SCHEMAS[name].metadata) for part in parts]
    return _fitted(pa.concat_tables([*parts, empty], promote_options="default"), name, kept)


def _read_file(path: Path, columns: Sequence[str] | None, rows: pc.Expression | None) -> pa.Table:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        version = (schema.metadata or {}).get(b"rlsparse_schema", b"none").decode()
        if version not in {SCHEMA_VERSION, *OLDER_VERSIONS}:
            raise TableError(
                f"{path} has schema version {version}, this release reads {SCHEMA_VERSION}; "
                "run the study again to rebuild its tables"
            )
    there = None if columns is None else [name for name in columns if name in schema.names]
    # Of a file of several row groups, only those that can hold such rows are read.
    return pq.read_table(path, columns=there, filters=rows, partitioning=None)
