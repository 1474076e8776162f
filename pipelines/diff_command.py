"""``rlsparse diff``: reads the arguments, shows progress and prints the result.

The command is registered in ``cli``; what it measures is ``rlsparse.diff``.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.json_option import write_json
from rlsparse.definitions import VIEWS
from rlsparse.errors import ConfigError, RlsparseError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from rlsparse.diff import Diff, Row
    from rlsparse.matching import TensorPair

OnProgress = Callable[[int, int], None]

PROGRESS_BYTES = 200_000_000
"""Less work than this is done before a progress bar would be read."""
TORCH_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    "float8_e4m3fn": "fp8_e4m3",
}  # fmt: skip
"""PyTorch's names of number formats, as the published script takes them."""
PAGE_TABLES = ("base_tensors", "stripes")
"""Tables that only ``--out`` needs."""


BEFORE = typer.Argument(metavar="BEFORE", help="Checkpoint to compare with.", show_default=False)
AFTER = typer.Argument(metavar="AFTER", help="Checkpoint or patch after it.", show_default=False)
JSON = typer.Option(
    "--json", metavar="PATH",
    help="Write the result here; - is standard output. Besides the counts under every definition: "
    "totals, modules, layers and warnings, as printed.",
)  # fmt: skip
CAST = typer.Option(
    metavar="DTYPE",
    help=f"Round both sides to this first: {', '.join(VIEWS[1:])}; may be repeated.",
)
SPECTRUM = typer.Option(
    help="Rank and singular values of the update. exact: every matrix by SVD; auto: those with "
    "both sides above 512 by their Gram matrix, faster, within about 1e-8 of the largest singular "
    "value."
)


class Spectrum(StrEnum):
    """How the singular values of the update are found."""

    OFF = "off"
    AUTO = "auto"
    EXACT = "exact"


def diff(
    before: Annotated[str | None, BEFORE] = None,
    after: Annotated[str | None, AFTER] = None,
    json_path: Annotated[str | None, JSON] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder for Parquet tables, diff.json, index.html."),
    ] = None,
    cast: Annotated[list[str] | None, CAST] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="AFTER_PREFIX=BEFORE_PREFIX", help="Tensors renamed; repeatable."),
    ] = None,
    spectrum: Annotated[Spectrum, SPECTRUM] = Spectrum.OFF,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="Print a line per tensor too.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores at hand.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the work over Ray, started here if need be.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Ray cluster for --ray, such as auto.")
    ] = None,
    sft_model: Annotated[str | None, typer.Option("--sft_model", hidden=True)] = None,
    rl_model: Annotated[str | None, typer.Option("--rl_model", hidden=True)] = None,
    torch_dtype: Annotated[str | None, typer.Option("--torch_dtype", hidden=True)] = None,
    tolerances: Annotated[str | None, typer.Option("--tolerances", hidden=True)] = None,
) -> None:
    """Say what changed between two checkpoints: folders, files, hub ids id@revision or URLs."""
    if tolerances is not None:
        raise ConfigError("--tolerances is not needed: all are always reported; leave it out")
    first = _one_of(before, sft_model, "BEFORE", "--sft_model")
    second = _one_of(after, rl_model, "AFTER", "--rl_model")
    _check_outputs(json_path, out)
    if address is not None and not ray:
        raise ConfigError(f"--address {address} is only for --ray; add it")
    casts = _formats([*(cast or []), *([] if torch_dtype is None else [torch_dtype])])
    measure = partial(
        partial(_measure_on_ray, address=address) if ray else _measure, first, second,
        aliases=_aliases(alias or []), num_threads=threads,
        casts=casts,
        extra_tables=PAGE_TABLES if out else (),
    )  # fmt: skip
    if (done := _unless_interrupted(measure, spectrum, out)) is None:
        print("rlsparse: interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130)
    result, spectra, page = done
    if json_path is not None:
        _write_json(json_path, result, spectra)
    if json_path != "-":
        _print(result, spectra, page, per_tensor)


# --- arguments -------------------------------------------------------------------------------


def _one_of(argument: str | None, option: str | None, name: str, flag: str) -> str:
    """The argument, or the flag of the published script that means the same."""
    given = [value for value in (argument, option) if value]
    if len(given) != 1:
        problem = "is missing" if not given else f"is given twice, also as {flag} {option}"
        raise ConfigError(f"{name} {problem}; usage: rlsparse diff BEFORE AFTER")
    return given[0]


def _formats(given: Sequence[str]) -> list[str]:
    """Number formats to round to; those of PyTorch under their names here."""
    from rlsparse.views import check_view

    casts = [TORCH_DTYPES.get(name, name) for name in given]
    for cast in casts:
        check_view(cast, VIEWS[1:])
    return casts


def _aliases(given: Sequence[str]) -> dict[str, str]:
    """Prefix after -> prefix before, of ``AFTER_PREFIX=BEFORE_PREFIX``; either may be empty."""
    for alias in given:
        if alias.count("=") != 1 or alias == "=":
            raise ConfigError(
                f"--alias {alias}: must be AFTER_PREFIX=BEFORE_PREFIX, such as model.llm.=model."
            )
    aliases = dict(alias.split("=") for alias in given)
    if len(aliases) != len(given):
        raise ConfigError(f"--alias names a prefix twice: {', '.join(given)}; give each once")
    return aliases


def _check_outputs(json_path: str | None, out: Path | None) -> None:
    """Refuse now what could not be written after minutes of work."""
    if json_path not in (None, "-"):
        _check_json(str(json_path), out)
    if out is None:
        return
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(".")):
            raise ConfigError(f"--out {out} exists and is not an empty folder; give a new one")
        ancestor = next(folder for folder in out.resolve().parents if folder.exists())
        tempfile.TemporaryDirectory(dir=ancestor).cleanup()
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror}; give a new folder to --out"
        ) from error


