"""A gradient of some elements of a weight tensor, packed."""

import math
from collections.abc import Callable
from typing import Any

import torch

from rlsparse.errors import ConfigError
from rlsparse.subnetwork.selection import Selection

_REMEDY = (
    "clip with max_grad_norm of the subnetwork optimizer and set the trainer's max_grad_norm to 0; "
    "use neither a GradScaler nor DistributedDataParallel, the optimizer averages over workers; "
    "read gradients as param.grad.elements"
)


class Norm(torch.Tensor):
    """Norm of packed gradients, as one worker has them; may be read, but not be clipped by.

    ``clip_grad_norm_`` divides the limit by the norm, be it exceeded or not: a limit is refused
    there, at the first step. Without one (infinity: transformers logs the norm so) all is well.
    """

    def __rtruediv__(self, limit: Any) -> torch.Tensor:
        """``limit`` / norm.

        Raises:
            ConfigError: the limit is finite.
        """
        if not math.isinf(limit):
            raise ConfigError(
                f"gradients of a subnetwork would be clipped to {limit} outside of its optimizer, "
                f"before they are averaged over workers: {_REMEDY}"
            )
        return torch.full_like(self.as_subclass(torch.Tensor), limit)


class PackedGradient(torch.Tensor):
    """What stands in ``param.grad`` for a dense gradient: of its shape, but just some elements.

    It has no storage of its own. autograd adds later gradients to it, of which the selected
    elements are taken; it can be scaled by a number, set to zero and dropped (``param.grad =
    None``); its norm, and whether ``any`` is not zero, are those of its elements. All else that
    torch could do with a dense gradient raises ``ConfigError``, so that nothing works on gradients
    that are not there.

    Attributes:
        elements: the selected ones [n], in the format of the weights.
        selection: which they are.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    elements: torch.Tensor
    selection: Selection

    @staticmethod
    def __new__(
        cls, weight: torch.Tensor, selection: Selection, elements: torch.Tensor
    ) -> "PackedGradient":
        """A gradient of ``weight``."""
        gradient: PackedGradient = torch.Tensor._make_wrapper_subclass(
            cls,
            weight.shape,
            strides=weight.stride(),
            dtype=weight.dtype,
            device=weight.device,
        )
        gradient.elements, gradient.selection = elements, selection
        return gradient

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What torch does with it."""
        own, *others = args
        apply = _OPERATIONS.get(func)
        if apply is None or not isinstance(own, PackedGradient):
            raise _needs_dense(func)
        return apply(own, *others, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Its elements."""
        return f"PackedGradient({list(self.shape)}, elements={self.elements})"


def _needs_dense(operation: Any) -> ConfigError:
    return ConfigError(
        f"the gradient of a weight of a subnetwork is packed, {operation} needs a dense one: "
        + _REMEDY
    )


def _add(own: PackedGradient, dense: torch.Tensor, alpha: float = 1) -> PackedGradient:
    if dense.shape != own.shape:
        raise _needs_dense("a sum with another shape")
    own.selection.add(own.elements, dense.reshape(-1), alpha)
    return own


def _multiply(own: PackedGradient, factor: Any) -> PackedGradient:
    if isinstance(factor, torch.Tensor) and factor.dim():
        raise _needs_dense("a product with a tensor")
    own.elements.mul_(factor)
    return own


def _zero(own: PackedGradient) -> PackedGradient:
    own.elements.zero_()
    return own


def _detach(own: PackedGradient) -> PackedGradient:
    return PackedGradient(own, own.selection, own.elements)


def _norm(own: PackedGradient, *args: Any, **kwargs: Any) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(own.elements, *args, **kwargs)
    return norm.as_subclass(Norm)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.add_.Tensor: _add,
    torch.ops.aten.mul_.Tensor: _multiply,
    torch.ops.aten.zero_.default: _zero,
    torch.ops.aten.detach.default: _detach,
    torch.ops.aten.linalg_vector_norm.default: _norm,
    torch.ops.aten.any.default: lambda own: own.elements.any(),
}


def compact(weight: torch.Tensor, selection: Selection) -> None:
    """Replace the dense gradient of ``weight``, which is freed, by the selected elements of it.

    Raises:
        ConfigError: another selection's optimizer has packed it.
    """
    gradient: Any = weight.grad
    if not isinstance(gradient, PackedGradient):
        elements = selection.take(gradient.detach().reshape(-1))
        weight.grad = PackedGradient(weight, selection, elements)
    elif gradient.selection is not selection:
        raise ConfigError("two subnetwork optimizers train one weight: call release() of the first")


def packed_gradient(weight: torch.Tensor) -> PackedGradient:
    """The gradient of ``weight``, which is packed."""
    gradient: Any = weight.grad
    assert isinstance(gradient, PackedGradient)
    return gradient
