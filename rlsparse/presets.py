"""Published checkpoint pairs, their sparsity as printed, and a check of ours against it.

How the published numbers relate to ours. Sources: 2505.11711 Table 6 and ``check_sparsity.py`` of
its authors for ``abs_*``; 2511.08567 Definition 2.1 and Table 1 for ``rel_1e-03``.

- They load both models in bf16, whatever is stored. So a preset names ``bf16`` as its ``cast``:
  it changes nothing where both are stored in bf16, and is needed where one side is fp32.
- ``abs_*``: they subtract in bf16 and call a weight unchanged where ``torch.isclose(delta, 0,
  atol=tau)``, which rounds tau to bf16 too (1e-5 becomes 1.00136e-5). We compare the exact
  difference with the exact tau. The two disagree only on differences between tau and 1.0044 tau,
  which are unchanged to them; bf16 weights above 16 tau cannot differ by that little.
- ``rel_1e-03``: their bf16 probe, |d| <= 1e-3 max(|w|, |w'|), is equality of finite, normal,
  non-zero bf16 weights (Proposition E.3); so it is ``bitwise`` but for -0 against +0.
- Tensors of different shape silently leave their denominator; here they are in the accounting.

The numbers are printed rounded to 1e-4 or 1e-3, ``tolerance`` is no less than half of that. No
checkpoint comes with this package: the pairs must be at hand, or be fetched from the hub.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsparse.definitions import DEFINITIONS
from rlsparse.errors import ConfigError, nearest

TABLE = Path(__file__).with_name("published_sparsity.csv")


@dataclass(frozen=True)
class Preset:
    """A pair of checkpoints, and the fraction of weights that was published as unchanged.

    Attributes:
        name: short name.
        before: hub id; empty where a publication names none.
        after: hub id, or the label in the publication.
        algorithm: that led from before to after.
        published: definition of ``definitions.DEFINITIONS`` -> published sparsity, in [0, 1].
        tolerance: largest difference from ``published`` that passes; None where none is.
        cast: number format in which the pair must be compared (``rlsparse diff --cast``); None for
            as stored.
        source: paper and table.
        status: ``published``; ``disputed`` (the publication contradicts its own source) or
            ``incomparable`` (the number is not about the stored values): both are shown, but
            nothing is checked against them; ``unpublished`` (a pair without a number).
        note: what else one must know.
    """

    name: str
    before: str
    after: str
    algorithm: str
    published: dict[str, float]
    tolerance: float | None
    cast: str | None
    source: str
    status: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """Published and own sparsity under one definition; ``passed`` is None where nothing is checked.

    ``difference`` is ours - published.
    """

    definition: str
    published: float | None
    ours: float
    difference: float | None
    tolerance: float | None
    passed: bool | None


@dataclass(frozen=True)
class Verification:
    """Ours against what was published, under every definition."""

    preset: Preset
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool | None:
        """Whether every checked definition passed; None if none could be checked."""
        checked = [one.passed for one in self.comparisons if one.passed is not None]
        return all(checked) if checked else None


def load_presets() -> list[Preset]:
    """All presets, those that are never verified against included, in the order of the table."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return [_preset(row) for row in csv.DictReader(stream)]


def _preset(row: Mapping[str, str]) -> Preset:
    return Preset(
        name=row["preset"],
        before=row["before"],
        after=row["after"],
        algorithm=row["algorithm"],
        published={name: float(row[name]) for name in DEFINITIONS if row.get(name)},
        tolerance=float(row["tolerance"]) if row["tolerance"] else None,
        cast=row["cast"] or None,
        source=row["source"],
        status=row["status"],
        note=row["note"],
    )


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the nearest known name is given.
    """
    presets = {preset.name: preset for preset in load_presets()}
    if name not in presets:
        raise ConfigError(f"no preset {name!r}; {nearest(name, list(presets))}")
    return presets[name]


def verify(preset: Preset, diff_json: Mapping[str, Any]) -> Verification:
    """Compare the sparsity of a pair, under every definition, with what was published.

    A definition passes when ours is within the tolerance of the preset. Definitions without a
    published number, and all definitions of presets that are not ``published``, are reported
    without a verdict.

    Args:
        preset: of this pair.
        diff_json: content of ``rlsparse diff BEFORE AFTER --json``, made with ``--cast`` if the
            preset names a cast.

    Raises:
        ConfigError: ``diff_json`` lacks the sparsity under some definition.
    """
    sparsity = diff_json.get("sparsity", {})
    if lacking := [name for name in DEFINITIONS if name not in sparsity]:
        raise ConfigError(
            f"the diff lacks the sparsity under {', '.join(lacking)}; "
            "make it with `rlsparse diff BEFORE AFTER --json PATH`"
        )
    return Verification(
        preset, [_compare(preset, name, float(sparsity[name])) for name in DEFINITIONS]
    )


def _compare(preset: Preset, definition: str, ours: float) -> Comparison:
    published = preset.published.get(definition)
    difference = None if published is None else ours - published
    passed = None
    if difference is not None and preset.tolerance is not None and preset.status == "published":
        passed = round(abs(difference), 9) <= preset.tolerance  # published numbers are decimals
    tolerance = preset.tolerance if passed is not None else None
    return Comparison(definition, published, ours, difference, tolerance, passed)


def preset_rows(presets: Sequence[Preset]) -> list[dict[str, str]]:
    """Rows to print for ``rlsparse preset list``; sparsity in per cent, empty where unknown."""
    return [
        {
            "preset": preset.name,
            "before": preset.before,
            "after": preset.after,
            "algorithm": preset.algorithm,
            **{name: _per_cent(preset.published.get(name)) for name in _shown(presets)},
            "status": preset.status,
            "source": preset.source,
            "note": preset.note,
        }
        for preset in presets
    ]


def _shown(presets: Sequence[Preset]) -> list[str]:
    return [name for name in DEFINITIONS if any(name in one.published for one in presets)]


def verification_rows(verification: Verification) -> list[dict[str, str]]:
    """Rows to print for ``rlsparse preset verify``, one per definition; numbers in per cent."""
    verdicts = {True: "pass", False: "FAIL", None: "not checked"}
    return [
        {
            "definition": one.definition,
            "published": _per_cent(one.published),
            "ours": _per_cent(one.ours),
            "difference": _per_cent(one.difference, "+.2f"),
            "tolerance": _per_cent(one.tolerance),
            "verdict": "" if one.published is None else verdicts[one.passed],
        }
        for one in verification.comparisons
    ]


def _per_cent(fraction: float | None, form: str = ".2f") -> str:
    return "" if fraction is None else f"{100 * fraction:{form}}"
