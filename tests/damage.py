"""Damage to patches and anchors, with checksums made to agree with it, without the product."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from hypothesis import strategies as st

from rlsparse.patch import METADATA_KEY
from rlsparse.patch.file import CHECKSUM_KEY

NUMBERS = st.one_of(
    st.integers(-2, 130),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**80]),
)
JSON = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.floats(), st.text(max_size=4),
    st.just([]), st.just({}), st.lists(NUMBERS, max_size=3),
)  # fmt: skip


# --- files, taken apart and put together without the product -----------------------------------


@dataclass
class Parts:
    """A safetensors file: its metadata, and its arrays as (tag, shape, bytes)."""

    notes: dict[str, str]
    arrays: dict[str, tuple[str, list[int], bytearray]] = field(default_factory=dict)

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        parts = cls(header.pop("__metadata__"))
        for name, one in header.items():
            stored = bytearray(data[slice(*one["data_offsets"])])
            parts.arrays[name] = one["dtype"], one["shape"], stored
        return parts

    def content(self) -> bytes:
        header, data = {"__metadata__": self.notes}, b""
        for name, (tag, shape, stored) in self.arrays.items():
            span = [len(data), len(data) + len(stored)]
            header[name] = {"dtype": tag, "shape": shape, "data_offsets": span}
            data += stored
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    def numbers(self, name: str) -> np.ndarray:
        """An array of uint64, to be changed."""
        _, shape, stored = self.arrays[name]
        return np.frombuffer(stored, "<u8").reshape(shape)


def seal_blocks(parts: Parts, name: str) -> None:
    """Give the blocks of a tensor the checksums of their payloads."""
    at, data = 0, parts.arrays[f"{name}.data"][2]
    for entry, sizes in zip(
        parts.numbers(f"{name}.blocks"), parts.numbers(f"{name}.sizes"), strict=True
    ):
        stop = at + sum(sizes.tolist())
        entry[4] = xxhash.xxh3_64_intdigest(bytes(data[at:stop]))
        at = stop


def seal_tables(parts: Parts) -> None:
    """Give the header the checksums of the tables, and its own."""
    said = json.loads(parts.notes[METADATA_KEY])
    for name, one in said["tensors"].items():
        if one["num_changed"]:
            tables = [bytes(parts.arrays[f"{name}.{key}"][2]) for key in ("blocks", "sizes")]
            one["xxh3_table"] = xxhash.xxh3_128_hexdigest(b"".join(tables))
    seal(parts, METADATA_KEY, json.dumps(said))


def seal(parts: Parts, key: str, text: str) -> None:
    """Put a text into the metadata, with the checksum that its reader looks for."""
    parts.notes[key] = text
    if key == METADATA_KEY:
        parts.notes[CHECKSUM_KEY] = xxhash.xxh3_128_hexdigest(text.encode())
        return
    others = {k: v for k, v in parts.notes.items() if k != "rlsparse_anchor_checksum"}
    checked = json.dumps(others, sort_keys=True).encode()
    parts.notes["rlsparse_anchor_checksum"] = xxhash.xxh3_128_hexdigest(checked)


# --- damage --------------------------------------------------------------------------------------


def damaged_bytes(data: Any, content: bytes) -> bytes:
    """Some were overwritten, cut, spliced, doubled or deleted, anywhere."""
    for _ in range(data.draw(st.integers(1, 3))):
        place = st.integers(0, len(content))
        start, stop = sorted((data.draw(place), data.draw(place)))
        own, other = content[start : start + 16], content[stop : stop + 16]
        instead = {
            "write": data.draw(st.binary(min_size=len(own), max_size=len(own))),
            "flip": bytes(byte ^ 1 << stop % 8 for byte in own[:1]) + own[1:],
            "splice": other,
            "double": own + own,
            "delete": b"",
        }[data.draw(st.sampled_from(["write", "flip", "splice", "double", "delete"]))]
        content = content[:start] + instead + content[start + 16 :]
        if data.draw(st.integers(0, 7)) == 0:
            content = content[:start] + content[stop:]
    return content


def damaged_json(data: Any, text: str) -> str:
    """One place of it has another value, another name, or is gone; or it is another text."""
    content = json.loads(text)
    kind = data.draw(st.sampled_from(["value", "value", "value", "name", "gone", "text", "deep"]))
    if kind == "deep":
        return "[" * 100_000
    if kind == "text":
        return damaged_bytes(data, text.encode()).decode(errors="replace")
    *path, last = data.draw(st.sampled_from([*paths(content)]))
    inside = content
    for key in path:
        inside = inside[key]
    if kind == "value":
        inside[last] = data.draw(JSON)
        return json.dumps(content)
    value = inside.pop(last)
    if kind == "name" and isinstance(inside, dict):
        inside[data.draw(st.sampled_from(["a", "b", "part", "more"]))] = value
    return json.dumps(content)


def paths(value: Any) -> Iterator[list[Any]]:
    """Where something is in a JSON value."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield [key]
        if isinstance(one, dict | list):
            yield from ([key, *more] for more in paths(one))


def damaged_patch(data: Any, content: bytes) -> bytes:
    """A patch damaged anywhere, or in one layer with the checksums of the others made to agree."""
    kind = data.draw(st.sampled_from(["bytes", "header", "table", "payload"]))
    if kind == "bytes":
        return damaged_bytes(data, content)
    parts = Parts.of(content)
    if kind == "header":
        seal(parts, METADATA_KEY, damaged_json(data, parts.notes[METADATA_KEY]))
        return parts.content()
    name = data.draw(st.sampled_from(["a", "b", "c"]))
    if kind == "payload":
        stored = parts.arrays[f"{name}.data"][2]
        for _ in range(data.draw(st.integers(1, 3))):
            stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
        seal_blocks(parts, name)
    for _ in range(data.draw(st.integers(1, 2)) if kind == "table" else 0):
        array = parts.numbers(f"{name}.{data.draw(st.sampled_from(['blocks', 'sizes']))}")
        place = data.draw(st.integers(0, array.size - 1))
        array.flat[place] = data.draw(NUMBERS.filter(lambda n: 0 <= n < 2**64))
    if kind == "table" and data.draw(st.booleans()):
        move(data, parts, name)
    seal_tables(parts)
    return parts.content()


def move(data: Any, parts: Parts, name: str) -> None:
    """Add to one number of a table what is taken from another of its column."""
    key, column = data.draw(st.sampled_from([("blocks", 1), ("blocks", 0), ("sizes", 0)]))
    array, amount = parts.numbers(f"{name}.{key}"), data.draw(st.integers(1, 5))
    for row, number in ((0, amount), (-1, -amount)):
        array[row, column] = (int(array[row, column]) + number) % 2**64


def damaged_anchor(data: Any, content: bytes) -> bytes:
    """An anchor damaged anywhere, or in what it says of itself with a checksum of that."""
    if data.draw(st.booleans()):
        return damaged_bytes(data, content)
    parts = Parts.of(content)
    seal(parts, "rlsparse_anchor", damaged_json(data, parts.notes["rlsparse_anchor"]))
    return parts.content()
