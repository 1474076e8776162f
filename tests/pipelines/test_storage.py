"""Files are written all or nothing, are done when marked, and belong to one driver."""

import os
import pickle
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
from pyarrow import fs

from pipelines.storage import LOCK, MARKER, Storage
from rlsparse.errors import StorageError


class ObjectStore(Storage):
    """Stands for an object store: a file system that is not the local one."""

    @cached_property
    def _root(self) -> tuple[fs.FileSystem, str]:
        return fs.SubTreeFileSystem(self.url, fs.LocalFileSystem()), "bucket"


@pytest.fixture(params=["local", "url", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "object store":
        return ObjectStore(str(tmp_path))
    return Storage(str(tmp_path) if request.param == "local" else tmp_path.as_uri())


def everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write_bytes("a/b/c.bin", b"one")
    storage.write_bytes("a/b/c.bin", b"two")
    storage.write_json("a/d.json", {"x": [1, None]})
    assert storage.read_bytes("a/b/c.bin") == b"two"
    assert storage.read_json("a/d.json") == {"x": [1, None]}
    assert storage.list("a") == ["b", "d.json"]
    assert storage.list("nothing") == []
    assert storage.exists("a/d.json")
    storage.delete("a/d.json")
    storage.delete("a/d.json")
    assert not storage.exists("a/d.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json("a/d.json", {"x": float("nan")})


def test_json_keeps_the_order_of_keys(storage: Storage) -> None:
    storage.write_json("order.json", {"b": {"z": 1, "y": 2}, "a": 3})
    assert list(storage.read_json("order.json")) == ["b", "a"]
    assert list(storage.read_json("order.json")["b"]) == ["z", "y"]


def test_files_of_any_size_go_there_and_back(storage: Storage, tmp_path: Path) -> None:
    own, back = tmp_path / "own", tmp_path / "deep" / "back"
    own.write_bytes(os.urandom(2**24 + 1))
    storage.put(own, "a/b/large")
    storage.get("a/b/large", back)
    assert back.read_bytes() == own.read_bytes()
    with pytest.raises(StorageError, match="cannot read"):
        storage.get("a/nothing", back)
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert not storage.exists("a")


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    Storage(str(tmp_path)).write_bytes("a/b", b"1")
    assert everything(tmp_path) == ["a/b"]


def test_a_write_that_breaks_off_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        storage.write_bytes("file", b"new")
    assert storage.read_bytes("file") == b"old"
    assert everything(tmp_path) == ["file"]


def test_below_a_regular_file_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    storage = Storage(str(tmp_path / "file" / "study"))
    for attempt in (lambda: storage.write_bytes("x", b"1"), storage.check_writable):
        with pytest.raises(StorageError, match=r"cannot write .*Not a directory"):
            attempt()
    assert (tmp_path / "file").read_text() == "mine"


def test_check_writable_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    storage.check_writable()
    assert everything(tmp_path) == []


def test_reading_what_is_not_there_is_one_error(storage: Storage) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        storage.read_bytes("nothing")


def test_an_unknown_kind_of_url_says_what_is_known() -> None:
    with pytest.raises(StorageError, match="s3://bucket/prefix"):
        Storage("floppy://a").exists("x")


def test_a_folder_is_done_when_marked_and_whole(storage: Storage, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "one").write_bytes(b"12345")
    (made / "sub" / "two").write_bytes(b"")
    assert not storage.is_done("out")
    storage.publish(made, "out")
    assert storage.is_done("out")
    assert set(storage.read_json(f"out/{MARKER}")["files"]) == {"one", "sub/two"}
    with storage.local_copy("out") as copy:
        assert (copy / "one").read_bytes() == b"12345"
        assert (copy / "sub" / "two").read_bytes() == b""
    with storage.local_copy("out/one") as copy:
        assert copy.read_bytes() == b"12345"
    storage.write_bytes("out/one", b"1234")
    assert not storage.is_done("out"), "a truncated file"
    storage.write_bytes("out/one", b"12345")
    storage.delete("out/sub/two")
    assert not storage.is_done("out"), "a missing file"
    storage.write_bytes("out/sub/two", b"")
    storage.delete(f"out/{MARKER}")
    assert not storage.is_done("out"), "no marker"


def test_the_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, written = Storage(str(tmp_path / "out")), []
    write = Storage.write_bytes

    def record(self: Storage, name: str, content: bytes) -> None:
        written.append(name)
        write(self, name, content)

    monkeypatch.setattr(Storage, "write_bytes", record)
    (tmp_path / "made").mkdir()
    for name in ("a", "z"):
        (tmp_path / "made" / name).write_bytes(b"1")
    storage.publish(tmp_path / "made", "trial")
    assert written == ["trial/a", "trial/z", f"trial/{MARKER}"]


def test_pickles_as_its_url(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("x", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert again.url == storage.url
    assert again.sub("y").url == f"{storage.url}/y"
    assert again.read_bytes("x") == b"1"


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs")
    monkeypatch.chdir("/")
    storage.write_bytes("x", b"1")
    assert everything(tmp_path) == ["runs/x"]


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "study"))
    with (
        storage.lock(),
        pytest.raises(StorageError, match=rf"another driver .* process {os.getpid()} "),
        storage.lock(),
    ):
        pass
    with storage.lock():
        storage.write_bytes("x", b"1")
    assert everything(tmp_path) == ["study/x"]


def test_a_driver_in_another_process_is_refused(tmp_path: Path) -> None:
    code = f"""
from pipelines.storage import Storage
with Storage({str(tmp_path)!r}).lock():
    print("locked", flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(StorageError, match=f"process {other.pid} on"),
            Storage(str(tmp_path)).lock(),
        ):
            pass
        other.kill()
    with Storage(str(tmp_path)).lock():
        held = (tmp_path / LOCK).read_text()
    assert f"process {os.getpid()} on" in held, "the lock of a killed driver was not taken over"


def test_a_lock_leaves_no_empty_study_behind(tmp_path: Path) -> None:
    with Storage(str(tmp_path / "study")).lock():
        pass
    assert not (tmp_path / "study").exists()


def test_a_file_in_the_place_of_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("saves", b"")
    with pytest.raises(StorageError, match=f"cannot list {storage.url}/saves: "):
        storage.list("saves")
