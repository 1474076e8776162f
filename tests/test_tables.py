"""Schemas are a contract: checked when written, versioned, and refused when they do not fit."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rlsparse import tables
from rlsparse.errors import TableError

CLAIM = {"id": "a", "verdict": "undecided", "num_runs": 4}


def test_every_table_of_the_contract_is_there():
    names = (
        "trials steps eval base_tensors tensor_deltas changes magnitudes stripes masks overlaps "
        "consensus agreement syncs spectra effects terms means claims"
    )
    assert set(tables.SCHEMAS) == set(names.split())
    for schema in tables.SCHEMAS.values():
        assert schema.metadata == {b"rlsparse_schema": tables.SCHEMA_VERSION.encode()}


def test_definitions_have_a_column_each():
    columns = tables.SCHEMAS["tensor_deltas"].names
    assert [c.removeprefix("num_changed_") for c in columns if c.startswith("num_changed_")] == [
        "bitwise", "abs_1e-08", "abs_1e-07", "abs_1e-06", "abs_1e-05", "abs_1e-04", "rel_1e-03",
    ]  # fmt: skip


def test_round_trip_of_a_file(tmp_path):
    table = tables.from_rows([CLAIM, {**CLAIM, "id": "b", "further": 1.5}], "claims")
    tables.write(table, "claims", tmp_path / "claims.parquet")
    again = tables.read(tmp_path / "claims.parquet", "claims")
    assert again.equals(table)
    assert again.column_names == [*tables.SCHEMAS["claims"].names, "further"]
    assert again.column("further").to_pylist() == [None, 1.5]
    assert again.column("margin").to_pylist() == [None, None]
    assert again.schema.field("num_runs").type == pa.int64()


def test_columns_come_in_order_and_are_cast():
    rows = {name: pa.nulls(1) for name in reversed(tables.SCHEMAS["claims"].names)}
    rows["num_runs"] = pa.array([3], pa.int8())
    table = tables.check(pa.table(rows), "claims")
    assert table.schema.equals(tables.SCHEMAS["claims"], check_metadata=True)
    assert table.column("num_runs").to_pylist() == [3]


def test_no_rows_make_an_empty_table():
    assert tables.from_rows([], "masks").schema.equals(tables.SCHEMAS["masks"])


def test_what_does_not_fit_is_refused():
    table = tables.from_rows([CLAIM], "claims")
    with pytest.raises(TableError, match=r"claims lacks the columns \['verdict'\]"):
        tables.check(table.drop_columns(["verdict"]), "claims")
    index = table.column_names.index("num_runs")
    with pytest.raises(TableError, match="does not fit its schema"):
        tables.check(table.set_column(index, "num_runs", pa.array(["many"])), "claims")


def test_another_schema_version_is_refused(tmp_path):
    table = tables.from_rows([CLAIM], "claims")
    for version in ({"rlsparse_schema": "0"}, None):
        pq.write_table(table.replace_schema_metadata(version), tmp_path / "old.parquet")
        with pytest.raises(TableError, match="run the study again"):
            tables.read(tmp_path / "old.parquet", "claims")


def test_folders_are_read_in_order_of_file_names(tmp_path):
    for name in ("b", "a", "c"):
        table = tables.from_rows([{**CLAIM, "id": name, f"of_{name}": 1}], "claims")
        tables.write(table, "claims", tmp_path / f"{name}.parquet")
    read = tables.read(tmp_path, "claims")
    assert read.column("id").to_pylist() == ["a", "b", "c"]
    assert read.column("of_b").to_pylist() == [None, 1, None]


def test_missing_tables(tmp_path):
    with pytest.raises(TableError, match=r"no table claims at .*; `rlsparse run` makes it again"):
        tables.read(tmp_path / "nothing", "claims")
    assert tables.read(tmp_path, "claims").num_rows == 0
    assert tables.snapshot_folder(10) == "snapshots/step-000010"


def test_only_the_columns_and_rows_asked_for_are_read(tmp_path):
    rows = [{"trial_id": "a", "step": step, "loss": step / 4, "further": step} for step in range(4)]
    tables.write(tables.from_rows(rows, "steps"), "steps", tmp_path / "a.parquet")
    columns = ["step", "trial_id"]
    found = tables.read(tmp_path / "a.parquet", "steps", columns, pc.field("step") >= 2)
    assert found.column_names == columns
    assert found.to_pylist() == [{"step": step, "trial_id": "a"} for step in (2, 3)]
    assert found.schema.metadata == tables.SCHEMAS["steps"].metadata
    assert tables.read(tmp_path, "steps", columns).num_rows == 4
    (tmp_path / "b").mkdir()
    assert tables.read(tmp_path / "b", "steps", columns).column_names == columns
    with pytest.raises(KeyError, match="nonsense"):
        tables.read(tmp_path, "steps", ["nonsense"])


def test_columns_that_an_earlier_release_did_not_write_are_null(tmp_path):
    table = tables.from_rows([CLAIM], "claims").drop_columns(["would_decide"])
    old = table.replace_schema_metadata({"rlsparse_schema": "2"})
    pq.write_table(old, tmp_path / "old.parquet")
    found = tables.read(tmp_path, "claims")
    assert found["would_decide"].to_pylist() == [None]
    assert found.schema.metadata == tables.SCHEMAS["claims"].metadata
    columns = ["would_decide", "id"]
    assert tables.read(tmp_path, "claims", columns).to_pylist() == [
        {"would_decide": None, "id": "a"}
    ]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "claims.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TableError, match=r"claims at .*claims\.parquet is damaged .* delete it"):
        tables.read(tmp_path / "claims.parquet", "claims")


def test_a_trial_that_ended_before_there_was_validation_has_none(tmp_path):
    rows = [{"trial_id": "a", "status": "finished", "score_after": 0.5}]
    new = ["score_validation", "num_validation_problems"]
    earlier = tables.from_rows(rows, "trials").drop_columns(new)
    assert earlier.schema.metadata == {b"rlsparse_schema": b"3"}
    pq.write_table(earlier, tmp_path / "trials.parquet")
    read = tables.read(tmp_path / "trials.parquet", "trials")
    assert read.column_names == tables.SCHEMAS["trials"].names
    assert read.select(["score_after", *new]).to_pylist() == [
        {"score_after": 0.5, "score_validation": None, "num_validation_problems": None}
    ]
