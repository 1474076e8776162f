"""Damage to patches and anchors, with checksums made to agree with it, without the product."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow
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

    def index(self) -> dict[str, Any]:
        """What the index of a patch says, to be changed and given to ``seal_index``."""
        stored = bytes(self.arrays["index"][2])
        said = json.loads(self.notes[METADATA_KEY])["index"]["size_bytes"]
        text = stored if len(stored) == said else ZSTD.decompress(stored, said, asbytes=True)
        return json.loads(text)


ZSTD = pyarrow.Codec("zstd")


def seal_blocks(parts: Parts, index: dict[str, Any]) -> None:
    """Give all blocks the checksums of their payloads."""
    at, data = 0, bytes(parts.arrays["data"][2])
    for tensor in index["tensors"]:
        for block in tensor["blocks"]:
            stop = at + sum(block[-1])
            block[4] = xxhash.xxh3_64_intdigest(data[at:stop])
            at = stop


def seal_index(parts: Parts, text: str) -> None:
    """Put an index into a patch, compressed, and its checksum and its size into the header."""
    raw = text.encode()
    stored = bytearray(ZSTD.compress(raw, asbytes=True))
    stored = stored if len(stored) < len(raw) else bytearray(raw)
    parts.arrays["index"] = "U8", [len(stored)], stored
    said = json.loads(parts.notes[METADATA_KEY])
    said["index"] = {"size_bytes": len(raw), "xxh3": xxhash.xxh3_128_hexdigest(bytes(stored))}
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
    kind = data.draw(st.sampled_from(["bytes", "header", "index", "blocks", "payload"]))
    if kind == "bytes":
        return damaged_bytes(data, content)
    parts = Parts.of(content)
    if kind == "header":
        seal(parts, METADATA_KEY, damaged_json(data, parts.notes[METADATA_KEY]))
        return parts.content()
    index = parts.index()
    if kind == "index":
        seal_index(parts, damaged_json(data, json.dumps(index)))
        return parts.content()
    if kind == "payload":
        stored = parts.arrays["data"][2]
        for _ in range(data.draw(st.integers(1, 3))):
            stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
        seal_blocks(parts, index)
    else:
        tensor = data.draw(st.sampled_from([one for one in index["tensors"] if one["blocks"]]))
        for _ in range(data.draw(st.integers(1, 2))):
            block = data.draw(st.sampled_from(tensor["blocks"]))
            row = data.draw(st.sampled_from([block, block[-1]]))
            places = [place for place, number in enumerate(row) if isinstance(number, int)]
            row[data.draw(st.sampled_from(places))] = data.draw(NUMBERS)
        if data.draw(st.booleans()):
            move(data, tensor["blocks"])
    seal_index(parts, json.dumps(index))
    return parts.content()


def move(data: Any, blocks: list[Any]) -> None:
    """Add to one number of a tensor's first block what is taken from another of its last."""
    amount, column = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0, 1, "sizes"]))
    for block, number in ((blocks[0], amount), (blocks[-1], -amount)):
        row, place = (block[-1], 0) if column == "sizes" else (block, column)
        row[place] += number


def damaged_anchor(data: Any, content: bytes) -> bytes:
    """An anchor damaged anywhere, or in what it says of itself with a checksum of that."""
    if data.draw(st.booleans()):
        return damaged_bytes(data, content)
    parts = Parts.of(content)
    seal(parts, "rlsparse_anchor", damaged_json(data, parts.notes["rlsparse_anchor"]))
    return parts.content()
