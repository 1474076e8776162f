"""Trains the weights in a mask alone.

State and gradients are packed, one element per weight in the mask. A dense gradient is compacted
as soon as autograd has accumulated it, so that dense gradients never live all at once.
"""

from rlsparse.subnetwork.mask import (
    SubnetworkMask,
    assert_outside_unchanged,
    load_mask,
    outside_digests,
)
from rlsparse.subnetwork.optimizer import (
    InFp32,
    SubnetworkAdamW,
    SubnetworkOptimizer,
    SubnetworkSGD,
    UpdatePath,
)

__all__ = [
    "InFp32",
    "SubnetworkAdamW",
    "SubnetworkMask",
    "SubnetworkOptimizer",
    "SubnetworkSGD",
    "UpdatePath",
    "assert_outside_unchanged",
    "load_mask",
    "outside_digests",
]
