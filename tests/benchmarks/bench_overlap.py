"""Overlap of all pairs of 32 masks of 1.02e8 weights, against NumPy, pair by pair.

Run with ``make bench``. A tenth of the weights is changed, one thread. Both ways take their turn in
each round; NumPy counts a sample of the 496 pairs, blocked or not it is as fast. Beside it, what a
null costs: the strata of all masks, and the agreement of all runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from rlsparse.kernels import agreement, label_counts, popcount_and

NUM_MASKS, NUM_WEIGHTS, DENSITY = 32, 102_000_000, 0.1
SAMPLE = 8
NUM_LABELS = 25


def make_masks(draw: np.random.Generator) -> np.ndarray:
    """Packed masks, shape [NUM_MASKS, words]: a tenth of the bits, wherever."""
    words = np.empty((NUM_MASKS, NUM_WEIGHTS // 64), np.uint64)
    block = 2**16
    bits = draw.random((NUM_MASKS, 64 * block)) < DENSITY
    few = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
    for mask in range(NUM_MASKS):
        for start in range(0, words.shape[1], block):  # each block another rotation of few words
            part = words[mask, start : start + block]
            part[:] = np.roll(few[mask], int(draw.integers(block)))[: part.size]
    return words


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    masks = make_masks(draw)
    num_pairs = NUM_MASKS * (NUM_MASKS - 1) // 2
    pairs = [draw.choice(NUM_MASKS, 2, replace=False) for _ in range(SAMPLE)]
    shared = popcount_and(masks)
    for a, b in pairs:
        assert shared[a, b] == np.bitwise_count(masks[a] & masks[b]).sum()
    labels = np.minimum(draw.geometric(0.3, 64 * masks.shape[1]), NUM_LABELS - 1).astype(np.uint16)

    def numpy_sample() -> None:
        for a, b in pairs:
            int(np.bitwise_count(masks[a] & masks[b]).sum())

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "numpy": (numpy_sample, SAMPLE),
        "all pairs": (lambda: popcount_and(masks), num_pairs),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (work, count) in ways.items():
            found[name].append(timed(work) / count)
    medians = {name: statistics.median(times) for name, times in found.items()}
    ratios = [a / b for a, b in zip(found["numpy"], found["all pairs"], strict=True)]
    rates = {name: 64 * masks.shape[1] / each / 1e12 for name, each in medians.items()}
    print(
        f"{NUM_MASKS} masks of {NUM_WEIGHTS:.3g} weights, {DENSITY:.0%} changed: numpy "
        f"{rates['numpy']:.3f}, all pairs at once {rates['all pairs']:.2f} T pair-bits/s, ratio "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f})"
    )
    both = num_pairs * medians["all pairs"]
    strata = timed(lambda: label_counts(masks, labels, NUM_LABELS))
    together = timed(lambda: agreement(masks, NUM_WEIGHTS))
    print(f"all pairs {both:.2f} s, {NUM_LABELS} strata of all masks {strata:.2f} s, "
          f"agreement of all {together:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
