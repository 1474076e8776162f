"""What is trained, and by which optimizer: built here for all precision regimes, nowhere else.

All regimes use plain torch optimizers (neither foreach nor fused, so that a step is the same sum
everywhere), except bf16 weights with fp32 moments, which torch does not offer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from rlsparse.config import TrainConfig
from rlsparse.definitions import MODULES
from rlsparse.errors import ConfigError
from rlsparse.names import layer_and_module


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
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for weight, number in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, torch.Tensor):
                        self.state[weight][name] = value.to(weight.device, copy=True)

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


def select_trainable(model: torch.nn.Module, config: TrainConfig) -> None:
    """Freeze every weight outside ``trainable_modules`` and ``trainable_layers``, for good.

    No gradient is computed for a frozen weight, and no optimizer touches it. A tied weight counts
    once, under the name that the model has for it first (the head of a tied model is its
    embedding). Weights outside the layers are frozen where layers are given.

    Raises:
        ConfigError: the model lacks a layer, or nothing is left to train.
    """
    places = {
        name: layer_and_module(name, tuple(weight.shape))
        for name, weight in model.named_parameters()
    }
    layers = {layer for layer, _ in places.values() if layer is not None}
    chosen = {
        name
        for name, (layer, module) in places.items()
        if (config.trainable_modules is None or module in config.trainable_modules)
        and (config.trainable_layers is None or layer in config.trainable_layers)
    }
    beyond = set(config.trainable_layers or ()) - layers
    if beyond or not chosen:
        inside = {m for layer, m in places.values() if layer is not None}
        outside = {m for layer, m in places.values() if layer is None}
        here = [", ".join(m for m in MODULES if m in found) for found in (inside, outside)]
        raise ConfigError(
            f"train.trainable_modules {_shown(config.trainable_modules)} in train.trainable_layers "
            f"{_shown(config.trainable_layers)} select nothing to train or a layer that is not "
            f"there: this model has layers 0 to {max(layers, default=-1)}, in them {here[0]}, "
            f"outside them {here[1]}"
        )
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in chosen)


def _shown(chosen: tuple[Any, ...] | None) -> str:
    return "all" if chosen is None else f"[{', '.join(map(str, chosen))}]"


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all weights of ``model`` that are trained."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, **common, foreach=False, fused=False)
    if config.optimizer == "sgd-momentum":
        common["momentum"] = config.momentum
        if config.precision == "bf16-weights":
            return Fp32MomentSgd(weights, **common)
        return torch.optim.SGD(weights, **common, nesterov=False, foreach=False, fused=False)
    adam: dict[str, Any] = {
        **common,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.precision == "bf16-weights":
        return Fp32MomentAdamW(weights, **adam)
    return torch.optim.AdamW(weights, **adam, foreach=False, fused=False)
