"""Rows come out of files as they went in; whatever is wrong with a file is told in one line."""

import json
import os
import re
from types import SimpleNamespace

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from rlsparse.errors import ConfigError
from rlsparse.tasks.rows import content_hash, read_rows

ROWS = [
    {"prompt": "1 + 1 =", "answer": "02", "other": "a,b"},
    {"prompt": 'a "quoted"\nprompt \u2028 é', "answer": "-3", "other": "c"},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif path.suffix == ".csv":
        cells = [list(rows[0]), *(row.values() for row in rows)]
        quoted = [",".join('"' + str(c).replace('"', '""') + '"' for c in line) for line in cells]
        path.write_bytes("\r\n".join(quoted).encode("utf-8-sig"))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(params=[".jsonl", ".csv", ".parquet"])
def file(request, tmp_path):
    return write(tmp_path / f"data{request.param}", ROWS)


def test_formats(file):
    for source in (file, f"file://{file}"):
        rows = read_rows(source, ["prompt", "answer"])
        assert [{key: row[key] for key in ("prompt", "answer")} for row in rows] == [
            {key: row[key] for key in ("prompt", "answer")} for row in ROWS
        ]


def test_values_keep_their_types(tmp_path):
    rows = [{"label": True, "score": 0.5, "n": 0}, {"label": False, "score": 1.0, "n": 7}]
    for suffix in (".jsonl", ".parquet"):
        assert read_rows(write(tmp_path / f"data{suffix}", rows), ["label", "score", "n"]) == rows
    (tmp_path / "data.csv").write_text("label,n\nTrue,007\n")
    assert read_rows(str(tmp_path / "data.csv"), ["n"]) == [{"label": "True", "n": "007"}]


def test_urls(file):
    suffix = file[file.rindex(".") :]
    with open(file, "rb") as local:
        fsspec.filesystem("memory").pipe(f"/rows/data{suffix}", local.read())
    url = f"memory://rows/data{suffix}"
    assert read_rows(url, ["prompt"]) == read_rows(file, ["prompt"])
    assert content_hash(url) == content_hash(file)


def test_missing_column(file):
    with pytest.raises(ConfigError, match=r"has no column 'promt': did you mean prompt\? known: p"):
        read_rows(file, ["answer", "promt"])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("value", [None, "", " \n", float("nan")])
def test_empty_cells(tmp_path, suffix, value):
    good = 1.0 if isinstance(value, float) else "x"
    path = write(tmp_path / f"d{suffix}", [{"a": good, "b": "y"}, {"a": value, "b": "y"}])
    with pytest.raises(ConfigError, match=rf"^row 2 of {path} has nothing in column 'a': fill"):
        read_rows(path, ["b", "a"])
    assert len(read_rows(path, ["b"])) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "a,b\n1,2\n3,\n", "row 2 of .* has nothing in column 'b'"),
        ("d.csv", "a,b\n1,2\n3\n", "row 2 of .* has nothing in column 'b'"),
        ("d.csv", "a,b\n1,2,3\n", "cannot read .*: row 1 has more cells than the header"),
        ("d.csv", 'a,b\n1,"2\n', "cannot read .*: line 2: unexpected end of data"),
        ("d.csv", "a,b\n", "has no rows"),
        ("d.csv", "", "has no rows"),
        ("d.jsonl", "", "has no rows"),
        ("d.jsonl", '{"a": 1, "b": 1}\n{"a": 2}', "row 2 of .* has nothing in column 'b'"),
        ("d.jsonl", '{"a": 1, "b": 1}\n\n{"a": 2,', "cannot read .*: line 3 is not JSON: "),
        ("d.jsonl", '[{"a": 1}]', "cannot read .*: line 1 is not a JSON object"),
        ("d.jsonl", b'{"a": "\xff"}', "cannot read .*: 'utf-8' codec can't decode"),
        ("d.parquet", "PAR1 nonsense", "cannot read .*: Parquet magic bytes not found"),
        ("d.parquet", "", "cannot read .*"),
        ("d.json", "[]", "cannot tell the format of .*ends with .jsonl, .csv, .parquet"),
        ("d", "a", "cannot tell the format of"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        read_rows(str(path), ["a", "b"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/here.jsonl", "^no data file nothing/here.jsonl: give a .* or a hub id org/name"),
        ("file:///nothing/here.csv", "^no data file /nothing/here.csv"),
        ("/nothing/here", "cannot tell the format"),
        ("name", "cannot tell the format"),
        ("http://me:secret@127.0.0.1:9/here.csv", "^cannot read http://127.0.0.1:9/here.csv: "),
        ("nosuch://nothing/here.csv", "^cannot read nosuch://nothing/here.csv: "),
        ("http://127.0.0.1:9/here.csv?key=secret", "^cannot read http://127.0.0.1:9/here.csv: "),
    ],
)
def test_nothing_there(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_rows(source, ["a"])
    assert "secret" not in str(caught.value)


def test_folder(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="no data file"):
        read_rows(str(tmp_path / "folder.csv"), ["a"])


def test_content_hash_follows_the_content(tmp_path):
    one, same, other = (tmp_path / f"{name}.csv" for name in "abc")
    for path, text in ((one, "a\n1\n"), (same, "a\n1\n"), (other, "a\n2\n")):
        path.write_text(text)
    assert content_hash(str(one)) == content_hash(str(same)) != content_hash(str(other))
    before = content_hash(str(one))
    one.write_text("a\n12\n")
    assert content_hash(str(one)) != before


class Hub:
    """Stands for the functions of ``datasets``: rows of one data set, calls recorded."""

    def __init__(self):
        from datasets import Dataset

        self.rows, self.calls = Dataset.from_list(ROWS), []

    def load_dataset(self, *arguments, **options):
        self.calls.append((arguments, options))
        return self.rows

    def load_dataset_builder(self, *arguments, **options):
        self.calls.append((arguments, options))
        return SimpleNamespace(hash="0123abc")


def test_hub(monkeypatch):
    import datasets

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    rows = read_rows("org/name@v1.0", ["answer"], subset="main", split="validation")
    assert rows == [{"answer": row["answer"]} for row in ROWS]
    assert content_hash("org/name@v1.0", "main") == "0123abc"
    read_rows("org/name", ["answer"])
    assert hub.calls == [
        (("org/name", "main"), {"revision": "v1.0", "split": "validation"}),
        (("org/name", "main"), {"revision": "v1.0"}),
        (("org/name", None), {"revision": None, "split": "train"}),
    ]
    with pytest.raises(ConfigError, match=r"org/name has no column 'answers': did you mean answer"):
        read_rows("org/name", ["answers"])


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("not\nthere")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=r"^cannot load org/name from the hub.*: not there$"):
        read_rows("org/name", ["a"])


def test_a_local_file_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("org")
    write(tmp_path / "org" / "name.csv", ROWS)
    assert len(read_rows("org/name.csv", ["prompt"])) == len(ROWS)
    (tmp_path / "org" / "plain").write_text("x")
    with pytest.raises(ConfigError, match=re.escape("cannot tell the format of org/plain")):
        read_rows("org/plain", ["prompt"])
