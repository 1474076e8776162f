import itertools
import json
import os
import pickle
import random
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import planted
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.errors import CheckpointError
from rlsparse.tensor_file import TensorInfo, bits_dtype, read_header

EXOTIC = {
    "scalar": Tensor("fp32", (), np.array([7], "<u4")),
    "empty": Tensor("bf16", (0, 4), np.array([], "<u2")),
    "cube": Tensor("bf16", (2, 3, 4), np.arange(24, dtype="<u2")),
    "ids": Tensor("i64", (3,), np.array([1, 2**63, 5], "<u8")),
    "flags": Tensor("bool", (2,), np.array([0, 1], "u1")),
    "eight": Tensor("fp8_e4m3", (5,), np.array([0, 127, 255, 128, 1], "u1")),
}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of this header, given as JSON or as its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def vector(tmp_path):
    file = tmp_path / "v.safetensors"
    planted.write_file(file, {"pad": EXOTIC["eight"], "v": EXOTIC["cube"]})
    return read_header(file)[0]["v"]


@settings(max_examples=200)
@given(st.integers(0, 24), st.integers(0, 24), st.integers(1, 30))
def test_pieces_cover_the_range_in_one_buffer(tmp_path_factory, one, other, size):
    file = tmp_path_factory.getbasetemp() / "pieces.safetensors"
    if not file.exists():
        planted.write_file(file, {"pad": EXOTIC["eight"], "v": EXOTIC["cube"]})
    info = read_header(file)[0]["v"]
    start, stop = sorted((one, other))
    buffer = np.empty(size, "<u2")
    seen, lengths = [], []
    for piece in info.pieces(start, stop, buffer):
        assert np.shares_memory(piece, buffer[:1])
        seen += piece.tolist()
        lengths.append(piece.size)
    assert seen == list(range(start, stop))
    assert all(length == size for length in lengths[:-1])
    assert info.read(start, stop).tolist() == seen


def test_pieces_of_every_format_equal_the_file(tmp_path):
    file = tmp_path / "t.safetensors"
    planted.write_file(file, EXOTIC)
    for name, info in read_header(file)[0].items():
        buffer = np.empty(2, bits_dtype(info.dtype))
        pieces = [piece.tobytes() for piece in info.pieces(0, info.num_elements, buffer)]
        assert b"".join(pieces) == EXOTIC[name].bits.tobytes()


def test_pieces_refuse_wrong_ranges_and_buffers(vector):
    buffer = np.empty(4, "<u2")
    for start, stop in [(-1, 3), (3, 2), (0, 25)]:
        with pytest.raises(CheckpointError, match="24 elements"):
            vector.pieces(start, stop, buffer)
        with pytest.raises(CheckpointError, match="24 elements"):
            vector.read(start, stop)
    for wrong in (np.empty(4, "<u4"), np.empty(4, "<i2"), np.empty(0, "<u2")):
        with pytest.raises(CheckpointError, match=r"v needs a buffer of uint16, not .*\["):
            vector.pieces(0, 4, wrong)
    assert list(vector.pieces(3, 3, np.empty(0, "<u2"))) == []


def test_two_threads_read_one_tensor(tmp_path):
    bits = np.arange(2**16, dtype="<u2")
    file = tmp_path / "t.safetensors"
    planted.write_file(file, {"t": Tensor("bf16", (2**16,), bits)})
    info = pickle.loads(pickle.dumps(read_header(file)[0]["t"]))
    found: dict[int, bytes] = {}

    def read(size: int) -> None:
        buffer = np.empty(size, "<u2")
        found[size] = b"".join(piece.tobytes() for piece in info.pieces(0, 2**16, buffer))

    threads = [threading.Thread(target=read, args=(size,)) for size in (100, 333)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {100: bits.tobytes(), 333: bits.tobytes()}


def test_file_that_shrinks_between_pieces(vector):
    pieces = vector.pieces(0, 24, np.empty(4, "<u2"))
    assert next(pieces).tolist() == [0, 1, 2, 3]
    with vector.file.open("r+b") as stream:
        stream.truncate(vector.offset + 9)
    with pytest.raises(CheckpointError, match=r"v\.safetensors was truncated while it was read"):
        list(pieces)
    with pytest.raises(CheckpointError, match="truncated"):
        vector.read()
    vector.file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*v\.safetensors: No such file"):
        vector.read()


def test_every_truncation_is_noticed(tmp_path):
    file = tmp_path / "t.safetensors"
    planted.write_file(file, {"a": EXOTIC["cube"], "b": EXOTIC["scalar"]})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"t\.safetensors is .*(download|save) it again"):
            read_header(file)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


