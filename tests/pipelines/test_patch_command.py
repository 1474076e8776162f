"""``rlsparse patch``: what it makes and says, and every mistake in one line."""

import json
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import planted
import pytest
import synced
from planted import Pair, Tensor, make_pair, random_tensor, write_folder

from pipelines import patch_command
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import CheckpointError, ConfigError, PatchError, StorageError
from rlsparse.patch import CODECS, Patch
from rlsparse.patch.blocks import Compression
from rlsparse.patch.values import CODINGS
from rlsparse.weight_sync.writer import PatchWriter

P = "p.patch.safetensors"


@pytest.fixture
def run(invoke):
    return partial(invoke, "patch")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair in the working directory, 10 % of whose weights changed."""
    monkeypatch.chdir(tmp_path)
    return make_pair(tmp_path)


@pytest.mark.parametrize("values", ["relative", "absolute"])
@pytest.mark.parametrize("codec", ["auto", "gaps", "bitmap", "indices"])
def test_there_and_back(run, pair: Pair, values: str, codec: str) -> None:
    said = run("make", "before", "after", "-o", P, "--values", values, "--codec", codec)
    num_changed = sum(int(changed.sum()) for changed in pair.changed.values())
    size = sum(tensor.bits.size for tensor in pair.tensors_before.values())
    assert f"changed  {num_changed:,} of {size:,} weights" in said
    assert f"values {values}" in said
    if codec != "auto":
        assert f"; {codec} {num_changed:,}\n" in said
    assert f"{num_changed:,} changed weights" in run("verify", "before", P)
    assert "all checksums agree" in run("apply", "before", P, "-o", "out")
    assert fingerprint(Checkpoint.open("out")) == fingerprint(Checkpoint.open("after"))


def test_numbers_are_those_of_the_files(run, pair: Pair) -> None:
    made = json.loads(run("make", "before", "after", "-o", P, "--json", "-"))
    patch = Patch.open(P)
    assert made["bytes"] == Path(P).stat().st_size
    assert made["bytes_dense"] == sum(2 * t.bits.size for t in pair.tensors_after.values())
    assert made["bytes_per_change"] == pytest.approx(made["bytes"] / patch.num_changed, rel=1e-9)
    assert made["bytes_per_change"] > 2  # the file's header weighs, in a model this small
    assert made["dense_is_smaller_from"] == 2 / made["bytes_per_change"]
    assert 0.5 < made["bytes_zstd"] / made["bytes_dense"] < 1.5
    assert made["encode_mb_per_s"] > 0 < made["apply_mb_per_s"]
    info = json.loads(run("info", P, "--json", "-"))
    assert {k: v for k, v in made.items() if k in info} == info
    assert sum(info["changed_by_codec"].values()) == patch.num_changed


def test_a_copy_that_is_never_smaller(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "before", {"w": Tensor("bf16", (256, 256), np.zeros(2**16, np.uint16))})
    after = np.ones(2**16, np.uint16)
    after[-1] = 0  # all but one change, each by one step
    write_folder(tmp_path / "after", {"w": Tensor("bf16", (256, 256), after)})
    said = run("make", "before", "after", "-o", P)
    assert "changed  65,535 of 65,536 weights (99.9985 %) in" in said
    assert "a copy of the checkpoint is never smaller" in said
    made = json.loads(run("info", P, "--json", "-"))
    assert (made["bytes_per_change"] < 2, made["dense_is_smaller_from"]) == (True, None)


def test_a_patch_in_another_format_is_against_the_cast_base(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    narrow = random_tensor(rng, "bf16", (8, 16))
    wide = Tensor("fp32", (8, 16), (narrow.bits.astype(np.uint32) << 16) + np.uint32(3))
    write_folder(tmp_path / "before", {"w": narrow})
    write_folder(tmp_path / "after", {"w": wide})
    run("make", "before", "after", "-o", P)
    run("apply", "before", P, "-o", "out")
    out = Checkpoint.open("out")
    assert out.tensors["w"].dtype == "fp32"
    assert np.array_equal(out.read_bits("w"), wide.bits)


@pytest.mark.parametrize("own", ["copy", "another", "another at its end", "wider"])
def test_a_tied_head_is_listed_only_where_it_differs(run, tmp_path, monkeypatch, own) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlsparse.patch.write.PIECE", 16)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = random_tensor(np.random.default_rng(0), "bf16", (5, 8))
    after = Tensor("bf16", (5, 8), np.zeros(40, np.uint16))
    owns = {
        "copy": after,
        "another": tied,
        "another at its end": Tensor("bf16", (5, 8), np.eye(1, 40, 39, np.uint16)[0]),
        "wider": Tensor("fp32", (5, 8), np.zeros(40, np.uint32)),
    }
    config = {"tie_word_embeddings": True}
    write_folder(tmp_path / "before", {head: tied, embedding: tied}, config)
    write_folder(tmp_path / "after", {head: owns[own], embedding: after}, config)
    run("make", "before", "after", "-o", P)
    assert set(Patch.open(P).tensors) == {embedding, *([] if own == "copy" else [head])}
    run("apply", "before", P, "-o", "out")
    for name in (head, embedding):
        expected = Checkpoint.open("after").tensors[name].read()
        found = Checkpoint.open("out").tensors[name].read()
        assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())


def test_checkpoints_that_are_not_alike_write_nothing(run, pair: Pair, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    without = {k: v for k, v in pair.tensors_after.items() if k != name}
    tensor = pair.tensors_after[name]
    others = {
        r"before alone has model.embed_tokens.weight": without,
        r"other\d alone has extra": {**pair.tensors_after, "extra": tensor},
        r"is bf16 \[37, 16\] before, bf16 \[16, 37\] after": {
            **pair.tensors_after, name: Tensor("bf16", (16, 37), tensor.bits),
        },
        r"before, u8 \[37, 16\] after": {
            **pair.tensors_after, name: Tensor("u8", tensor.shape, tensor.bits.astype(np.uint8)),
        },
    }  # fmt: skip
    for number, (message, tensors) in enumerate(others.items()):
        write_folder(tmp_path / f"other{number}", tensors)
        with pytest.raises(PatchError, match=message):
            run("make", "before", f"other{number}", "-o", P)
        assert not Path(P).exists()


def test_mistakes_are_told_before_work_begins(run, pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"patches are called \*.patch.safetensors"):
        run("make", "before", "after", "-o", "p.safetensors")
    with pytest.raises(ConfigError, match="there is no folder no"):
        run("make", "before", "after", "-o", f"no/{P}")
    run("make", "before", "after", "-o", P)
    with pytest.raises(ConfigError, match="is there already; give another -o, or --force"):
        run("make", "before", "after", "-o", P)
    for sides, what in ((("before", P), "AFTER"), ((P, "after"), "BEFORE")):
        with pytest.raises(ConfigError, match=rf"{what} is {P}, a patch: apply it first"):
            run("make", *sides, "-o", "q.patch.safetensors")
    run("make", "after", "before", "-o", P, "--force")
    with pytest.raises(PatchError, match="belongs to another base"):
        run("apply", "before", P, "-o", "out")
    with pytest.raises(PatchError, match="belongs to another base"):
        run("verify", "before", P)
    with pytest.raises(PatchError, match=r"cannot read missing: .*; give one that `rlsparse patch"):
        run("info", "missing")
    with pytest.raises(CheckpointError):
        run("make", "before", "nowhere", "-o", "q.patch.safetensors")
    assert not Path("out").exists()


def test_squash(run, pair: Pair, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    last = {n: planted.plant(rng, one, 0.1)[0] for n, one in pair.tensors_after.items()}
    write_folder(tmp_path / "last", last)
    one, two = "one.patch.safetensors", "two.patch.safetensors"
    run("make", "before", "after", "-o", one)
    run("make", "after", "last", "-o", two)
    made = json.loads(run("squash", one, two, "-o", P, "--codec", "indices", "--json", "-"))
    direct = json.loads(
        run("make", "before", "last", "-o", "direct.patch.safetensors", "--json", "-")
    )
    same = {"base_fingerprint", "num_changed", "num_tensors_changed", "values"}
    assert {key: made[key] for key in same} == {key: direct[key] for key in same}
    assert made["changed_by_codec"] == {"indices": made["num_changed"]}
    run("apply", "before", P, "-o", "out")
    assert fingerprint(Checkpoint.open("out")) == fingerprint(Checkpoint.open("last"))
    for message, error, arguments in (
        ("do not meet at tensor", PatchError, (two, one, "-o", "q.patch.safetensors")),
        ("is there already", ConfigError, (one, two, "-o", P)),
        ("patches are called", ConfigError, (one, two, "-o", "q")),
    ):
        with pytest.raises(error, match=message):
            run("squash", *arguments)
    assert not list(tmp_path.glob("q*"))


def test_export(run, pair: Pair, tmp_path: Path) -> None:
    run("make", "before", "after", "-o", P)
    num_changed = sum(int(changed.sum()) for changed in pair.changed.values())
    said = run("export", P, "-o", "plain.safetensors", "--base", "before")
    assert said.startswith(f"plain.safetensors: {num_changed:,} changed weights, ")
    for name, places in pair.changed.items():
        stored = Checkpoint.open("plain.safetensors").tensors
        if places.any():
            indices = np.flatnonzero(places)
            assert np.array_equal(stored[f"{name}.idx"].read(), indices)
            values = pair.tensors_after[name].bits[indices]
            assert np.array_equal(stored[f"{name}.val"].read(), values)
    for message, error, arguments in (
        ("has relative values", PatchError, (P, "-o", "q.safetensors")),
        ("is there already", ConfigError, (P, "-o", "plain.safetensors", "--base", "before")),
        ("there is no folder no", ConfigError, (P, "-o", "no/q.safetensors")),
        ("and not", ConfigError, (P, "-o", "q.patch.safetensors", "--base", "before")),
        ("call it", ConfigError, (P, "-o", "q", "--base", "before")),
    ):
        with pytest.raises(error, match=message):
            run("export", *arguments)
    assert not list(tmp_path.glob("q*"))


def test_what_cannot_be_written_is_one_line(run, pair: Pair, tmp_path: Path) -> None:
    """Nobody, not even root, can make a file in /proc."""
    run("make", "before", "after", "-o", P)
    PatchWriter(synced.tiny(), tmp_path / "sync").close()
    for name, arguments in (
        (P, ("make", "before", "after")),
        ("out", ("apply", "before", P)),
        (P, ("squash", P)),
        ("plain.safetensors", ("export", P, "--base", "before")),
        ("out", ("rebuild", "sync")),
    ):
        message = f"cannot write /proc/{name}: [^\n]+; free space there, or give another -o$"
        with pytest.raises(StorageError, match=message):
            run(*arguments, "-o", f"/proc/{name}")


def test_options_name_what_the_format_has() -> None:
    """They are written twice, as the format's modules are too heavy for --help."""
    assert tuple(patch_command.Values) == CODINGS
    assert {*patch_command.Positions} == {"auto", *CODECS}
    assert tuple(patch_command.Compression) == get_args(Compression)
