import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import planted
import pytest
import torch
from planted import Tensor

from rlsparse import files
from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError

TENSORS = {
    "a": Tensor("bf16", (100, 3), np.arange(300, dtype="<u2")),
    "b": Tensor("fp32", (), np.array([7], "<u4")),
}
REST = {"c": Tensor("fp16", (5,), np.arange(5, dtype="<u2"))}
SHARDS = {"one.safetensors": TENSORS, "two.safetensors": REST}


def same(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> bool:
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
        assert info.read().tobytes() == tensor.bits.tobytes()
        buffer = np.empty(64, tensor.bits.dtype)
        pieces = [piece.tobytes() for piece in info.pieces(0, info.num_elements, buffer)]
        assert b"".join(pieces) == tensor.bits.tobytes()
    return True


def refuse(place: str, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder by byte ranges; ``log`` holds (method, path, bytes sent)."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, root: Path, log: list, refused: dict[str, int]):
        self.root, self.log, self.refused = root, log, refused
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.log.append((self.command, self.path, len(content)))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = self.root / unquote(path).lstrip("/")
        if status := self.refused.get(self.command) or self.refused.get(path):
            return self.answer(status)
        if not file.is_file():
            return self.answer(404)
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or "no ranges" in self.refused:
            return self.answer(200, content)
        if "cut" in self.refused:  # promises more than it sends
            self.send_response(206)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.close_connection = True
            return self.wfile.write(content[:9])
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        length = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        return self.answer(206, content[start:stop], Content_Range=length)

    do_HEAD = do_GET


@contextmanager
def serve(handler):
    """The address of a loopback server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def web(tmp_path):
    """Address of a web server over ``tmp_path``, its log, and what it refuses."""
    log: list = []
    refused: dict[str, int] = {}
    with serve(functools.partial(Handler, root=tmp_path, log=log, refused=refused)) as address:
        yield address, log, refused


def test_web_folder_is_read_by_ranges(tmp_path, web):
    address, log, _ = web
    planted.write_shards(tmp_path / "run 1" / "model", SHARDS)
    (tmp_path / "run 1" / "model" / "config.json").write_text('{"n": 1}')
    checkpoint = Checkpoint.open(f"{address}/run 1/model?key=secret")
    assert checkpoint.config == {"n": 1}
    assert checkpoint.path == f"{address}/run 1/model"
    assert same(checkpoint, TENSORS | REST)
    assert same(pickle.loads(pickle.dumps(checkpoint)), TENSORS | REST)
    log.clear()
    buffer = np.empty(64, "<u2")
    list(checkpoint.tensors["a"].pieces(10, 300, buffer))
    assert [entry[::2] for entry in log] == [("GET", 128)] * 4 + [("GET", 68)]
    assert all("key=secret" in entry[1] for entry in log)


def test_web_folder_of_one_file_and_one_web_file(tmp_path, web):
    address, _, _ = web
    planted.write_folder(tmp_path / "model", TENSORS)
    assert same(Checkpoint.open(f"{address}/model/"), TENSORS)
    assert same(Checkpoint.open(f"{address}/model/model.safetensors?key=1"), TENSORS)
    torch.save({"x": torch.arange(5.0)}, tmp_path / "old.bin")
    assert Checkpoint.open(f"{address}/old.bin").read_bits("x").view("<f4").tolist() == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_web_server_that_signs_only_get(tmp_path, web):
    address, _, refused = web
    planted.write_folder(tmp_path / "model", TENSORS)
    refused["HEAD"] = 403
    assert same(Checkpoint.open(f"{address}/model/model.safetensors"), TENSORS)


def test_web_failures_are_told_in_one_line(tmp_path, web):
    address, _, refused = web
    planted.write_folder(tmp_path / "model", TENSORS)
    file = f"{address}/model/model.safetensors?token=secret"
    refuse(f"{address}/nowhere", r"no model\.safetensors.* in http://127\S+/nowhere")
    assert "secret" not in refuse(
        file.replace("model.s", "other.s"), r"cannot read http://\S+/model/other\.safetensors: 404"
    )
    refused["/model/model.safetensors"] = 403
    assert "secret" not in refuse(file, r"cannot read http://\S+/model\.safetensors: 403")
    refuse(f"{address}/model", "403")
    refused["/model/model.safetensors"] = 500
    refuse(f"{address}/model", "500")
    del refused["/model/model.safetensors"]
    checkpoint = Checkpoint.open(file)
    refused["no ranges"] = 1
    with pytest.raises(CheckpointError, match="sends no parts of files; download it"):
        checkpoint.read_bits("a", 10, 20)
    del refused["no ranges"]
    refused["cut"] = 1
    with pytest.raises(CheckpointError, match=r"cannot read http://\S+/model\.safetensors: \S+"):
        checkpoint.read_bits("a")
    del refused["cut"]
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was truncated while it was"):
        checkpoint.read_bits("b")


def test_server_that_never_answers(monkeypatch):
    monkeypatch.setattr(files, "READ_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}/model"
        for place in (address, f"{address}/model.safetensors"):
            text = refuse(
                place, r"cannot read http://127\S+/model\.safetensors: the server did not"
            )
            assert "secret" not in text


def test_nobody_listens_and_unknown_protocols():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    refuse(f"http://127.0.0.1:{port}/model", rf"cannot read http://127.0.0.1:{port}/model/model")
    refuse("nonsense://bucket/model", "cannot read nonsense://bucket/.*Protocol not known")


def test_memory_url(tmp_path):
    memory = fsspec.filesystem("memory")
    local = planted.write_shards(tmp_path / "model", SHARDS)
    memory.put(f"{local}/", "/bucket/run/checkpoint-10/", recursive=True)
    memory.pipe("/bucket/run/checkpoint-9/model.safetensors", b"older")
    try:
        checkpoint = Checkpoint.open("memory://bucket/run")
        assert checkpoint.path == "memory://bucket/run/checkpoint-10"
        assert same(checkpoint, TENSORS | REST)
        refuse("memory://bucket/none", r"in memory://bucket/none, which holds nothing")
        refuse("memory://bucket/run/x.safetensors", "cannot read memory://bucket/run/x.safetensors")
        memory.pipe("/bucket/other/a.gguf", b"")
        refuse("memory://bucket/other", r"no weights to read in memory://bucket/other: .*gguf_file")
        buffers = [np.empty(size, "<u2") for size in (7, 100)]
        ways = [checkpoint.tensors["a"].pieces(0, 300, buffer) for buffer in buffers]
        first = next(ways[0]).tolist()  # two readers at once have two positions
        assert [n for piece in ways[1] for n in piece.tolist()] == list(range(300))
        assert first + [n for piece in ways[0] for n in piece.tolist()] == list(range(300))
    finally:
        memory.rm("/bucket", recursive=True)


COMMIT = {"main": "a" * 40, "step_5": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}


class Hub(Handler):
    """The part of the hub that huggingface_hub asks: the list of a commit's files, and the files.

    The gated repository lists its files and gives none of them.
    """

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        asked = re.fullmatch(
            r"(?:/api/models)?/(\w+/\w+)(?:/(?:resolve|revision)/([^/]+))?(?:/(.+))?", path
        )
        repo, revision, name = asked[1], asked[2] or "main", asked[3]
        commit = COMMIT.get(revision, "unknown")
        folder = self.root / repo / commit
        if not folder.parent.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound")
        if not folder.is_dir():
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if name is None:
            stored = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": f} for f in stored]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if repo == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if name in self.refused:  # the branch has moved on
            commit = COMMIT["step_5"]
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


READ_ALL = """
import hashlib, json, sys
from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError
for place in sys.argv[1:]:
    try:
        found = Checkpoint.open(place)
        bits = {name: info.read().tobytes().hex() for name, info in found.tensors.items()}
        print(json.dumps([str(found.path), found.config, bits]))
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


def read_in_child(folder: Path, address: str, *places: str, **environment: str) -> list:
    """Open places in another process: huggingface_hub reads its environment when imported."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    told = {
        "HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(files.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *places],
        env=own | told | environment, cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_downloads_what_is_needed_and_caches_it(tmp_path):
    planted.write_shards(tmp_path / "org" / "model" / COMMIT["main"], SHARDS)
    planted.write_folder(tmp_path / "org" / "model" / COMMIT["step_5"], REST, {"step": 5})
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin", "spare.safetensors"):
        (tmp_path / "org" / "model" / COMMIT["main"] / name).write_text("{}")
    inner = tmp_path / "org" / "run" / COMMIT["main"] / "checkpoint-10"
    planted.write_folder(inner, REST)
    (tmp_path / "org" / "gguf" / COMMIT["main"]).mkdir(parents=True)
    (tmp_path / "org" / "gguf" / COMMIT["main"] / "q4.gguf").touch()
    planted.write_folder(tmp_path / "org" / "gated" / COMMIT["main"], REST)
    work = tmp_path / "work"
    planted.write_folder(work / "org" / "local", TENSORS)
    log: list = []
    whole = {name: tensor.bits.tobytes().hex() for name, tensor in (TENSORS | REST).items()}
    rest = {"c": whole["c"]}
    with serve(functools.partial(Hub, root=tmp_path, log=log, refused={})) as address:
        found = read_in_child(
            work, address, "org/model", "org/model@step_5", "org/run", "org/local", "org/gguf",
            "org/none", "org/gated", "org/model@step_6",
        )  # fmt: skip
    cache = work / "hf" / "hub"
    main = cache / "models--org--model" / "snapshots" / COMMIT["main"]
    assert found[0] == [str(main), {}, whole]
    assert found[1] == [str(main.parent / COMMIT["step_5"]), {"step": 5}, rest]
    assert found[2][0].endswith(f"models--org--run/snapshots/{COMMIT['main']}/checkpoint-10")
    assert found[2][2] == rest
    assert found[3] == ["org/local", {"model_type": "llama"}, {n: whole[n] for n in TENSORS}]
    assert re.search(r"no weights to read in org/gguf: .*gguf_file='q4.gguf'", found[4])
    assert re.search(
        r"cannot read org/none from the hub: no such model there, and no such", found[5]
    )
    assert re.search(
        r"cannot read org/gated .*: gated; .*huggingface.co/org/gated.*HF_TOKEN", found[6]
    )
    assert re.search(r"cannot read org/model .* has no branch, tag or commit step_6", found[7])
    assert not any("\n" in error for error in found[4:])
    assert sorted(os.listdir(main)) == [
        "config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors",
    ]  # fmt: skip
    got = [path for method, path, size in log if method == "GET" and size and "/org/model/" in path]
    assert not [path for path in got if re.search("tokenizer|bin|spare", path)]
    offline = read_in_child(work, address, "org/model", "org/model@step_5", "org/other",
                            "org/model@step_7", HF_HUB_OFFLINE="1")  # fmt: skip
    assert offline[:2] == found[:2]
    gone = read_in_child(work, address, "org/model", "org/other")  # nobody listens there now
    assert gone[0] == found[0]
    for error in (offline[2], offline[3], gone[1]):
        assert re.search(
            r"no folder org/\w+ is here, the hub cannot be reached, .*HF_HUB_OFF", error
        )


def test_partly_cached_model_without_network(tmp_path):
    planted.write_shards(tmp_path / "org" / "model" / COMMIT["main"], SHARDS)
    lost = tmp_path / "org" / "model" / COMMIT["main"] / "two.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    with serve(functools.partial(Hub, root=tmp_path, log=[], refused={})) as address:
        (error,) = read_in_child(tmp_path / "org", address, "org/model")
        assert re.search(
            r"model.*lacks the shards \['two.safetensors'\].*download them again", error
        )
        (offline,) = read_in_child(tmp_path / "org", address, "org/model", HF_HUB_OFFLINE="1")
        assert re.search(r"lacks the shards \['two.safetensors'\].*cannot be reached", offline)
        lost.write_bytes(content)
        (found,) = read_in_child(tmp_path / "org", address, "org/model")
        assert sorted(found[2]) == ["a", "b", "c"]


def test_branch_that_moves_during_the_download(tmp_path):
    planted.write_shards(tmp_path / "org" / "model" / COMMIT["main"], SHARDS)
    moved = {"two.safetensors": 1}
    with serve(functools.partial(Hub, root=tmp_path, log=[], refused=moved)) as address:
        (error,) = read_in_child(tmp_path, address, "org/model@main")
    assert re.search("org/model was changed while it was downloaded: try again", error)


class Dripping(io.RawIOBase):
    """Gives one or two bytes at a time."""

    def __init__(self, content: bytes):
        self.source = io.BytesIO(content)

    def readinto(self, buffer) -> int:
        return self.source.readinto(memoryview(buffer)[:2])


def test_short_reads_are_continued():
    buffer = bytearray(11)
    files.fill(Dripping(bytes(range(11))), memoryview(buffer), Path("x"))
    assert buffer == bytes(range(11))
    with pytest.raises(CheckpointError, match="x was truncated"):
        files.fill(Dripping(bytes(10)), memoryview(buffer), Path("x"))


def test_local_files():
    refuse("file:///nowhere/at all", "no checkpoint at /nowhere/at all: no such file")
    refuse("../nowhere/model", "no such file or folder")
    with pytest.raises(CheckpointError, match=r"limit|at most 1 expected"):
        files.read_bytes(Path(__file__), 1)
    assert files.read_bytes(Path(__file__), 10**6) == Path(__file__).read_bytes()