DAMAGE: dict[str, tuple[object, int, str]] = {
    "size and shape": ({"a": entry(shape=[2])}, 4, "8 bytes lies in 4"),
    "negative": ({"a": entry(shape=[-1], data_offsets=[4, 0])}, 4, "shape or offsets of tensor a"),
    "two negatives": ({"a": entry(shape=[-1, -1])}, 4, "shape or offsets"),
    "float": ({"a": entry(shape=[1.0])}, 4, "shape or offsets"),
    "boolean": ({"a": entry(shape=[True])}, 4, "shape or offsets"),
    "shape is text": ({"a": entry(shape="1")}, 4, "shape or offsets"),
    "huge": ({"a": entry(shape=[0, 2**70], data_offsets=[0, 0])}, 0, "shape or offsets"),
    "overflow": ({"a": entry(shape=[2**62, 2**62])}, 4, "bytes lies in 4"),
    "backwards": ({"a": entry(data_offsets=[4, 0])}, 4, "lies in -4"),
    "beyond": ({"a": entry(data_offsets=[400, 404])}, 4, "hole"),
    "three offsets": ({"a": entry(data_offsets=[0, 4, 8])}, 4, "too many values"),
    "4 bits": ({"a": entry(dtype="F4")}, 4, "number format 'F4'; known: F64, .*; save it in one"),
    "no format": ({"a": entry(dtype=None)}, 4, "number format None"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "KeyError 'shape'"),
    "no entry": ({"a": 7}, 4, "TypeError"),
    "a list": (["a"], 4, "not a JSON mapping"),
    "no JSON": (b"{", 4, "Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', 4, "can't decode byte 0xff"),
    "bomb": (b'{"a":' + b"[" * 200_000, 4, "nested too deep"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", 4, "4300"),
    "metadata list": ({"__metadata__": [1]}, 0, "AttributeError"),
    "metadata number": ({"__metadata__": {"a": 1}}, 0, "metadata are not all strings"),
    "metadata surrogate": (b'{"__metadata__":{"a":"\\ud800"}}', 0, "surrogates not allowed"),
    "metadata false": ({"__metadata__": False}, 0, "AttributeError"),
    "newline": ({"a\nb": entry()}, 4, r"called 'a\\nb'"),
    "surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "ud800"),
    "trailing": ({"a": entry()}, 9, "is damaged: 78 bytes, its tensors end at 73"),
    "overlap": (
        {"a": entry(), "b": entry(data_offsets=[2, 6])}, 6, "a and b overlap",
    ),
    "same place": ({"a": entry(), "b": entry()}, 4, "a and b overlap"),
    "hole": (
        {"a": entry(), "b": entry(data_offsets=[8, 12])}, 12, "a and b have a hole between them",
    ),
    "before": ({"a": entry(data_offsets=[4, 8])}, 8, "the header and a have a hole"),
    "empty in the middle": (
        {"a": entry(), "b": entry(shape=[0], data_offsets=[2, 2])}, 4, "overlap",
    ),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "a name is given twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("header", "num_bytes", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_in_one_line(tmp_path, header, num_bytes, message):
    file = tmp_path / "d.safetensors"
    file.write_bytes(file_bytes(header, bytes(num_bytes)))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    text = str(caught.value)
    assert text.startswith(str(file))
    assert "again" in text or "save it in one of these" in text
    assert "\n" not in text
    assert len(text) < 600


def test_header_length_and_pointers(tmp_path):
    file = tmp_path / "d.safetensors"
    for content in (b"", bytes(7), b"\xff" * 8, (10**8 + 1).to_bytes(8, "little"), b"PK\x03\x04aa"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            read_header(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(file)
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        read_header(tmp_path)


def test_header_longer_than_the_first_request(tmp_path):
    tensors = {f"layers.{n}.weight": Tensor("bf16", (1,), np.uint16([n])) for n in range(2000)}
    file = tmp_path / "many.safetensors"
    planted.write_file(file, tensors, {"format": "pt"})
    assert file.stat().st_size > 2 * 2**16
    found, notes = read_header(file)
    assert notes == {"format": "pt"}
    assert [found[name].read().tolist() for name in tensors] == [[n] for n in range(2000)]


NUMPY_NAMES = {
    "fp16": "<f2", "fp32": "<f4", "fp64": "<f8", "i64": "<i8", "u8": "u1", "bool": "?",
}  # fmt: skip
PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(NUMPY_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.dictionaries(PLAIN_TEXT, PLAIN_TEXT, max_size=3),
)
def test_reads_what_the_safetensors_library_writes(tmp_path_factory, shapes, metadata):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, shape).astype(NUMPY_NAMES[dtype])
        for name, (dtype, shape) in shapes.items()
    }
    file = tmp_path_factory.getbasetemp() / "library.safetensors"
    file.write_bytes(safetensors.numpy.save(arrays, metadata or None))
    found, notes = read_header(file)
    assert notes == metadata
    read = {n: (i.dtype, list(i.shape), i.read().tobytes()) for n, i in found.items()}
    assert read == {
        name: (dtype, shape, arrays[name].tobytes()) for name, (dtype, shape) in shapes.items()
    }


TAGS_OF_THE_LIBRARY = {
    "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8_e4m3",
    "F8_E5M2": "fp8_e5m2", "F8_E8M0": "fp8_e8m0", "F8_E4M3FNUZ": "fp8_e4m3fnuz",
    "F8_E5M2FNUZ": "fp8_e5m2fnuz", "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8",
    "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "C64": "c64", "BOOL": "bool",
}  # fmt: skip

NUM_FUZZ_CASES = 20_000
STATED_REASONS = re.compile(
    r"given twice|control characters|number format '(F4|F6_E2M3|F6_E3M2)'|shape or offsets"
)
"""Why a file that the library reads may be refused; the last for sizes of 2^63 and more."""

JUNK = [
    -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, True, None, 1.0, 1e400, "", "F4", "F32", "U8", "x",
    "a\x00b", "\ud800", [], [0], [0, 0], [1, 2, 3], [[]], {}, {"a": 1}, [2**62, 4], [0, 2**63],
]  # fmt: skip


def bases() -> list[bytes]:
    """Sound files: nothing in it, one tensor, every format, metadata."""
    rng = random.Random(0)
    header: dict[str, object] = {"__metadata__": {"format": "pt", "é": "ü"}}
    position = 0
    for number, tag in enumerate(TAGS_OF_THE_LIBRARY):
        shape = [[], [2], [0, 3], [2, 1, 2]][number % 4]
        length = int(np.prod(shape)) * bits_dtype(TAGS_OF_THE_LIBRARY[tag]).itemsize
        header[f"layers.{number}"] = {
            "dtype": tag, "shape": shape, "data_offsets": [position, position + length],
        }  # fmt: skip
        position += length
    one = file_bytes({"w": entry(shape=[2, 2], data_offsets=[0, 16])}, rng.randbytes(16))
    return [file_bytes({}), one, file_bytes(header, rng.randbytes(position))]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to three small damages, to bytes or to the parsed header."""
    length = int.from_bytes(content[:8], "little")
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.randrange(8)
        if how == 0:
            flipped = bytearray(content)
            place = rng.randrange(len(content)) if content else 0
            flipped[place : place + 1] = bytes([rng.randrange(256)])
            content = bytes(flipped)
        elif how == 1:
            content = content[: rng.randrange(len(content) + 1)]
        elif how == 2:
            content += bytes(rng.randrange(1, 9))
        elif how == 3:
            number = max(0, length + rng.choice((-8, -1, 1, 8, 2**20, 2**40)))
            content = (number % 2**64).to_bytes(8, "little") + content[8:]
        elif how == 4:
            place = rng.randrange(8, len(content) + 1) if len(content) > 8 else 0
            piece = content[place : place + rng.randrange(1, 30)]
            content = content[:place] + piece + content[place:]
        else:
            content = mutate_header(rng, content)
    return content


def mutate_header(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return content
    if not isinstance(header, dict) or not header:
        return file_bytes({rng.choice(["a", "__metadata__"]): rng.choice(JUNK)}, content[-4:])
    name = rng.choice(list(header))
    target = header[name]
    how = rng.randrange(7)
    if how == 0:
        header[name] = rng.choice(JUNK)
    elif how in (5, 6):  # sound: another order, format of the same width, white space
        header = dict(rng.sample(list(header.items()), len(header)))
        if isinstance(target, dict) and target.get("dtype") in ("F32", "BF16", "U8"):
            target["dtype"] = {"F32": "I32", "BF16": "F16", "U8": "F8_E5M2"}[target["dtype"]]
        return file_bytes(
            json.dumps(header, indent=rng.choice((None, 1))).encode() + b"  ", content[8 + length :]
        )
    elif how == 1:
        header[rng.choice(["a\nb", "\ud800", "", "z"])] = header.pop(name)
    elif isinstance(target, dict) and target:
        key = rng.choice(list(target))
        if how == 2:
            del target[key]
        elif isinstance(target[key], list) and target[key] and how == 3:
            numbers = target[key]
            numbers[rng.randrange(len(numbers))] = rng.choice(JUNK)
        else:
            target[key] = rng.choice(JUNK)
    text = json.dumps(header).encode()
    if rng.random() < 0.1 and len(text) > 2:  # the same name again
        text = text[:-1] + b", " + text[1:]
    return file_bytes(text, content[8 + length :])


def of_library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        found = safetensors.deserialize(content)
    except (safetensors.SafetensorError, ValueError, OverflowError):
        return None
    return {
        name: (TAGS_OF_THE_LIBRARY.get(e["dtype"], ""), list(e["shape"]), bytes(e["data"]))
        for name, e in found
    }


def of_reader(file: Path) -> dict[str, tuple[str, list[int], bytes]] | str:
    """The same inventory by the code under test, or the reason of its refusal."""
    try:
        found = read_header(file)[0]
    except CheckpointError as error:
        return str(error)
    return {n: (i.dtype, list(i.shape), i.read().tobytes()) for n, i in found.items()}


def test_fuzz_agrees_with_the_safetensors_library(tmp_path):
    file = Path("/dev/shm" if Path("/dev/shm").is_dir() else tmp_path, f"fuzz-{os.getpid()}")
    rng = random.Random(1)
    outcomes = Counter()
    try:
        for number, base in zip(range(NUM_FUZZ_CASES), itertools.cycle(bases()), strict=False):
            content = base if number < 3 else mutate(rng, base)
            file.write_bytes(content)
            theirs, ours = of_library(content), of_reader(file)
            outcomes[type(ours)] += 1
            if isinstance(ours, dict):
                assert ours == theirs, content
            else:
                assert theirs is None or STATED_REASONS.search(ours), (content, ours)
                assert str(file) in ours
                assert "\n" not in ours
    finally:
        file.unlink(missing_ok=True)
    assert min(outcomes[dict], outcomes[str]) > NUM_FUZZ_CASES / 20


def test_info_pickles_without_a_handle(vector):
    again = pickle.loads(pickle.dumps(vector))
    assert again == vector
    assert isinstance(again, TensorInfo)
    assert (again.num_elements, again.size_bytes) == (24, 48)
