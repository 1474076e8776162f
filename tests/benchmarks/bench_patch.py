"""Patches against the way that is in use, and against copying the whole checkpoint.

    .venv/bin/python tests/benchmarks/bench_patch.py [--base FOLDER --after FOLDER] [--json FILE]

One bf16 tensor of normal weights, of which a share moved by 1 to 3 codes either way (uniformly, so
that a value has log2 6 bits), or a real pair. All on one thread, files in memory where the system
has /dev/shm, by turns in each round:

- rlsparse: ``write_patch`` from arrays, and ``after_pieces``, which reads the base, applies the
  patch and checks the result, without writing it;
- deltas: flat index differences and the bits after, each compressed by zstd, with numpy, from
  arrays to arrays, without checksums: the least that the way in use takes;
- coo: that way as products have it (written after the description of grail's sparse codec 3.1, in
  arXiv 2602.03839 and its code): sorted rows and columns, differences within each row, the bits
  after, all under zstd; decoded row by row; likewise;
- copy: the whole checkpoint, read and written by ``shutil``; zstd: the whole checkpoint compressed.

Prints sizes as a share of the whole checkpoint, bytes per changed weight, GB of the checkpoint per
second, and ratios of times within a round (median, range).
"""

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlsparse.checkpoint import Checkpoint
from rlsparse.patch import Patch, TensorPair, write_patch
from rlsparse.patch.apply import after_pieces
from rlsparse.tensor_file import SINGLE_FILE, Bits, save_checkpoint

ZSTD = pa.Codec("zstd", 1)
ROW = 1024
"""Length of a row of a vector, for coo."""
Tensors = dict[str, tuple[tuple[int, ...], Bits]]


def seconds(work: Callable[[], object]) -> float:
    """Time of the clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def drawn(size: int, density: float) -> tuple[Tensors, Tensors]:
    """Normal weights, and moves of 1 to 3 codes of a share of them."""
    draw = np.random.default_rng(0)
    before = ((draw.standard_normal(size, np.float32) * 0.02).view(np.uint32) >> 16).astype(
        np.uint16
    )
    moves = draw.integers(1, 4, size) * draw.choice([-1, 1], size)
    changed = draw.random(size, np.float32) < density
    after = np.where(changed, before.astype(np.int32) + moves, before).astype(np.uint16)
    return {"w": ((size,), before)}, {"w": ((size,), after)}


def stored(folder: Path) -> Tensors:
    """A checkpoint in bf16."""
    checkpoint = Checkpoint.open(folder)
    return {info.name: (info.shape, info.read()) for info in checkpoint.counted}


def encode_deltas(before: Tensors, after: Tensors) -> list[tuple[str, Any, int, Any]]:
    """What the way in use makes of two checkpoints."""
    found = []
    for name, (_, bits) in after.items():
        index = np.flatnonzero(bits != before[name][1])
        gaps = np.diff(index, prepend=0)
        narrow = gaps.astype(np.uint16 if gaps.max(initial=0) < 2**16 else np.uint32)
        found.append(
            (name, ZSTD.compress(narrow.data), index.size, ZSTD.compress(bits[index].data))
        )
    return found


def apply_deltas(before: Tensors, encoded: list[tuple[str, Any, int, Any]]) -> None:
    """The way back."""
    for name, gaps, count, values in encoded:
        bits = before[name][1].copy()
        for width in (np.uint16, np.uint32):
            try:
                narrow = np.frombuffer(ZSTD.decompress(gaps, count * width().itemsize), width)
                break
            except OSError:
                continue
        index = np.cumsum(narrow, dtype=np.int64)
        bits[index] = np.frombuffer(ZSTD.decompress(values, 2 * count), np.uint16)


def encode_coo(before: Tensors, after: Tensors) -> list[tuple[str, Any, list[Any], int]]:
    """What grail's codec makes of two checkpoints."""
    found = []
    for name, (shape, bits) in after.items():
        width = shape[-1] if len(shape) > 1 else ROW
        rows, columns = np.divmod(np.flatnonzero(bits != before[name][1]), width)
        order = np.lexsort((columns, rows))
        rows, columns = rows[order], columns[order]
        row_steps, steps = np.diff(rows, prepend=0), np.diff(columns, prepend=0)
        steps[row_steps > 0] = columns[row_steps > 0]  # absolute where a row begins
        parts = [_narrow(row_steps), _narrow(steps), bits[rows * width + columns]]
        blob = b"".join(part.tobytes() for part in parts)
        kinds = [(part.dtype, part.size) for part in parts]
        found.append((name, ZSTD.compress(blob), [*kinds, len(blob)], width))
    return found


def _narrow(values: Any) -> Any:
    top = values.max(initial=0)
    return values.astype(np.uint8 if top < 2**8 else np.uint16 if top < 2**16 else np.int32)


