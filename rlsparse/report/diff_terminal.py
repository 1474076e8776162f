"""The diff of one pair on a terminal: Rich tables there, plain columns where stdout is piped."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from rlsparse.definitions import DEFINITIONS, REL_TOLERANCE
from rlsparse.diff import Diff, Row
from rlsparse.report import diff_rows
from rlsparse.report.formats import counted, definition, number, percent

MEASURES = ("weights", "unchanged bitwise", "|d| <= 1e-5", "||d||/||w||", "ULP")
MAX_NAMES = 5
"""Tensors named in a line about several."""
SPECTRUM_KEY = """\
ranks in per cent of full rank; null: as many weights moved by one ULP at random
NSS: relative drift of the singular values, beside that of noise of equal norm
lifts: changed weights among the principal or the smallest weights over chance; 1 = no preference"""


def make_console() -> Console:
    """Standard output: names are never markup, and no number is cut however narrow it is."""
    return Console(markup=False, emoji=False, highlight=False, width=10_000)


def print_diff(console: Console, diff: Diff, spectra: Sequence[Row] | None = None) -> None:
    """Print what was compared, every definition, modules, layers, and what to beware of.

    Args:
        console: see ``make_console``.
        diff: the diff.
        spectra: rows of table ``spectra``, where asked for.
    """
    rows = diff_rows.of_view(diff)
    _print_facts(console, diff)
    _print_sparsity(console, diff)
    _print_measures(console, "module", diff_rows.module_rows(rows))
    _print_measures(console, "layer", diff_rows.layer_rows(rows))
    if spectra:
        _print_spectra(console, spectra)
    console.print()
    for warning in diff_rows.warnings(diff, spectra or ()):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def print_tensors(console: Console, diff: Diff) -> None:
    """Print a line per tensor."""
    _print_measures(console, "tensor", diff_rows.tensor_rows(diff_rows.of_view(diff)))


def _print_facts(console: Console, diff: Diff) -> None:
    total = diff_rows.summarise(diff_rows.of_view(diff))
    lines = [
        f"{name:9}{side['path']} ({', '.join(side['num_elements_by_dtype'])}, "
        f"{counted(side['num_tensors'], 'tensor')}, {counted(side['num_elements'], 'weight')})"
        for name, side in (("before", diff.before), ("after", diff.after))
    ]
    lines.append(f"compared {counted(total['num_elements'], 'weight')}, view {diff.views[0]}")
    for row in diff_rows.accounting_rows(diff.accounting):
        if row["name"] not in ("compared", "total"):
            sides = {"before": row["num_before"], "after": row["num_after"]}
            counts = [f"{count:,} {side}" for side, count in sides.items() if count is not None]
            lines.append(f"  {row['name']}: {', '.join(counts)}{_named(row['tensors'])}")
    for row in diff_rows.matched_rows(diff.accounting):
        count = counted(len(row["tensors"]), "tensor")
        lines.append(f"  {count} {row['name']}{_named(row['tensors'])}")
    lines.append(
        f"changes  ||d||/||w|| {number(total['relative_change'])}, largest |d| "
        f"{number(total['max_abs_delta'])}, median {total['median_ulp'] or '-'} ULP, "
        f"{counted(total['num_sign_flips'], 'sign flip')}"
    )
    for line in lines:
        console.print(line, soft_wrap=True)


def _named(tensors: Sequence[str]) -> str:
    return f" ({diff_rows.shortened(tensors, MAX_NAMES)})" if tensors else ""


def _print_sparsity(console: Console, diff: Diff) -> None:
    by_view = diff_rows.sparsity_by_view(diff)
    lines = [
        [f"unchanged {name}", *(percent(by_view[view][name]) for view in diff.views)]
        for name in DEFINITIONS
    ]
    _print_table(console, ("definition", *diff.views), lines)
    relative = f"rel_{REL_TOLERANCE}"
    meaning = definition(relative).replace("Δ", "d").replace("≤", "<=")
    console.print(f"{relative}: {meaning}, w before and w' after", soft_wrap=True)


def _print_measures(console: Console, label: str, rows: Sequence[Row]) -> None:
    lines = [
        [
            row["name"],
            f"{row['num_elements']:,}",
            percent(row["sparsity"]["bitwise"]),
            percent(row["sparsity"]["abs_1e-05"]),
            number(row["relative_change"]),
            row["median_ulp"] or "-",
        ]
        for row in rows
    ]
    _print_table(console, (label, *MEASURES), lines)


def _print_spectra(console: Console, spectra: Sequence[Row]) -> None:
    if lines := diff_rows.spectrum_lines(spectra):
        _print_table(console, ("module", "matrices", *diff_rows.SPECTRUM), lines)
        console.print(SPECTRUM_KEY, soft_wrap=True)


def _print_table(console: Console, columns: Sequence[str], lines: Sequence[list[str]]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, show_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table)
