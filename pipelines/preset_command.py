"""``rlsparse preset``: published checkpoint pairs, and a check of what was published about them."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.diff_command import progress
from rlsparse.errors import ConfigError

if TYPE_CHECKING:
    from rlsparse.presets import Verification

app = typer.Typer(
    help="Published checkpoint pairs, compared with what was published.", no_args_is_help=True
)
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command("list")
def list_presets(as_json: AsJson = False) -> None:
    """Name the published pairs, with the share of weights published as unchanged (in %)."""
    from rlsparse.presets import load_presets, preset_rows

    presets = load_presets()
    if as_json:
        print(json.dumps([asdict(preset) for preset in presets], indent=1))
        return
    rows = preset_rows(presets)
    _print(rows, [name for name in rows[0] if name != "note"])
    for row in rows:
        if row["note"]:
            print(f"{row['preset']}: {row['note']}")


@app.command("verify")
def verify_preset(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    before: Annotated[
        str | None, typer.Option(help="The checkpoint before, instead of the hub's.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="The checkpoint after, instead of the hub's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a published pair and compare with the published numbers; exit code 1 if they differ.

    Fetches the pair from the hub unless --before and --after name folders.
    """
    from rlsparse.presets import find_preset, verify

    preset = find_preset(name)
    one, other = before or preset.before, after or preset.after
    if not one:
        raise ConfigError(f"no repository is known for {name}; give --before and --after")
    from rlsparse.diff import diff_checkpoints

    casts = [preset.cast] if preset.cast else []
    with progress("compare") as on_progress:
        result = diff_checkpoints(one, other, casts=casts, on_progress=on_progress)
    verification = verify(preset, result.to_json())
    if as_json:
        print(json.dumps({**asdict(verification), "passed": verification.passed}, indent=1))
    else:
        _print_verification(verification, one, other)
    if verification.passed is False:
        raise SystemExit(1)


def _print_verification(verification: "Verification", before: str, after: str) -> None:
    from rlsparse.presets import verification_rows

    preset = verification.preset
    print(f"{preset.name}: {before} -> {after}, unchanged weights in %, {preset.source}")
    rows = verification_rows(verification)
    _print(rows, list(rows[0]))
    if preset.note:
        print(preset.note)
    verdicts = {True: "agrees with", False: "DIFFERS from", None: "cannot be checked against"}
    print(f"{preset.name} {verdicts[verification.passed]} what was published")


def _print(rows: list[dict[str, Any]], columns: list[str]) -> None:
    from rich.table import Table

    from rlsparse.report.diff_terminal import make_console

    table = Table(box=None, pad_edge=False)
    for column in columns:
        numbers = all(row[column].lstrip("+-").replace(".", "").isdecimal() for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    make_console().print(table, markup=False)
