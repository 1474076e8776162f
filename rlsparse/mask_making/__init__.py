"""Makes subnetwork masks: of what training changed, of what it did not, and controls for both.

Nothing is read before a tensor's mask is asked for, but for headers and fingerprints; ``write``
takes one tensor after the other.
"""

from rlsparse.mask_making.algebra import complement, difference, intersection, union
from rlsparse.mask_making.changed import changed, of_trial, step_of
from rlsparse.mask_making.chosen import (
    by_direction,
    by_magnitude,
    random_like,
    random_within_magnitude,
    uniform,
)
from rlsparse.mask_making.configured import make_mask
from rlsparse.mask_making.made import MadeMask, check_one_model, held, shapes_of, write

__all__ = [
    "MadeMask",
    "by_direction",
    "by_magnitude",
    "changed",
    "check_one_model",
    "complement",
    "difference",
    "held",
    "intersection",
    "make_mask",
    "of_trial",
    "random_like",
    "random_within_magnitude",
    "shapes_of",
    "step_of",
    "uniform",
    "union",
    "write",
]
