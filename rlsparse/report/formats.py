"""How the report writes numbers; also for the terminal, so that both say the same."""

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "\N{EN DASH}"
"""What stands where there is no value."""


def percent(value: float | None) -> str:
    """A fraction as a percentage, with at least two digits of its distance from 0 and from 1.

    Exactly 1 is ``100 % (exact)``, so that .99996 is never taken for it.
    """
    if value is None:
        return NOTHING
    if value == 1:
        return "100 % (exact)"
    distance = min(abs(value), abs(1 - value))
    digits = max(2, math.ceil(-math.log10(100 * distance)) + 1) if distance else 0
    return f"{100 * value:.{digits}f} %"


def score(value: float | None) -> str:
    """A score, the fraction of problems solved, as a percentage with one decimal."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def number(value: Any) -> str:
    """A float with three significant digits, anything else as it is."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.3g}"
    return str(value)


def measured(value: float | None) -> str:
    """A measured number with three significant digits, so that those of a column line up."""
    if value is None or not math.isfinite(value) or value == round(value):
        return number(value)
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, decimals)}f}" if decimals < 7 else number(value)


def interval_texts(value: Any, low: Any, high: Any) -> tuple[str, str, str]:
    """An estimate and the ends of its interval, all with the decimals of three digits of the first.

    Of an estimate that is small beside its interval, with those of half the interval's width; of
    an interval that is narrow beside it, with one more, so that .995 is not read as 1.
    """
    known = all(isinstance(v, float) and math.isfinite(v) for v in (value, low, high))
    half = (high - low) / 2 if known else 0.0
    size = max(abs(value), half) if known else 0.0
    if not size:
        return number(value), number(low), number(high)
    if not 1e-4 <= size < 1e5:
        return f"{value:.2e}", f"{low:.2e}", f"{high:.2e}"
    decimals = max(0, 2 + (half < size / 50) - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}", f"{low:.{decimals}f}", f"{high:.{decimals}f}"


def interval_text(row: Mapping[str, Any]) -> str:
    """The effect of a row on its readable scale, with its interval."""
    shown = interval_texts(row["shown"], row["shown_low"], row["shown_high"])
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def listed(values: list[Any]) -> str:
    """Numbers or texts, with commas between."""
    return ", ".join(map(number, values)) or NOTHING


def p_value(value: float | None) -> str:
    """A p value with three significant digits, never shown as 0."""
    if value is None:
        return NOTHING
    return "< 0.0001" if value < 1e-4 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever is readable."""
    if seconds is None:
        return NOTHING
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def definition(name: str) -> str:
    """A definition of unchanged as readers write it, such as ``|Δ| ≤ 1e-05``; w' is w after."""
    kind, _, tolerance = name.partition("_")
    relative = f"|Δ| ≤ {tolerance} max(|w|, |w'|)"
    return {"abs": f"|Δ| ≤ {tolerance}", "rel": relative}.get(kind, name)


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count and its noun: ``1 weight``, ``2,000 weights``; ``many`` where no s makes it."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as ``None``, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def null_name(null: str) -> str:
    """A null of overlap in words."""
    return _NULL_NAMES.get(null, null)


_NULL_NAMES = {
    "uniform": "density alone",
    "tensor": "the density of each tensor",
    "magnitude": "the magnitude of the weights",
    "update_size": "the size of the update",
    "margins": "row and column counts",
}