def _check_json(json_path: str, out: Path | None) -> None:
    path = Path(json_path)
    problem = None
    if not json_path:
        raise ConfigError("--json is empty; give a file, or - for standard output")
    try:
        if path.is_dir() or (out is not None and path.resolve() == out.resolve()):
            problem = "it is a folder"
        elif not path.absolute().parent.is_dir():
            problem = "no such folder"
        elif path.exists():
            problem = None if os.access(path, os.W_OK) else "permission denied"
        else:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ConfigError(f"cannot write {json_path}: {problem}; give another --json")


# --- work ------------------------------------------------------------------------------------


def _unless_interrupted(
    measure: "Callable[[], Diff]", spectrum: Spectrum, out: Path | None
) -> "tuple[Diff, list[Row] | None, Path | None] | None":
    """The diff, its spectra and its page, as far as asked for; None after Ctrl-C.

    A result, not an exception: that would keep the threads at work, and their queue, alive.
    """
    try:
        result = measure()
        spectra = None if spectrum is Spectrum.OFF else _spectra(result, spectrum)
        return result, spectra, None if out is None else _write_folder(out, result, spectra)
    except KeyboardInterrupt:
        return None


def _measure(before: str, after: str, **options: Any) -> "Diff":
    from rlsparse.diff import diff_checkpoints

    with progress("compare") as on_progress:
        return diff_checkpoints(before, after, on_progress=on_progress, **options)


def _measure_on_ray(
    before: str, after: str, *, address: str | None, num_threads: int | None, **options: Any
) -> "Diff":
    from pipelines.session import RaySession
    from rlsparse.diff import plan_diff

    if num_threads is not None:
        raise ConfigError("--threads: with --ray a task has one core; leave one of the two out")
    plan_diff(before, after, **options)  # mistakes are told before Ray starts
    with RaySession(address) as session, progress("compare") as on_progress:
        session.start()
        from pipelines.pairs import diff_pairs

        (result,) = diff_pairs([(before, after)], on_progress=on_progress, **options)
    if isinstance(result, RlsparseError):
        raise result
    return result


def _spectra(result: "Diff", method: Spectrum) -> "list[Row]":
    from rlsparse.kernels import FLOATS
    from rlsparse.spectrum import spectrum_rows

    costs = {
        tensor["name"]: _cost(tensor["shape"]) if tensor["sparsity"]["bitwise"] < 1 else 0
        for tensor in result.tensors
    }
    matrices = [
        (pair, costs[pair.name])
        for pair in result.pairs
        if len(pair.shape) > 1
        and math.prod(pair.shape) > 0
        and {pair.before.dtype, pair.after.dtype} <= FLOATS.keys()
    ]
    with _announced(matrices) as pairs:
        return spectrum_rows(pairs, view=result.views[0], method=method.value)


def _cost(shape: Sequence[int]) -> int:
    """What a decomposition costs, but for a factor: m n min(m, n)."""
    num_elements = math.prod(shape)
    return num_elements * min(shape[0], num_elements // max(shape[0], 1))


# --- progress --------------------------------------------------------------------------------


@contextmanager
def progress(label: str) -> Iterator[OnProgress | None]:
    """A bar with bytes, speed and time left on a terminal, if the work is worth one."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    bar = _bar(DownloadColumn(), TransferSpeedColumn())
    task = bar.add_task(label)

    def advance(done: int, total: int) -> None:
        if total >= PROGRESS_BYTES:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def _announced(
    matrices: "Sequence[tuple[TensorPair, int]]",
) -> "Iterator[Iterable[TensorPair]]":
    """The pairs, each with its number on a bar that counts their costs, on a terminal."""
    if not sys.stderr.isatty():
        yield (pair for pair, _ in matrices)
        return
    from rich.progress import TaskProgressColumn

    bar = _bar(TaskProgressColumn())
    bar.speed_estimate_period = math.inf  # one matrix can take minutes
    task = bar.add_task("spectrum", total=sum(cost for _, cost in matrices))
    bar.advance(task, 0)  # else the first matrix would not count for the speed

    def numbered() -> "Iterator[TensorPair]":
        for number, (pair, cost) in enumerate(matrices, 1):
            bar.update(task, description=f"spectrum, matrix {number} of {len(matrices)}")
            yield pair
            bar.advance(task, cost)

    with bar:
        yield numbered()


def _bar(*columns: "ProgressColumn") -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


# --- results ---------------------------------------------------------------------------------


def _write_folder(out: Path, result: "Diff", spectra: "list[Row] | None") -> Path:
    from rlsparse.report.diff_page import write_diff

    return write_diff(result, out, spectra=spectra)


def _write_json(path: str, result: "Diff", spectra: "list[Row] | None") -> None:
    from rlsparse.report.diff_rows import json_content

    write_json(path, json.dumps(json_content(result, spectra), allow_nan=False))


def _print(
    result: "Diff", spectra: "list[Row] | None", page: Path | None, per_tensor: bool
) -> None:
    from rlsparse.report import diff_terminal

    console = diff_terminal.make_console()
    diff_terminal.print_diff(console, result, spectra)
    if per_tensor:
        diff_terminal.print_tensors(console, result)
    if page is not None:
        console.print(f"page     xdg-open {page}", soft_wrap=True)
