"""What the diff of one pair says, as plain rows: the one source of its page and of the terminal.

Light: imports neither matplotlib nor pyarrow. Fractions lie in [0, 1]; what is unknown is ``None``.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsparse.definitions import DEFINITIONS, MODULES, ULP_BINS
from rlsparse.diff import Diff, Row
from rlsparse.placement import Stripes, measure_stripes
from rlsparse.report.formats import counted, finite, number, percent
from rlsparse.spectrum import adapter_hint

ALL = "all"
"""Name of the row that sums the others up."""
ACCOUNTED: tuple[tuple[str, str | None, str | None, str | None], ...] = (
    ("compared", "compared", "compared", None),
    ("tied to a tensor counted already", "tied_before", "tied_after", "tied_tensors"),
    ("only before", "removed", None, "removed_tensors"),
    ("only after", None, "added", "added_tensors"),
    ("of another shape", "reshaped_before", "reshaped_after", "reshaped_tensors"),
    ("total", "total_before", "total_after", None),
)
"""What becomes of every stored weight: its name, the keys of ``Diff.accounting`` for the elements
before and after, and for the names of the tensors."""
MATCHED = {
    "renamed_tensors": "compared under another name",
    "mapped_tensors": "compared with parts of fused or split tensors",
    "resized_tensors": "compared in their common rows",
}
"""Keys of ``Diff.accounting``: tensors that were compared, though not simply name with name."""

MAX_PARTS = 3
"""A fused tensor of more parts is named with the first of them only."""

_FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})
HELD: dict[str, frozenset[str]] = {
    "fp32": frozenset({"fp32", "bf16", "fp16"}) | _FP8,
    "bf16": frozenset({"bf16"}) | _FP8,
    "fp16": frozenset({"fp16"}) | _FP8,
    "fp8_e4m3": frozenset({"fp8_e4m3"}),
}
"""View -> stored formats all of whose values it holds exactly."""
CODES = ("fp8_", "i8", "u8", "i32")
"""How formats begin that may hold the codes of quantised weights."""
SCALES = ("weight_scale_inv", "weight_scale", "scales", "qzeros", "absmax")
"""How names end of the tensors that give such codes their values."""

SPECTRUM: dict[str, tuple[str, str]] = {
    "rank": ("update", "rank_share_default"),
    "rank, null": ("null", "rank_share_default"),
    "99 % energy": ("update", "energy_rank_share"),
    "99 % energy, null": ("null", "energy_rank_share"),
    "stable rank": ("update", "stable_rank"),
    "NSS": ("update", "nss"),
    "NSS, noise": ("update", "nss_random"),
    "principal lift": ("update", "principal_lift_in_decile"),
    "low-|w| lift": ("update", "low_lift_in_decile"),
}
"""Headings for readers -> kind of row and column of table ``spectra``."""
RANKS = ("rank", "rank, null", "99 % energy", "99 % energy, null")
"""Headings whose values are shares of the full rank."""


def of_view(diff: Diff, view: str | None = None) -> list[Row]:
    """Rows of ``tensor_deltas`` of one view, by default the primary one."""
    view = view or diff.views[0]
    return [row for row in diff.tables["tensor_deltas"] if row["view"] == view]


def summarise(rows: Sequence[Row]) -> Row:
    """Totals over rows of ``tensor_deltas`` of one view.

    Returns:
        ``num_elements``; ``sparsity`` by definition; ``relative_change``, the Frobenius norm of
        the difference over that of the weights before; ``ulp_histogram``; ``median_ulp``, the bin
        of ``ULP_BINS`` with the median of the changed weights; ``max_abs_delta``;
        ``num_sign_flips``, ``num_zero_sign_flips``, ``num_nonfinite`` and ``num_nan``.
    """
    total = {
        key: sum(row[key] for row in rows)
        for key in ("num_elements", "num_sign_flips", "num_zero_sign_flips", "num_nonfinite",
                    "num_nan", *(f"num_changed_{name}" for name in DEFINITIONS))
    }  # fmt: skip
    ulps = histogram(rows, "ulp_histogram", len(ULP_BINS))
    sum_sq, sum_sq_delta = (
        math.fsum(row[key] for row in rows) for key in ("sum_sq_before", "sum_sq_delta")
    )
    return {
        "num_elements": total["num_elements"],
        "sparsity": {
            name: 1 - total[f"num_changed_{name}"] / max(total["num_elements"], 1)
            for name in DEFINITIONS
        },
        "relative_change": math.sqrt(sum_sq_delta / sum_sq) if sum_sq > 0 else None,
        "ulp_histogram": ulps.tolist(),
        "median_ulp": ULP_BINS[int(np.searchsorted(ulps.cumsum(), ulps.sum() / 2))]
        if ulps.any()
        else None,
        "max_abs_delta": max((row["max_abs_delta"] for row in rows), default=0.0),
        **{key: count for key, count in total.items() if not key.startswith("num_changed_")},
    }


def histogram(rows: Iterable[Row], column: str, num_bins: int) -> NDArray[np.int64]:
    """Sum of a histogram column, shape [num_bins]."""
    total = np.zeros(num_bins, np.int64)
    for row in rows:
        total += row[column]
    return total


def module_rows(rows: Sequence[Row]) -> list[Row]:
    """``summarise`` per kind of module, in the order of ``MODULES``, and of all; key ``name``."""
    groups = _grouped(rows, lambda row: row["module"])
    kinds = [name for name in MODULES if name in groups]
    return [*(_named(name, groups[name]) for name in kinds), _named(ALL, rows)]


def layer_rows(rows: Sequence[Row]) -> list[Row]:
    """``summarise`` per layer; norms of all layers, and what is outside of them, by kind apart.

    The groups share no weight, and together they hold all; ``name`` is the number of the layer as
    text, or the kind of module.
    """
    layers = _grouped(rows, lambda row: None if row["module"] == "norm" else row["layer"])
    rest = _grouped(layers.pop(None, []), lambda row: row["module"])
    return [
        *(_named(str(layer), layers[layer]) for layer in sorted(layers)),
        *(_named(name, rest[name]) for name in MODULES if name in rest),
    ]


def tensor_rows(rows: Sequence[Row]) -> list[Row]:
    """``summarise`` per tensor, in order of first appearance, and its ``module``."""
    groups = _grouped(rows, lambda row: row["tensor"])
    return [_named(name, of) | {"module": of[0]["module"]} for name, of in groups.items()]


def cell_rows(rows: Sequence[Row]) -> list[Row]:
    """Density by layer and module, for the heat map: ``layer``, ``module``, ``density``."""
    groups = _grouped(rows, lambda row: (row["layer"], row["module"]))
    return [
        {"layer": layer, "module": module, "density": 1 - summarise(of)["sparsity"]["bitwise"]}
        for (layer, module), of in groups.items()
    ]


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _named(name: str, rows: Sequence[Row]) -> Row:
    return {"name": name, **summarise(rows)}


def accounting_rows(accounting: Row) -> list[Row]:
    """Where every stored weight went: ``name``, ``num_before``, ``num_after``, ``tensors``.

    Parts without a weight and without a tensor are left out; a count that a part cannot have is
    ``None``.
    """
    rows = [
        {
            "name": name,
            "num_before": accounting[before] if before else None,
            "num_after": accounting[after] if after else None,
            "tensors": list(accounting[tensors]) if tensors else [],
        }
        for name, before, after, tensors in ACCOUNTED
    ]
    return [row for row in rows if row["num_before"] or row["num_after"] or row["tensors"]]


def matched_rows(accounting: Row) -> list[Row]:
    """Tensors not simply compared name with name: ``name`` says how, ``tensors`` which."""
    return [
        {"name": name, "tensors": _arrows(accounting[key])}
        for key, name in MATCHED.items()
        if accounting[key]
    ]


def _arrows(tensors: Sequence[str] | Mapping[str, str | Sequence[str]]) -> list[str]:
    """Names, of a mapping with what each corresponds to."""
    if not isinstance(tensors, Mapping):
        return list(tensors)
    parts = {
        name: [other] if isinstance(other, str) else list(other) for name, other in tensors.items()
    }
    return [
        f"{name} = {' + '.join(of)}"
        if len(of) <= MAX_PARTS
        else f"{name} = {of[0]} + {len(of) - 1:,} more"
        for name, of in parts.items()
    ]


def shortened(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def sparsity_by_view(diff: Diff) -> dict[str, dict[str, float]]:
    """Fraction of the compared weights that is unchanged: view -> definition -> fraction."""
    return {view: summarise(of_view(diff, view))["sparsity"] for view in diff.views}


def stripe_rows(stripes: Sequence[Row]) -> list[Row]:
    """Stripes per kind of module, under the names of ``spectrum.Stripes``: medians over tensors."""
    measured = [
        {**row, **asdict(measure_stripes(row["row_counts"], row["column_counts"]))}
        for row in stripes
        if row["num_rows"] > 1 and row["num_columns"] > 1
    ]
    return _medians(measured, [field.name for field in fields(Stripes)])


def spectrum_rows(spectra: Sequence[Row]) -> list[Row]:
    """Medians of ``SPECTRUM`` per kind of module; ranks are shares of the full rank.

    Matrices with non-finite weights have no spectrum and are left out.
    """
    finite_rows = [row for row in spectra if not row["num_nonfinite"]]
    for_readers = [
        {"tensor": row["tensor"], "module": row["module"]}
        | {title: row[column] for title, (kind, column) in SPECTRUM.items() if kind == row["kind"]}
        for row in (row | {"energy_rank_share": _energy_rank_share(row)} for row in finite_rows)
    ]
    return _medians(for_readers, tuple(SPECTRUM))


def spectrum_lines(spectra: Sequence[Row]) -> list[list[str]]:
    """``spectrum_rows`` in words, under the headings module, matrices and ``SPECTRUM``."""
    return [
        [
            row["name"],
            f"{row['tensors']:,}",
            *(_rank(row[title]) if title in RANKS else number(row[title]) for title in SPECTRUM),
        ]
        for row in spectrum_rows(spectra)
    ]


def _rank(share: float | None) -> str:
    return "100 %" if share == 1 else percent(share)


def _energy_rank_share(row: Row) -> float:
    num_rows, *rest = row["shape"]
    return float(row["energy_rank"] / min(num_rows, math.prod(rest)))


def _medians(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Per kind of module (``name``) its ``tensors`` and the median of each key, where known."""
    groups = _grouped(rows, lambda row: row["module"])
    known = {
        (name, key): [row[key] for row in of if row.get(key) is not None]
        for name, of in groups.items()
        for key in keys
    }
    return [
        {"name": name, "tensors": len({row["tensor"] for row in groups[name]})}
        | {key: float(np.median(of)) if (of := known[name, key]) else None for key in keys}
        for name in MODULES
        if name in groups
    ]


