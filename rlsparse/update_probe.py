"""Gradients and the steps that the optimizer makes of them, against the spacing of bf16.

Is an update sparse because the gradient is, or because bf16 swallows what is smaller than half the
distance to the next number? Looked at after the optimizer's step and before its gradients are
cleared, where they are and a piece of a tensor at a time: nothing is copied but pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlsparse.distributed import own_part
from rlsparse.subnetwork.packed import PackedGradient

_PIECE = 2**20
"""Weights of a piece: takes some 30 bytes per weight of it for a while."""


@dataclass(frozen=True)
class UpdateCounts:
    """One optimizer step, counted over the weights that have a gradient.

    Attributes:
        num_elements: those weights.
        num_nonzero: whose gradient is not zero.
        num_predicted: whose update is at least half a bf16 ULP.
        num_changed: whose bf16 view the step changed, bitwise.
        num_both: predicted and changed.
    """

    num_elements: int
    num_nonzero: int
    num_predicted: int
    num_changed: int
    num_both: int

    def fractions(self) -> dict[str, float | None]:
        """Under the names of table ``steps``; None where there is nothing to divide by."""
        return {
            "gradient_nonzero_fraction": _share(self.num_nonzero, self.num_elements),
            "update_below_half_ulp": _share(
                self.num_elements - self.num_predicted, self.num_elements
            ),
            "half_ulp_precision": _share(self.num_both, self.num_predicted),
            "half_ulp_recall": _share(self.num_both, self.num_changed),
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@torch.no_grad()
def count_updates(
    model: torch.nn.Module,
    optimizer: Any,
    before: Callable[[str], torch.Tensor],
) -> UpdateCounts:
    """Count what one step of ``optimizer`` did; to be called right after it.

    The prediction is that of 2602.03839: a weight visibly changes iff its update reaches half a
    ULP. There the threshold is about |w| / 256 and the update that of Adam's bound; here both are
    those of the very weight (``half_ulp``, ``update_of``). Of a weight that is bf16 itself it can
    only err at ties, and toward zero from a power of two, where the spacing is half as wide. With
    fp32 masters it also depends on where the master lies between two bf16 numbers, which is what
    precision and recall then show.

    Gradients are seen after clipping, which scales them: a zero is one before it, too, but for
    gradients that clipping makes smaller than their format can hold. Of a subnetwork the weights in
    its mask are looked at.

    Args:
        model: after the step, with the gradients it was made of.
        optimizer: of ``optim.build_optimizer``, or accelerate's wrapper of one, before the learning
            rate is changed for the next step.
        before: name of a weight -> its flat values before the step, in the stored format.
    """
    groups = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    num_elements = 0
    counts: torch.Tensor | None = None
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        state = optimizer.state.get(weight, {})
        own = {"weight": weight, "before": before(name)}
        kept = {"gradient": weight.grad, **_moments(state)}
        if isinstance(weight.grad, PackedGradient):
            take = weight.grad.selection.take
            own = {key: take(tensor.detach().reshape(-1)) for key, tensor in own.items()}
            kept["gradient"] = weight.grad.elements
        flat = {key: own_part(tensor).reshape(-1) for key, tensor in (own | kept).items()}
        num_elements += flat["before"].numel()
        age = int(state.get("step", 0))
        for start in range(0, flat["before"].numel(), _PIECE):
            piece = {key: tensor[start : start + _PIECE] for key, tensor in flat.items()}
            found = _count(piece, groups[weight], age)
            counts = found if counts is None else counts + found
    return UpdateCounts(num_elements, *(counts.tolist() if counts is not None else [0] * 4))


def _moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    names = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    return {name: state[name] for name in names if state.get(name) is not None}


def _count(piece: dict[str, torch.Tensor], group: dict[str, Any], age: int) -> torch.Tensor:
    """Counts of one piece, [4], int64, on its device: nonzero, predicted, changed, both."""
    seen = piece["before"].to(torch.bfloat16)
    after = piece["weight"].to(torch.bfloat16)
    changed = seen.view(torch.int16) != after.view(torch.int16)
    reaches = update_of(piece, group, age).abs() >= half_ulp(seen)
    found = [piece["gradient"] != 0, reaches, changed, reaches & changed]
    return torch.stack([torch.count_nonzero(each) for each in found])


def update_of(piece: dict[str, torch.Tensor], group: dict[str, Any], age: int) -> torch.Tensor:
    """What the optimizer added to weights before any rounding to their format, fp32.

    Computed of its state after the step, as it does (AdamW of 1711.05101 or SGD, with decoupled
    decay or decay in the gradient). Where its numbers are bf16, so are those between, as torch has
    them. Left out is the rounding of the sum to the weight's format; with bf16 also that of Adam's
    decayed weight before it, and that of SGD's learning rate (torch rounds it to bf16 for the CPU:
    up to 2^-9 of it). Of fp32 masters the decay is taken of the weight in the stored format, since
    the masters before the step are gone: it is off by less than 2^-8 of itself.

    Args:
        piece: flat tensors of one length: ``gradient``, ``before``, and what the optimizer keeps.
        group: its settings.
        age: number of this step, from 1, for Adam.
    """
    before, decay = piece["before"], group["weight_decay"]
    if "betas" in group:
        beta1, beta2 = group["betas"]
        scale = piece["exp_avg_sq"].sqrt().div_((1 - beta2**age) ** 0.5).add_(group["eps"])
        step = piece["exp_avg"].float() / scale.float() / (1 - beta1**age)
        step.add_(before, alpha=decay)
    elif group["momentum"]:
        step = piece["momentum_buffer"].float()
    else:
        gradient = piece["gradient"]
        step = gradient.add(before.to(gradient.dtype), alpha=decay).float()
    return torch.mul(step, -group["lr"])


def half_ulp(weights: torch.Tensor) -> torch.Tensor:
    """Half the distance of bf16 weights from the next number away from zero, exactly, in fp32.

    2^(e - 8) where 2^e <= |w| < 2^(e + 1); 2^-134 below the normal numbers and at zero.
    """
    size = weights.abs()
    above = (size.view(torch.int16) + 1).view(torch.bfloat16)
    return (above.float() - size.float()) / 2
