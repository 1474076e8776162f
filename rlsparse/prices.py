"""CPU time by what it was spent on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Prices:
    """Adds up the CPU seconds of this process, all threads, under the names of what they bought.

    Time within a name that is entered inside another counts for the inner one alone. Kernels of a
    GPU run beside the process that starts them: what they take is in no price, and none is waited
    for, since waiting would slow down what is measured.
    """

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}
        self._paying: str | None = None
        self._since = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Within it, time counts for ``name``."""
        outer = self._paying
        self._charge_to(name)
        try:
            yield
        finally:
            self._charge_to(outer)

    def _charge_to(self, name: str | None) -> None:
        now = time.process_time()
        if self._paying is not None:
            self.cpu_s[self._paying] = self.cpu_s.get(self._paying, 0.0) + now - self._since
        self._paying, self._since = name, now

    def columns(self) -> dict[str, float]:
        """The seconds under the names of table ``trials``."""
        return {f"probe_{name}_cpu_s": seconds for name, seconds in self.cpu_s.items()}
