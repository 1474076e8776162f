"""The diff kernel on data in memory, as a fraction of the speed of merely reading both arrays.

Run with ``make bench``. Pairs of 64 M weights in bf16 (or ``--dtype``) at several densities of
change; reading is one pass of xor over both arrays, one thread. Each way takes its turn in each
round, ratios are of medians; two threads are pinned to two cores.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from numba import njit

from rlsparse.kernels import Scan, new_workspace
from rlsparse.tensor_file import Bits, bits_dtype

NUM_WEIGHTS = 2**26
PIECE = 2**18
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
DTYPES["fp8_e4m3"] = ml_dtypes.float8_e4m3fn


@njit(nogil=True)
def read(before, after):
    """Touch everything once; the result keeps the compiler honest."""
    found = np.uint64(0)
    for i in range(before.size):
        found |= before[i] ^ after[i]
    return found


def scan(before: Bits, after: Bits, dtype: str) -> None:
    """All statistics, one thread, in pieces as the streaming diff has them."""
    counts, workspace = Scan(before.size, dtype), new_workspace()
    for start in range(0, before.size, PIECE):
        counts.add(before[start : start + PIECE], after[start : start + PIECE], workspace)


def mask_only(before: Bits, after: Bits) -> None:
    """Packed mask and count, as for integers."""
    Scan(before.size, f"u{8 * before.itemsize}").add(before, after)


def in_two(before: Bits, after: Bits, dtype: str, pool: ThreadPoolExecutor) -> None:
    """``scan`` with a half for each of two threads."""
    half = before.size // 2
    parts = (slice(0, half), slice(half, None))
    list(pool.map(lambda part: scan(before[part], after[part], dtype), parts))


def pinned_pool() -> ThreadPoolExecutor:
    """Two threads on two cores."""
    cores, lock = sorted(os.sched_getaffinity(0)), threading.Lock()
    free = list(cores[:2])

    def pin() -> None:
        with lock:
            os.sched_setaffinity(threading.get_native_id(), {free.pop()})

    return ThreadPoolExecutor(2, initializer=pin)


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print a line per density."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    item, draw = bits_dtype(args.dtype), np.random.default_rng(0)
    block = 2**22
    weights = (draw.standard_normal(block) * 0.02).astype(np.float32).astype(DTYPES[args.dtype])
    before = np.tile(weights.view(item), NUM_WEIGHTS // block)
    with pinned_pool() as pool:
        for density in (0.0, 0.02, 0.1, 0.3, 1.0):
            moves = (draw.random(block) < density) * draw.integers(1, 4, block)
            after = before + np.tile(moves.astype(item), NUM_WEIGHTS // block)
            ways: dict[str, Callable[[], object]] = {
                "reading": lambda a=after: read(before.view(np.uint64), a.view(np.uint64)),
                "mask and count": lambda a=after: mask_only(before, a),
                "all": lambda a=after: scan(before, a, args.dtype),
                "all, two threads": lambda a=after: in_two(before, a, args.dtype, pool),
            }
            found: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(args.rounds + 1):
                for name, work in ways.items():
                    seconds = timed(work)
                    if turn:
                        found[name].append(seconds)
            medians = {name: statistics.median(times) for name, times in found.items()}
            limit = medians.pop("reading")
            ratios = ", ".join(f"{name} {limit / time_:.2f}" for name, time_ in medians.items())
            speed = 2 * before.nbytes / limit / 1e9
            print(f"{args.dtype} {density:4.0%} changed: reading {speed:.0f} GB/s; {ratios}")


if __name__ == "__main__":
    main()
