"""A trial that trains a subnetwork: which weights, and the proof that no other has moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from rlsparse import distributed
from rlsparse.config import TrialConfig
from rlsparse.errors import ConfigError, TrialError
from rlsparse.subnetwork.mask import (
    SubnetworkMask,
    assert_outside_unchanged,
    check,
    outside_digests,
)


def trained_mask(
    model: torch.nn.Module, config: TrialConfig, mask: SubnetworkMask | None
) -> SubnetworkMask | None:
    """The weights of a mask that are trained: those of tensors that are not frozen.

    Args:
        model: whose weights outside ``trainable_modules`` and ``trainable_layers`` are frozen.
        config: the trial.
        mask: that its ``train.mask`` describes; None where it is null.

    Raises:
        ConfigError: there is a mask and the configuration has none, or the other way round, or
            all of it is frozen.
        CheckpointError: the mask is of another model.
    """
    if (mask is None) != (config.train.mask is None):
        given, wanted = ("no mask", "one") if mask is None else ("a mask", "none")
        raise ConfigError(
            f"the trial got {given}, its configuration has {wanted}; train.mask decides its name "
            "and must say what it is trained under"
        )
    if mask is None:
        return None
    check(model, mask)
    bits = {
        name: (shape, packed if model.get_parameter(name).requires_grad else np.zeros_like(packed))
        for name, (shape, packed) in mask.bits.items()
    }
    if not any(packed.any() for _, packed in bits.values()):
        raise ConfigError(
            f"no weight of train.mask ({mask.num_selected} weights) is in train.trainable_modules "
            "and train.trainable_layers; leave these out, or give another mask"
        )
    return SubnetworkMask(bits, mask.base_fingerprint, mask.metadata)


@contextmanager
def others_untouched(model: torch.nn.Module, mask: SubnetworkMask | None) -> Iterator[None]:
    """Prove that what is done within moves no weight outside the mask; all workers enter it.

    Raises:
        TrialError: on all of them, if a weight of one has moved.
    """
    if mask is None:
        yield
        return
    before = outside_digests(model, mask)
    yield
    reason = None
    try:
        assert_outside_unchanged(model, mask, before)
    except TrialError as error:
        reason = str(error)
    if (reason := distributed.first_given(reason)) is not None:
        raise TrialError(reason)


def keep_unwrapped(trainer: Any) -> None:
    """Let accelerate set up autocast for the model, but wrap it in no DDP: the optimizer averages.

    Args:
        trainer: of transformers, before it trains.
    """
    prepare = trainer.accelerator.prepare_model
    trainer.accelerator.prepare_model = partial(prepare, evaluation_mode=True)


def columns(mask: SubnetworkMask | None) -> dict[str, Any]:
    """What table ``trials`` says of a mask."""
    if mask is None:
        return {}
    return {
        "mask_density": mask.density,
        "num_in_mask": mask.num_selected,
        "mask_fingerprint": mask.fingerprint,
    }
