"""Ray for a study: started when a stage first needs it, quiet, and stopped at the end."""

import logging
import os
import socket
from types import TracebackType
from typing import Any

from pipelines.capacity import host_memory
from rlsparse.errors import ConfigError

_REMEDY = "start it with `ray up` or `ray start --head`, or leave --address out"
_LOGIN = "if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; else"
_CONNECT_TIMEOUT_S = 10

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Else Tune takes Ctrl-C for the wish to end the sweep, and the study would go on.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Else relative paths of data and modules would be looked for in a folder of Tune's.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""What Ray reads when it starts."""


class RaySession:
    """Ray on this machine, or a cluster; a study that is done never starts it.

    Args:
        address: of a cluster; None starts Ray on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._started = False

    def start(self) -> None:
        """Connect, unless that has been done.

        Raises:
            ConfigError: no cluster answers at the address.
        """
        if self._started:
            return
        os.environ |= ENVIRONMENT
        import ray

        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
        if self._address is None:
            settings |= {"address": "local", "include_dashboard": False, "_memory": host_memory()}
        else:
            settings |= {"address": self._address}
            _check_reachable(self._address)
        try:
            ray.init(**settings)
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"no Ray cluster at {self._address}: {reason}; {_LOGIN} {_REMEDY}"
            ) from error
        self._started = True
        ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray.data", "ray.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

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


def _check_reachable(address: str) -> None:
    """Raise ConfigError now if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}; {_REMEDY}") from error
