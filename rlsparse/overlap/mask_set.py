"""Masks from anywhere, to be compared without a study: mask files, trials, patches, checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from rlsparse import tables
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import ModelConfig
from rlsparse.definitions import MASK_SUFFIX
from rlsparse.deltas import mask_rows
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.masks import read_masks
from rlsparse.models import resolve
from rlsparse.overlap import count_masks, overlaps
from rlsparse.overlap.comparison import Comparison
from rlsparse.patch import PATCH_FILE
from rlsparse.patch.side import open_side

_OF_TRIAL = ("snapshots", "steps.parquet", "summary.json")

Row = dict[str, Any]


class _Item(NamedTuple):
    """One thing to compare: its mask, or the weights that it follows from."""

    label: str
    mask: Path | None
    weights: str | None


def compare_masks(
    places: Sequence[str], *, base: str | None = None, view: str = "stored"
) -> list[Row]:
    """Overlap of all pairs of masks, with what each null expects.

    Args:
        places: mask files, folders of trials (their last snapshot), patches, or checkpoints
            (folders, hub ids, URLs); two or more, of one base.
        base: the base checkpoint; not needed where a trial's folder names it.
        view: number format in which patches and checkpoints are compared with the base, and masks
            of files were made (those that trials leave: stored).

    Returns:
        Rows of table ``overlaps``, of all weights and of each module, whose ``trial_a`` and
        ``trial_b`` are the places. Update sizes
        come from a third of the places that has weights, where there is one.

    Raises:
        ConfigError: fewer than two places, no base to be found, something that holds no mask (a
            study, a trial without snapshots, the base itself), or a mask file of another view.
        CheckpointError: something cannot be read, or is of another base.
    """
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise ConfigError(
            f"overlap compares two or more different masks, got {len(places)}: "
            f"{', '.join(places) or 'none'}"
        )
    items = [_item(place) for place in places]
    for file in (item.mask for item in items if item.mask):
        if view != (own := read_masks(file).metadata.get("view", "stored")):
            raise ConfigError(
                f"--view {view}: {file} is a mask file, which says what changed in the format "
                f"{own} alone; give its patch or checkpoint, or --view {own}"
            )
    source = base or _base_of(places)
    opened = Checkpoint.open(source if "://" in source else resolve(ModelConfig(source=source)))
    for item in items:
        if item.weights in (source, str(opened.path)) or _same(item.weights, opened):
            raise ConfigError(
                f"{item.label} is the base itself, in which nothing changed; leave it out"
            )
    rows: list[Row] = []
    for item in items:
        rows += _mask_rows(item, opened, view)
    with_weights = {item.label: item.weights for item in items if item.weights}
    comparison = Comparison(
        view=view,
        runs=tuple((item.label, 0) for item in items),
        seeds={item.label: _origin(item, items) for item in items},
        moments=(tuple(range(len(items))),),
        trajectories=(),
        references=tuple(with_weights)[:3],
    )
    after = {label: open_side(place, opened)[0] for label, place in with_weights.items()}
    table = overlaps(count_masks(comparison, _table(rows), opened, after))
    found: list[Row] = table.to_pylist()
    return found


def _table(rows: list[Row]) -> pa.Table:
    return tables.from_rows(rows, "masks")


def _item(place: str) -> _Item:
    path = Path(place)
    if place.endswith(MASK_SUFFIX):
        return _Item(place, path, None)
    patch = last_snapshot(place)
    if patch is None and (path / "trials").is_dir():
        raise ConfigError(
            f"{place} is the folder of a study; give those of its trials: {path / 'trials'}/ID"
        )
    if patch is None and any((path / name).exists() for name in _OF_TRIAL):
        raise ConfigError(
            f"{place} is the folder of a trial without any snapshot; run the trial, or leave it out"
        )
    return _Item(place, None, str(patch or place))


def last_snapshot(place: str) -> Path | None:
    """The patch that stands for the folder of a trial: its last; None where there is none."""
    return max(Path(place).glob(f"snapshots/*/{PATCH_FILE}"), default=None)


def _same(weights: str | None, base: Checkpoint) -> bool:
    """Whether weights lie where the base does."""
    if weights is None or "://" in weights or "://" in str(base.path):
        return False
    return Path(weights).resolve() == Path(base.path).resolve()


def _origin(item: _Item, items: Sequence[_Item]) -> int:
    """Number of the run that an item is of: a mask file in a trial's folder is of that trial."""
    folders = [Path(item.label), *(item.mask.parents if item.mask else ())]
    return next(n for n, other in enumerate(items) if Path(other.label) in folders)


def _base_of(places: Sequence[str]) -> str:
    """The base that the folder of a trial names."""
    for place in places:
        config = Path(place) / "config.json"
        if Path(place, "snapshots").is_dir() and config.is_file():
            try:
                return str(json.loads(config.read_text(encoding="utf-8"))["model"]["source"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{config} is damaged; give --base") from error
    raise ConfigError(
        "which base the masks are of is not known; give --base: the checkpoint before training"
    )


def _mask_rows(item: _Item, base: Checkpoint, view: str) -> list[Row]:
    about = {"trial_id": item.label, "step": 0, "kind": "snapshot", "view": view}
    if item.mask is None:
        casts = [] if view == "stored" else [view]
        diff = diff_checkpoints(base.path, str(item.weights), casts=casts, extra_tables=("masks",))
        return [row | about for row in diff.tables["masks"] if row["view"] == view]
    file, own = read_masks(item.mask), fingerprint(base)
    if file.base_fingerprint != own:
        raise CheckpointError(
            f"{item.mask} is of the base {file.base_fingerprint[:12]}, {base.path} is {own[:12]}; "
            "masks of different bases have no weights in common"
        )
    rows = mask_rows(base, file, trial_id=item.label, step=0, kind="snapshot")
    return [row | about for row in rows]
