"""Patches against the way that is in use, and against copying the whole checkpoint.

    .venv/bin/python tests/benchmarks/bench_patch.py [--base FOLDER --after FOLDER] [--json FILE]

One bf16 tensor of normal weights, of which a share moved by 1 to 3 codes either way (uniformly, so
that a value has log2 6 bits), or a real pair. All on one thread, files in memory where the system
has /dev/shm, by turns in each round:

- rlsparse: ``write_patch`` from arrays, and ``after_pieces``, which reads the base, applies the
  patch and checks the result, without writing it;
- deltas: index differences and the bits after, each compressed by zstd, with numpy (the coding of
  SparrowRL and of several products), from arrays to arrays;
- copy: the whole checkpoint, read and written by ``shutil``; zstd: the whole checkpoint compressed.

Prints sizes as a share of the whole checkpoint, bytes per changed weight, GB of the checkpoint per
second, and ratios of times within a round (median, range).
"""

import argparse
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

    encoded = encode_deltas(before, after)
    for _ in range(rounds):
        take("encode", lambda: write_patch(path, pairs, base_fingerprint="f"))
        patch = Patch.open(path)
        take("apply", lambda: [drain(after_pieces(base, patch, n)) for n in before])  # noqa: B023
        take("encode_deltas", lambda: encode_deltas(before, after))
        take("apply_deltas", lambda: apply_deltas(before, encoded))
        take("copy", lambda: shutil.copyfile(whole, folder / "copy"))
    size = sum(bits.nbytes for _, bits in after.values())
    zstd = sum(ZSTD.compress(bits.data).size for _, bits in after.values())
    deltas = sum(gaps.size + values.size for _, gaps, _, values in encoded)
    patch = Patch.open(path)
    return {
        "density": patch.num_changed / (size / 2),
        "share": patch.size_bytes / size,
        "share_deltas": deltas / size,
        "share_zstd": zstd / size,
        "bytes_per_change": patch.size_bytes / patch.num_changed,
        "encode_gb_s": size / 1e9 / statistics.median(times["encode"]),
        "apply_gb_s": size / 1e9 / statistics.median(times["apply"]),
        "encode_speedup": ratios(times["encode_deltas"], times["encode"]),
        "apply_speedup": ratios(times["apply_deltas"], times["apply"]),
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
    print("density   whole %  deltas %  zstd %  B/change   enc, apply GB/s   ", end="")
    print("x deltas: encode             apply                  x copy: apply")
    for percent in [math.nan] if options.base else options.densities:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            sides = (
                (stored(options.base), stored(options.after)) if options.base
                else drawn(int(options.elements), percent / 100)
            )  # fmt: skip
            row = measure(Path(folder), *sides, options.rounds)
        rows.append(row)
        shown = "   ".join(
            f"{row[k][0]:5.1f} ({row[k][1]:.1f} .. {row[k][2]:.1f})"
            for k in ("encode_speedup", "apply_speedup")
        )
        copy = "{:.2f} ({:.2f} .. {:.2f})".format(*row["apply_of_copy"])
        print(
            f"{100 * row['density']:6.2f}% {100 * row['share']:9.3f} "
            f"{100 * row['share_deltas']:9.3f} {100 * row['share_zstd']:7.1f} "
            f"{row['bytes_per_change']:9.2f} "
            f"{row['encode_gb_s']:8.2f} {row['apply_gb_s']:8.2f}      {shown}   {copy}"
        )
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
