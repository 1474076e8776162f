"""What is counted of one chunk of all masks, and how the chunks add up.

Work splits by tensor chunk: ``count_chunk`` reads nothing and returns counts; ``add_up`` forms, per
tensor, what each null expects, and adds tensors up by module. ``overlap`` and ``consensus`` make
tables of the totals.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlsparse.checkpoint import Checkpoint, chunks
from rlsparse.errors import TableError
from rlsparse.kernels import agreement, popcount_and, stripe_counts
from rlsparse.matching import match_tensors
from rlsparse.names import layer_and_module
from rlsparse.overlap.comparison import Comparison
from rlsparse.overlap.nulls import (
    expected_agreement,
    expected_in_both,
    expected_of_margins,
    pair_products,
)
from rlsparse.overlap.strata import (
    Counts,
    Floats,
    Strata,
    add_strata,
    count_strata,
    magnitude_labels,
    update_size_labels,
    update_sizes,
)
from rlsparse.tensor_file import Bits, TensorInfo

Words = NDArray[np.uint64]
Array = NDArray[Any]


class Weights(NamedTuple):
    """A tensor of the base, the shape that is compared, and the same tensor after other runs."""

    before: TensorInfo
    shape: tuple[int, ...]
    after: tuple[TensorInfo, ...]


class Place(NamedTuple):
    """A chunk: ``num_columns`` is the length of a row of its tensor, 0 for one of one dimension."""

    tensor: str
    module: str
    chunk: int
    num_elements: int
    num_columns: int


@dataclass(frozen=True)
class MaskCounts:
    """Counts of one chunk; pairs and runs are those of a ``Comparison``, in its order.

    Attributes:
        place: the chunk.
        both: weights changed in both runs, per pair.
        within: likewise for the pairs of snapshots of one trial.
        agreeing: weights changed in exactly k runs of a group, k = 0 ... R, group after group.
        strata: by magnitude, of all runs.
        update_sizes: by update size too, one per reference, of ``Comparison.compared``.
        rows: per pair, the sum over rows of the product of their counts; None for vectors.
        columns: weights changed per column, of ``Comparison.compared``; None for vectors.
    """

    place: Place
    both: Counts
    within: Counts
    agreeing: Counts
    strata: Strata
    update_sizes: tuple[Strata, ...]
    rows: Floats | None
    columns: NDArray[np.int32] | None


class Job(NamedTuple):
    """A chunk to count, and where its weights are to be read; holds none of them."""

    place: Place
    start: int
    weights: Weights


def weights_of(
    base: Checkpoint, references: Sequence[Checkpoint], like: Checkpoint | None = None
) -> dict[str, Weights]:
    """The tensors of masks, by name and in its order.

    Args:
        base: the base checkpoint.
        references: checkpoints after, that give update sizes.
        like: any checkpoint after, where tensors are stored otherwise than in the base; the first
            reference if None.

    Raises:
        TableError: a reference lacks tensors that the others have.
    """
    sides = [{p.name: p for p in match_tensors(base, one).pairs} for one in references]
    if like is None and sides:
        pairs = sides[0]
    elif like is not None:
        pairs = {pair.name: pair for pair in match_tensors(base, like).pairs}
    else:
        return {info.name: Weights(info, info.shape, ()) for info in base.counted}
    found = {}
    for name, pair in pairs.items():
        if not all(name in side and side[name].shape == pair.shape for side in sides):
            raise TableError(
                f"{name} {list(pair.shape)} is not alike in all runs that give update sizes: "
                "compare only runs of one layout and vocabulary"
            )
        found[name] = Weights(pair.before, pair.shape, tuple(side[name].after for side in sides))
    return found


def jobs(weights: Mapping[str, Weights]) -> Iterator[Job]:
    """All chunks, tensor after tensor."""
    for name, tensor in weights.items():
        _, module = layer_and_module(name, tensor.shape)
        columns = math.prod(tensor.shape[1:]) if len(tensor.shape) > 1 else 0
        for chunk in chunks(tensor.shape):
            place = Place(name, module, chunk.index, chunk.num_elements, columns)
            yield Job(place, chunk.start, tensor)


# --- one chunk ---------------------------------------------------------------------------------


def mask_words(comparison: Comparison, place: Place, rows: pa.Table) -> Words:
    """The masks of all runs of a comparison in one chunk, shape [R, words].

    Args:
        comparison: names the runs.
        place: the chunk.
        rows: rows of table ``masks`` of this chunk; others than the comparison's are left out.

    Raises:
        TableError: a mask is missing, twice there, or of another length.
    """
    wanted = {run: number for number, run in enumerate(comparison.runs)}
    words = np.zeros((len(wanted), -(-place.num_elements // 64)), np.uint64)
    found = words.view(np.uint8)
    columns = (rows[name].to_pylist() for name in ("trial_id", "step", "view", "kind"))
    missing = set(wanted)
    for number, (trial, step, view, kind) in enumerate(zip(*columns, strict=True)):
        run = trial, step
        if view != comparison.view or kind != "snapshot" or run not in wanted:
            continue
        mask = np.frombuffer(rows["mask"][number].as_buffer(), np.uint8)
        if run not in missing or mask.size != -(-place.num_elements // 8):
            raise TableError(
                f"trial {trial} step {step}: its mask of {place.tensor} chunk {place.chunk} has "
                f"{mask.size} bytes, not one for {place.num_elements} weights, or is there twice; "
                "were the trials diffed against the same base? run the diff stage again"
            )
        missing.remove(run)
        found[wanted[run], : mask.size] = mask
    if missing:
        trial, step = min(missing)
        raise TableError(
            f"trial {trial} step {step} has no mask of {place.tensor} chunk {place.chunk} in view "
            f"{comparison.view}; run the diff stage for it, or leave the run out"
        )
    return words


def count_job(comparisons: Sequence[Comparison], job: Job, rows: pa.Table) -> list[MaskCounts]:
    """Read the weights of a chunk and count its masks for each comparison (one per view).

    Args:
        comparisons: what to count, with one choice of references.
        job: the chunk.
        rows: rows of table ``masks`` of this chunk.

    Raises:
        TableError: as ``mask_words``.
    """
    (before, _, afters), stop = job.weights, job.start + job.place.num_elements
    bits = before.read(job.start, stop)
    sizes = [
        update_sizes(bits, before.dtype, after.read(job.start, stop), after.dtype)
        for after in afters
    ]
    counted = []
    for comparison in comparisons:
        words = mask_words(comparison, job.place, rows)
        counted.append(count_chunk(comparison, job.place, words, bits, before.dtype, sizes))
    return counted


def count_chunk(
    comparison: Comparison,
    place: Place,
    masks: Words,
    before: Bits,
    dtype: str,
    sizes: Sequence[Floats] = (),
) -> MaskCounts:
    """Count one chunk of all masks.

    Args:
        comparison: what to count.
        place: the chunk.
        masks: of all its runs, shape [R, words]; bits beyond the last weight are zero.
        before: the base's bits of the chunk, as stored.
        dtype: their number format.
        sizes: per reference, |after - before| of each weight (``strata.update_sizes``).
    """
    labels = magnitude_labels(before, dtype, comparison.view)
    compared = masks[list(comparison.compared)]
    sized = (update_size_labels(labels, one) for one in sizes)
    rows, columns = _margins(comparison, place, compared)
    groups = [agreement(masks[list(g.runs)], place.num_elements) for g in comparison.groups]
    return MaskCounts(
        place=place,
        both=_shared(masks, comparison.moments),
        within=_shared(masks, comparison.trajectories),
        agreeing=np.concatenate([np.zeros(0, np.int64), *groups]),
        strata=count_strata(masks, labels),
        update_sizes=tuple(count_strata(compared, one) for one in sized),
        rows=rows,
        columns=columns,
    )


def _shared(masks: Words, sets: Sequence[Sequence[int]]) -> Counts:
    parts = [np.zeros(0, np.int64)]
    for places in sets:
        chosen = masks if len(places) == len(masks) else masks[list(places)]
        parts.append(popcount_and(chosen)[np.triu_indices(len(places), 1)])
    return np.concatenate(parts)


def _margins(
    comparison: Comparison, place: Place, masks: Words
) -> tuple[Floats | None, NDArray[np.int32] | None]:
    if not place.num_columns:
        return None, None
    num_rows = place.num_elements // place.num_columns
    counted = [stripe_counts(mask.view(np.uint8), num_rows, place.num_columns) for mask in masks]
    empty = np.zeros((0, 0), np.int64)
    rows = np.array([rows for rows, _ in counted]) if counted else empty
    columns = np.array([columns for _, columns in counted]) if counted else empty
    return pair_products(rows, rows, _sets(comparison)), columns.astype(np.int32)


def _sets(comparison: Comparison) -> list[list[int]]:
    """The moments as places in ``Comparison.compared``."""
    places = {run: place for place, run in enumerate(comparison.compared)}
    return [[places[run] for run in moment] for moment in comparison.moments]


# --- adding up ---------------------------------------------------------------------------------

Sums = dict[str, Array]
"""What is known of some weights, by name; arrays of two such add up.

