"""What is trained, and by which optimizer: built here for all precision regimes, nowhere else.

All regimes use plain torch optimizers (neither foreach nor fused, so that a step is the same sum
everywhere), except bf16 weights with fp32 moments, which torch does not offer. Under a mask it is
the packed form of the same optimizer, which gives the same bits where the mask has all weights.
"""

from typing import Any

import torch

from rlsparse.config import Precision, TrainConfig
from rlsparse.definitions import MODULES
from rlsparse.errors import ConfigError
from rlsparse.fp32_moments import Fp32MomentAdamW, Fp32MomentSgd
from rlsparse.names import layer_and_module
from rlsparse.subnetwork import InFp32, SubnetworkAdamW, SubnetworkMask, SubnetworkSGD

_IN_FP32: dict[Precision, InFp32] = {
    "bf16": "nothing", "bf16-weights": "moments", "bf16-mixed": "masters", "fp32": "masters",
}  # fmt: skip
"""What a subnetwork optimizer holds in fp32; fp32 weights are their own masters."""


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


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig, mask: SubnetworkMask | None = None
) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all weights of ``model`` that are trained.

    Args:
        model: the model.
        config: how it is trained.
        mask: of the weights that are trained, if not all; the optimizer then clips, too.

    Raises:
        CheckpointError: the mask is of another model.
        ConfigError: see ``subnetwork.SubnetworkOptimizer``.
    """
    if mask is not None:
        return _subnetwork_optimizer(model, config, mask)
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


def _subnetwork_optimizer(
    model: torch.nn.Module, config: TrainConfig, mask: SubnetworkMask
) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "in_fp32": _IN_FP32[config.precision],
        "path": "torch",  # arms of a study differ by their masks alone, not by rounding
    }
    if config.optimizer == "sgd":  # has no moments
        return SubnetworkSGD(model, mask, **{**common, "in_fp32": "nothing"})
    if config.optimizer == "sgd-momentum":
        return SubnetworkSGD(model, mask, **common, momentum=config.momentum)
    betas = (config.adam_beta1, config.adam_beta2)
    return SubnetworkAdamW(model, mask, **common, betas=betas, eps=config.adam_epsilon)
