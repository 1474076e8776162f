"""``rlsparse patch``: makes, applies, checks, joins and exports lossless patches."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.json_option import write_json
from rlsparse.errors import ConfigError, RlsparseError, StorageError

if TYPE_CHECKING:
    from rlsparse.checkpoint import Checkpoint
    from rlsparse.patch import Patch
    from rlsparse.patch.blocks import CodecName

SUFFIX = ".patch.safetensors"
PLAIN_SUFFIX = ".safetensors"

app = typer.Typer(
    help="Lossless patches: what changed between two checkpoints, exactly.", no_args_is_help=True
)

Before = Annotated[
    str, typer.Argument(metavar="BEFORE", show_default=False, help="The checkpoint patched.")
]
PatchPath = Annotated[
    Path, typer.Argument(metavar="PATCH", show_default=False, help=f"Patch, *{SUFFIX}.")
]
Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write it here too; - prints it alone.")
]


class Values(StrEnum):
    """How values are coded."""

    RELATIVE = "relative"
    ABSOLUTE = "absolute"


class Positions(StrEnum):
    """How positions are coded."""

    AUTO = "auto"
    GAPS = "gaps"
    BITMAP = "bitmap"
    INDICES = "indices"


class Compression(StrEnum):
    """How everything is compressed."""

    ZSTD = "zstd"
    NONE = "none"


Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="PATCH", show_default=False, help=f"*{SUFFIX}.")
]
Codec = Annotated[Positions, typer.Option(help="auto: for each stretch what suits its density.")]
Compressed = Annotated[Compression, typer.Option()]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is at -o.")]


@app.command()
def make(
    before: Before,
    after: Annotated[str, typer.Argument(metavar="AFTER", show_default=False)],
    out: Out,
    values: Annotated[
        Values,
        typer.Option(help="relative: steps from BEFORE, smallest; absolute: bits of AFTER."),
    ] = Values.RELATIVE,
    codec: Codec = Positions.AUTO,
    compression: Compressed = Compression.ZSTD,
    force: Force = False,
    json_path: Json = None,
) -> None:
    """Write what changed from BEFORE to AFTER, check it, and say what it takes."""
    from rlsparse.checkpoint import Checkpoint
    from rlsparse.patch import apply
    from rlsparse.patch.make import make_patch

    _check_out(out, force)
    for what, side in (("BEFORE", before), ("AFTER", after)):
        if side.endswith(SUFFIX):
            raise ConfigError(f"{what} is {side}, a patch: apply it first (rlsparse patch apply)")
    sides = Checkpoint.open(before), Checkpoint.open(after)
    begun = time.perf_counter()
    with _writing(out):
        patch = make_patch(
            *sides, out, coding=values.value, codec=_codec(codec), compression=compression.value
        )
    made = time.perf_counter()
    for name in patch.tensors:
        for _ in apply.after_pieces(sides[0], patch, name):
            pass
    applied = time.perf_counter()
    num_bytes = sum(sides[1].tensors[name].size_bytes for name in patch.tensors)
    found = _facts(patch) | {
        "bytes_zstd": _compressed_bytes(sides[1], patch),
        "encode_mb_per_s": num_bytes / 1e6 / (made - begun),
        "apply_mb_per_s": num_bytes / 1e6 / (applied - made),
    }
    _show(found, json_path)


@app.command("apply")
def apply_command(
    before: Before,
    patch: PatchPath,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="AFTER", show_default=False, help="New folder.")
    ],
) -> None:
    """Write the checkpoint after, with BEFORE's configuration, bit for bit."""
    from rlsparse.patch import apply_patch

    with _writing(out):
        apply_patch(before, patch, out)
    print(f"{out}: {patch} applied to {before}, all checksums agree")


@app.command()
def verify(before: Before, patch: PatchPath) -> None:
    """Check that PATCH is whole, and that it gives what was there when it was made."""
    from rlsparse.checkpoint import Checkpoint
    from rlsparse.patch import Patch, verify_patch

    opened = Patch.open(patch)
    verify_patch(Checkpoint.open(before), opened)
    print(f"{patch}: whole, fits {before}, {opened.num_changed:,} changed weights")


@app.command()
def info(patch: PatchPath, json_path: Json = None) -> None:
    """What is in a patch; its header and tables are read alone."""
    from rlsparse.patch import Patch

    _show(_facts(Patch.open(patch)), json_path)


@app.command("squash")
def squash_command(
    patches: Annotated[
        list[Path], typer.Argument(metavar="PATCH PATCH ...", show_default=False, help="In order.")
    ],
    out: Out,
    codec: Codec = Positions.AUTO,
    compression: Compressed = Compression.ZSTD,
    force: Force = False,
    json_path: Json = None,
) -> None:
    """Make one patch of a chain, each from where the last ends; no checkpoint is needed."""
    from rlsparse.patch import Patch
    from rlsparse.patch.squash import squash

    _check_out(out, force)
    opened = [Patch.open(path) for path in patches]
    with _writing(out):
        joined = squash(opened, out, codec=_codec(codec), compression=compression.value)
    _show(_facts(joined), json_path)


@app.command()
def export(
    patch: PatchPath,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="FILE", show_default=False, help=f"*{PLAIN_SUFFIX}."),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="BEFORE", help="The checkpoint patched, if relative.")
    ] = None,
    force: Force = False,
) -> None:
    """Write plain flat indices and values of what changed, as safetensors, for other programs."""
    from rlsparse.checkpoint import Checkpoint
    from rlsparse.patch import Patch
    from rlsparse.patch.export import export_patch

    if not out.name.endswith(PLAIN_SUFFIX) or out.name.endswith(SUFFIX):
        raise ConfigError(f"-o {out}: call it *{PLAIN_SUFFIX}, and not *{SUFFIX}, as patches are")
    _check_free(out, force)
    opened = Patch.open(patch)
    with _writing(out):
        export_patch(opened, out, None if base is None else Checkpoint.open(base))
    print(f"{out}: {opened.num_changed:,} changed weights, {out.stat().st_size:,} bytes")


