"""The option ``--json``; imports nothing that is slow to load."""

from pathlib import Path

from rlsparse.errors import ConfigError


def write_json(path: str, text: str) -> None:
    """Write the value of an option ``--json``: a file, or standard output if it is ``-``.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give another --json") from error
