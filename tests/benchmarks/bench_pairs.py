"""How the bytes per second of ``diff_pairs`` grow with workers until the storage is the limit.

Run with ``make bench``; takes half a minute. The storage is simulated, in each worker, by a file
system ``slow://`` over local files: every read of a piece waits LATENCY_S, as long as it takes a
store to answer, and then occupies a line that all workers share (a file lock) for its bytes at
LINE_BYTES_PER_S. Neither wait uses a core, so that four workers on two cores are not slower than
on four: Ray is told that it has as many as there are workers.
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

LATENCY_S = 0.014
LINE_BYTES_PER_S = 80e6
WORKERS = (1, 2, 4)
NUM_PAIRS = 16
SHAPE = (4, 1024, 1024)  # bf16: 8 MiB
TASK_BYTES = 2**23


class Local(LocalFileSystem):
    """Local files as ``slow://``, at full speed: the headers that the driver reads."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("slow://")))


def register() -> None:
    """Make ``slow://`` slow in a worker; runs when it starts."""

    class Line:
        """A stream whose reads wait for the store and for the line."""

        def __init__(self, stream):
            self._stream = stream
            self.seek = stream.seek

        def readinto(self, buffer):
            time.sleep(LATENCY_S)
            with Path(os.environ["BENCH_LINE"]).open() as line:
                fcntl.flock(line, fcntl.LOCK_EX)
                time.sleep(len(buffer) / LINE_BYTES_PER_S)
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
    weights = (draw.standard_normal(SHAPE[0] * SHAPE[1] * SHAPE[2]) * 0.02).astype(np.float32)
    before = (weights.view(np.uint32) >> 16).astype("<u2")
    steps = (draw.random(before.size) < 0.05).astype("<u2")
    for name, bits in [
        ("base", before),
        *((f"step-{n}", before + np.roll(steps, n)) for n in range(NUM_PAIRS)),
    ]:
        parts = {f"layers.{i}.weight": part for i, part in enumerate(np.split(bits, SHAPE[0]))}
        save_checkpoint(folder / name, {k: ("bf16", SHAPE[1:], v) for k, v in parts.items()})
    return [(f"slow://{folder}/base", f"slow://{folder}/step-{n}") for n in range(NUM_PAIRS)]


def bytes_per_s(pairs: list[tuple[str, str]], num_workers: int) -> float:
    """Bytes of both sides over the wall time of all pairs."""
    options = ray.data.DataContext.get_current().execution_options
    options.resource_limits = options.resource_limits.copy(cpu=num_workers)
    start = time.perf_counter()
    found = list(diff_pairs(pairs, task_bytes=TASK_BYTES))
    wall_s = time.perf_counter() - start
    assert all(isinstance(diff, Diff) and 0.9 < diff.sparsity["bitwise"] < 1 for diff in found)
    return len(pairs) * 2 * 2 * int(np.prod(SHAPE)) / wall_s


def main() -> None:
    """Time the same pairs with 1, 2 and 4 workers that have started before."""
    fsspec.register_implementation("slow", Local, clobber=True)
    piece_s = PIECE_BYTES / LINE_BYTES_PER_S
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        line = Path(folder, "line")
        line.touch()
        ray.init(
            "local", num_cpus=max(WORKERS), include_dashboard=False, log_to_driver=False,
            logging_level="critical",
            runtime_env={
                "worker_process_setup_hook": register, "env_vars": {"BENCH_LINE": str(line)},
            },
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        bytes_per_s(pairs[:4], max(WORKERS))
        print(
            f"{NUM_PAIRS} pairs over simulated storage on {os.cpu_count()} cores: {LATENCY_S * 1e3:.0f}"
            f" ms per read of {PIECE_BYTES / 1e6:.1f} MB, and one line of "
            f"{LINE_BYTES_PER_S / 1e6:.0f} MB/s for all workers"
        )
        print("workers  MB/s  times one  of the line  of what the storage allows")
        one = 0.0
        for num_workers in WORKERS:
            speed = bytes_per_s(pairs, num_workers)
            one = one or speed
            alone = PIECE_BYTES / (LATENCY_S + piece_s)
            allowed = min(num_workers * alone, LINE_BYTES_PER_S)
            print(
                f"{num_workers:7}  {speed / 1e6:4.0f}  {speed / one:9.2f}  "
                f"{speed / LINE_BYTES_PER_S:10.0%}  {speed / allowed:.0%}"
            )
        ray.shutdown()


if __name__ == "__main__":
    main()