def warnings(diff: Diff, spectra: Sequence[Row] = ()) -> list[str]:
    """What a reader must know before quoting the numbers, one sentence each.

    Args:
        diff: the diff.
        spectra: rows of table ``spectra``, as far as made; they tell merged adapters, and
            matrices without a spectrum.
    """
    total, view = summarise(of_view(diff)), diff.views[0]
    before, after = (sorted(side["num_elements_by_dtype"]) for side in (diff.before, diff.after))
    zeros = counted(total["num_zero_sign_flips"], "zero")
    no_spectrum = sum(row["num_nonfinite"] > 0 for row in spectra)
    found: list[tuple[object, str | None]] = [
        (sentence := _rounding(diff), sentence),
        (
            before == after == ["fp32"] and view in ("stored", "fp32"),
            "stored in fp32, where training changes nearly every weight; --cast bf16 tells what a "
            "server in bf16 sees",
        ),
        (scales := _num_scales(diff), f"{CODES_COMPARED} ({counted(scales, 'scale tensor')})"),
        (
            total["num_nonfinite"],
            f"{counted(total['num_nonfinite'], 'weight')} with NaN or infinity on a side "
            f"({total['num_nan']:,} NaN): changed where the bits differ",
        ),
        (
            total["num_zero_sign_flips"],
            f"{zeros} changed sign only: changed bitwise, unchanged within every tolerance",
        ),
        (
            total["sparsity"]["bitwise"] == 1,
            "no compared weight differs in any bit"
            + ("" if view == "stored" else f" after rounding to {view}"),
        ),
        (hint := adapter_hint(spectra), hint),
        (
            no_spectrum,
            f"{counted(no_spectrum, 'matrix holds', 'matrices hold')} NaN or infinities: no "
            "spectrum",
        ),
    ]
    return [sentence for holds, sentence in found if holds and sentence]