@app.command()
def rebuild(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", show_default=False, help="Anchors and versions."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="CHECKPOINT", show_default=False)],
    version: Annotated[
        int | None, typer.Option(metavar="V", show_default=False, help="Default: the newest.")
    ] = None,
) -> None:
    """Write the checkpoint of a version that a training run sent (rlsparse.weight_sync)."""
    from rlsparse.weight_sync import rebuild as rebuilding

    with _writing(out):
        reached = rebuilding.rebuild(folder, out, version)
    print(f"{out}: version {reached} of {folder}, all checksums agree")


# --- small parts -----------------------------------------------------------------------------


def _check_out(out: Path, force: bool) -> None:
    """Refuse now what could not be written after minutes of work."""
    if not out.name.endswith(SUFFIX):
        raise ConfigError(f"-o {out}: patches are called *{SUFFIX}, by which they are known")
    _check_free(out, force)


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already; give another -o, or --force")
    if not out.parent.is_dir():
        raise ConfigError(f"-o {out}: there is no folder {out.parent}; make it first")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Errors of the storage, such as a full disk, become one of ours."""
    try:
        yield
    except RlsparseError:  # some of ours are OSErrors, too
        raise
    except OSError as error:
        why = error.strerror or error
        raise StorageError(
            f"cannot write {out}: {why}; free space there, or give another -o"
        ) from error


def _codec(positions: Positions) -> "CodecName | None":
    from rlsparse.patch import CODECS

    return next((name for name in CODECS if name == positions), None)


def _facts(patch: "Patch") -> dict[str, Any]:
    """What a patch says of itself; sizes of the dense checkpoint are those of its tensors."""
    from rlsparse.patch import CODECS
    from rlsparse.tensor_file import ITEMSIZE

    names, codecs = [*CODECS], Counter[str]()
    for tensor in patch.tensors.values():
        for block in tensor.blocks:
            codecs[names[block.codec]] += block.num_changed
    sizes = {name: math.prod(one.shape) for name, one in patch.tensors.items()}
    dense = sum(ITEMSIZE[patch.tensors[name].dtype] * size for name, size in sizes.items())
    changed = patch.num_changed
    each = patch.size_bytes / changed if changed else None
    dense_from = dense / sum(sizes.values()) / each if each else 1.0
    return {
        "patch": str(patch.path),
        "base_fingerprint": patch.base_fingerprint,
        "values": patch.values,
        "metadata": patch.metadata,
        "num_tensors": len(patch.tensors),
        "num_tensors_changed": sum(one.num_changed > 0 for one in patch.tensors.values()),
        "num_weights": sum(sizes.values()),
        "num_changed": changed,
        "changed_by_codec": dict(codecs),
        "bytes": patch.size_bytes,
        "bytes_dense": dense,
        "bytes_per_change": each,
        "dense_is_smaller_from": dense_from if dense_from < 1 else None,
    }


def _compressed_bytes(after: "Checkpoint", patch: "Patch") -> int:
    """Bytes of the tensors after, compressed by zstd at level 1, piece by piece."""
    import pyarrow

    from rlsparse.patch.write import cast_pieces

    codec = pyarrow.Codec("zstd", 1)

    def pieces() -> Iterator[Any]:
        for name in patch.tensors:
            yield from cast_pieces(after.tensors[name], after.tensors[name].dtype)

    return sum(codec.compress(piece.data).size for piece in pieces())


def _show(found: dict[str, Any], json_path: str | None) -> None:
    if json_path is not None:
        write_json(json_path, json.dumps(found, indent=1))
    if json_path != "-":
        print("\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from rlsparse.report.formats import percent

    num, num_weights = found["num_changed"], max(found["num_weights"], 1)
    yield f"patch    {found['patch']}, values {found['values']}"
    yield f"base     {found['base_fingerprint'][:12]}"
    yield from (f"{key:8} {value}" for key, value in found["metadata"].items())
    by = ", ".join(f"{name} {count:,}" for name, count in found["changed_by_codec"].items())
    share = percent(num / num_weights)
    yield (
        f"changed  {num:,} of {found['num_weights']:,} weights ({share}) in "
        f"{found['num_tensors_changed']} of {found['num_tensors']} tensors{f'; {by}' if by else ''}"
    )
    shares = [
        f"{100 * found['bytes'] / found[key]:.4g} % of {what}"
        for key, what in (("bytes_dense", "the checkpoint"), ("bytes_zstd", "it under zstd"))
        if found.get(key)
    ]
    yield f"bytes    {found['bytes']:,}: {', '.join(shares)}"
    if num:
        dense_from = found["dense_is_smaller_from"]
        when = (
            "never smaller" if dense_from is None else f"smaller from {percent(dense_from)} changed"
        )
        yield (
            f"         {found['bytes_per_change']:.3g} per changed weight; at that a copy of the "
            f"checkpoint is {when}"
        )
    if "encode_mb_per_s" in found:
        yield (
            f"speed    made at {found['encode_mb_per_s']:,.0f} MB of checkpoint a second (the base "
            f"fingerprinted too), applied and checked at {found['apply_mb_per_s']:,.0f}"
        )
