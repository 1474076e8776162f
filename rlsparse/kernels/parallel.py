"""Several kernels at a time, on a given number of threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def run(calls: Iterable[Callable[[], None]], num_threads: int) -> None:
    """Make all calls, which release the GIL, on this thread and ``num_threads - 1`` others.

    A thread that is done takes the next call, so that a busy core delays nothing but its own; calls
    must not depend on each other.
    """
    left = deque(calls)

    def drain() -> None:
        while True:
            try:
                call = left.popleft()
            except IndexError:
                return
            call()

    others = min(num_threads, len(left)) - 1
    waiting = [_pool(os.getpid(), others).submit(drain) for _ in range(others)]
    drain()
    for one in waiting:
        one.result()


@cache
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of its parent do not outlive a fork."""
    return ThreadPoolExecutor(num_threads, "rlsparse-kernels")
