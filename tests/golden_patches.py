"""The weights of the golden patches: from closed formulas, so that no generator can drift."""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from planted import unsigned

from rlsparse.patch import CODECS, Patch, new_patch
from rlsparse.patch.blocks import Compression
from rlsparse.patch.values import CODINGS, Coding

FOLDER = Path(__file__).parent / "golden"
FINGERPRINT = "0123456789abcdef" * 4
NOTES = {"step": "10", "of": "gölden"}

SIZE = 203
PART = 3, 103
_PIECE = 64
_BLOCK_CHANGES = 30

# Of each width: +-0, the least and greatest subnormals, infinities, NaNs with their payloads.
SPECIAL = {
    "u8": [0, 1, 127, 128, 129, 254, 255],
    "bf16": [0, 0x8000, 1, 0x8001, 0x7F, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
    "fp32": [
        0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
        0x7F800001, 0xFFFFFFFF,
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A tensor of a golden patch: bits before and after of ``part``, or of all."""

    dtype: str
    codec: str | None
    before: np.ndarray
    after: np.ndarray
    part: tuple[int, int] | None = None


def known() -> dict[str, Known]:
    """Every codec with every width, what did not change, and a part of a tensor."""
    tensors = {
        f"{codec}.{dtype}": Known(dtype, codec, *_sides(dtype))
        for codec in CODECS
        for dtype in SPECIAL
    }
    before, after = _sides("bf16")
    tensors["same"] = Known("bf16", None, before, before)
    tensors["part"] = Known("bf16", None, before[slice(*PART)], after[slice(*PART)], PART)
    return tensors


def _sides(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Every third weight changes, most by a step or two; special codes come first, as both."""
    width = 8 * unsigned(dtype).itemsize
    before = [(2654435761 * (i + 1) >> 5) % 2**width for i in range(SIZE)]
    after = [(bits + (i % 2 or -2)) % 2**width if i % 3 == 0 else bits
             for i, bits in enumerate(before)]  # fmt: skip
    special = SPECIAL[dtype]
    for i, bits in enumerate(special):
        before[i], after[i] = bits, special[(i + 1) % len(special)]
        before[SIZE - 1 - i], after[SIZE - 1 - i] = bits, special[0]
    return np.array(before, unsigned(dtype)), np.array(after, unsigned(dtype))


def golden_file(coding: Coding, compression: Compression) -> Path:
    """Where a golden patch lies."""
    return FOLDER / f"{coding}-{compression}.patch.safetensors"


def write_golden(path: Path, coding: Coding, compression: Compression) -> Patch:
    """Write the known weights, in blocks of few changes."""
    with (
        patch("rlsparse.patch.write.BLOCK_CHANGES", _BLOCK_CHANGES),
        new_patch(
            path, base_fingerprint=FINGERPRINT, metadata=NOTES, coding=coding,
            compression=compression,
        ) as builder,
    ):  # fmt: skip
        for name, one in known().items():
            builder.codec = one.codec
            tensor = builder.tensor(name, one.dtype, (SIZE,), one.part)
            for start in range(0, one.before.size, _PIECE):
                stretch = slice(start, start + _PIECE)
                tensor.compare(one.before[stretch], one.after[stretch])
            tensor.close()
    return Patch.open(path)


WAYS = [(coding, compression) for coding in CODINGS for compression in ("none", "zstd")]
