"""The one place that imports ``trl.experimental``, which may change with any release of TRL."""

import importlib
import sys
from importlib.metadata import version
from typing import Any

from trl.import_utils import suppress_experimental_warning

from rlsparse.errors import TrialError

WITHOUT_TRUNCATION = sys.maxsize
"""``max_length`` of trainers that take None for 512 tokens. The others cut nothing, and algorithms
are compared on equal data."""


def experimental_classes(module: str, *names: str) -> tuple[Any, ...]:
    """Classes of ``trl.experimental.<module>``, without the warning that they are experimental.

    Raises:
        TrialError: the installed TRL has them no longer.
    """
    try:
        with suppress_experimental_warning():
            found = importlib.import_module(f"trl.experimental.{module}")
        return tuple(getattr(found, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise TrialError(
            f"trl {version('trl')} has no trl.experimental.{module} with {' and '.join(names)} "
            f"({error}); install the tested version: pip install 'trl>=1.16,<1.17'"
        ) from error
