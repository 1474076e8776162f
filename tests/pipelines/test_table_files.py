"""Tables of a study are written all or nothing, whole or in parts, wherever its storage is."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.storage import Storage
from pipelines.table_files import read_parts, read_table, table_file, write_table
from rlsparse import tables
from rlsparse.errors import TableError


def steps(trial: str, *numbers: int) -> pa.Table:
    return tables.from_rows([{"trial_id": trial, "step": step} for step in numbers], "steps")


@pytest.fixture(params=["folder", "url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "folder" else tmp_path.as_uri())


def test_a_table_is_replaced_as_a_whole(storage: Storage) -> None:
    for numbers in ((1, 2, 3), (4,)):
        write_table(storage, steps("a", *numbers), "steps")
        assert read_table(storage, "steps").equals(steps("a", *numbers))
    content = storage.read_bytes("tables/steps.parquet")
    assert pq.read_table(io.BytesIO(content)).num_rows == 1
    with pytest.raises(TableError, match="lacks the columns"):
        write_table(storage, pa.table({"trial_id": ["b"]}), "steps")
    assert storage.read_bytes("tables/steps.parquet") == content


def test_only_the_parts_asked_for_are_read(storage: Storage) -> None:
    for part in ("a", "b", "c"):
        write_table(storage, steps(part, 1, 2), "steps", part)
    assert table_file("steps", "a") == "tables/steps.parquet/a.parquet"
    assert read_parts(storage, "steps", ["c", "a"])["trial_id"].to_pylist() == [*"ccaa"]
    assert read_parts(storage, "steps", []).equals(tables.from_rows([], "steps"))
    found = read_table(storage, "steps", "b", ["step"], pc.field("step") > 1)
    assert found.to_pylist() == [{"step": 2}]


def test_a_missing_table_is_told_with_what_makes_it(storage: Storage) -> None:
    with pytest.raises(TableError, match=r"no table steps at .*/tables/steps\.parquet; `rlsparse"):
        read_table(storage, "steps")
    with pytest.raises(TableError, match=r"steps\.parquet/a\.parquet"):
        read_parts(storage, "steps", ["a"])
