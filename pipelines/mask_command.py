"""``rlsparse mask``: makes subnetwork masks, and says what is in one.

What masks are made of is ``rlsparse.mask_making``.
"""

import json
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlsparse.definitions import MASK_SUFFIX, VIEWS, Direction, Size, Take
from rlsparse.errors import ConfigError, PatchError, StorageError

if TYPE_CHECKING:
    from rlsparse.masks import Mask, MaskFile

app = typer.Typer(
    help="Make masks of subnetworks: what training changed, and controls of equal density.",
    no_args_is_help=True,
)

Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="OUT", show_default=False, help=f"File, *{MASK_SUFFIX}."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT.")]
MaskPath = Annotated[
    Path, typer.Argument(metavar="MASK", show_default=False, help=f"Mask file, *{MASK_SUFFIX}.")
]
Base = Annotated[
    str, typer.Option(show_default=False, help="The checkpoint whose weights the mask selects.")
]
Seed = Annotated[int, typer.Option(show_default=False, help="Another seed, another mask.")]


class Operation(StrEnum):
    """How masks are combined."""

    UNION = "union"
    INTERSECTION = "intersection"
    DIFFERENCE = "difference"


@app.command("from-diff")
def from_diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", show_default=False)],
    after: Annotated[
        str,
        typer.Argument(metavar="AFTER", show_default=False, help="Checkpoint or patch after it."),
    ],
    out: Out,
    view: Annotated[
        str, typer.Option(help=f"Format in which weights are compared: {', '.join(VIEWS)}.")
    ] = "stored",
    force: Force = False,
) -> None:
    """What differs bitwise between two checkpoints."""
    if view not in VIEWS:
        raise ConfigError(f"--view {view}: choose of {', '.join(VIEWS)}")
    from rlsparse.mask_making import changed

    _check_out(out, force)
    _write(changed(before, after, view), out)


@app.command("from-trial")
def from_trial(
    study: Annotated[str, typer.Argument(metavar="STUDY_DIR", show_default=False)],
    trial: Annotated[
        str, typer.Argument(metavar="TRIAL", show_default=False, help="Its id, or a prefix.")
    ],
    out: Out,
    take: Annotated[
        Take,
        typer.Option(help="What differed from the base after the last step, after another, ever."),
    ] = Take.FINAL,
    step: Annotated[int | None, typer.Option(help="Of the snapshot.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Of training, at whose end the snapshot was taken.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it lies elsewhere now.")] = None,
    force: Force = False,
) -> None:
    """What a trial of a study changed; of another seed, algorithm or task: a transfer mask."""
    if [step, fraction].count(None) != (1 if take is Take.SNAPSHOT else 2):
        raise ConfigError(
            f"--take {take}: give --step or --fraction with --take snapshot, one of them, and "
            "neither with the others"
        )
    from pipelines.storage import Storage
    from pipelines.subnetworks import remedied
    from rlsparse.mask_making import of_trial, step_of

    storage = Storage(study)
    _check_out(out, force)
    name = _trial_id(storage, trial)
    with storage.local_copy(f"trials/{name}") as folder:
        at = step if fraction is None else step_of(folder, fraction)
        with remedied(storage, name, PatchError) if base is None else nullcontext():
            mask = of_trial(folder, take, step=at, base=base)
        _write(mask, out)


@app.command("random")
def random(
    mask: MaskPath,
    seed: Seed,
    out: Out,
    within_magnitude: Annotated[
        bool,
        typer.Option("--within-magnitude", help="As dense in each power of two of |w|, too."),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Its weights, for --within-magnitude alone.")
    ] = None,
    force: Force = False,
) -> None:
    """Random weights, in each tensor as many as MASK has there."""
    if within_magnitude is (base is None):
        raise ConfigError("--within-magnitude and --base go together: give both, or neither")
    from rlsparse.mask_making import random_like, random_within_magnitude
    from rlsparse.masks import read_masks

    _check_out(out, force)
    given = read_masks(mask)
    if base is None:
        _write(random_like(given, seed), out)
    else:
        _write(random_within_magnitude(given, base, seed), out)


@app.command("uniform")
def uniform(
    base: Annotated[str, typer.Argument(metavar="BASE", show_default=False)],
    density: Annotated[float, typer.Option(show_default=False, help="Above 0 and below 1.")],
    seed: Seed,
    out: Out,
    force: Force = False,
) -> None:
    """Random weights, the same share of each tensor."""
    from rlsparse import mask_making

    _check_out(out, force)
    _write(mask_making.uniform(base, density, seed), out)


@app.command("magnitude")
def magnitude(
    mask: MaskPath,
    base: Base,
    pick: Annotated[Size, typer.Option(show_default=False)],
    out: Out,
    force: Force = False,
) -> None:
    """The smallest or largest |w| of the base, in each tensor as many as MASK has there."""
    from rlsparse.mask_making import by_magnitude
    from rlsparse.masks import read_masks

    _check_out(out, force)
    _write(by_magnitude(read_masks(mask), base, pick), out)


