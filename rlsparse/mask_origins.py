"""Which trial of a study the mask of another one is of."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from rlsparse.config import TrialConfig
from rlsparse.definitions import Take
from rlsparse.errors import ConfigError, nearest
from rlsparse.levels import MASK, TAGS, at_level, has, level_label, order_of, paths_of, put
from rlsparse.mask_config import TrialMask
from rlsparse.variants import explain


def origin_config(
    mask: TrialMask, config: TrialConfig, baseline: dict[str, Any], seeds: Sequence[int]
) -> TrialConfig:
    """The trial that a mask is of; it has no mask itself, so that none waits for another in turn.

    Args:
        mask: of ``config``.
        config: the trial that trains under it.
        baseline: of the study, without a seed.
        seeds: of the study.

    Raises:
        ConfigError: there can be no such trial, or it has no snapshot after the step.
    """
    label = level_label(mask.model_dump(mode="json"))
    own = baseline if mask.source == "baseline" else config.model_dump(mode="json")
    found = put(own, MASK, None)
    for path, level in sorted(mask.where, key=lambda pair: order_of(pair[0])):
        if not has(found, path):
            raise ConfigError(
                f"mask {label}: where has no field {path}; {nearest(path, [*paths_of(found)])}"
            )
        found = at_level(found, path, list(level) if isinstance(level, tuple) else level)
    found["seed"] = _seed(mask, config.seed, seeds, label)
    try:
        source = TrialConfig.model_validate(found)
    except ValidationError as error:
        reason = explain(TrialConfig, found, error.errors()[0])
        raise ConfigError(f"mask {label} is of no valid trial: {reason}") from error
    step = mask.step_of(source.train.num_steps)
    if mask.take is Take.SNAPSHOT and step not in source.snapshot_steps:
        raise ConfigError(
            f"mask {label} is of step {step}, after which its trial takes no snapshot (it does "
            f"after {', '.join(map(str, source.snapshot_steps))}); add {step} to probe.snapshots "
            "of the baseline"
        )
    return source


def _seed(mask: TrialMask, own: int, seeds: Sequence[int], label: str) -> int:
    if mask.seed == "same":
        return own
    if mask.seed != "other":
        return mask.seed
    if len(seeds) < 2:
        raise ConfigError(f"mask {label} is of another seed, the study has one; give more seeds")
    return seeds[(seeds.index(own) + 1) % len(seeds)]


def absence(source: TrialConfig, there: Sequence[TrialConfig]) -> str:
    """Why a trial that a mask is of is not among those of the study, and what to add.

    Args:
        source: the trial, which is not there.
        there: the study's trials.
    """
    unmasked = [one for one in there if one.train.mask is None]
    seeds = sorted({one.seed for one in unmasked})
    wanted = _flat(source)
    others = [
        {path for path, value in _flat(one).items() if wanted.get(path) != value}
        | (wanted.keys() - _flat(one).keys())
        for one in unmasked
    ]
    if not others:
        return f"every trial has a mask; add null to the levels of {MASK}"
    if set() in others:
        return f"it has seed {source.seed}, the study has {', '.join(map(str, seeds))}; add it"
    fewest = sorted(min(others, key=lambda paths: len(list(paths))))
    heads = [head for tag, head in TAGS.items() if tag in fewest]  # others follow from the name
    fewest = [path for path in fewest if path in TAGS or path.split(".")[0] not in heads]
    told = ", ".join(f"{path} {level_label(wanted[path])}" for path in fewest if path in wanted)
    return f"no trial without a mask has {told}; add that as a level, or change what the mask is of"


def _flat(config: TrialConfig) -> dict[str, Any]:
    """Values by dotted path, but for the seed."""
    nested = config.model_dump(mode="json", exclude={"seed"})
    flat: dict[str, Any] = {}
    for path in paths_of(nested):
        value: Any = nested
        for part in path.split("."):
            value = value[part]
        if not isinstance(value, dict):
            flat[path] = value
    return flat
