import io
import random
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError
from rlsparse.pickled import read_pickled
from rlsparse.tensor_file import bits_dtype

FORMATS = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint16: "u16",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64",
}  # fmt: skip


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights() -> OrderedDict:
    """Tensors of every format, and parts of a larger storage."""
    torch.manual_seed(0)
    found = OrderedDict(
        (f"layers.{name}", (torch.randn(3, 5) * 9).to(dtype)) for dtype, name in FORMATS.items()
    )
    whole = torch.arange(100.0)
    found["parameter"] = torch.nn.Parameter(torch.randn(4, 2))
    found["part"], found["rest"] = whole[10:20].view(2, 5), whole[20:]
    found["scalar"], found["empty"] = torch.tensor(3.0), torch.empty(0, 4)
    return found


def same(tensors: dict, expected: dict) -> bool:
    assert list(tensors) == list(expected)
    for name, info in tensors.items():
        tensor = expected[name]
        assert (info.dtype, info.shape) == (FORMATS[tensor.dtype], tuple(tensor.shape))
        assert info.read().tobytes() == raw(tensor)
    return True


def refuse(file, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickled(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_the_bits_where_they_lie(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights(), file)
    tensors, tied = read_pickled(file)
    assert same(tensors, weights())
    assert tied == {}
    buffer = np.empty(7, bits_dtype("fp32"))
    pieces = [piece.tobytes() for piece in tensors["rest"].pieces(3, 80, buffer)]
    assert b"".join(pieces) == raw(weights()["rest"])[12:]
    assert Checkpoint.open(file).tensors == dict(sorted(tensors.items()))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_under_a_key(tmp_path, key):
    file = tmp_path / "epoch.pt"
    torch.save({key: weights(), "epoch": 3}, file)
    assert same(read_pickled(file)[0], weights())
    assert len(Checkpoint.open(file).tensors) == len(weights())


def test_weights_saved_from_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    torch.save(weights(), tmp_path / "cuda.pt")
    monkeypatch.undo()
    assert same(read_pickled(tmp_path / "cuda.pt")[0], weights())


def test_a_module_with_tied_weights(tmp_path):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 4), "head": torch.nn.Linear(4, 7)})
    model["head"].weight = model["embed"].weight
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tied == {"head.weight": "embed.weight"}
    assert [info.name for info in checkpoint.counted] == ["embed.weight", "head.bias"]
    assert checkpoint.read_bits("head.weight").tobytes() == raw(model["embed"].weight)


def test_one_storage_read_in_two_shapes_or_parts_is_not_tied(tmp_path):
    one = torch.arange(6.0)
    shared = {"a": one, "b": one.view(2, 3), "d": one[:3], "e": one[3:]}
    torch.save(shared, tmp_path / "x.pt")
    tensors, tied = read_pickled(tmp_path / "x.pt")
    assert tied == {}
    assert {name: info.read().tobytes() for name, info in tensors.items()} == {
        name: raw(tensor) for name, tensor in shared.items()
    }


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_a_malicious_pickle_does_not_run(tmp_path):
    file, proof = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
    torch.save({"a": torch.ones(2), "b": Malicious(proof)}, file)
    refuse(file, r"is not opened: it asks for \S*exec to be run, .* safetensors")
    assert not proof.exists()
    torch.load(file, weights_only=False)
    assert proof.exists()


REFUSED = {
    "list": ([torch.ones(2)], "holds a list, not tensors: .* save it as safetensors"),
    "number": ({"a": 3}, "a is a int, not a tensor; only {name: tensor}"),
    "nested": ({"a": {"b": torch.ones(2)}}, "a is a dict, not a tensor"),
    "both keys": ({"model": {}, "state_dict": {}}, "model is a dict, not a tensor"),
    "numbered": ({0: torch.ones(2)}, "a tensor is called 0"),
    "newline": ({"a\nb": torch.ones(2)}, r"called 'a\\nb'"),
    "transposed": ({"a": torch.ones(2, 3).t()}, r"a is torch.float32, .*strides \[1, 3\]"),
    "expanded": ({"a": torch.ones(1).expand(4)}, r"strides \[0\]; only contiguous"),
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "sparse_coo"),
    "conjugate": ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "only contiguous"),
    "complex128": ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128.* known formats"),
    "module": (torch.nn.Linear(2, 2), r"it asks for torch\.nn\.modules\.linear\.Linear"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_remedy(tmp_path, content, message):
    file = tmp_path / "x.pt"
    torch.save(content, file)
    refuse(file, message)


def repack(file, change=lambda name, content: content, order=sorted, how=zipfile.ZIP_STORED):
    """The zip file again, with contents changed, in another order, or compressed."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", how) as archive:
        for name in order(contents):
            if (content := change(name, contents[name])) is not None:
                archive.writestr(name, content)


def test_files_of_other_tools(tmp_path):
    file = tmp_path / "x.pt"

    def make(**options):
        torch.save({"a": torch.zeros(4), "b": torch.ones(4)}, file)
        repack(file, **options)

    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    refuse(file, "is no zip file as torch >= 1.6 writes them")
    file.write_bytes(b"")
    refuse(file, "is no zip file")
    make(how=zipfile.ZIP_DEFLATED)
    refuse(file, "is compressed")
    make(order=lambda names: sorted(names, reverse=True))
    refuse(file, "packed again in another order")
    make(change=lambda name, content: b"big" if name.endswith("byteorder") else content)
    refuse(file, "big-endian")
    make(change=lambda name, content: None if name.endswith("data.pkl") else content)
    refuse(file, "is no archive of torch.save")
    make(change=lambda name, content: content[:-4] if "data/1" in name else content)
    refuse(file, "is damaged")
    make()  # in order, but not aligned as torch expects: its offsets would be wrong
    refuse(file, "is damaged: b lies outside its storage")
    # Without the mark of torch >= 2.7 the offsets are those of the zip file, in any order.
    make(
        change=lambda name, content: None if "format_version" in name else content,
        order=lambda names: sorted(names, reverse=True),
    )
    values = {n: i.read().view("<f4").tolist() for n, i in read_pickled(file)[0].items()}
    assert values == {"a": [0] * 4, "b": [1] * 4}
    repack(file, lambda name, content: content + b"more" if "data/1" in name else content)
    refuse(file, "is damaged: b lies outside its storage")


def test_a_file_cut_short(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"a": torch.ones(100)}, file)
    tensors, _ = read_pickled(file)
    with file.open("r+b") as stream:
        stream.truncate(tensors["a"].offset + 8)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        tensors["a"].read()
    refuse(file, "is damaged")


def test_fuzz_is_refused_or_right(tmp_path):
    """Bytes flipped outside the weights: another error never comes up, nor do other bits."""
    buffer = io.BytesIO()
    expected = {"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(expected, buffer)
    whole = buffer.getvalue()
    file = tmp_path / "x.pt"
    file.write_bytes(whole)
    held = {
        place
        for info in read_pickled(file)[0].values()
        for place in range(info.offset, info.offset + info.size_bytes)
    }
    known = {raw(tensor) for tensor in expected.values()}
    rng = random.Random(0)
    places = [place for place in range(len(whole)) if place not in held]
    num_refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for place in rng.sample(places, rng.choice((1, 1, 4))):
            damaged[place] = rng.randrange(256)
        file.write_bytes(damaged[: rng.choice((len(whole), len(whole), rng.randrange(len(whole))))])
        try:
            found = read_pickled(file)[0].values()
        except CheckpointError:
            num_refused += 1
            continue
        assert all(any(info.read().tobytes() in bits for bits in known) for info in found)
    assert 100 < num_refused < 600
