"""Whether a trial ends in the weights of another: trained under a mask, run again, another seed.

Where the full run left the base as it was, a trial under the mask of what it changed did, too:
agreement there is automatic. So it is counted again inside the weights that the full run changed,
beside that of the base, which has learned nothing: a tolerance at which even the base agrees says
nothing. Source: arXiv 2505.11711, section 4 (94.0 % and 90.5 % of *all* weights within 1e-05, 100 %
within 1e-04). Deviation: both scopes, and the base, a rerun and another seed to compare with.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlsparse.checkpoint import Checkpoint
from rlsparse.definitions import AGREEMENT_DEFINITIONS, AGREEMENT_SCOPES
from rlsparse.errors import PatchError
from rlsparse.kernels import measure
from rlsparse.patch import Patch, check_base, reconstruct
from rlsparse.study import Trial
from rlsparse.tensor_file import Bits

Row = dict[str, Any]


class TrialPair(NamedTuple):
    """Two trials whose last weights are compared; see ``trial_pairs``.

    Attributes:
        trial: whose weights they are.
        reference: whose weights they might be, and whose changes say what is inside.
        relation: of ``definitions.AGREEMENT_RELATIONS``.
    """

    trial: Trial
    reference: Trial
    relation: str


def trial_pairs(trials: Sequence[Trial], seeds: Sequence[int]) -> list[TrialPair]:
    """The pairs of a study; none unless one of its trials has a mask.

    ``subnetwork``: a trial under a mask, with the one without that is alike otherwise. ``rerun``: a
    same-seed replicate without a mask, with its original. ``other seed``: a trial of the baseline
    or of a factor's level without a mask, with that of the next seed (of the last, the first). No
    trial is the first of more than one pair.

    Args:
        trials: all of the study, in its order, done or not.
        seeds: of the study, in its order.
    """
    if all(trial.config.train.mask is None for trial in trials):
        return []
    originals = {trial.config: trial for trial in trials if trial.replicate == 0}
    following = dict(zip(seeds, [*seeds[1:], *seeds[:1]], strict=True))
    pairs = []
    for trial in trials:
        config = trial.config
        if config.train.mask is not None:
            relation = "subnetwork"
            full = config.train.model_copy(update={"mask": None})
            config = config.model_copy(update={"train": full})
        elif trial.replicate:
            relation = "rerun"
        elif trial.role in ("baseline", "factor"):
            relation = "other seed"
            config = config.model_copy(update={"seed": following[config.seed]})
        else:
            continue
        reference = originals.get(config)
        if reference is not None and reference is not trial:
            pairs.append(TrialPair(trial, reference, relation))
    return pairs


def agreement_rows(
    base: Checkpoint, patch: Patch, reference: Patch, *, base_fingerprint: str
) -> list[Row]:
    """Rows of table ``agreement`` of one pair, without the columns that name it: one per scope.

    Holds one chunk of each side at a time, and checks the checksums of both patches. Sums are
    float64, over finite pairs of weights; definitions are those of ``kernels.measure``.

    Args:
        base: theta_0, the base of both.
        patch: theta, the last weights of the trial.
        reference: theta_full, those of the other one.
        base_fingerprint: of ``base``.

    Raises:
        PatchError: a patch is damaged or of another base, or their formats differ.
    """
    for side in (patch, reference):
        check_base(base, side, base_fingerprint)
    rows = {scope: _no_weights(scope) for scope in AGREEMENT_SCOPES}
    for info in base.counted:
        formats = [
            side.tensors[info.name].dtype if info.name in side.tensors else info.dtype
            for side in (patch, reference)
        ]
        if formats[0] != formats[1]:
            raise PatchError(
                f"tensor {info.name} is {formats[0]} in {patch.path} and {formats[1]} in "
                f"{reference.path}; weights of different formats do not agree bit for bit: compare "
                "trials of one precision"
            )
        sides = (reconstruct(base, side, info.name) for side in (patch, reference))
        for (_, before, after), (_, _, full) in zip(*sides, strict=True):
            inside = before != full
            _add(rows["all"], before, after, full, formats[0])
            _add(rows["changed"], before[inside], after[inside], full[inside], formats[0])
    return [*rows.values()]


def _no_weights(scope: str) -> Row:
    counts = [f"num_{base}equal_{name}" for base in ("", "base_") for name in AGREEMENT_DEFINITIONS]
    sums = {"sum_sq_difference": 0.0, "sum_sq_update": 0.0}
    return {"scope": scope, "num_elements": 0, **dict.fromkeys(counts, 0), **sums}


def _add(row: Row, before: Bits, after: Bits, full: Bits, dtype: str) -> None:
    """Count these weights in, too."""
    row["num_elements"] += full.size
    for kind, norm, bits in (
        ("", "sum_sq_difference", after), ("base_", "sum_sq_update", before),
    ):  # fmt: skip
        counts = measure(full, bits, dtype)
        for name in AGREEMENT_DEFINITIONS:
            row[f"num_{kind}equal_{name}"] += full.size - counts.num_changed[name]
        row[norm] += counts.sum_sq_delta
