"""Optimizers that torch does not offer: bf16 weights with fp32 moments."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def restore_formats(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back each tensor of a state in the format that it was saved in.

    To be called after torch's ``load_state_dict``, which casts them to the format of the weights.
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for weight, number in zip(group["params"], saved["params"], strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    # The number of the step stays where it is, as in torch.
                    device = weight.device if value.dim() else value.device
                    optimizer.state[weight][name] = value.to(device, copy=True)


class _Fp32MomentOptimizer(torch.optim.Optimizer):
    """Optimizer whose moments are fp32 whatever the weights are.

    The update is computed in fp32 from the upcast weight and gradient and rounded once, to the
    weight's own format; no fp32 copy of the weights is kept, so an update below half a unit in
    the last place is lost, as in pure bf16 training.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.copy_(
                        self._updated(
                            weight.float(), weight.grad.float(), self.state[weight], group
                        )
                    )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, which casts moments to the format of the weights; but they stay fp32."""
        super().load_state_dict(state_dict)
        restore_formats(self, state_dict)

    def _updated(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> torch.Tensor:
        """The new weight in fp32; may overwrite ``value``, the old one."""
        raise NotImplementedError


class Fp32MomentAdamW(_Fp32MomentOptimizer):
    """AdamW (1711.05101, algorithm 2) whose moments are fp32 whatever the weights are."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _updated(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        value.mul_(1 - group["lr"] * group["weight_decay"])
        return value.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))


class Fp32MomentSgd(_Fp32MomentOptimizer):
    """SGD with momentum (torch's form: v = momentum v + g, w = w - lr v) whose v is fp32.

    Weight decay is added to the gradient, as in ``torch.optim.SGD``; no dampening, no Nesterov.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _updated(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> torch.Tensor:
        decayed = gradient.add(value, alpha=group["weight_decay"])
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(decayed)
        return value.add_(velocity, alpha=-group["lr"])