``num_elements`` (a scalar), ``num_changed`` per run; per pair ``both``, ``tensor``, ``magnitude``,
``update_size`` (NaN without a reference), ``margins``; per pair within a trial ``within``,
``within_tensor``, ``within_magnitude``; per group and k ``agreeing``, ``agreeing_tensor``,
``agreeing_magnitude``.
"""


@dataclass
class Totals:
    """Sums over all chunks of the tensors added so far.

    Attributes:
        comparison: what is counted.
        overall: of all weights.
        modules: by module.
        named: of the tensors that claims name: (module, sums).
        tensors: names and modules, in the order added.
        num_elements: of each tensor.
        num_changed: of each, weights changed by each run, shape [R].
    """

    comparison: Comparison
    overall: Sums = field(default_factory=dict)
    modules: dict[str, Sums] = field(default_factory=dict)
    named: dict[str, tuple[str, Sums]] = field(default_factory=dict)
    tensors: list[tuple[str, str]] = field(default_factory=list)
    num_elements: list[int] = field(default_factory=list)
    num_changed: list[Counts] = field(default_factory=list)

    def add(self, parts: Sequence[MaskCounts]) -> None:
        """Add one tensor: all its chunks, in any order."""
        parts = sorted(parts, key=lambda part: part.place.chunk)
        tensor, module = parts[0].place[:2]
        sums = _sums(self.comparison, parts)
        self.tensors.append((tensor, module))
        self.num_elements.append(int(sums["num_elements"]))
        self.num_changed.append(sums["num_changed"])
        if tensor in self.comparison.tensors:
            self.named[tensor] = module, sums
        _add(self.modules.setdefault(module, {}), sums)
        _add(self.overall, sums)


def add_up(comparison: Comparison, parts: Iterable[MaskCounts]) -> Totals:
    """Add the counts of all chunks up; those of a tensor follow each other.

    Only one tensor's strata are held at a time. Sums of floats depend on the order of the tensors,
    so that equal results need an equal order.
    """
    totals = Totals(comparison)
    for _, every in itertools.groupby(parts, lambda part: part.place.tensor):
        totals.add(list(every))
    return totals


def _add(total: Sums, more: Sums) -> None:
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def _sums(comparison: Comparison, parts: Sequence[MaskCounts]) -> Sums:
    """Sums of one tensor, of all its chunks in order."""
    strata = add_strata([part.strata for part in parts])
    changed, size = strata.changed.sum(axis=1), strata.sizes.sum(keepdims=True)
    moments, within = comparison.moments, comparison.trajectories
    by_tensor = expected_in_both(changed[:, None], size, moments)
    sums = {
        "num_elements": size[0],
        "num_changed": changed,
        "both": _total([part.both for part in parts]),
        "tensor": by_tensor,
        "magnitude": expected_in_both(strata.changed, strata.sizes, moments),
        "update_size": _update_size(comparison, parts),
        "margins": by_tensor,
        "within": _total([part.within for part in parts]),
        "within_tensor": expected_in_both(changed[:, None], size, within),
        "within_magnitude": expected_in_both(strata.changed, strata.sizes, within),
        "agreeing": _total([part.agreeing for part in parts]),
        "agreeing_tensor": _agreement(comparison, changed[:, None], size),
        "agreeing_magnitude": _agreement(comparison, strata.changed, strata.sizes),
    }
    if parts[0].place.num_columns:
        columns = _total([part.columns for part in parts]).astype(np.int64)
        products = pair_products(columns, columns, _sets(comparison))
        rows = _total([part.rows for part in parts])
        num_a, num_b = changed[comparison.pairs]
        sums["margins"] = expected_of_margins(rows, products, num_a, num_b)
    return sums


def _total(arrays: Sequence[Any]) -> Array:
    total = arrays[0]
    for one in arrays[1:]:
        total = total + one
    return np.asarray(total)


def _update_size(comparison: Comparison, parts: Sequence[MaskCounts]) -> Floats:
    """Expected per pair, by its own reference; strata do not reach beyond a chunk."""
    sets, chosen = _sets(comparison), comparison.reference_of
    expected = np.full(chosen.shape, np.nan)
    for place in range(len(comparison.references)):
        sized = [part.update_sizes[place] for part in parts]
        every = _total([expected_in_both(one.changed, one.sizes, sets) for one in sized])
        expected = np.where(chosen == place, every, expected)
    return expected


def _agreement(comparison: Comparison, changed: Counts, sizes: Counts) -> Floats:
    groups = (expected_agreement(changed[list(g.runs)], sizes) for g in comparison.groups)
    return np.concatenate([np.zeros(0), *groups])
