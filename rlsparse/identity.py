"""The name of a trial: a hash of everything that determines its bits."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlsparse.config import TrialConfig
from rlsparse.mask_config import Leaf, MaskConfig, Origin, TrialMask, resolved


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces, floats by ``repr``, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def trial_id(
    config: TrialConfig,
    *,
    replicate: int,
    num_threads: int,
    num_workers: int,
    strategy: str = "ddp",
    base_fingerprint: str,
    data_version: str,
    origins: Sequence[Origin] = (),
) -> str:
    """Name of a trial: the first 12 hex digits of the sha256 of all that determines its bits.

    Args:
        config: the resolved configuration; where the base and a user's data lie is replaced by
            what they contain.
        replicate: 0, or k for the k-th rerun of the same trial under the same seed.
        num_threads: CPU threads of the trial, fixed for a study.
        num_workers: processes that train the trial together.
        strategy: how several do; without effect where there is one.
        base_fingerprint: content hash of the base model.
        data_version: version of what it learns from: the task's problems and grader, its reward,
            its data, mask files.
        origins: what the masks of other trials in ``train.mask`` refer to, in their order. Their
            names determine the bits of these masks, which need not be there yet.
    """
    own = config.model_dump(
        mode="json",
        exclude={"keep_checkpoints": True, "model": True, "task": {"source", "test_source"}},
    )
    for later in ("k_steps", "step_masks", "step_patches", "casts", "update_interval"):
        # Without, the name stays.
        if not own["probe"][later]:
            del own["probe"][later]
    if not own["task"]["num_validation_problems"]:
        del own["task"]["num_validation_problems"]
    del own["train"]["mask"]
    if config.train.mask is not None:
        own["train"]["mask"] = _named_mask(config.train.mask, origins)
    generation = own["algorithm"].pop("generation", None)
    if generation and generation["engine"] != "transformers":
        for placed in ("mode", "server_url", "gpu_memory_utilization"):
            del generation[placed]
        own["algorithm"]["generation"] = generation
    if own["algorithm"].get("data", "gold") not in ("gold", "sampled"):
        own["algorithm"]["data"] = "own"
    identity = {
        "config": own,
        "replicate": replicate,
        "num_threads": num_threads,
        "num_workers": num_workers,
        "base": base_fingerprint,
        "data_version": data_version,
    }
    if num_workers > 1:  # others keep the names that they had before there were strategies
        identity["strategy"] = strategy
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]


def _named_mask(mask: MaskConfig, origins: Sequence[Origin]) -> dict[str, Any]:
    """A mask by the trials that it is of; what is in files is in ``data_version``."""
    left = iter(origins)

    def name(leaf: Leaf) -> dict[str, Any]:
        return asdict(next(left)) if isinstance(leaf, TrialMask) else {"file": "own"}

    return resolved(mask, name)
