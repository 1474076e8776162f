"""Where this user keeps what can be made again: machine code, converted base models."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$RLSPARSE_CACHE_DIR``, else ``rlsparse`` in the user's cache folder; may not exist yet."""
    if chosen := os.environ.get("RLSPARSE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlsparse"
