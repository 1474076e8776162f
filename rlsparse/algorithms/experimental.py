"""The one place that imports ``trl.experimental``, which may change with any release of TRL."""

import importlib
import sys
from importlib.metadata import version
from typing import Any

from trl.import_utils import suppress_experimental_warning

from rlsparse.errors import TrialError

PAIR_ARGUMENTS = {
    "disable_dropout": True,
    "max_length": sys.maxsize,  # None would cut at 512 tokens, where the other trainers cut nothing
    "max_completion_length": None,
    "generate_during_eval": False,
    "remove_unused_columns": False,
}
"""What CPO and ORPO share: whole pairs, as all other algorithms get them."""


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
