"""How fast the GPU kernels measure a pair, as a fraction of a device-to-device copy.

    .venv/bin/python tests/benchmarks/bench_gpu.py [RESULT.json]

A pair of bf16 matrices of 2 to 4 GB each, at several densities; all outputs on: every statistic,
the mask, and the counts per row and column. Bandwidth is bytes read and written over the median of
rounds, timed with CUDA events and interleaved with copies of the same size. Counts of a slice are
compared with the CPU's. Says so and ends well where there is no GPU.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from rlsparse import kernels

ROW_LENGTH = 8192
DENSITIES = (0.0, 0.02, 0.1, 0.3, 1.0)
ROUNDS = 7
SLICE_ROWS = 64
CHUNK_ROWS = 4096
GOAL = 0.6


def pair(num_rows: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a normal distribution, some of them one to three codes further from zero."""
    generator = torch.Generator("cuda").manual_seed(0)
    before = torch.empty(num_rows, ROW_LENGTH, dtype=torch.bfloat16, device="cuda")
    after = torch.empty_like(before)
    for x, y in zip(before.split(CHUNK_ROWS), after.split(CHUNK_ROWS), strict=True):
        x.normal_(0, 0.02, generator=generator)
        chance = torch.rand(x.shape, device="cuda", generator=generator)
        steps = torch.randint(1, 4, x.shape, device="cuda", generator=generator)
        moved = x.view(torch.int16) + (steps * (chance < density)).to(torch.int16)
        y.copy_(moved.view(torch.bfloat16))
    return before, after


def timed_ms(work: Callable[[], object]) -> float:
    """Milliseconds on the device from before ``work`` to after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def agrees_with_cpu(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether all integers, the mask and the stripes of a slice are those of the CPU kernel."""
    from rlsparse.kernels import gpu

    x, y = before[:SLICE_ROWS].contiguous(), after[:SLICE_ROWS].contiguous()
    found = gpu.measure(x, y)
    bits = (side.flatten().view(torch.uint16).cpu().numpy() for side in (x, y))
    expected = kernels.measure(*bits, "bf16")
    stripes = gpu.stripe_counts(found.mask, SLICE_ROWS, ROW_LENGTH)
    known = kernels.stripe_counts(expected.mask, SLICE_ROWS, ROW_LENGTH)
    found = dataclasses.replace(found, mask=found.mask.cpu().numpy())
    return all(
        getattr(found, field.name) == getattr(expected, field.name)
        for field in dataclasses.fields(found)
        if field.name != "mask" and not field.name.startswith("sum_")
    ) and all(
        (ours == theirs).all()
        for ours, theirs in [
            (found.mask, expected.mask),
            *((one.cpu().numpy(), other) for one, other in zip(stripes, known, strict=True)),
        ]
    )


def run(num_rows: int, density: float) -> dict[str, object]:
    """One row of the table."""
    from rlsparse.kernels import gpu

    before, after = pair(num_rows, density)
    target = torch.empty_like(before)

    def measure_all() -> None:
        counts = gpu.measure(before, after)
        gpu.stripe_counts(counts.mask, num_rows, ROW_LENGTH)

    works: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(before),
        "all": measure_all,
        "measure": lambda: gpu.measure(before, after),
    }
    for work in works.values():  # compiles, and fills the caches of the allocator
        work()
    rounds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            rounds[name].append(timed_ms(work))
    median_ms = {name: statistics.median(times) for name, times in rounds.items()}
    copied = read = 2 * before.nbytes
    written = before.numel() // 8
    copy_gb_s = copied / median_ms["copy"] / 1e6
    rates = {name: (read + written) / median_ms[name] / 1e6 for name in ("all", "measure")}
    return {
        "size_bytes": before.nbytes,
        "density": density,
        "copy_gb_s": copy_gb_s,
        "all_gb_s": rates["all"],
        "ratio_all": rates["all"] / copy_gb_s,
        "ratio_measure": rates["measure"] / copy_gb_s,
        "agrees_with_cpu": agrees_with_cpu(before, after),
        "rounds_ms": rounds,
    }


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="JSON file to write")
    result = parser.parse_args().result
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    import triton

    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; goal {GOAL} x copy")
    print("GB each  density  copy GB/s  all GB/s  all/copy  without stripes  equals CPU")
    rows = []
    for num_rows in (2**17, 2**18):
        for density in DENSITIES:
            row = run(num_rows, density)
            rows.append(row)
            print(
                f"{row['size_bytes'] / 1e9:7.2f}  {density:7.2f}  {row['copy_gb_s']:9.0f}  "
                f"{row['all_gb_s']:8.0f}  {row['ratio_all']:8.2f}  {row['ratio_measure']:15.2f}  "
                f"{row['agrees_with_cpu']}"
            )
    if result:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        result.write_text(json.dumps({"device": device, "versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
