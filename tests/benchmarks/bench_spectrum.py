"""What the spectrum of one matrix costs: update, its null and its control, one thread or more.

Run with ``make bench``. A bf16 matrix of which a tenth of the weights moved by 1 to 3 codes.
"""

import time

import ml_dtypes
import numpy as np

from rlsparse.spectrum import measure_spectrum

CASES = (((1024, 4096), "gram"), ((1024, 4096), "exact"), ((2048, 2048), "gram"))


def main() -> None:
    """Print seconds and ranks per case."""
    draw = np.random.default_rng(0)
    for shape, method in CASES:
        weights = (draw.standard_normal(shape) * 0.02).astype(ml_dtypes.bfloat16)
        before = weights.reshape(-1).view(np.uint16)
        moves = (draw.random(before.size) < 0.1) * draw.integers(1, 4, before.size)
        after = before + moves.astype(np.uint16)
        start = time.perf_counter()
        found = measure_spectrum(before, after, "bf16", shape, method=method)
        seconds = time.perf_counter() - start
        print(f"spectrum of {shape[0]} x {shape[1]}, {method}: {seconds:.1f} s, {found.ranks}")


if __name__ == "__main__":
    main()
