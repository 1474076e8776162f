"""The mask that a trial of a study trains under: checked as it is planned, made by its worker."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.plan import Base, Plan
from pipelines.storage import Storage
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import TrialConfig
from rlsparse.definitions import Take
from rlsparse.errors import CheckpointError, ConfigError, PatchError, StorageError
from rlsparse.kernels import popcount
from rlsparse.mask_config import FileMask, Leaf, Origin, leaves
from rlsparse.mask_making import MadeMask, changed, check_one_model, held, make_mask, shapes_of
from rlsparse.masks import Mask, Packed, bits_of, read_masks
from rlsparse.patch import PATCH_FILE
from rlsparse.study import Trial
from rlsparse.tables import EVER_CHANGED, snapshot_folder

if TYPE_CHECKING:
    from rlsparse.subnetwork import SubnetworkMask


def check_mask_files(plan: Plan) -> list[str]:
    """Refuse mask files that trials of a plan could not train under, before any runs.

    Masks of other trials, which need not be there yet, are of their base.

    Returns:
        A line for each file that is of other weights than a trial starts from.

    Raises:
        ConfigError: a file is of another model than a trial's base, has no weight in it, or does
            not fit what else the mask is made of.
        CheckpointError: it cannot be read.
    """
    of_files = {
        (trial.config.model, trial.config.train.mask): trial
        for trial in plan.trials
        if any(isinstance(leaf, FileMask) for leaf in leaves(trial.config.train.mask))
    }
    notes: dict[str, None] = {}
    for trial in of_files.values():
        try:
            notes |= dict.fromkeys(_check_mask(trial, plan.base(trial)))
        except CheckpointError as error:
            raise ConfigError(f"train.mask of trial {trial.label}: {error}") from error
    return [*notes]


def _check_mask(trial: Trial, base: Base) -> list[str]:
    opened, mask, notes = Checkpoint.open(base.path), trial.config.train.mask, []
    assert mask is not None
    shapes, later = shapes_of(opened), dict[str, Packed]()

    def read(leaf: Leaf) -> Mask:
        if not isinstance(leaf, FileMask):
            return MadeMask(shapes, base.fingerprint, {"kind": leaf.take.value}, later.__getitem__)
        file = read_masks(leaf.file)
        theirs = {name: shape for name, shape in file.shapes.items() if name not in opened.tied}
        own = f"the base {trial.config.model.source}"
        check_one_model({own: shapes, f"mask {leaf.file}": theirs})
        if not any(popcount(file.packed(name)) for name in file.shapes):
            raise CheckpointError(
                f"mask {leaf.file} has no weight in it, so that nothing would be trained; make it "
                "of a run that changed some"
            )
        if file.base_fingerprint and file.base_fingerprint != base.fingerprint:
            notes.append(
                f"mask {leaf.file} is of the base {file.base_fingerprint[:12]}, trials start from "
                f"{base.fingerprint[:12]} ({trial.config.model.source})"
            )
        return file

    make_mask(mask, read, base.path, seed=trial.config.seed)
    return notes


def load_subnetwork(
    config: TrialConfig, origins: Sequence[Origin], storage: Storage, base: Base
) -> "SubnetworkMask | None":
    """The mask of a trial; None if it has none.

    Args:
        config: the trial.
        origins: what its masks of other trials refer to (``study.Trial.origins``).
        storage: of the study.
        base: model that the trial starts from.

    Raises:
        StorageError: a trial that it is of is not done.
        CheckpointError: a mask file is damaged, or masks are of different models.
        PatchError: the patch of a trial that it is of is damaged.
    """
    from rlsparse.subnetwork import SubnetworkMask

    if config.train.mask is None:
        return None
    left = iter(origins)

    def read(leaf: Leaf) -> Mask:
        if isinstance(leaf, FileMask):
            return read_masks(leaf.file)
        return _of_trial(next(left), storage, base.path)

    mask = make_mask(config.train.mask, read, base.path, seed=config.seed)
    return SubnetworkMask(bits_of(mask), base.fingerprint, mask.metadata)


def _of_trial(origin: Origin, storage: Storage, base: Path) -> Mask:
    folder = f"trials/{origin.trial_id}"
    if not storage.is_done(folder):
        raise StorageError(
            f"the mask is of trial {origin.trial_id}, which is not done in {storage.url}; run the "
            "study again"
        )
    notes = {"kind": origin.take.value, "source": f"trial {origin.trial_id}"}
    if origin.take == Take.EVER_CHANGED:
        own = storage.local_copy(f"{folder}/{EVER_CHANGED}")
        with own as path, remedied(storage, origin.trial_id, CheckpointError):
            found = held(read_masks(path))
    else:
        notes["step"] = str(origin.step)
        own = storage.local_copy(f"{folder}/{snapshot_folder(origin.step)}/{PATCH_FILE}")
        with own as path, remedied(storage, origin.trial_id, PatchError):
            found = held(changed(base, path))
    return replace(found, metadata=found.metadata | notes)


@contextmanager
def remedied(
    storage: Storage, trial_id: str, damage: type[CheckpointError] | type[PatchError]
) -> Iterator[None]:
    """Errors that tell of damage to the files of a trial end with what to do about it."""
    try:
        yield
    except damage as error:
        raise damage(
            f"{error}; delete {storage.url}/trials/{trial_id} and run the study again: that trial "
            "runs again"
        ) from error