def _rounding(diff: Diff) -> str | None:
    """What to say where two formats meet in a view that does not hold all values of both."""
    view = diff.views[0]
    mixed = [
        (tensor["dtype_before"], tensor["dtype_after"])
        for tensor in diff.tensors
        if tensor["dtype_before"] != tensor["dtype_after"]
    ]
    if all(HELD[view] >= set(formats) for formats in mixed):
        return None
    before, after = (", ".join(sorted(set(side))) for side in zip(*mixed, strict=True))
    return (
        f"stored as {before} before and {after} after, compared as {view}: rounding to it can hide "
        "changes, and make some"
    )


CODES_COMPARED = (
    "quantised weights are compared code by code, not by the values that the codes stand for; "
    "dequantise both sides to compare values"
)


def _num_scales(diff: Diff) -> int:
    """Tensors on either side that scale codes; 0 where no codes are compared."""
    formats = {tensor[key] for tensor in diff.tensors for key in ("dtype_before", "dtype_after")}
    if not any(dtype.startswith(CODES) for dtype in formats):
        return 0
    alone = (diff.accounting[f"{part}_tensors"] for part in ("removed", "added", "reshaped"))
    names = {tensor["name"] for tensor in diff.tensors}.union(*alone)
    return sum(name.endswith(SCALES) for name in names)


def json_content(diff: Diff, spectra: Sequence[Row] | None) -> Row:
    """What ``--json`` writes: ``Diff.to_json``, and what is printed besides, in the primary view.

    - ``totals``: ``summarise`` of all compared weights.
    - ``modules``, ``layers``: the same per kind of module and per layer, in lists, with ``name``.
    - ``warnings``: sentences.
    - ``spectra``: rows of that table, if they were made.

    Plain JSON: NaN and infinities are None.
    """
    rows = of_view(diff)
    content = diff.to_json() | {
        "totals": summarise(rows),
        "modules": module_rows(rows),
        "layers": layer_rows(rows),
        "warnings": warnings(diff, spectra or ()),
    }
    content |= {} if spectra is None else {"spectra": list(spectra)}
    return {key: finite(value) for key, value in content.items()}
