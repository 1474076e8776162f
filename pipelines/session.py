"""Ray for a study: started when a stage first needs it, quiet, and stopped at the end."""

import logging
import os
from types import TracebackType
from typing import Any


class RaySession:
    """Ray on this machine, or a cluster; a study that is done never starts it.

    Args:
        address: of a cluster; None starts Ray on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._started = False

    def start(self) -> None:
        """Connect, unless that has been done."""
        if self._started:
            return
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        # Else Tune takes Ctrl-C for the wish to end the sweep, and the study would go on.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        import ray

        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if self._address is None:
            settings |= {"address": "local", "include_dashboard": False}
        else:
            settings |= {"address": self._address}
        ray.init(**settings)
        self._started = True
        ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray.data", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def __enter__(self) -> "RaySession":
        """Begin without connecting."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect; Ray that was started here ends."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False
