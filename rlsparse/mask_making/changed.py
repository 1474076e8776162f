"""Masks of what training changed: of two checkpoints, of a patch, of a trial."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.definitions import Take, step_at
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.kernels import FLOATS, cast_bits
from rlsparse.kernels.compare import compare
from rlsparse.mask_making.made import MadeMask, check_one_model, shapes_of
from rlsparse.masks import Packed, num_bytes, read_masks
from rlsparse.matching import TensorPair, match_tensors
from rlsparse.patch import METADATA_KEY, PATCH_FILE, verify_patch
from rlsparse.patch.side import open_side
from rlsparse.tables import EVER_CHANGED, snapshot_folder
from rlsparse.tensor_file import bits_dtype
from rlsparse.views import check_view

_PIECE = 2**18  # weights of either side in memory


def changed(before: str | Path, after: str | Path, view: str = "stored") -> MadeMask:
    """The weights that differ bitwise between two checkpoints.

    Args:
        before: what ``Checkpoint.open`` takes.
        after: likewise, or a patch against ``before``, whose checksums are checked first. Its names
            may carry another prefix, or its tensors be fused: the mask is of those before.
        view: number format to which both sides are rounded first. ``stored``: that of either side,
            of a patch its own, to which the base is cast.

    Raises:
        CheckpointError: unreadable, of different models, or stored in different formats without
            a view.
        PatchError: the patch is damaged or of another base.
    """
    check_view(view)
    base = Checkpoint.open(before)
    if METADATA_KEY in base.metadata:
        raise CheckpointError(f"{before} is a patch; give its base before and the patch after")
    other, patch = open_side(after, base)
    if patch is not None:
        verify_patch(base, patch)
    matching = match_tensors(base, other)
    pairs = {pair.name: pair for pair in matching.pairs}
    theirs = {name: pair.shape for name, pair in pairs.items()}
    unlike = ("added_tensors", "reshaped_tensors", "resized_tensors")
    for name in (name for kind in unlike for name in matching.accounting[kind]):
        theirs[name] = other.tensors[name].shape if name in other.tensors else ()
    check_one_model({str(before): shapes_of(base), str(after): theirs})
    mixed = [pair for pair in pairs.values() if pair.before.dtype != pair.after.dtype]
    if patch is None and mixed and view == "stored":
        name, one, two, _ = mixed[0]
        raise CheckpointError(
            f"{name} is {one.dtype} in {before} and {two.dtype} in {after}; choose the number "
            "format to compare them in: --view bf16 or another"
        )
    metadata = {"kind": "changed", "source": f"{before} -> {after}", "view": view}
    return MadeMask(
        shapes_of(base), fingerprint(base), metadata, lambda name: _differing(pairs[name], view)
    )


def _differing(pair: TensorPair, view: str) -> Packed:
    one, other, size = pair.before, pair.after, math.prod(pair.shape)
    dtype = other.dtype if view == "stored" or other.dtype not in FLOATS else view
    words = np.zeros(-(-size // 64), np.uint64)
    buffers = (np.empty(_PIECE, bits_dtype(info.dtype)) for info in (one, other))
    sides = [info.pieces(0, size, b) for info, b in zip((one, other), buffers, strict=True)]
    start = 0
    for before, after in zip(*sides, strict=True):
        part = words[start // 64 : -(-(start + before.size) // 64)]
        compare(cast_bits(before, one.dtype, dtype), cast_bits(after, other.dtype, dtype), part)
        start += before.size
    return words.view(np.uint8)[: num_bytes(size)]


def of_trial(
    folder: Path, take: Take, *, step: int | None = None, base: str | Path | None = None
) -> MadeMask:
    """A mask of a trial that has run, in the format that it stores.

    That of another seed, algorithm or task makes a transfer mask.

    Args:
        folder: of the trial.
        take: which mask.
        step: of a snapshot, and given for that kind alone; see ``definitions.step_at``.
        base: where the base lies, if not where the trial's configuration says.

    Raises:
        ConfigError: no folder of a trial, or no snapshot of that step.
        CheckpointError: the base or the mask cannot be read, or does not fit.
        PatchError: the patch is damaged or of another base.
    """
    config = _config(folder)
    if (step is None) is (take is Take.SNAPSHOT):
        raise ConfigError(
            f"take {take}, step {step}: a step belongs to a snapshot, and to nothing else"
        )
    notes = {
        "kind": take.value,
        "source": f"trial {folder.name}",
        "trial_id": folder.name,
        "algorithm": config["algorithm"]["name"],
        "seed_of_trial": str(config["seed"]),
        "num_steps": str(config["train"]["num_steps"]),
    }
    if take is Take.EVER_CHANGED:
        file = read_masks(folder / EVER_CHANGED)
        return MadeMask(file.shapes, file.base_fingerprint, {**file.metadata, **notes}, file.packed)
    step = config["train"]["num_steps"] if step is None else step
    patch = folder / snapshot_folder(step) / PATCH_FILE
    if not patch.is_file():
        there = sorted(path.parent.name for path in folder.glob(f"snapshots/*/{PATCH_FILE}"))
        raise ConfigError(
            f"{folder} has no snapshot of step {step}; there are: {', '.join(there) or 'none'}; "
            "ask for others with probe.snapshots"
        )
    found = changed(base or config["model"]["source"], patch)
    metadata = found.metadata | notes | {"step": str(step)}
    return MadeMask(found.shapes, found.base_fingerprint, metadata, found.make)


def step_of(folder: Path, fraction: float) -> int:
    """``definitions.step_at`` of a trial.

    Raises:
        ConfigError: not in (0, 1], or no folder of a trial.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction {fraction} of training: must be above 0 and at most 1")
    return step_at(fraction, int(_config(folder)["train"]["num_steps"]))


def _config(folder: Path) -> Any:
    """The configuration of a trial, with all that is read of it."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        _ = config["algorithm"]["name"], config["train"]["num_steps"], config["seed"]
        _ = config["model"]["source"]
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is no folder of a trial: no config.json in it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is damaged or of another release; run the trial again"
        ) from error
    return config
