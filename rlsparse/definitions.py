"""The words of every measurement: what *unchanged* means, number formats, modules, bins, masks."""

import math
from enum import StrEnum
from typing import Literal, get_args

ABS_TOLERANCES: tuple[str, ...] = ("1e-08", "1e-07", "1e-06", "1e-05", "1e-04")
REL_TOLERANCE = "1e-03"
DEFINITIONS: tuple[str, ...] = (
    "bitwise",
    *(f"abs_{tau}" for tau in ABS_TOLERANCES),
    f"rel_{REL_TOLERANCE}",
)
"""The definitions of *unchanged*, the primary one first."""

AGREEMENT_DEFINITIONS: tuple[str, ...] = ("bitwise", "abs_1e-05", "abs_1e-04")
"""Definitions under which it is counted whether two trials end in the same weights."""
AGREEMENT_SCOPES: tuple[str, ...] = ("all", "changed")
"""Weights among which that is counted: all, and those that the reference changed."""
AGREEMENT_RELATIONS: tuple[str, ...] = ("subnetwork", "rerun", "other seed")
"""What the first trial of such a pair is to the other one."""

VIEWS: tuple[str, ...] = ("stored", "fp32", "bf16", "fp16", "fp8_e4m3")

StepWindow = Literal[2, 4, 8, 16, 32, 64]
STEP_WINDOWS: tuple[int, ...] = (1, *get_args(StepWindow))
"""Lengths, in optimizer steps, over which a trial measures what changed."""
SYNC_INTERVAL = 8
"""Of windows shorter than this, the first and those that end at its multiples are sent in all ways;
the others, of which there are many, as ``relative`` patches alone."""

PROBE_PARTS: tuple[str, ...] = (
    "steps", "snapshots", "scores", "windows", "step_masks", "step_patches", "casts", "updates",
)  # fmt: skip
"""What a trial measures while it trains, by the names under which its CPU time is kept; the first
two are in every trial."""

Module = Literal[
    "q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down",
    "router", "norm", "embed", "head", "bias", "other",
]  # fmt: skip
MODULES: tuple[str, ...] = get_args(Module)

ULP_BINS: tuple[str, ...] = (
    "1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128", "129-256", ">256",
)  # fmt: skip
"""Labels of ``ulp_histogram``: distance of a changed weight in representable values. -0 and +0 are
neighbours, so a step across zero is one longer than without the two."""

RANK_TOLERANCES: tuple[str, ...] = ("default", "1e-04", "1e-05", "1e-06")
"""Shares of the largest singular value above which others count for a rank; ``default`` is that of
``torch.linalg.matrix_rank`` in fp32, max(m, n) * eps."""

MIN_EXPONENT, MAX_EXPONENT = -40, 15
NUM_EXPONENTS = MAX_EXPONENT - MIN_EXPONENT + 1
NUM_MAGNITUDE_BINS = 1 + 2 * NUM_EXPONENTS
"""Length of ``magnitude_histogram``: bin 0 counts zeros; bin ``1 + (e - MIN_EXPONENT)`` weights
with 2^e < |w| < 2^(e+1); bin ``1 + NUM_EXPONENTS + (e - MIN_EXPONENT)`` those with |w| = 2^e
exactly (their rounding gap downwards is half as wide). Exponents are clipped to the range;
non-finite weights are in no bin."""

NESTED_NULLS: tuple[str, ...] = ("uniform", "tensor", "magnitude", "update_size")
"""What the overlap of two masks is compared with, each null holding fixed what the one before does
and more: nothing but the two densities; the density of each tensor; of each power of two of
|before| in it; and, within these, of each size of the update of an independent run."""
NULLS: tuple[str, ...] = (*NESTED_NULLS, "margins")
"""All nulls of table ``overlaps``. ``margins`` stands apart: the number of changed weights in each
row and each column of each matrix."""

MASK_SUFFIX = ".mask.safetensors"
"""How names of mask files end, by which they are known from checkpoints."""


class Take(StrEnum):
    """Which mask of a trial is taken.

    ``FINAL``: what differs from the base after its last step; ``SNAPSHOT``: after an earlier one;
    ``EVER_CHANGED``: what did after any.
    """

    FINAL = "final"
    SNAPSHOT = "snapshot"
    EVER_CHANGED = "ever_changed"


def step_at(fraction: float, num_steps: int) -> int:
    """The step that ends this fraction of training: the nearest (of two the later), at least 1."""
    return max(1, math.floor(fraction * num_steps + 0.5))


class Size(StrEnum):
    """Which weights of a tensor by |w|: the smallest, or the largest."""

    LOW = "low"
    HIGH = "high"


class Direction(StrEnum):
    """Which weights of a matrix by its principal directions: the most principal, or the least."""

    PRINCIPAL = "principal"
    OTHER = "other"
