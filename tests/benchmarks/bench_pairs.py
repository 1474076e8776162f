"""How the bytes per second of ``diff_pairs`` grow with workers until the storage is the limit.

Run with ``make bench``; takes a minute. The storage is simulated by a file system
``slow://`` over local files: every read waits LATENCY_S, as long as a store takes to answer, and
then occupies a line that all workers share (a locked file that holds its bytes per second). Neither
wait uses a core, and Ray is told that there is one for each worker, however many there are. The
rest of what the storage allows goes to Ray Data, which starts all workers after one second, and
looks for finished tasks ten times a second: of tasks that take a second it takes 0.2 s.
"""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import ray
from fsspec.implementations.local import LocalFileSystem

from pipelines.pairs import diff_pairs
from rlsparse.diff import PIECE_BYTES, Diff
from rlsparse.tensor_file import save_checkpoint

LATENCY_S = 0.07
CASES = ((1, 1e9), (2, 1e9), (4, 1e9), (4, 15e6))  # workers, bytes per second of the line
NUM_PAIRS = 12
NUM_TENSORS, SIDE = 2, 1024  # bf16: 4 MiB per checkpoint, 8 MiB per pair and task


def register() -> None:
    """Make ``slow://`` known in this process: the driver, and every worker when it starts."""

    class Line:
        """A stream whose reads wait for the store and for the line."""

        def __init__(self, stream):
            self._stream = stream
            self.seek = stream.seek

        def readinto(self, buffer):
            time.sleep(LATENCY_S)
            with Path(os.environ["BENCH_LINE"]).open() as line:
                fcntl.flock(line, fcntl.LOCK_EX)
                time.sleep(len(buffer) / float(line.read()))
            return self._stream.readinto(buffer)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._stream.close()

    class Slow(LocalFileSystem):
        protocol = "slow"

        @classmethod
        def _strip_protocol(cls, path):
            return str(super()._strip_protocol(str(path).removeprefix("slow://")))

        def _open(self, path, mode="rb", **_):
            return Line(Path(path).open(mode, buffering=0))

    fsspec.register_implementation("slow", Slow, clobber=True)


def make_pairs(folder: Path) -> list[tuple[str, str]]:
    """One base, and as many checkpoints after it as there are pairs; 5 % of weights changed."""
    draw = np.random.default_rng(0)
    weights = (draw.standard_normal(NUM_TENSORS * SIDE**2) * 0.02).astype(np.float32)
    before = (weights.view(np.uint32) >> 16).astype("<u2")
    steps = (draw.random(before.size) < 0.05).astype("<u2")
    sides = {"base": before} | {f"{n}": before + np.roll(steps, n) for n in range(NUM_PAIRS)}
    for name, bits in sides.items():
        parts = enumerate(np.split(bits, NUM_TENSORS))
        tensors = {f"layers.{i}.weight": ("bf16", (SIDE, SIDE), part) for i, part in parts}
        save_checkpoint(folder / name, tensors)
    return [(f"slow://{folder}/base", f"slow://{folder}/{n}") for n in range(NUM_PAIRS)]


def bytes_per_s(pairs: list[tuple[str, str]], num_workers: int) -> float:
    """Bytes of both sides over the wall time of all pairs, planning included."""
    options = ray.data.DataContext.get_current().execution_options
    options.resource_limits = options.resource_limits.copy(cpu=num_workers)
    start = time.perf_counter()
    found = list(diff_pairs(pairs))
    wall_s = time.perf_counter() - start
    assert all(isinstance(diff, Diff) and 0.9 < diff.sparsity["bitwise"] < 1 for diff in found)
    return len(pairs) * 2 * 2 * NUM_TENSORS * SIDE**2 / wall_s


def start_ray(line: Path) -> None:
    """Ray with as many cores as workers are wanted; ``line`` is locked by reads."""
    os.environ["BENCH_LINE"] = str(line)
    register()
    hook = {"worker_process_setup_hook": register}
    ray.init(
        "local", num_cpus=max(CASES)[0], runtime_env=hook, include_dashboard=False,
        log_to_driver=False, logging_level="critical",
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def main() -> None:
    """Time the same pairs in each case, with workers that have started before."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        line = Path(folder, "line")
        line.write_text("1e9")
        start_ray(line)
        bytes_per_s(pairs[:4], 4)
        print(f"{NUM_PAIRS} pairs of 2 x {2 * NUM_TENSORS * SIDE**2 / 1e6:.1f} MB on "
              f"{os.cpu_count()} cores; simulated storage: {LATENCY_S * 1e3:.0f} ms before each "
              f"read of {PIECE_BYTES / 1e6:.1f} MB, one line for all workers")  # fmt: skip
        print("workers  line MB/s  MB/s  times one worker  of what the storage allows")
        one = 0.0
        for num_workers, limit in CASES:
            line.write_text(str(limit))
            speed = bytes_per_s(pairs, num_workers)
            one = one or speed
            allowed = min(num_workers * PIECE_BYTES / (LATENCY_S + PIECE_BYTES / limit), limit)
            print(f"{num_workers:7}  {limit / 1e6:9.0f}  {speed / 1e6:4.1f}  {speed / one:16.2f}  "
                  f"{speed / allowed:.0%} of {allowed / 1e6:.1f} MB/s")  # fmt: skip
        ray.shutdown()


if __name__ == "__main__":
    main()
