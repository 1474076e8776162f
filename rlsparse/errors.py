"""Errors that a user can act on: each says what, the value, what is allowed, and the remedy.

Every class takes a single message, so that it survives pickling between processes, and also
inherits from the built-in exception that it specialises.
"""

import difflib
from collections.abc import Sequence


class RlsparseError(Exception):
    """Root of all errors raised on purpose; the command line prints it as one clear line."""


class ConfigError(RlsparseError, ValueError):
    """A study, a configuration or a command-line value is wrong."""


class CheckpointError(RlsparseError, ValueError):
    """A checkpoint folder is missing, damaged, or of an unknown kind."""


class PatchError(RlsparseError, ValueError):
    """A patch is damaged or does not belong to the base that it was applied to."""


class TableError(RlsparseError, ValueError):
    """A table lacks a column, or was written under another schema version."""


class TrialError(RlsparseError, RuntimeError):
    """A trial cannot go on, and running it again would not help (for example a NaN loss)."""


class StorageError(RlsparseError, OSError):
    """The storage of a study cannot be read, written or locked."""


class RlsparseWarning(UserWarning):
    """Something works, but not as well as it could; the command line prints it as one line."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Hint for an error: the known name that is nearest, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
