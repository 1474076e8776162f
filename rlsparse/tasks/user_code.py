"""Functions of a user's own code, named ``module:function``."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlsparse.errors import ConfigError, nearest


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    The current working directory can be imported from too, after everything installed.

    Raises:
        ConfigError: there is no such module, importing it fails, or it has no such function.
    """
    module = _import(name)
    function_name = name.partition(":")[2]
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        what = "is not a function" if function_name in vars(module) else "does not exist"
        raise ConfigError(
            f"{name}: {function_name} {what} in {_file(module) or module.__name__}; "
            f"{nearest(function_name, known)}"
        )
    loaded: Callable[..., Any] = function
    return loaded


def code_hash(name: str) -> str:
    """Hash of the source file of the module that ``module:function`` names.

    What the module imports in turn is not covered.

    Raises:
        ConfigError: see ``load_function``.
    """
    load_function(name)
    path = _file(_import(name))
    content = path.read_bytes() if path else name.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def explain(name: str, error: Exception) -> str:
    """Start of a message: a user's function raised."""
    return f"{name} raised {type(error).__name__}: {' '.join(str(error).split())}"


def _import(name: str) -> ModuleType:
    module_name = name.partition(":")[0]
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.append(directory)  # stays: functions may import more when they are called
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{name}: there is no module {missing}; it must be installed, lie in the "
                f"current directory {directory}, or in a folder of PYTHONPATH"
            ) from error
        raise ConfigError(f"importing {explain(module_name, error)}") from error


def _file(module: ModuleType) -> Path | None:
    path = getattr(module, "__file__", None)
    return Path(path) if path else None
