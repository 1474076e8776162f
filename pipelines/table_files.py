"""Tables of a study in its storage: small ones in one file, large ones in a part per trial or base.

The only place that knows where they lie; neither Ray nor torch is needed to read them.
"""

import io
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.storage import Storage
from rlsparse import tables
from rlsparse.errors import TableError
from rlsparse.schemas import SCHEMAS

MASKS_PER_GROUP = 8
"""Rows of ``masks`` that are read together, 4 MB at most: to read one chunk reads few others."""


def write_table(storage: Storage, table: pa.Table, name: str, part: str | None = None) -> None:
    """Write table ``name``, or one part of it, all or nothing."""
    buffer = io.BytesIO()
    size = MASKS_PER_GROUP if name == "masks" else None
    pq.write_table(tables.check(table, name), buffer, compression="zstd", row_group_size=size)
    storage.write_bytes(table_file(name, part), buffer.getvalue())


def read_table(
    storage: Storage,
    name: str,
    part: str | None = None,
    columns: Sequence[str] | None = None,
    rows: pc.Expression | None = None,
) -> pa.Table:
    """Read table ``name``, or one part of it; ``columns`` and ``rows`` as in ``tables.read``.

    Raises:
        TableError: it is not there, damaged, or of another schema version.
    """
    file = table_file(name, part)
    if not storage.exists(file):
        raise TableError(f"no table {name} at {storage.url}/{file}; `rlsparse run` makes it again")
    with storage.local_copy(file) as path:
        return tables.read(path, name, columns, rows)


def read_parts(storage: Storage, name: str, parts: Iterable[str]) -> pa.Table:
    """The parts of table ``name`` that belong to these trials (or bases), concatenated."""
    read = [read_table(storage, name, part) for part in parts]
    return pa.concat_tables([*read, SCHEMAS[name].empty_table()], promote_options="default")


def table_file(name: str, part: str | None = None) -> str:
    """File of a table, or of one part of it, below the folder of its study."""
    return f"tables/{name}.parquet" if part is None else f"tables/{name}.parquet/{part}.parquet"
