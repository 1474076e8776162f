"""Base models: the tiny one that ships with the project, packaged ones, folders, hub ids."""

import hashlib
import json
from pathlib import Path

from rlsparse.config import ModelConfig
from rlsparse.errors import CheckpointError, nearest
from rlsparse.models.gguf import PACKAGES, converted

TINY = Path(__file__).parent / "tiny"
NAMES = ("tiny", *PACKAGES)
"""Bases that have a name of their own; the others are folders and hub ids."""

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
)
"""Files beside the weights that transformers reads for a model and its tokenizer."""


def named(name: str) -> Path | None:
    """Local folder of the base model of ``NAMES`` that is called so; None if there is none.

    Raises:
        CheckpointError: its package is not installed, or damaged.
    """
    if name in PACKAGES:
        return converted(name)
    return TINY if name == "tiny" else None


def resolve(config: ModelConfig) -> Path:
    """Local folder of a base model: one of ``NAMES``, a folder, or a hub ``id@revision``.

    A packaged base is converted when first used, one of the hub is downloaded.

    Raises:
        CheckpointError: no such folder, a package is missing, or the hub does not give the model.
    """
    source = config.source
    if folder := named(source):
        return folder
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"model.source {source!r}: no such folder; {nearest(source, NAMES)}; or give a "
            "folder in the format of transformers, or a hub id such as Qwen/Qwen2.5-0.5B@main"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"model.source {source!r} is no folder here and the hub does not give it: {reason}"
        ) from error
    return Path(found)


def companion_hash(folder: Path) -> str:
    """sha256 (hex) over names and bytes of the files beside the weights that training reads.

    They are the model's configuration, its tokenizer and its chat templates; others, such as a
    README, do not count.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in _COMPANIONS
        for path in folder.glob(pattern)
        if path.is_file()
    }
    contents = [
        [name, hashlib.sha256(path.read_bytes()).hexdigest()]
        for name, path in sorted(files.items())
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
