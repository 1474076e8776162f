"""The mask that a trial of a study trains under, made by its worker of what the study holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.plan import Base
from pipelines.storage import Storage
from rlsparse import masks
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import TrialConfig
from rlsparse.errors import StorageError
from rlsparse.mask_config import FileMask, Leaf, Origin
from rlsparse.mask_making import changed, make_mask
from rlsparse.patch import PATCH_FILE, Patch
from rlsparse.tables import EVER_CHANGED, snapshot_folder

if TYPE_CHECKING:
    from rlsparse.subnetwork import SubnetworkMask


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
        PatchError: a trial that it is of has another base, or its files are damaged.
    """
    from rlsparse.subnetwork import SubnetworkMask

    if config.train.mask is None:
        return None
    left, weights = iter(origins), Checkpoint.open(base.path)

    def read(leaf: Leaf) -> masks.Bits:
        if isinstance(leaf, FileMask):
            return masks.read_masks(leaf.file).bits()
        return _of_trial(next(left), storage, weights, base.fingerprint)

    bits = make_mask(config.train.mask, read, weights, seed=config.seed)
    return SubnetworkMask(bits, base.fingerprint)


def _of_trial(
    origin: Origin, storage: Storage, base: Checkpoint, base_fingerprint: str
) -> masks.Bits:
    folder = f"trials/{origin.trial_id}"
    if not storage.is_done(folder):
        raise StorageError(
            f"the mask is of trial {origin.trial_id}, which is not done in {storage.url}; run the "
            "study again"
        )
    if origin.take == "ever_changed":
        with storage.local_copy(f"{folder}/{EVER_CHANGED}") as path:
            return masks.read_masks(path).bits()
    with storage.local_copy(f"{folder}/{snapshot_folder(origin.step)}/{PATCH_FILE}") as path:
        return changed(base, base_fingerprint, Patch.open(path))
