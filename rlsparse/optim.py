"""Optimizers of the precision regimes, built here and nowhere else.

All regimes use plain torch optimizers (neither foreach nor fused, so that a step is the same sum
everywhere), except bf16 weights with fp32 moments, which torch does not offer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from rlsparse.config import TrainConfig


class Fp32MomentAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101, algorithm 2) whose moments are fp32 whatever the weights are.

    The update is computed in fp32 from the upcast weight and gradient and rounded once, to the
    weight's own format; no fp32 copy of the weights is kept, so an update below half a unit in
    the last place is lost, as in pure bf16 training.
    """

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
                state["step"] += 1
                gradient = weight.grad.float()
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
                square = (
                    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                )
                scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                value = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
                value.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))
                weight.copy_(value)
        return loss


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all weights of ``model`` that are trained."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, **common, foreach=False, fused=False)
    adam: dict[str, Any] = {
        **common,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.precision == "bf16-weights":
        return Fp32MomentAdamW(weights, **adam)
    return torch.optim.AdamW(weights, **adam, foreach=False, fused=False)
