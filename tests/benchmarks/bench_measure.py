"""How fast one pass of the diff kernel is, as a ratio to plain numpy in the same process.

Run with ``make bench``. Both sides count bitwise changes, changes beyond 1e-5 and pack the mask of
the same 16 M bf16 weights, of which a tenth moved; the kernel also makes all other statistics.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from rlsparse.kernels import measure

NUM_WEIGHTS = 2**24
CHUNK = 2**22
ROUNDS = 7


def numpy_counts(before: np.ndarray, after: np.ndarray) -> tuple[int, int, bytes]:
    """Three statistics the plain way."""
    a = (before.astype(np.uint32) << 16).view(np.float32)
    b = (after.astype(np.uint32) << 16).view(np.float32)
    changed = before != after
    mask = np.packbits(changed, bitorder="little").tobytes()
    return int(changed.sum()), int((np.abs(b - a) > 1e-5).sum()), mask


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Interleave the two and print the ratio of their medians."""
    draw = np.random.default_rng(0)
    values = (draw.standard_normal(NUM_WEIGHTS) * 0.05).astype(np.float32)
    before = (values.view(np.uint32) >> 16).astype(np.uint16)
    after = before + (draw.random(NUM_WEIGHTS) < 0.1).astype(np.uint16)
    chunks = [slice(start, start + CHUNK) for start in range(0, NUM_WEIGHTS, CHUNK)]
    measure(before[:64], after[:64], "bf16")  # compiles
    kernel, plain = [], []
    for _ in range(ROUNDS):
        kernel.append(timed(lambda: [measure(before[c], after[c], "bf16") for c in chunks]))
        plain.append(timed(lambda: [numpy_counts(before[c], after[c]) for c in chunks]))
    a, b = statistics.median(kernel), statistics.median(plain)
    print(f"kernel, all statistics: {NUM_WEIGHTS / a / 1e6:.0f} M weights/s")
    print(f"numpy, three statistics: {NUM_WEIGHTS / b / 1e6:.0f} M weights/s")
    print(f"numpy / kernel: {b / a:.2f}")


if __name__ == "__main__":
    main()