@app.command("principal")
def principal(
    mask: MaskPath,
    base: Base,
    pick: Annotated[Direction, typer.Option(show_default=False)],
    out: Out,
    force: Force = False,
) -> None:
    """The most or least principal weights of the base, in each tensor as many as MASK has there."""
    from rlsparse.mask_making import by_direction
    from rlsparse.masks import read_masks

    _check_out(out, force)
    _write(by_direction(read_masks(mask), base, pick), out)


@app.command("combine")
def combine(
    operation: Annotated[Operation, typer.Argument(show_default=False)],
    masks: Annotated[list[Path], typer.Argument(metavar="MASK MASK ...", show_default=False)],
    out: Out,
    force: Force = False,
) -> None:
    """Weights in any, in all, or in the first and no other of several masks of one model."""
    from rlsparse.mask_making import difference, intersection, union
    from rlsparse.masks import read_masks

    _check_out(out, force)
    functions = {
        Operation.UNION: union,
        Operation.INTERSECTION: intersection,
        Operation.DIFFERENCE: difference,
    }
    _write(functions[operation]([read_masks(mask) for mask in masks]), out)


@app.command("complement")
def complement(mask: MaskPath, out: Out, force: Force = False) -> None:
    """Weights that are not in MASK."""
    from rlsparse import mask_making
    from rlsparse.masks import read_masks

    _check_out(out, force)
    _write(mask_making.complement(read_masks(mask)), out)


@app.command("info")
def info(
    mask: MaskPath,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What is in a mask file: its notes, and how dense it is by module."""
    from rlsparse.masks import read_masks

    file = read_masks(mask)
    if not as_json:
        _print(file)
        return
    content = {
        "mask": str(mask),
        "base_fingerprint": file.base_fingerprint,
        "metadata": file.metadata,
        "modules": _modules(file),
    }
    print(json.dumps(content, indent=1))


# --- small parts -----------------------------------------------------------------------------


def _trial_id(storage: Any, prefix: str) -> str:
    """The one finished trial of a study whose id begins so."""
    if not storage.exists(""):
        raise ConfigError(
            f"{storage.url}: no such folder; give that of a study that has run, such as runs/NAME"
        )
    trials = storage.list("trials")
    found = [trial for trial in trials if prefix and trial.startswith(prefix)]
    if len(found) != 1:
        what = f"{len(found)} trials: {', '.join(found)}" if found else "no trial"
        raise ConfigError(
            f"{prefix!r} names {what} in {storage.url}; give enough of one id of "
            f"{', '.join(trials[:5]) or 'a study that has run'}{', ...' if trials[5:] else ''}"
        )
    if not storage.is_done(f"trials/{found[0]}"):
        raise ConfigError(f"trial {found[0]} is not done; `rlsparse run` its study again")
    return str(found[0])


def _check_out(out: Path, force: bool) -> None:
    """Refuse now what could not be written after minutes of work."""
    if not out.name.endswith(MASK_SUFFIX):
        raise ConfigError(
            f"-o {out}: mask files are called *{MASK_SUFFIX}, by which they are known"
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"-o {out}: no file in a folder that is there; make the folder first")
    if out.exists() and not force:
        raise ConfigError(f"-o {out} is there already; give another file, or --force")


def _write(mask: "Mask", out: Path) -> None:
    from rlsparse.mask_making import write
    from rlsparse.masks import read_masks

    try:
        write(out, mask)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}") from error
    _print(read_masks(out))


def _modules(file: "MaskFile") -> list[dict[str, Any]]:
    """Counts by module, and of all weights (module None) last."""
    import math

    from rlsparse.kernels import popcount
    from rlsparse.names import layer_and_module

    rows: dict[str | None, dict[str, Any]] = {}
    for name, shape in file.shapes.items():
        num_selected = popcount(file.packed(name))
        for module in (layer_and_module(name, shape)[1], None):
            empty = {"module": module, "num_tensors": 0, "num_elements": 0, "num_selected": 0}
            row = rows.setdefault(module, empty)
            row["num_tensors"] += 1
            row["num_elements"] += math.prod(shape)
            row["num_selected"] += num_selected
    for row in rows.values():
        row["density"] = row["num_selected"] / row["num_elements"] if row["num_elements"] else None
    return [*(rows[module] for module in sorted(m for m in rows if m)), rows[None]]


def _print(file: "MaskFile") -> None:
    from rich.table import Table

    from rlsparse.report.diff_terminal import make_console
    from rlsparse.report.formats import percent

    lines = {"mask": file.path, "base": file.base_fingerprint[:12] or "several", **file.metadata}
    for word, text in lines.items():
        print(f"{word:16} {text}")
    table = Table(box=None, pad_edge=False)
    for column in ("module", "tensors", "weights", "in mask", "density"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for row in _modules(file):
        counts = (f"{row[key]:,}" for key in ("num_tensors", "num_elements", "num_selected"))
        table.add_row(row["module"] or "all", *counts, percent(row["density"]))
    make_console().print(table)
