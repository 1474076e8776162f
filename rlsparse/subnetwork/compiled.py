"""Updates by the compiled kernels of ``kernels.packing``, one pass over weights and state.

They compute what torch does, operation by operation, and give the same values but for what follows
from torch's square roots (MKL), which are not always the nearest: on some processors one in five
is the next one. That is within 2 fp32 ULP of the larger of the values before and after; up to 8,
rarely, where the step outweighs the weight.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from rlsparse.subnetwork.packed import packed_gradient
from rlsparse.subnetwork.selection import Selection

Calls = list[Callable[[], None]]
"""What does an update, piece by piece, in any order."""

Kind = Literal["fp32", "masters", "moments"]
"""fp32 weights; bf16 weights with fp32 masters, or with fp32 moments alone."""

MASTER = "master"
"""Name in the state of the fp32 values of narrower weights."""


class Rule(Protocol):
    """A rule in compiled kernels."""

    def __call__(
        self,
        kind: Kind,
        weight: torch.nn.Parameter,
        selection: Selection,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> Calls | None:
        """One step of a weight; None if it is left to torch. Begins the state as torch does."""


def kind_of(weight: torch.nn.Parameter, in_fp32: str) -> Kind | None:
    """How kernels update ``weight``; None if they cannot."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if weight.dtype == torch.float32:
        return "fp32"
    if weight.dtype == torch.bfloat16 and in_fp32 in ("masters", "moments"):
        return "masters" if in_fp32 == "masters" else "moments"
    return None


def adamw(
    kind: Kind,
    weight: torch.nn.Parameter,
    selection: Selection,
    state: dict[str, Any],
    group: dict[str, Any],
) -> Calls:
    """AdamW, as in torch; of ``moments``, as in ``fp32_moments``."""
    if "step" not in state:
        state["step"] = 0 if kind == "moments" else torch.tensor(0.0)
    state["step"] += 1
    (beta1, beta2), rate, step = group["betas"], float(group["lr"]), float(state["step"])
    correction = 1 - beta2**step
    settings = (
        1 - rate * group["weight_decay"],
        1 - beta1,
        beta2,
        1 - beta2,
        correction if kind == "moments" else correction**0.5,
        group["eps"],
        -rate / (1 - beta1**step),
    )
    moments = [_moment(state, name, selection.size) for name in ("exp_avg", "exp_avg_sq")]
    return _calls("adamw", kind, weight, selection, state, moments, settings)


def sgd(
    kind: Kind,
    weight: torch.nn.Parameter,
    selection: Selection,
    state: dict[str, Any],
    group: dict[str, Any],
) -> Calls | None:
    """SGD with momentum, as in torch; None without, except of ``moments``."""
    if not group["momentum"] and kind != "moments":
        return None
    velocity = _moment(state, "momentum_buffer", selection.size)
    settings = (group["weight_decay"], group["momentum"], -float(group["lr"]))
    return _calls("sgd", kind, weight, selection, state, [velocity, velocity], settings)


def _moment(state: dict[str, Any], name: str, size: int) -> torch.Tensor:
    if state.get(name) is None:
        state[name] = torch.zeros(size, dtype=torch.float32)
    moment: torch.Tensor = state[name]
    return moment


def _calls(
    work: str,
    kind: Kind,
    weight: torch.nn.Parameter,
    selection: Selection,
    state: dict[str, Any],
    moments: list[torch.Tensor],
    settings: tuple[float, ...],
) -> Calls:
    flat = weight.detach().view(-1)
    masters = flat  # not read but of masters
    if kind == "masters":
        if MASTER not in state:
            state[MASTER] = selection.take(flat).float()
        masters = state[MASTER]
    gradient = packed_gradient(weight).elements.contiguous()
    given = torch.tensor(settings, dtype=torch.float32)
    return selection.calls(work, kind, flat, gradient, masters, *moments, given)