def apply_coo(before: Tensors, encoded: list[tuple[str, Any, list[Any], int]]) -> None:
    """The way back, a row at a time."""
    for name, blob, (*kinds, size), width in encoded:
        raw, at, parts = ZSTD.decompress(blob, size), 0, []
        for dtype, count in kinds:
            parts.append(np.frombuffer(raw, dtype, count, at))
            at += count * dtype.itemsize
        row_steps, steps, values = parts
        rows, columns = np.cumsum(row_steps, dtype=np.int64), steps.astype(np.int64)
        starts = [0, *np.flatnonzero(row_steps[1:]) + 1, rows.size]
        for low, high in itertools.pairwise(starts):
            columns[low:high] = np.cumsum(columns[low:high])
        bits = before[name][1].copy()
        bits[rows * width + columns] = values


def drain(pieces: Iterator[Bits]) -> None:
    """Run to the end."""
    for _ in pieces:
        pass


def measure(folder: Path, before: Tensors, after: Tensors, rounds: int) -> dict[str, Any]:
    """One row."""
    for name, tensors in (("base", before), ("after", after)):
        save_checkpoint(folder / name, {n: ("bf16", *t) for n, t in tensors.items()})
    base = Checkpoint.open(folder / "base")
    pairs = [TensorPair(n, "bf16", s, before[n][1], bits) for n, (s, bits) in after.items()]
    whole, path = folder / "after" / SINGLE_FILE, folder / "p.safetensors"
    times: dict[str, list[float]] = {}

    def take(name: str, work: Callable[[], object]) -> None:
        times.setdefault(name, []).append(seconds(work))

    encoded, encoded_coo = encode_deltas(before, after), encode_coo(before, after)
    for _ in range(rounds):
        take("encode", lambda: write_patch(path, pairs, base_fingerprint="f"))
        patch = Patch.open(path)
        take("apply", lambda: [drain(after_pieces(base, patch, n)) for n in before])  # noqa: B023
        take("encode_deltas", lambda: encode_deltas(before, after))
        take("apply_deltas", lambda: apply_deltas(before, encoded))
        take("encode_coo", lambda: encode_coo(before, after))
        take("apply_coo", lambda: apply_coo(before, encoded_coo))
        take("copy", lambda: shutil.copyfile(whole, folder / "copy"))
    size = sum(bits.nbytes for _, bits in after.values())
    zstd = sum(ZSTD.compress(bits.data).size for _, bits in after.values())
    deltas = sum(gaps.size + values.size for _, gaps, _, values in encoded)
    patch = Patch.open(path)
    return {
        "density": patch.num_changed / (size / 2),
        "share": patch.size_bytes / size,
        "share_deltas": deltas / size,
        "share_coo": sum(blob.size for _, blob, *_ in encoded_coo) / size,
        "share_zstd": zstd / size,
        "bytes_per_change": patch.size_bytes / patch.num_changed,
        "encode_gb_s": size / 1e9 / statistics.median(times["encode"]),
        "apply_gb_s": size / 1e9 / statistics.median(times["apply"]),
        "encode_speedup": ratios(times["encode_deltas"], times["encode"]),
        "apply_speedup": ratios(times["apply_deltas"], times["apply"]),
        "encode_speedup_coo": ratios(times["encode_coo"], times["encode"]),
        "apply_speedup_coo": ratios(times["apply_coo"], times["apply"]),
        "apply_of_copy": ratios(times["copy"], times["apply"]),
    }


def ratios(others: list[float], ours: list[float]) -> list[float]:
    """How much faster, by round: median, least, most."""
    found = [a / b for a, b in zip(others, ours, strict=True)]
    return [statistics.median(found), min(found), max(found)]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 1, 5, 10, 30])
    parser.add_argument("--elements", type=float, default=2**25)
    parser.add_argument("--base", type=Path, help="a real pair, in bf16, instead")
    parser.add_argument("--after", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    memory = Path("/dev/shm")
    rows = []
    print("sizes in % of all weights; times: how often as fast, median (range)")
    for percent in [math.nan] if options.base else options.densities:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            sides = (
                (stored(options.base), stored(options.after)) if options.base
                else drawn(int(options.elements), percent / 100)
            )  # fmt: skip
            row = measure(Path(folder), *sides, options.rounds)
        rows.append(row)
        shown = ", ".join(
            f"{name} {100 * row[key]:.3f}"
            for name, key in (
                ("patch", "share"), ("deltas", "share_deltas"), ("coo", "share_coo"),
                ("zstd", "share_zstd"),
            )
        )  # fmt: skip
        print(
            f"{100 * row['density']:.2f} % changed: {shown}; {row['bytes_per_change']:.2f} B/change"
        )
        for work in ("encode", "apply"):
            times = [
                f"{name} {row[key][0]:.2f} ({row[key][1]:.2f} .. {row[key][2]:.2f})"
                for name, key in (
                    ("deltas", f"{work}_speedup"), ("coo", f"{work}_speedup_coo"),
                    ("copy", f"{work}_of_copy"),
                )
                if key in row
            ]  # fmt: skip
            print(f"    {work} {row[f'{work}_gb_s']:.2f} GB/s: {', '.join(times)}")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
